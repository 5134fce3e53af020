"""Rejects an update whose loss or gradient is not finite, so that it changes nothing.

One bad image or one step that is too large would spoil the weights, BatchNorm's statistics, the
momentum and the moving average for good. The device decides whether an update counts, and all ranks
decide the same. The host learns of a rejected update when it next calls `Guard.read`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain.learner import Learner
from fasttrain.schedule import Plan


class Skipped(NamedTuple):
    """The updates that were skipped since the last `read`: their number, and the first of them."""

    number: int
    offset: int  # position of the first, from 0, among the updates since the last `read`
    loss: float  # of the first: mean over this rank's images
    gradient_norm: float  # of the first


def are_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    """True if both lists hold tensors of the same values. Waits for the device."""
    return len(some) == len(others) and all(map(torch.equal, some, others))


class Guard:
    """Accepts or rejects each update of a network.

    For each update, call `add` with the loss of each micro-batch, then `decide`. `kept` then scales
    the change of the moving average: by 1, or by 0 if the update was rejected.

    The guard averages BatchNorm's running statistics over the ranks, by one small all-reduce per
    update. With DistributedDataParallel alone, each rank would evaluate with its own statistics, or
    rank 0 would broadcast its statistics. The average is taken in every update, so that the run
    depends on the step alone.

    Under float16 the scaler handles infinite gradients, and the guard checks only the loss and the
    statistics.

    All sums and counters are float64 on the device. The arithmetic takes few kernels: 32 per
    update, or 8 if it is compiled.
    """

    def __init__(
        self, learner: Learner, plan: Plan, max_skipped: int, compile_it: bool = False
    ) -> None:
        """
        Args:
            max_skipped: once more updates than this are rejected, every later one is rejected too.
            compile_it: compile the arithmetic, to launch fewer kernels.
        """
        self.max_skipped = max_skipped
        self.world_size = plan.world_size
        self.images = plan.micro_batch_size * plan.accumulation  # of this rank per update
        self.flat = learner.flat
        self.scaler = learner.scaler
        self.first_gradient = learner.optimizer.param_groups[0]["params"][0]
        device = self.flat.weights.device
        state = learner.state

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.loss_sum = zeros()  # over this rank's images in all accepted updates
        self.loss = zeros()  # of the current update, summed over this rank's images
        self.offset = zeros()  # number of updates since `read`
        self.excess = zeros() + (state.skipped_steps - max_skipped)  # all skipped - max_skipped
        self.number = zeros()  # of updates skipped since `read`
        # Offset, loss and gradient norm of the first update that was skipped since `read`.
        self.first = [zeros(), zeros(), zeros()]
        self.keep = torch.ones((), device=device)  # 1 if the latest update was accepted, else 0
        self.skip = torch.zeros((), device=device)  # 1 - keep
        if self.scaler is None:  # a scaler would give its own `found_inf` to the optimizer
            optimizer: Any = learner.optimizer
            fused: Any = getattr(optimizer, "optimizer", optimizer)  # Accelerate may wrap it
            fused.found_inf, fused.grad_scale = self.skip, None
        self.accepted = [tensor.clone() for tensor in self._statistics()]
        self.apply_decision = self._compiled() if compile_it else self._apply_decision

    def add(self, loss: Tensor, num_images: int) -> None:
        """Adds the mean loss (0-d) of a micro-batch of `num_images` images."""
        self.loss.add_(loss.detach(), alpha=num_images)

    @torch.no_grad()
    def decide(self, gradient_norm: Tensor) -> None:
        """Accepts or rejects the update, given the norm (0-d) of the reduced gradients.

        Averages BatchNorm's statistics, or restores them if the update is rejected. Adds an
        accepted loss to `loss_sum`. Without a scaler, the optimizer skips a rejected step by
        itself.
        """
        statistics = self.flat.statistics
        statistics[-1] = self.loss  # so that every rank sees the loss of all ranks
        if self.world_size > 1:
            torch.distributed.all_reduce(statistics)
            statistics /= self.world_size
        self.apply_decision(gradient_norm)
        if self.scaler is not None:  # the scaler skips a step whose gradients are not finite
            assert self.first_gradient.grad is not None
            self.first_gradient.grad += torch.where(self.skip == 0, 0.0, torch.nan)

    @torch.no_grad()
    def _compiled(self) -> Callable[[Tensor], None]:
        """Returns `_apply_decision`, compiled to 6 kernels if the compiler works.

        Compiling fails if the machine has no C compiler. It may also go wrong without an error:
        torch 2.11 loses some of the changes to scalar tensors. So the plain and the compiled
        function are tried on accepted and rejected updates, and must leave the same values. All
        tensors are restored afterwards.
        """
        compiled = torch.compile(self._apply_decision, dynamic=False)
        changed = [*self._statistics(), *self.tensors()]
        originals = [tensor.clone() for tensor in changed]
        left: list[list[Tensor]] = []
        for function in (self._apply_decision, compiled):
            try:
                for gradient_norm in (1.0, math.inf, 2.0):
                    self.loss.fill_(1.0)
                    function(torch.full_like(self.flat.weights[0], gradient_norm))
                left.append([tensor.clone() for tensor in changed])
            except Exception:  # the parts of the compiler have no common exception
                left.append([])
            for tensor, original in zip(changed, originals, strict=True):
                tensor.copy_(original)
        plain, found = left
        return compiled if are_equal(plain, found) else self._apply_decision

    def _apply_decision(self, gradient_norm: Tensor) -> None:
        """Decides on the update, and updates statistics, sums and counters accordingly."""
        total = self.flat.statistics.sum(dtype=torch.float64)  # float32 values cannot overflow it
        if self.scaler is None:
            total = total + gradient_norm
        # x - x is 0 if x is finite, else NaN. NaN >= y is always false.
        good = (total - total) >= self.excess
        bad = ~good
        is_first = bad & (self.number == 0)
        for now, accepted in zip(self._statistics(), self.accepted, strict=True):
            now.copy_(torch.where(good, now, accepted))
            accepted.copy_(now)
        for first, now in zip(self.first, (self.offset, self.loss, gradient_norm), strict=True):
            first.copy_(torch.where(is_first, now, first))
        self.loss_sum.copy_(torch.where(good, self.loss_sum + self.loss, self.loss_sum))
        self.number += bad
        self.excess += bad
        self.skip.copy_(bad)
        self.keep.copy_(good)
        self.offset += 1
        self.loss.zero_()

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """The tensors that BatchNorm changes in a forward pass."""
        return self.flat.statistics, self.flat.counts

    def kept(self, weight: float | Tensor) -> Tensor:
        """`weight` if the latest update was accepted, else 0; 0-d on the device."""
        return weight * self.keep

    def read(self) -> Skipped | None:
        """The updates that were skipped since the last call; None if none was.

        Waits for the device.
        """
        number, offset, loss, norm = torch.stack([self.number, *self.first]).tolist()
        self.number.zero_()
        self.offset.zero_()
        return Skipped(int(number), int(offset), loss / self.images, norm) if number else None

    def tensors(self) -> list[Tensor]:
        """The tensors that `decide` changes, without those of the network."""
        counters = [self.loss_sum, self.offset, self.loss, self.excess, self.number, *self.first]
        return [*counters, self.keep, self.skip, *self.accepted]
