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
    best: dict[str, Any] = field(default_factory=dict)  # the record of the best one: see `better`
    seconds: float = 0.0  # in the loop, over all starts
    joules: float = 0.0  # of the GPUs in that time; 0 if they do not tell it

    def better(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """The `best` record of an evaluation whose top-1 is higher than all before; else None.

        The moving average of the weights counts too, if there is one.
        """
        average = record.get("ema_top1", -1.0)
        top1 = max(record["top1"], average)
        if record["loss"] is None or top1 <= self.best.get("top1", -1.0):
            return None
        return {
            "event": "best",
            "step": record["step"],
            "epoch": record["epoch"],
            "top1": top1,
            "ema": average > record["top1"],
            "checkpoint": f"checkpoints/step_{record['step'] + 1:08d}",
        }


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
