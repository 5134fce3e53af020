"""Parameter groups, the optimizer, the moving average of the weights, and all that is trained."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain import config


def build_optimizer(model: nn.Module, optim: config.Optim) -> torch.optim.SGD:
    """SGD that decays the weights of convolutions and linear layers, not biases and BatchNorm.

    The learning rate is set on every group before each update (`schedule.lr_at`).
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        groups, lr=optim.warmup_lr, momentum=optim.momentum, nesterov=optim.nesterov, fused=True
    )


class WeightAverage:
    """Exponential moving average (EMA) of parameters and BatchNorm statistics, as a network.

    The decay grows from 0.1 as (1 + n) / (10 + n) up to its value, as an average that starts from
    untrained weights would stay near chance for epochs.

    Source of the growing decay: tf.train.ExponentialMovingAverage, num_updates.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).requires_grad_(False).eval()

    def weight(self, num_updates: int) -> float:
        """The part of the weights after update number `num_updates` (the first is 1)."""
        return 1 - min(self.decay, (1 + num_updates) / (10 + num_updates))

    @torch.no_grad()
    def update(self, model: nn.Module, weight: float | Tensor) -> None:
        """Takes in the weights by their part `weight`; a 0-d tensor of it lies on the device."""
        average, given = _floats(self.module), _floats(model)
        if isinstance(weight, Tensor):  # which lerp takes no single one of
            difference = torch._foreach_sub(given, average)
            torch._foreach_mul_(difference, weight)
            torch._foreach_add_(average, difference)
        else:
            torch._foreach_lerp_(average, given, weight)


def _floats(model: nn.Module) -> list[Tensor]:
    return [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]


class BatchNormAverage:
    """Averages BatchNorm's running statistics over the processes: one small all-reduce a step.

    DistributedDataParallel would let each process evaluate its own, or hand round those of rank 0.
    Doing it every step keeps the run a function of the step alone: nothing depends on when it was
    evaluated or saved. The statistics become views of one flat tensor, so nothing is packed.
    """

    def __init__(self, model: nn.Module, world_size: int) -> None:
        self.world_size = world_size
        if world_size == 1:
            return
        layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        buffers = [(layer, name) for layer in layers for name in ("running_mean", "running_var")]
        tensors = [getattr(layer, name) for layer, name in buffers]
        self.flat = torch.cat(tensors)
        views = self.flat.split([len(t) for t in tensors])
        for (layer, name), view in zip(buffers, views, strict=True):
            setattr(layer, name, view)

    def update(self) -> None:
        if self.world_size > 1:
            torch.distributed.all_reduce(self.flat)
            self.flat /= self.world_size


@dataclass(slots=True)
class TrainState:
    """The counters of a run; `step` is the whole state of its data."""

    step: int = 0  # updates done
    loss_sum: float = 0.0  # over the images since the last train line
    loss_images: int = 0
    last_eval: dict[str, Any] = field(default_factory=dict)  # the record of the last evaluation


@dataclass(slots=True)
class Learner:
    """All that training changes, and so all that a checkpoint holds."""

    model: nn.Module  # as prepared by Accelerate
    module: nn.Module  # the network itself
    optimizer: torch.optim.Optimizer
    ema: WeightAverage | None
    scaler: torch.amp.GradScaler | None
    state: TrainState = field(default_factory=TrainState)
