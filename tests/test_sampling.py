"""Order, windows and flips are the same for every world size, and spread as torchvision's."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomErasing, RandomResizedCrop
from torchvision.transforms import functional as TF

from fasttrain import config, sampling, shards
from fasttrain.config import Optim, Train
from fasttrain.schedule import Plan, image_px, make_plan
from fasttrain.shards import Split

GOLDEN_IDS = [22, 25, 34, 38]
GOLDEN_WINDOWS = [[149, 158, 233, 217], [212, 48, 152, 180], [0, 130, 41, 50], [0, 1, 33, 39]]


def plan_for(split: Split, world: int, micro: int, batch: int = 12) -> Plan:
    train = Train(epochs=6, global_batch_size=batch, micro_batch_size=micro)
    return make_plan(train, Optim(), split.num_samples, world)


def global_batch(split: Split, plan: Plan, step: int) -> list[tuple[Any, ...]]:
    """The samples that all processes together get, in the order of the groups."""
    rows: list[tuple[Any, ...]] = []
    for micro in range(plan.accumulation):
        for rank in range(plan.world_size):
            draw = sampling.train_draw(
                split, config.Data(), plan, rank, step * plan.accumulation + micro
            )
            assert draw.ids.shape == (plan.micro_batch_size,)
            rows += zip(
                draw.ids.tolist(), map(tuple, draw.windows.tolist()), draw.flips, strict=True
            )
    return rows


@pytest.mark.parametrize(("world", "micro"), [(1, 3), (2, 6), (2, 3), (3, 4), (4, 3), (6, 2)])
def test_any_world_size_sees_the_same_global_batches(split: Split, world: int, micro: int) -> None:
    one, many = plan_for(split, 1, 12), plan_for(split, world, micro)
    for step in range(2 * one.steps_per_epoch):
        assert global_batch(split, many, step) == global_batch(split, one, step)


def test_an_epoch_holds_each_sample_at_most_once_and_epochs_differ(split: Split) -> None:
    plan = plan_for(split, 2, 3)
    epochs = [
        [row[0] for s in range(3) for row in global_batch(split, plan, 3 * e + s)] for e in range(6)
    ]
    for ids in epochs:
        assert len(set(ids)) == len(ids) == 36  # of 45: the incomplete last batch is dropped
    assert len({tuple(ids) for ids in epochs}) == 6
    assert set().union(*epochs) == set(range(45))  # others are dropped in each epoch


def test_views_repeat_the_images_and_not_their_order(split: Split) -> None:
    train = Train(epochs=6, global_batch_size=45, seed=3)
    data = config.Data(augment="rand", color_jitter=(0.4, 0.3, 1.2, 0.1), erase=0.5)

    def epoch(number: int, distill: config.Distill) -> list[np.ndarray]:
        """Windows, flips and augmentations of an epoch, in the order of the samples."""
        plan = make_plan(train, Optim(), 45, 1, distill)
        draw = sampling.train_draw(split, data, plan, 0, number)
        orders.append(tuple(draw.ids.tolist()))
        rows = np.argsort(draw.ids)
        assert draw.view == plan.view_of(number)
        columns: list[np.ndarray | None] = [draw.windows, draw.flips, *draw.augment]
        return [column[rows] for column in columns if column is not None]

    def same(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
        return all(map(np.array_equal, some, others))

    orders: list[tuple[int, ...]] = []
    two = config.Distill(views=2)
    epochs = [epoch(number, two) for number in range(4)]
    assert same(epochs[0], epochs[2]) and same(epochs[1], epochs[3])
    assert not same(epochs[0], epochs[1])
    assert len(set(orders)) == 4
    # Without views, the first epochs are the same. With another seed, only the order is.
    assert same(epoch(1, config.Distill()), epochs[1])
    assert not same(epoch(2, config.Distill()), epochs[2])
    other = epoch(1, config.Distill(draw_seed=4))
    assert not same(other, epochs[1]) and orders[-1] == orders[1]
    train = train.model_copy(update={"seed": 9})
    assert same(epoch(1, config.Distill(draw_seed=4)), other) and orders[-1] != orders[1]


def test_draws_match_golden_values(split: Split) -> None:
    ids = sampling.epoch_order(0, 1, split, 0)[:4].astype(np.int64)
    sizes = np.array([500, 375, 64, 48], np.uint16), np.array([375, 500, 311, 48], np.uint16)
    windows = sampling.crop_windows(0, 1, ids, sizes, (0.08, 1.0), (3 / 4, 4 / 3))
    assert ids.tolist() == GOLDEN_IDS
    assert windows.tolist() == GOLDEN_WINDOWS


def test_flips_can_be_disabled(split: Split) -> None:
    plan = plan_for(split, 1, 12)
    flips = [
        sampling.train_draw(split, config.Data(flip=flip), plan, 0, step).flips.mean()
        for flip in (True, False)
        for step in range(18)
    ]
    assert 0.4 < np.mean(flips[:18]) < 0.6 and not any(flips[18:])


@pytest.mark.parametrize(
    ("width", "height", "area", "ratio"),
    [
        (500, 375, (0.08, 1.0), (3 / 4, 4 / 3)),
        (333, 500, (0.25, 1.0), (3 / 4, 4 / 3)),
        (640, 160, (0.08, 1.0), (3 / 4, 4 / 3)),  # wide: tries fail, some fall back to the centre
        (40, 36, (0.08, 1.0), (3 / 4, 4 / 3)),
    ],
)
def test_windows_follow_torchvision(
    width: int, height: int, area: tuple[float, float], ratio: tuple[float, float]
) -> None:
    number = 100_000
    ids = np.arange(number)
    sizes = np.full(number, width, np.uint16), np.full(number, height, np.uint16)
    ours = sampling.crop_windows(0, 0, ids, sizes, area, ratio).astype(float)
    x, y, w, h = ours.T
    assert w.min() >= 1 and h.min() >= 1 and x.min() >= 0 and y.min() >= 0
    assert (x + w).max() <= width and (y + h).max() <= height
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    draws = [RandomResizedCrop.get_params(image, list(area), list(ratio)) for _ in range(20_000)]
    theirs = np.array(draws, float)[:, [1, 0, 3, 2]]

    def features(windows: np.ndarray) -> np.ndarray:
        x, y, w, h = windows.T
        cover, shape = w * h / (width * height), np.log(w / h)
        return np.stack([x, y, w, h, cover, shape, cover**2, shape**2, w * x, h * y], 1)

    a, b = features(ours), features(theirs)
    error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    assert (np.abs(a.mean(0) - b.mean(0)) < 4.5 * error + 1e-9).all()
    spread = a.std(0) / np.maximum(b.std(0), 1e-9)
    assert ((spread > 0.97) & (spread < 1.03)).all()


def test_an_image_that_no_random_window_fits_gets_torchvisions_fallback() -> None:
    sizes = np.array([1000, 5, 1], np.uint16), np.array([5, 1000, 1], np.uint16)
    windows = sampling.crop_windows(0, 0, np.arange(3), sizes, (0.9, 1.0), (3 / 4, 4 / 3))
    assert windows.tolist() == [[496, 0, 7, 5], [0, 496, 5, 7], [0, 0, 1, 1]]


@pytest.mark.parametrize("world", range(1, 8))
@pytest.mark.parametrize("batch_size", [1, 2, 5, 13, 64])
def test_each_validation_image_is_drawn_exactly_once(
    dataset: Path, world: int, batch_size: int
) -> None:
    split = shards.open_split(dataset, "val")
    seen = []
    for rank in range(world):
        for number in range(sampling.num_eval_batches(13, batch_size, rank, world)):
            draw = sampling.eval_draw(split, config.Data(), batch_size, rank, world, number)
            assert 0 < len(draw.ids) <= batch_size
            seen += draw.ids.tolist()
    assert sorted(seen) == list(range(13))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (257, 300), (64, 311)])
def test_centre_windows_equal_torchvisions(size: tuple[int, int]) -> None:
    width, height = size
    found = sampling.center_windows(np.array([width]), np.array([height]), 256, 224)[0]
    # torchvision resizes and crops images that hold their own source coordinates
    resized = TF.resize(torch.zeros(1, height, width), [256]).shape
    top, left = (round((px - 224) / 2.0) for px in resized[1:])
    scale_x, scale_y = width / resized[2], height / resized[1]
    expected = [left * scale_x, top * scale_y, 224 * scale_x, 224 * scale_y]
    assert found.tolist() == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------
# Augmentation
# --------------------------------------------------------------------------------------------------

RAND = config.Data(augment="rand", augment_magnitude=7)
TRIVIAL = config.Data(augment="trivial")
FULL = config.Data(augment="rand", color_jitter=(0.4, 0.3, 1.2, 0.1), erase=0.5)
NUMBER = 20_000
GOLDEN_OPERATIONS = [[[5, 9, 1], [10, 9, 1]], [[6, 9, 1], [6, 9, 0]]]
GOLDEN_JITTER = [[1.1017, 0.9999, 0.5491, -35.7025], [0.9819, 1.2307, 0.0036, -22.0226]]
GOLDEN_ERASE = [[0, 0, 0, 0], [99, 76, 30, 88]]


def assert_uniform(drawn: np.ndarray, number: int) -> None:
    counts = np.bincount(drawn.ravel(), minlength=number)
    assert len(counts) == number
    expected = drawn.size / number
    # Chi-square with number - 1 degrees: five standard deviations above its mean.
    assert ((counts - expected) ** 2 / expected).sum() < number - 1 + 5 * (2 * number) ** 0.5


def test_augmentations_match_golden_values() -> None:
    drawn = sampling.augment_draw(0, 1, np.array(GOLDEN_IDS[:2]), FULL, 224)
    assert drawn.operations is not None and drawn.erase is not None
    assert drawn.operations.tolist() == GOLDEN_OPERATIONS
    assert drawn.jitter == pytest.approx(np.array(GOLDEN_JITTER), abs=1e-4)
    assert drawn.erase.tolist() == GOLDEN_ERASE


def test_operations_are_drawn_evenly() -> None:
    ids = np.arange(NUMBER)
    rand = sampling.augment_draw(0, 3, ids, RAND, 224).operations
    assert rand is not None and rand.shape == (NUMBER, 2, 3) and (rand[..., 1] == 7).all()
    trivial = sampling.augment_draw(0, 3, ids, TRIVIAL, 224).operations
    assert trivial is not None and trivial.shape == (NUMBER, 1, 3)
    assert_uniform(trivial[..., 1], sampling.MAGNITUDE_BINS)
    for drawn in (rand, trivial):
        assert_uniform(drawn[..., 0], sampling.NUM_OPERATIONS)
        assert_uniform(drawn[..., 2], 2)
    pairs = rand[:, 0, 0] * sampling.NUM_OPERATIONS + rand[:, 1, 0]
    assert_uniform(pairs, sampling.NUM_OPERATIONS**2)  # the second does not follow from the first
    assert_uniform(2 * rand[:, 0, 0] + rand[:, 0, 2], 2 * sampling.NUM_OPERATIONS)


def test_jitter_fills_its_ranges() -> None:
    drawn = sampling.augment_draw(0, 3, np.arange(NUMBER), FULL, 224).jitter
    assert drawn is not None
    low, high = np.array([0.6, 0.7, 0.0, -36.0]), np.array([1.4, 1.3, 2.2, 36.0])
    width = high - low
    assert (drawn.min(0) >= low - 1e-5).all() and (drawn.max(0) <= high + 1e-5).all()
    for place in range(4):
        parts = ((drawn[:, place] - low[place]) / width[place] * 20).astype(int).clip(0, 19)
        assert_uniform(parts, 20)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.03
    only_hue = config.Data(color_jitter=(0, 0, 0, 0.5))
    drawn = sampling.augment_draw(0, 3, np.arange(100), only_hue, 224).jitter
    assert drawn is not None
    assert (drawn[:, :3] == 1).all() and np.abs(drawn[:, 3]).max() > 150


@pytest.mark.parametrize("crop_px", [224, 40])
def test_erasing_follows_torchvision(crop_px: int) -> None:
    ours = sampling.erase_windows(0, 0, np.arange(100_000), 0.25, crop_px)
    erased = ours[ours[:, 2] > 0]
    assert abs(len(erased) / len(ours) - 0.25) < 0.006
    assert (ours[ours[:, 2] == 0] == 0).all()
    y, x, h, w = erased.T
    assert y.min() >= 0 and x.min() >= 0 and h.min() >= 1 and w.min() >= 1
    assert (y + h).max() <= crop_px and (x + w).max() <= crop_px
    torch.manual_seed(0)
    image = torch.empty(3, crop_px, crop_px)
    get = RandomErasing.get_params
    draws = [get(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(NUMBER)]

    def features(windows: np.ndarray) -> np.ndarray:
        y, x, h, w = windows.T
        cover, shape = h * w / crop_px**2, np.log(h / w)
        return np.stack([y, x, h, w, cover, shape, cover**2, shape**2, h * y, w * x], 1)

    a, b = features(erased.astype(float)), features(np.array(draws, float))
    error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    assert (np.abs(a.mean(0) - b.mean(0)) < 4.5 * error).all()
    spread = a.std(0) / b.std(0)
    assert ((spread > 0.97) & (spread < 1.03)).all()


def test_the_augmentation_of_a_sample_depends_on_the_epoch_and_not_on_the_batch() -> None:
    ids = np.arange(60)

    def draws(seed: int, epoch: int, *batches: np.ndarray) -> list[np.ndarray]:
        found = [sampling.augment_draw(seed, epoch, batch, FULL, 224) for batch in batches]
        return [np.concatenate(column) for column in zip(*found, strict=True)]

    whole = draws(0, 1, ids)
    for one, other in zip(whole, draws(0, 1, *np.split(ids, 20)), strict=True):
        assert one is not None and other is not None and np.array_equal(one, other)
    for one, other in zip(whole, draws(0, 1, ids[::-1]), strict=True):
        assert np.array_equal(one, other[::-1])
    for key in ((1, 1), (0, 2)):
        for one, other in zip(whole, draws(*key, ids), strict=True):
            assert (one == other).mean() < 0.8


def test_the_draw_of_a_step_has_the_augmentations_of_the_settings(split: Split) -> None:
    plan = plan_for(split, 1, 12)
    assert sampling.train_draw(split, config.Data(), plan, 0, 4).augment == (None, None, None)
    draw = sampling.train_draw(split, FULL, plan, 0, 4)
    expected = sampling.augment_draw(plan.seed, 1, draw.ids, FULL, 224)
    for one, other in zip(draw.augment, expected, strict=True):
        assert one is not None and other is not None and np.array_equal(one, other)


def test_blocks_hold_each_sample_once_and_read_each_tar_once(split: Split) -> None:
    data = config.Data(shuffle="blocks", shuffle_shards=2)
    order = sampling.epoch_order(3, 1, split, 2)
    assert sorted(order.tolist()) == list(range(45))
    shards_of = split.shard[order].tolist()  # four tars: two blocks of two
    first = sum(split.shard_samples[s] for s in set(shards_of[:5]))
    assert len(set(shards_of[:first])) == 2 and not set(shards_of[:first]) & set(shards_of[first:])
    assert not np.array_equal(order, sampling.epoch_order(3, 2, split, 2))
    plan = plan_for(split, 3, 1, batch=9)  # 5 updates an epoch: nothing is dropped
    covered: dict[int, list[tuple[int, int]]] = {}
    for step in range(5):
        for rank in range(3):
            for piece in sampling.pieces_ahead(split, data, plan, step, rank, step == 0):
                covered.setdefault(piece.shard, []).append((piece.start, piece.stop))
    for shard, ranges in covered.items():
        ends = [0]
        for start, stop in sorted(ranges):
            assert start <= ends[-1] + 1  # without a gap
            ends.append(max(ends[-1], stop))
        assert ends[-1] >= split.shard_bytes[shard] - 1
    assert set(covered) == set(range(4))


def test_size_of_crops_follows_the_epoch(split: Split) -> None:
    data = config.Data(crop_px=((0, 32), (2, 48), (5, 64)))
    plan = plan_for(split, 1, 12)
    found = [sampling.train_draw(split, data, plan, 0, step).out_px for step in range(18)]
    assert found == [32] * 6 + [48] * 9 + [64] * 3


def test_all_micro_batches_of_an_update_have_the_size_that_it_draws(split: Split) -> None:
    data = config.Data(scales_px=(32, 48, 64), erase=1.0)
    for world, micro in ((1, 12), (1, 3), (2, 3), (4, 1)):
        plan = plan_for(split, world, micro)
        for step in range(plan.total_steps):
            px = image_px(step, plan, data)
            for rank in range(world):
                for number in range(plan.accumulation):
                    draw = sampling.train_draw(
                        split, data, plan, rank, step * plan.accumulation + number
                    )
                    assert draw.out_px == px
                    assert draw.augment.erase is not None and draw.augment.erase.max() < px


def test_blocks_mix_as_many_tars_as_they_hold(split: Split) -> None:
    """If n tars are shuffled together, 1 in n pairs of a batch comes from one tar."""
    order, shard_of = (
        np.arange(64 * 100, dtype=np.uint64),
        np.repeat(np.arange(64), 100).astype(np.uint16),
    )
    many = dataclasses.replace(
        split, shard=shard_of, offset=order, shard_paths=split.shard_paths[:1] * 64
    )

    def neighbours(block: int) -> float:
        batches = shard_of[sampling.epoch_order(0, 0, many, block)].reshape(-1, 64).astype(int)
        same = (batches[:, :, None] == batches[:, None]).sum() - batches.size
        return same / (batches.size * 63)

    assert neighbours(0) == pytest.approx(1 / 64, rel=0.1)
    assert neighbours(16) == pytest.approx(1 / 16, rel=0.1)
    assert neighbours(4) == pytest.approx(1 / 4, rel=0.1)


def test_a_stand_in_depends_on_nothing_but_the_sample_it_stands_in_for(split: Split) -> None:
    ids = np.arange(split.num_samples)

    def alone(epoch: int, sample: int, bad: set[int]) -> int:
        return int(sampling.replace_bad(0, epoch, ids[[sample]], bad, split.num_samples)[0])

    drawn = set()
    for epoch in range(20):
        for bad in ({3}, {3, 5, 17}, set(range(40))):
            found = sampling.replace_bad(0, epoch, ids, bad, split.num_samples)
            assert found.tolist() == [alone(epoch, sample, bad) for sample in ids.tolist()]
            assert not bad & set(found.tolist())
            assert all(now == was or was in bad for now, was in zip(found, ids, strict=True))
        first = alone(epoch, 3, {3})
        drawn.add(first)
        if (other := (first + 1) % split.num_samples) != 3:
            assert alone(epoch, 3, {3, other}) == first
    assert len(drawn) > 10
    assert ids.tolist() == list(range(split.num_samples))  # what is given is left as it is
