"""Keeps an update whose loss or gradient is not finite from changing anything.

One forward pass over a bad image, or a step too long, would poison BatchNorm's statistics, weights,
momentum and moving average for good. Whether an update counts is decided on the device, alike in
all processes, and the host learns of it when it next asks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain.optim import Learner
from fasttrain.schedule import Plan


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
    and doing it every time keeps the run a function of the step alone.

    Under float16 an infinite gradient is the business of the scaler, and only the loss and the
    statistics count here.

    All numbers are float64 and lie on the device. The arithmetic is written for few kernels: 20 an
    update, where one operation for each thought took 44; compiled it takes fewer still.
    """

    def __init__(
        self, learner: Learner, plan: Plan, max_skipped: int, compile_it: bool = False
    ) -> None:
        """After more than `max_skipped` skipped updates, no other one changes anything either."""
        self.max_skipped = max_skipped
        self.world_size = plan.world_size
        self.images = plan.micro_batch_size * plan.accumulation  # of this process, an update
        self.flat = learner.flat
        self.scaler = learner.scaler
        self.first_gradient = learner.optimizer.param_groups[0]["params"][0]
        device = self.flat.weights.device
        state = learner.state

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.loss_sum = zeros()  # over this process's images, of the updates that counted
        # Skipped updates above `max_skipped` (in all), and since `read`.
        self.skipped = zeros(2)
        self.skipped[0] = state.skipped_steps - max_skipped
        # Of the update that is being made: step, sum of the loss over images, gradient's norm.
        self.now = zeros(3)
        self.now[0] = state.step
        self.first = zeros(3)  # the same of the first update that was skipped since `read`
        self.loss = self.now[1]
        self.skip = torch.zeros((), device=device)  # 1 where the latest update did not count
        if self.scaler is None:  # which would hand its own to the optimizer
            optimizer: Any = learner.optimizer
            fused: Any = getattr(optimizer, "optimizer", optimizer)  # Accelerate's, or ours
            fused.found_inf, fused.grad_scale = self.skip, None
        self.before = self.flat.statistics.clone(), self.flat.counts.clone()
        self.settle = torch.compile(self._settle, dynamic=False) if compile_it else self._settle

    def add(self, loss: Tensor, num_images: int) -> None:
        """Takes in the mean loss (0-d) of a micro-batch."""
        self.loss.add_(loss.detach(), alpha=num_images)

    @torch.no_grad()
    def decide(self, gradient_norm: Tensor) -> None:
        """Whether the update counts whose gradients, exchanged, have that norm (0-d).

        Settles BatchNorm's statistics and adds up the loss; the optimizer, if there is no scaler,
        leaves out a step by itself.
        """
        statistics = self.flat.statistics
        statistics[-1] = self.loss  # all processes must judge it as well
        if self.world_size > 1:
            torch.distributed.all_reduce(statistics)
            statistics /= self.world_size
        self.settle(gradient_norm)
        if self.scaler is not None:  # it leaves out a step whose gradients are not finite
            assert self.first_gradient.grad is not None
            self.first_gradient.grad += torch.where(self.skip == 0, 0.0, torch.nan)

    def _settle(self, gradient_norm: Tensor) -> None:
        """The decision itself, and what follows from it on this device."""
        statistics, counts = self.flat.statistics, self.flat.counts
        self.now[2].copy_(gradient_norm)
        total = statistics.sum(dtype=torch.float64)  # which float32 values cannot overflow
        if self.scaler is None:
            total = total + self.now[2]
        # A finite number less itself is 0; any other gives NaN, which is not >= anything.
        good = (total - total) >= self.skipped[0]
        torch.logical_not(good, out=self.skip)
        for now, before in zip((statistics, counts), self.before, strict=True):
            now.copy_(torch.where(good, now, before))
            before.copy_(now)
        self.loss_sum += torch.where(good, self.now[1], 0.0)
        # 1 > 0 for the first one that is skipped.
        self.first.copy_(torch.where(self.skip > self.skipped[1], self.now, self.first))
        self.skipped += self.skip
        self.now[0] += 1
        self.now[1].zero_()

    def kept(self, weight: float | Tensor) -> Tensor:
        """`weight` where the latest update counted, else 0; 0-d on the device."""
        return weight * (1 - self.skip)

    def read(self) -> Skipped | None:
        """What was skipped since the last call, if anything. Waits for the device."""
        number, step, loss, norm = torch.cat([self.skipped[1:], self.first]).tolist()
        self.skipped[1].zero_()
        return Skipped(int(number), int(step), loss / self.images, norm) if number else None

    def tensors(self) -> list[Tensor]:
        """All that `decide` changes, but for what the network learns."""
        return [self.loss_sum, self.skipped, self.now, self.first, self.skip, *self.before]
