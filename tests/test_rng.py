"""The counter-based draws keep their values, because other values would change every run."""

import numpy as np

from fasttrain.rng import Stream, hash64, permutation, uniform

GOLDEN_HASHES = ["0x842b9650144b4428", "0xeb2449f18be453e1", "0xe408b9d16bd6c0d8"]
GOLDEN_TORCH = "0x432ce023fd021085"
GOLDEN_ORDER = [5, 4, 3, 9, 8, 0, 7, 6, 2, 1]


def test_draws_match_golden_values() -> None:
    assert [hex(v) for v in hash64(0, Stream.ORDER, 0, np.arange(3))] == GOLDEN_HASHES
    assert hex(hash64(7, Stream.TORCH, 12_512, 3)[0]) == GOLDEN_TORCH
    assert permutation(0, Stream.ORDER, 0, 10).tolist() == GOLDEN_ORDER


def test_uniform_is_uniform_and_streams_are_independent() -> None:
    ids = np.arange(200_000)
    flip, x = uniform(0, Stream.FLIP, 3, ids), uniform(0, Stream.CROP_X, 3, ids)
    for values in (flip, x, uniform(1, Stream.FLIP, 3, ids), uniform(0, Stream.FLIP, 4, ids)):
        assert 0 <= values.min() and values.max() < 1
        assert abs(values.mean() - 0.5) < 0.003 and abs(values.var() - 1 / 12) < 0.001
        counts = np.histogram(values, 64, (0, 1))[0]
        assert ((counts - 3125) ** 2 / 3125).sum() < 110  # chi-square, 63 degrees: p < 0.0002
    assert abs(np.corrcoef(flip, x)[0, 1]) < 0.01
    assert abs(np.corrcoef(flip[:-1], flip[1:])[0, 1]) < 0.01


def test_each_epoch_has_a_permutation_of_its_own() -> None:
    orders = [permutation(0, Stream.ORDER, epoch, 1000) for epoch in range(3)]
    for order in orders:
        assert order.dtype == np.int32 and sorted(order.tolist()) == list(range(1000))
    assert (orders[0] == orders[1]).mean() < 0.01
    assert abs(np.corrcoef(orders[0], np.arange(1000))[0, 1]) < 0.1
