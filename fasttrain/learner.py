"""All that training changes, and so all that a checkpoint holds."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fasttrain.flat import Flat
from fasttrain.optim import WeightAverage


@dataclass(slots=True)
class TrainState:
    """The counters of a run; `step` is the whole state of its data."""

    step: int = 0  # updates done, or skipped
    skipped_steps: int = 0  # as their loss or gradient was not finite
    loss_sum: float = 0.0  # over the images since the last train line
    loss_images: int = 0
    last_eval: dict[str, Any] = field(default_factory=dict)  # the record of the last evaluation


@dataclass(slots=True)
class Learner:
    """All that training changes, and so all that a checkpoint holds."""

    model: nn.Module  # as prepared by Accelerate
    module: nn.Module  # the network itself
    flat: Flat  # of the network
    optimizer: torch.optim.Optimizer
    ema: WeightAverage | None
    scaler: torch.amp.GradScaler | None
    state: TrainState = field(default_factory=TrainState)
