"""MixUp and CutMix mix images and labels alike, and depend on the seed alone."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain import determinism
from fasttrain.config import Train
from fasttrain.mixing import build_mix
from fasttrain.rng import Stream

BOTH: dict[str, Any] = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
GOLDEN_WEIGHTS = [0.582765, 0.126623, 0.611126, 0.260011]


def mixed(
    seed: int, step: int, place: int, dtype: torch.dtype = torch.float32, **alphas: Any
) -> tuple[Tensor, Tensor]:
    """Mixes four images at (seed, step, place). All pixels of an image have its label's value."""
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 40, 32)
    images = images.to(dtype).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(4)
    mix = build_mix(Train(**alphas), 6)
    assert mix
    determinism.seed_torch(seed, Stream.MIX, step, place)
    result = mix(images, labels)
    assert torch.equal(images[:, 0, 0, 0].float(), labels.float())  # left as they were
    return result


def test_mixing_that_is_off_gives_no_mix() -> None:
    assert build_mix(Train(), 10) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mixup_alpha", "cutmix_alpha"])
def test_labels_say_how_much_of_each_image_there_is(kind: str, dtype: torch.dtype) -> None:
    rounding = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    weights = set()
    for step in range(20):
        images, labels = mixed(0, step, 0, dtype, **{kind: 1.0})
        assert images.dtype == dtype and images.shape == (4, 3, 40, 32)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.float32 and labels.shape == (4, 6)
        torch.testing.assert_close(labels.sum(1), torch.ones(4))
        # An image's value is its label, so the mean pixel is the mean label.
        mean_label = labels @ torch.arange(6.0)
        torch.testing.assert_close(
            images.float().mean((1, 2, 3)), mean_label, rtol=0, atol=rounding
        )
        weight = labels[0, 0]  # of the image itself, one for the whole micro-batch
        torch.testing.assert_close(labels.diagonal(), weight.expand(4))
        torch.testing.assert_close(labels[1, 0], 1 - weight)
        values = images[1].unique()
        assert len(values) <= 2 if kind == "cutmix_alpha" else len(values) == 1
        weights.add(round(float(weight), 4))
    assert len(weights) > 15


def test_a_mix_depends_on_seed_step_and_place_alone() -> None:
    expected, _ = mixed(3, 5, 1, **BOTH)
    torch.rand(7), np.random.rand(), random.random()
    states = random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist()
    found, _ = mixed(3, 5, 1, **BOTH)
    assert torch.equal(found, expected)
    assert states == (random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist())
    others = [mixed(*key, **BOTH)[0] for key in ((4, 5, 1), (3, 6, 1), (3, 5, 2))]
    assert not any(torch.equal(other, expected) for other in others)


def test_mixing_weights_match_golden_values() -> None:
    weights = [float(mixed(0, step, 0, **BOTH)[1][0, 0]) for step in range(4)]
    assert weights == pytest.approx(GOLDEN_WEIGHTS, abs=1e-5)


def test_with_both_either_comes_half_of_the_time() -> None:
    pasted = [len(mixed(0, step, 0, **BOTH)[0][1].unique()) == 2 for step in range(400)]
    assert 0.42 < np.mean(pasted) < 0.58


def test_mixed_labels_are_a_target_under_mixed_precision() -> None:
    _, labels = mixed(0, 0, 0, **BOTH)
    logits = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(logits.bfloat16(), labels, label_smoothing=0.1)
    smooth = 0.9 * labels + 0.1 / 6
    expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss.float(), expected, rtol=0.02, atol=0)
