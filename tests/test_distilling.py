"""The loss with a teacher follows its formulas, in every mode, and mixes as the labels do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from updates import Batches, assert_same, batches_for, carry_out, network, plan_for, recipe_for

from fasttrain import compiling, config, determinism, distilling, modes
from fasttrain.batch import Batch
from fasttrain.mixing import build_mix
from fasttrain.rng import Stream

LOGITS = torch.randn(6, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
TAUGHT = torch.randn(6, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
LABELS = torch.tensor([3, 0, 11, 5, 5, 7])


def packed(logits: Tensor, k: int) -> Tensor:
    """The k most probable classes of logits `(B, C)`, as they are stored."""
    probabilities, ids = logits.softmax(1).topk(k)
    bits = [ids.numpy().astype(np.uint16), probabilities.numpy().astype(np.float16)]
    return torch.from_numpy(np.stack([each.view(np.int16) for each in bits], 1))


def distill(**settings: Any) -> config.Distill:
    return config.Distill(labels=Path("labels"), **settings)


def test_stored_probabilities_become_rows_of_all_classes() -> None:
    k, whole = 4, TAUGHT.softmax(1).numpy()
    rows = distilling.dense(packed(TAUGHT, k), 12).numpy()
    expected = np.empty_like(whole)
    for row, probabilities in zip(expected, whole, strict=True):
        best = np.argsort(-probabilities)[:k]
        row[:] = (1 - probabilities[best].sum()) / (12 - k)
        row[best] = probabilities[best]
    np.testing.assert_allclose(rows, expected, atol=5e-4)  # float16
    np.testing.assert_allclose(rows.sum(1), 1, atol=1e-6)
    assert rows.dtype == np.float32
    everything = distilling.dense(packed(TAUGHT, 12), 12).numpy()
    np.testing.assert_allclose(everything, whole, atol=5e-4)


def test_class_ids_use_all_16_bits() -> None:
    logits = torch.zeros(1, 60_000)
    logits[0, 59_999], logits[0, 40_000] = 20.0, 19.0
    rows = distilling.dense(packed(logits, 2), 60_000)
    assert rows[0].topk(2).indices.tolist() == [59_999, 40_000]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_softened_probabilities_are_those_of_divided_logits(temperature: float) -> None:
    found = distilling.soften(TAUGHT.softmax(1), temperature)
    torch.testing.assert_close(found, (TAUGHT / temperature).softmax(1))
    sure = distilling.soften(torch.tensor([[1.0, 0.0]]), temperature)  # float16 makes such zeros
    assert sure.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("weight", "temperature", "smoothing"),
    [(0.9, 1.0, 0.0), (0.3, 2.5, 0.1), (0.0, 1.0, 0.1), (1.0, 4.0, 0.1)],
)
def test_the_loss_follows_its_formula_in_float64(
    weight: float, temperature: float, smoothing: float
) -> None:
    recipe = config.Recipe(
        train=config.Train(label_smoothing=smoothing),
        distill=distill(weight=weight, temperature=temperature),
    )
    logits = LOGITS.float().requires_grad_()
    rows = distilling.soften(TAUGHT.softmax(1), temperature).float()
    loss = compiling.loss_function(nn.Identity(), recipe, None)(
        logits, distilling.join(LABELS, rows)
    )
    z = LOGITS.numpy()

    def log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return (
            x
            - x.max(1, keepdims=True)
            - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1))[:, None]
        )

    hard = (1 - smoothing) * np.eye(12)[LABELS] + smoothing / 12
    soft = np.exp(log_softmax(TAUGHT.numpy() / temperature))
    by_labels = -(hard * log_softmax(z)).sum(1).mean()
    by_teacher = -(soft * log_softmax(z / temperature)).sum(1).mean() * temperature**2
    expected = (1 - weight) * by_labels + weight * by_teacher
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    # The gradient is that with the Kullback-Leibler divergence.
    loss.backward()
    exact = LOGITS.clone().requires_grad_()
    divergence = F.kl_div(
        (exact / temperature).log_softmax(1), torch.from_numpy(soft), reduction="batchmean"
    )
    plain = F.cross_entropy(exact, LABELS, label_smoothing=smoothing)
    ((1 - weight) * plain + weight * temperature**2 * divergence).backward()
    torch.testing.assert_close(logits.grad, exact.grad, check_dtype=False, rtol=1e-4, atol=1e-6)


def test_without_a_teacher_the_loss_is_that_of_before() -> None:
    recipe = config.Recipe(train=config.Train(label_smoothing=0.1))
    found = compiling.loss_function(nn.Identity(), recipe, None)(LOGITS, LABELS)
    assert torch.equal(found, F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1))


@pytest.mark.parametrize("kind", ["mixup_alpha", "cutmix_alpha"])
def test_the_teachers_labels_are_mixed_as_the_labels_are(kind: str) -> None:
    train = config.Train.model_validate({kind: 1.0})
    images = torch.randn(6, 3, 8, 8)
    rows = TAUGHT.softmax(1).float()

    def mixed(taught: bool, labels: Tensor) -> tuple[Tensor, Tensor]:
        mix = build_mix(train, 12, taught)
        assert mix
        determinism.seed_torch(0, Stream.MIX, 4, 0)
        return mix(images, labels)

    plain_images, plain = mixed(False, LABELS)
    _, soft = mixed(False, rows)
    both_images, both = mixed(True, distilling.join(LABELS, rows))
    assert torch.equal(both_images, plain_images)
    assert torch.equal(both, torch.cat([plain, soft], 1))


class Constant(nn.Module):
    """A teacher that gives the same logits to every image."""

    def forward(self, images: Tensor) -> Tensor:
        return TAUGHT[: len(images)].float()


def test_a_teacher_in_the_run_gives_what_is_stored() -> None:
    batch = Batch(torch.randn(6, 3, 8, 8), LABELS, None, packed(TAUGHT, 12))
    teacher = distilling.Teacher("constant", "", Constant())
    for temperature in (1.0, 2.0):
        live = distilling.from_teacher(teacher, Accelerator(cpu=True), temperature)(batch)
        stored = distilling.from_stored(12, temperature)(batch)
        torch.testing.assert_close(live, stored, rtol=0, atol=1e-3)
        assert not live.is_inference()  # autograd would refuse it


def distilled(batches: Batches) -> Batches:
    """The batches with the labels of a teacher beside their own."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for images, labels in batches:
        hard = F.one_hot(labels, 4).float() if labels.ndim == 1 else labels
        soft = torch.randn(hard.shape, generator=generator).softmax(1)
        found.append((images, torch.cat([hard, soft], 1)))
    return found


@pytest.mark.parametrize("mode", ["graph", pytest.param("compile", marks=pytest.mark.slow)])
@pytest.mark.parametrize("micro", [8, 4])
def test_every_mode_learns_the_same_from_a_teacher(mode: str, micro: int) -> None:
    recipe = recipe_for(micro_batch_size=micro).model_copy(
        update={"distill": distill(weight=0.7, temperature=2.0)}
    )
    plan = plan_for(recipe)
    batches = distilled(batches_for(plan, 3))
    losses, expected = carry_out("eager", recipe, plan, batches)
    found, learner = carry_out(mode, recipe, plan, batches)
    assert found == pytest.approx(losses, rel=1e-4)
    assert_same(learner, expected)


def test_modes_are_tried_on_labels_of_the_form_of_the_run() -> None:
    recipe = recipe_for().model_copy(update={"distill": distill()})
    setup = modes.Setup(Accelerator(cpu=True), network(), recipe, plan_for(recipe), 4)
    _, labels = setup.batch(8, 32)
    assert labels.shape == (8, 8) and labels.dtype == torch.float32
    torch.testing.assert_close(labels.sum(1), torch.full((8,), 2.0))
