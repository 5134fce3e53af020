"""Carries out updates of small networks on made-up batches."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fasttrain import determinism, execution
from fasttrain.config import Data, Optim, Recipe, Train
from fasttrain.execution import Graphed
from fasttrain.learner import Learner
from fasttrain.model import mobilenetv3_small
from fasttrain.rng import Stream
from fasttrain.schedule import Plan, make_plan

OPTIM = Optim(ema_decay=0.9, lr=0.1, warmup_lr=0.02, warmup_epochs=1)

Batches = list[tuple[Tensor, Tensor]]  # images and labels


def recipe_for(**train: Any) -> Recipe:
    """A recipe of images of 32 px, with these settings of [train]."""
    settings: dict[str, Any] = {
        "precision": "no",
        "global_batch_size": 8,
        "label_smoothing": 0.1,
        "epochs": 9,
    }
    return Recipe(optim=OPTIM, data=Data(crop_px=32), train=Train(**(settings | train)))


def plan_for(recipe: Recipe, world_size: int = 1) -> Plan:
    """The plan of a recipe for 64 images."""
    return make_plan(recipe.train, recipe.optim, 64, world_size)


def batches_for(plan: Plan, updates: int, sizes: tuple[int, ...] = (32,), seed: int = 1) -> Batches:
    """Random batches for some updates.

    The image size goes through `sizes` from the first to the last. Labels are class numbers in the
    first half, and probabilities in the second half.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(updates * plan.accumulation):
        px = sizes[number // plan.accumulation * len(sizes) // updates]
        images = torch.randn(plan.micro_batch_size, 3, px, px, generator=generator)
        labels = torch.randint(4, (plan.micro_batch_size,), generator=generator)
        if number >= updates * plan.accumulation // 2:
            labels = nn.functional.one_hot(labels, 4).float()
        found.append((images.contiguous(memory_format=torch.channels_last), labels))
    return found


def network() -> nn.Module:
    """A small network of 4 classes, channels-last, with the same weights at each call."""
    torch.manual_seed(0)
    return mobilenetv3_small(0.35, num_classes=4, dropout=0.2).to(memory_format=torch.channels_last)


def run_at_once(key: Any, function: Callable[[], object]) -> None:
    """Runs what a CUDA graph would record, because there is no GPU to record it on."""
    function()


def carry_out(
    mode: str,
    recipe: Recipe,
    plan: Plan,
    batches: Batches,
    module: nn.Module | None = None,
    accelerator: Accelerator | None = None,
    record: bool = False,
) -> tuple[list[float], Learner]:
    """Trains on `batches` in a mode; returns the mean loss of each update, and the learner.

    Args:
        record: False: the mode `graph` calls the functions of its graphs, which needs no GPU.
    """
    accelerator = accelerator or Accelerator(cpu=True)
    module = (module or network()).to(accelerator.device)
    learner = execution.prepare(mode, accelerator, module, recipe, plan)
    if mode.startswith("graph") and not record:
        updater: execution.Updater = Graphed(accelerator, learner, plan, recipe, run=run_at_once)
    else:
        updater = execution.build(mode, accelerator, learner, plan, recipe)
    losses, given = [], iter(batches)
    for step in range(len(batches) // plan.accumulation):
        for micro in range(plan.accumulation):
            determinism.seed_torch(0, Stream.TORCH, step, micro)
            images, labels = (t.to(accelerator.device) for t in next(given))
            updater.micro(images, labels, is_last=micro + 1 == plan.accumulation)
        updater.update(0.02 + 0.001 * step)
        losses.append(float(updater.guard.loss_sum) / plan.micro_batch_size / plan.accumulation)
        updater.guard.loss_sum.zero_()
    return losses, learner


def everything(learner: Learner) -> Iterator[tuple[str, Tensor]]:
    """Yields name and value of each tensor of the network, its moving average and the optimizer."""
    assert learner.ema
    yield from learner.module.state_dict().items()
    for name, value in learner.ema.module.state_dict().items():
        yield f"ema {name}", value
    for number, state in enumerate(learner.optimizer.state_dict()["state"].values()):
        for name, value in state.items():
            yield f"{name.removesuffix('_buffer')} {number}", value


def assert_same(found: Learner, expected: Learner, rtol: float = 1e-3, atol: float = 1e-4) -> None:
    """Checks that two learners have equal tensors, up to the tolerances."""
    for (name, ours), (_, theirs) in zip(everything(found), everything(expected), strict=True):
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=message)


class Block(nn.Module):
    """A network with one layer of each kind, which compiles in seconds."""

    def __init__(self) -> None:
        super().__init__()
        whole = mobilenetv3_small(0.35, num_classes=4, dropout=0.5)
        self.features = whole.features[:2]
        self.classifier = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 4))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)).repeat(1, 2)[:, :16])
