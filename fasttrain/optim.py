"""The optimizer with its parameter groups, and the moving average of the weights."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain import config
from fasttrain.flat import Flat, flatten
from fasttrain.model import LAST_LAYER


def build_optimizer(model: nn.Module, optim: config.Optim) -> torch.optim.Optimizer:
    """Builds SGD or AdamW. Only the weights of convolutions and linear layers decay.

    Before each update, every group gets the learning rate `schedule.lr_at` times its `lr_factor`.
    Frozen parameters are in no group. The state starts as zeros here and not at the first step: a
    CUDA graph must know its tensors. And if the first step is skipped, the fused SGD would read
    memory that was never set.

    Both are torch's fused kernels. They skip a step by themselves if the guard rejects the update,
    and read the learning rate from the device, so a CUDA graph can hold them.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    if optim.backbone_lr_factor == 1:
        groups = _groups(parameters, optim)
    else:
        head = [p for name, p in named if name.startswith(LAST_LAYER)]
        backbone = [p for name, p in named if not name.startswith(LAST_LAYER)]
        groups = [
            *(
                group | {"lr_factor": optim.backbone_lr_factor}
                for group in _groups(backbone, optim)
            ),
            *_groups(head, optim),
        ]
    optimizer: torch.optim.Optimizer
    if optim.name == "adamw":
        optimizer = torch.optim.AdamW(
            groups, lr=optim.warmup_lr, betas=optim.betas, eps=optim.eps, fused=True
        )
        zeros = ["exp_avg", "exp_avg_sq"]
    else:
        optimizer = torch.optim.SGD(
            groups, lr=optim.warmup_lr, momentum=optim.momentum, nesterov=optim.nesterov, fused=True
        )
        zeros = ["momentum_buffer"] if optim.momentum else []
    for parameter in parameters if zeros else ():
        state = {name: torch.zeros_like(parameter) for name in zeros}
        if optim.name == "adamw":
            state["step"] = torch.zeros((), device=parameter.device)
        optimizer.state[parameter] = state
    return optimizer


def set_capturable(optimizer: torch.optim.Optimizer, capturable: bool) -> None:
    """Tells AdamW if a CUDA graph records its steps, which it refuses otherwise.

    SGD has no such setting. A checkpoint stores it, so set it after the checkpoint was restored.
    """
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = capturable
    if capturable:  # otherwise it warns that the steps before the recording are not recorded
        optimizer._warned_capturable_if_run_uncaptured = True


def _groups(parameters: list[nn.Parameter], optim: config.Optim) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


class WeightAverage:
    """Exponential moving average (EMA) of parameters and BatchNorm statistics, as a network.

    The decay grows from 0.1 as (1 + n) / (10 + n) up to `decay`. With a constant decay, the average
    would contain untrained weights and stay near chance for epochs.

    Source of the growing decay: tf.train.ExponentialMovingAverage, num_updates.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self.flat = flatten(self.module)

    def weight(self, num_updates: int) -> float:
        """Returns the fraction by which the average moves towards the new weights.

        Args:
            num_updates: the number of updates done, at least 1.
        """
        return 1 - min(self.decay, (1 + num_updates) / (10 + num_updates))

    @torch.no_grad()
    def update(self, flat: Flat, weight: Tensor) -> None:
        """Moves the average towards the network by the fraction `weight`.

        Args:
            flat: the network's weights and statistics.
            weight: float32, 0-d, on the network's device.
        """
        self.flat.averaged.lerp_(flat.averaged, weight)
