"""Keeps an update whose loss or gradient is not finite from changing anything.

One forward pass over a bad image, or a step too long, would poison BatchNorm's statistics, weights,
momentum and moving average for good. Whether an update counts is decided on the device, alike in
all processes, and the host learns of it when it next asks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Skipped(NamedTuple):
    """The updates that were left out since the guard was last asked: how many, and the first."""

    number: int
    step: int  # 0-based
    loss: float  # mean over this process's images
    gradient_norm: float


class Guard:
    """Decides on each update of a network: `add` its losses, `decide`, and move by `kept`.

    It averages BatchNorm's running statistics over the processes: one small all-reduce an update.
    DistributedDataParallel would let each process evaluate its own, or hand round those of rank 0;
    and doing it every time keeps the run a function of the step alone. The statistics become views
    of one flat tensor, so nothing is packed, and putting them back takes one operation.

    Under float16 an infinite gradient is the business of the scaler, and only the loss and the
    statistics count here.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        world_size: int,
        max_skipped: int,
        first_step: int = 0,
        num_skipped: int = 0,
    ) -> None:
        """After more than `max_skipped` skipped updates, no other one changes anything either."""
        self.world_size = world_size
        self.max_skipped = max_skipped
        self.first_gradient = next(module.parameters())
        self.scaler = scaler
        device = self.first_gradient.device

        def zero(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.loss_sum = zero()  # over this process's images, of the updates that counted
        self.loss = zero()  # the same of the update that is being made, and its images
        self.images = zero()
        self.step = zero() + first_step
        self.num_skipped = zero() + num_skipped
        self.first = zero(3)  # of those that were skipped since `read`: step, loss, gradient's norm
        self.unread = zero()
        self.skip = torch.zeros((), device=device)  # 1 where the latest update did not count
        if scaler is None:  # which would hand its own to the optimizer
            fused: Any = getattr(optimizer, "optimizer", optimizer)  # Accelerate's, or ours
            fused.found_inf, fused.grad_scale = self.skip, None
        layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
        # The last value is for the loss, which all processes must judge as well.
        self.statistics = _flat(layers, ("running_mean", "running_var"), extra=torch.zeros(1))
        self.counts = _flat(
            layers, ("num_batches_tracked",), extra=torch.zeros(1, dtype=torch.long)
        )
        self.before = self.statistics.clone(), self.counts.clone()

    def add(self, loss: Tensor, num_images: int) -> None:
        """Takes in the mean loss (0-d) of a micro-batch."""
        self.loss += loss.detach() * num_images
        self.images += num_images

    @torch.no_grad()
    def decide(self, gradient_norm: Tensor) -> None:
        """Whether the update counts whose gradients, exchanged, have that norm (0-d).

        Settles BatchNorm's statistics and adds up the loss; the optimizer, if there is no scaler,
        leaves out a step by itself.
        """
        self.statistics[-1] = self.loss
        if self.world_size > 1:
            torch.distributed.all_reduce(self.statistics)
            self.statistics /= self.world_size
        counts = self.statistics.isfinite().all() & (self.num_skipped <= self.max_skipped)
        if self.scaler is None:
            counts &= gradient_norm.isfinite()
        else:  # it leaves out a step whose gradients are not finite
            assert self.first_gradient.grad is not None
            self.first_gradient.grad += torch.where(counts, 0.0, torch.nan)
        for now, before in zip((self.statistics, self.counts), self.before, strict=True):
            now.copy_(torch.where(counts, now, before))
            before.copy_(now)
        self.skip.copy_(~counts)
        self.loss_sum += torch.where(counts, self.loss, 0.0)
        found = torch.stack([self.step, self.loss / self.images, gradient_norm.double()])
        self.first.copy_(torch.where(~counts & (self.unread == 0), found, self.first))
        self.unread += ~counts
        self.num_skipped += ~counts
        self.step += 1
        self.loss.zero_()
        self.images.zero_()

    def kept(self, weight: float | Tensor) -> Tensor:
        """`weight` where the latest update counted, else 0; 0-d on the device."""
        return weight * (1 - self.skip)

    def read(self) -> Skipped | None:
        """What was skipped since the last call, if anything. Waits for the device."""
        number, step, loss, norm = torch.cat([self.unread[None], self.first]).tolist()
        self.unread.zero_()
        return Skipped(int(number), int(step), loss, norm) if number else None

    def tensors(self) -> list[Tensor]:
        """All that `decide` changes, but for BatchNorm's buffers."""
        return [
            self.loss_sum, self.loss, self.images, self.step, self.num_skipped, self.first,
            self.unread, self.skip, *self.before,
        ]  # fmt: skip


def _flat(layers: list[_BatchNorm], names: tuple[str, ...], extra: Tensor) -> Tensor:
    """One tensor of the buffers of those names, which become views of it, and of `extra`."""
    buffers = [(layer, name, getattr(layer, name)) for layer in layers for name in names]
    device = buffers[0][2].device if buffers else extra.device
    flat = torch.cat([*(buffer.flatten() for *_, buffer in buffers), extra.to(device)])
    views = flat.split([*(buffer.numel() for *_, buffer in buffers), 1])
    for (layer, name, buffer), view in zip(buffers, views, strict=False):
        setattr(layer, name, view.view(buffer.shape))
    return flat
