"""The order of the data: which samples each batch of a run holds.

Batches are numbered from the start of the run: batch n of a rank is micro-batch n % accumulation of
update n // accumulation. So a resumed run gets the same batches as a run that never stopped.
"""

import bisect
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from fasttrain import config, sampling
from fasttrain.reading import BadSamples
from fasttrain.sampling import Draw, Piece, View
from fasttrain.schedule import Plan
from fasttrain.shards import Split


class Order(Protocol):
    """Answers a loader's questions about a batch, given its number."""

    split: Split
    data: config.Data
    batch_size: int  # images in the largest batch
    training: bool

    def numbers(self, iteration: int) -> range:
        """The numbers of the batches in an iteration over the loader; the first iteration is 1."""

    def draw(self, number: int) -> Draw:
        """Samples, windows, flips and augmentations of a batch."""

    def pieces(self, number: int) -> Sequence[Piece]:
        """Byte ranges to announce to the kernel when this batch is read."""

    def verified(self, number: int) -> bool:
        """True if the bytes of this batch are compared with their checksums."""

    def replace(self, error: BadSamples) -> None:
        """Leaves damaged samples out of the draws from now on.

        Raises:
            BadSamples: this order does not replace samples, or too many samples are damaged.
        """


def to_stderr(text: str) -> None:
    """Prints a line on standard error."""
    sys.stderr.write(f"{text}\n")


class TrainingOrder:
    """The training micro-batches of one rank, from an update to the end of the run."""

    training = True

    def __init__(
        self,
        split: Split,
        data: config.Data,
        plan: Plan,
        rank: int,
        first_step: int = 0,
        warn: Callable[[str], object] = to_stderr,
    ) -> None:
        """
        Args:
            first_step: the 0-based update to begin with.
            warn: gets a text for each batch with damaged samples that are replaced. A loader's
                thread calls it.
        """
        self.split, self.data, self.plan, self.rank = split, data, plan, rank
        self.first_step = first_step
        self.warn = warn
        self.batch_size = plan.micro_batch_size
        self.bad: dict[int, str] = {}  # damaged samples that are replaced, with their faults

    def numbers(self, iteration: int) -> range:
        accumulation = self.plan.accumulation
        return range(self.first_step * accumulation, self.plan.total_steps * accumulation)

    def draw(self, number: int) -> Draw:
        plan = self.plan
        step, micro = divmod(number, plan.accumulation)
        if micro == 0 and step % plan.steps_per_epoch == 0:
            # Compute the next epoch's order now, in a thread, so that no batch waits for it later.
            block_size = sampling.block_size(self.data)
            upcoming = (plan.seed, plan.epoch_of(step) + 1, self.split, block_size)
            threading.Thread(target=sampling.epoch_order, args=upcoming, daemon=True).start()
        bad = self.bad.keys()
        return sampling.train_draw(self.split, self.data, plan, self.rank, number, bad)

    def pieces(self, number: int) -> Sequence[Piece]:
        step, micro = divmod(number, self.plan.accumulation)
        if self.data.shuffle != "blocks" or micro:
            return ()
        is_first = step == self.first_step
        return sampling.pieces_ahead(self.split, self.data, self.plan, step, self.rank, is_first)

    def verified(self, number: int) -> bool:
        if self.data.verify == "first_epoch":
            return self.plan.epoch_of(number // self.plan.accumulation) == 0
        return self.data.verify == "always"

    def replace(self, error: BadSamples) -> None:
        """Replaces damaged samples from now on.

        Raises:
            BadSamples: `data.on_bad_sample` is not `replace`, or too many samples are damaged.
        """
        if self.data.on_bad_sample != "replace":
            raise error
        assert not error.faults.keys() <= self.bad.keys()  # else the loader would retry forever
        self.bad.update(error.faults)
        if len(self.bad) > min(self.data.max_bad_samples, self.split.num_samples // 2):
            what = "damaged, more than may be replaced (data.max_bad_samples, or half of all)"
            raise BadSamples(self.split, self.bad, what) from error
        self.warn(f"{error}\n{len(self.bad)} damaged samples so far are replaced by others")


class ViewOrder:
    """The images of the training split in a given view and order: batches of consecutive samples.

    A teacher labels them. The images are those that `TrainingOrder` has in that view.
    """

    training = True

    def __init__(
        self,
        split: Split,
        data: config.Data,
        ranges: Sequence[tuple[View, int, int]],
        batch_size: int,
    ) -> None:
        """
        Args:
            ranges: a view, and the samples [first, last) that are wanted in it. No batch holds
                samples of two ranges.
        """
        self.split, self.data, self.ranges, self.batch_size = split, data, ranges, batch_size
        self.starts = [0]  # the number of the first batch of each range, and that of all batches
        for _, first, last in ranges:
            self.starts.append(self.starts[-1] - (first - last) // batch_size)

    def numbers(self, iteration: int) -> range:
        return range(self.starts[-1])

    def draw(self, number: int) -> Draw:
        place = bisect.bisect_right(self.starts, number) - 1
        view, first, last = self.ranges[place]
        first += (number - self.starts[place]) * self.batch_size
        ids = np.arange(first, min(first + self.batch_size, last))
        return sampling.view_draw(self.split, self.data, view, ids)

    def pieces(self, number: int) -> Sequence[Piece]:
        return ()

    def verified(self, number: int) -> bool:
        return self.data.verify != "off"

    def replace(self, error: BadSamples) -> None:
        raise error


class EvaluationOrder:
    """One rank's share of the validation batches. All ranks together have each image once.

    Every iteration has the same batches, but new numbers: they continue those of the previous one.
    """

    training = False

    def __init__(
        self, split: Split, data: config.Data, batch_size: int, rank: int, world_size: int
    ) -> None:
        self.split, self.data, self.batch_size = split, data, batch_size
        self.rank, self.world_size = rank, world_size
        self.num_batches = sampling.num_eval_batches(
            split.num_samples, batch_size, rank, world_size
        )

    def numbers(self, iteration: int) -> range:
        return range((iteration - 1) * self.num_batches, iteration * self.num_batches)

    def draw(self, number: int) -> Draw:
        return sampling.eval_draw(
            self.split, self.data, self.batch_size, self.rank, self.world_size,
            number % self.num_batches,
        )  # fmt: skip

    def pieces(self, number: int) -> Sequence[Piece]:
        return ()

    def verified(self, number: int) -> bool:
        if self.data.verify == "first_epoch":
            return number < self.num_batches
        return self.data.verify == "always"

    def replace(self, error: BadSamples) -> None:
        raise error
