"""Keeps an update whose loss or gradient is not finite from changing anything.

One forward pass over a bad image, or one step that is too long, would spoil BatchNorm's statistics,
the weights, the momentum and the moving average for good. The device decides whether an update
counts. All ranks decide alike. The host learns of it when it next asks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain.learner import Learner
from fasttrain.schedule import Plan


class Skipped(NamedTuple):
    """The updates that were left out since the guard was last asked: how many, and the first."""

    number: int
    offset: int  # of the first, counted from 0 over the updates since the guard was last asked
    loss: float  # mean over this process's images
    gradient_norm: float


class Guard:
    """Decides on each update of a network: `add` its losses, `decide`, and move by `kept`.

    It averages BatchNorm's running statistics over the ranks by one small all-reduce an update.
    DistributedDataParallel would let each rank evaluate with its own statistics, or broadcast those
    of rank 0. To do it in every update keeps the run a function of the step alone.

    Under float16 the scaler deals with infinite gradients. Then only the loss and the statistics
    count here.

    All numbers are float64 and lie on the device. The arithmetic is written for few kernels: 25 an
    update, and 8 where it is compiled.
    """

    def __init__(
        self, learner: Learner, plan: Plan, max_skipped: int, compile_it: bool = False
    ) -> None:
        """
        Args:
            max_skipped: once more updates than that are rejected, all others are rejected too.
            compile_it: compile the arithmetic, which takes fewer kernels.
        """
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
        self.loss = zeros()  # of the update that is being made, summed over its images
        self.offset = zeros()  # of that update, counted since `read`
        # Updates that were skipped in all, less `max_skipped`; and since `read`.
        self.excess = zeros() + (state.skipped_steps - max_skipped)
        self.number = zeros()
        # Offset, loss and gradient norm of the first update that was skipped since `read`.
        self.first = [zeros(), zeros(), zeros()]
        self.keep = torch.ones((), device=device)  # 1 where the latest update counted, else 0
        self.skip = torch.zeros((), device=device)  # the opposite
        if self.scaler is None:  # which would hand its own to the optimizer
            optimizer: Any = learner.optimizer
            fused: Any = getattr(optimizer, "optimizer", optimizer)  # Accelerate's, or ours
            fused.found_inf, fused.grad_scale = self.skip, None
        self.before = [tensor.clone() for tensor in self._statistics()]
        self.settle = self._compiled() if compile_it else self._settle

    def add(self, loss: Tensor, num_images: int) -> None:
        """Takes in the mean loss (0-d) of a micro-batch."""
        self.loss.add_(loss.detach(), alpha=num_images)

    @torch.no_grad()
    def decide(self, gradient_norm: Tensor) -> None:
        """Accepts or rejects the update, given the norm (0-d) of the reduced gradients.

        Settles BatchNorm's statistics and adds up the loss. Without a scaler, the optimizer then
        leaves out a rejected step by itself.
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

    def _compiled(self) -> Callable[[Tensor], None]:
        """`_settle` as 6 kernels; or as it is where nothing can be compiled.

        Compiling fails where the machine has no C compiler. The results are the same.
        """
        compiled = torch.compile(self._settle, dynamic=False)
        changed = [*self._statistics(), *self.tensors()]
        kept = [tensor.clone() for tensor in changed]
        try:
            with torch.no_grad():
                compiled(torch.zeros_like(self.flat.weights[0]))
        except Exception:  # each part of the compiler raises its own
            compiled = self._settle
        for tensor, before in zip(changed, kept, strict=True):
            tensor.copy_(before)
        return compiled

    def _settle(self, gradient_norm: Tensor) -> None:
        """The decision itself, and what follows from it on this device."""
        total = self.flat.statistics.sum(dtype=torch.float64)  # float32 values cannot overflow it
        if self.scaler is None:
            total = total + gradient_norm
        # A finite number less itself is 0; any other gives NaN, which is not >= anything.
        good = (total - total) >= self.excess
        bad = ~good
        is_first = bad > self.number
        for now, before in zip(self._statistics(), self.before, strict=True):
            torch.where(good, now, before, out=now)
            before.copy_(now)
        for first, now in zip(self.first, (self.offset, self.loss, gradient_norm), strict=True):
            torch.where(is_first, now, first, out=first)
        torch.where(good, self.loss_sum + self.loss, self.loss_sum, out=self.loss_sum)
        self.number += bad
        self.excess += bad
        self.skip.copy_(bad)
        self.keep.copy_(good)
        self.offset += 1
        self.loss.zero_()

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """What BatchNorm changes in a forward pass."""
        return self.flat.statistics, self.flat.counts

    def kept(self, weight: float | Tensor) -> Tensor:
        """`weight` where the latest update counted, else 0; 0-d on the device."""
        return weight * self.keep

    def read(self) -> Skipped | None:
        """What was skipped since the last call, if anything. Waits for the device."""
        number, offset, loss, norm = torch.stack([self.number, *self.first]).tolist()
        self.number.zero_()
        self.offset.zero_()
        return Skipped(int(number), int(offset), loss / self.images, norm) if number else None

    def tensors(self) -> list[Tensor]:
        """All that `decide` changes, but for what the network learns."""
        counters = [self.loss_sum, self.offset, self.loss, self.excess, self.number, *self.first]
        return [*counters, self.keep, self.skip, *self.before]
