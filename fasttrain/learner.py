"""The objects that training changes. A checkpoint holds all of them."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fasttrain.flat import Flat
from fasttrain.optim import WeightAverage


@dataclass(slots=True)
class TrainState:
    """The counters of a run. `step` alone determines which samples come next."""

    step: int = 0  # updates done, including skipped ones
    skipped_steps: int = 0  # updates skipped because their loss or gradient was not finite
    loss_sum: float = 0.0  # sum over the images since the last train line
    loss_images: int = 0  # number of these images
    last_eval: dict[str, Any] = field(default_factory=dict)  # the record of the last evaluation


@dataclass(slots=True)
class Learner:
    """The objects that training changes. A checkpoint holds all of them."""

    model: nn.Module  # the network as Accelerate has prepared it
    module: nn.Module  # the network itself
    flat: Flat  # the network's tensors
    optimizer: torch.optim.Optimizer
    ema: WeightAverage | None
    scaler: torch.amp.GradScaler | None
    state: TrainState = field(default_factory=TrainState)
