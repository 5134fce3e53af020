"""The loader: batches on the device, made ahead of the training thread.

    draw (ids, windows, flips, ...)     from `order`, a pure function of the batch's number
      -> bytes of the images            from `feed`, ahead of time, uncopied
      -> decode, cut, resize, augment, mirror, normalise      by one of `makers`
      -> Batch(images, labels, draw)    on the device, channels-last

One thread per loader drives this and keeps a queue of finished batches. The training thread only
takes from it.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from fasttrain import config
from fasttrain.batch import Batch, Placement
from fasttrain.feed import Feed
from fasttrain.forecast import Stages
from fasttrain.lane import Lane
from fasttrain.makers import KernelMaker, maker_for
from fasttrain.order import EvaluationOrder, Order, TrainingOrder
from fasttrain.reading import BadSamples
from fasttrain.schedule import Plan
from fasttrain.shards import Split


class Loader:
    """Iterates over the batches of an order, which a thread makes ahead.

    Batches come in order. An error of the thread is raised where its batch would have come. Samples
    that turn out to be damaged are reported to the order: if it replaces them, the batches are made
    anew from the one that failed. `stages` adds up over all iterations.

    Raises:
        DataError: while iterating; a batch could not be made.
    """

    def __init__(self, order: Order, placement: Placement, stages: Stages | None = None) -> None:
        self.order = order
        self.placement = placement
        self.stages = stages or Stages()
        self.maker = maker_for(order, placement)
        self.passes = 0

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        numbers, depth = self.order.numbers(self.passes), self.order.data.queue_depth
        ready: queue.Queue[Batch | BaseException] = queue.Queue(depth)
        closed = threading.Event()
        if isinstance(self.maker, KernelMaker):
            # At work: the batch being made, those that are ready, and two that are used.
            self.maker.lane = Lane(self.placement.device, depth + 3)
        lane = self.maker.lane
        thread = threading.Thread(target=self._produce, args=(numbers, ready, closed), daemon=True)
        thread.start()
        try:
            for _ in numbers:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                if lane:
                    lane.take([item.images, item.labels])
                yield item
                if lane:
                    lane.give_back()
        finally:
            closed.set()
            thread.join()

    def _produce(
        self, numbers: range, ready: "queue.Queue[Batch | BaseException]", closed: threading.Event
    ) -> None:
        """The thread: puts each batch, or the error that ends it, into `ready`."""

        def put(item: Batch | BaseException) -> None:
            while not closed.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        done = 0
        try:
            if self.placement.device.type == "cuda":
                # Per thread: from_dlpack waits on its stream.
                torch.cuda.set_device(self.placement.device)
            while done < len(numbers) and not closed.is_set():
                try:
                    for _ in self._made(numbers[done:], put, closed):
                        done += 1
                except BadSamples as error:
                    self.order.replace(error)
        except BaseException as error:
            put(error)

    def _made(
        self, numbers: range, put: Callable[[Batch], None], closed: threading.Event
    ) -> Iterator[None]:
        """Makes the batches with those numbers, and puts each."""
        windows_only, make_reader = self.maker.windows_only, self.maker.make_reader
        feed, lane = Feed(self.order, numbers, windows_only, make_reader), self.maker.lane
        begun, cpu_begun, waited_s = time.perf_counter(), time.thread_time(), 0.0
        room_s = lane.waited_s if lane else 0.0
        try:
            for batch in self.maker.make(feed, closed):
                made, storage_s = time.perf_counter(), feed.reader.waited_s - waited_s
                put(batch)
                if closed.is_set():
                    return
                now, cpu_now = time.perf_counter(), time.thread_time()
                full_s = now - made
                if lane:
                    full_s += lane.waited_s - room_s
                    room_s = lane.waited_s
                self.stages.storage_s += storage_s
                self.stages.decode_s += now - begun - storage_s - full_s
                self.stages.full_s += full_s
                self.stages.thread_s += cpu_now - cpu_begun
                self.stages.images += len(batch.labels)
                begun, cpu_begun, waited_s = now, cpu_now, feed.reader.waited_s
                yield
        finally:
            feed.close()


def train_batches(
    split: Split,
    data: config.Data,
    plan: Plan,
    rank: int,
    placement: Placement,
    first_step: int = 0,
) -> Iterator[Batch]:
    """The training micro-batches of a rank, from update `first_step` to the end of the run."""
    return iter(Loader(TrainingOrder(split, data, plan, rank, first_step), placement))


def eval_loader(
    split: Split,
    data: config.Data,
    batch_size: int,
    rank: int,
    world_size: int,
    placement: Placement,
) -> Loader:
    """A rank's share of the validation batches: over all ranks, each image exactly once."""
    return Loader(EvaluationOrder(split, data, batch_size, rank, world_size), placement)


def measure(
    split: Split, data: config.Data, plan: Plan, rank: int, placement: Placement, seconds: float
) -> tuple[float, bool]:
    """Images/s of this process's training input with nothing else to do, over `seconds`.

    Also returns whether they were steady: the speeds of the first and the second half differ by
    less than a quarter. Other work on the machine disturbs a measurement that is not.
    """
    on_gpu = placement.device.type == "cuda"
    micro = plan.micro_batch_size if on_gpu else min(plan.micro_batch_size, 32)
    small = replace(plan, micro_batch_size=micro, accumulation=1, total_steps=plan.schedule_steps)
    # With the first batch come threads, buffers and the pipeline. Some of the next were ready by
    # then. So many are not counted that as many are ready when the clock starts as when it stops.
    unmeasured = min(1 + 2 * data.queue_depth, small.total_steps - 1)
    # The run itself will tell of samples that are replaced.
    order = TrainingOrder(split, data, small, rank, warn=lambda text: None)
    batches = iter(Loader(order, placement))
    marks = [(time.perf_counter(), 0)]  # of time and images
    for number, batch in enumerate(batches):
        if number == unmeasured:
            marks = [(marks[-1][0], 0)]
        marks.append((time.perf_counter(), marks[-1][1] + len(batch.labels)))
        if number >= unmeasured and marks[-1][0] - marks[0][0] >= seconds:
            break
    batches.close()  # type: ignore[attr-defined]
    speeds = [_speed(marks), _speed(marks[: len(marks) // 2 + 1]), _speed(marks[len(marks) // 2 :])]
    return speeds[0], max(speeds) < 1.25 * min(speeds)


def _speed(marks: Sequence[tuple[float, int]]) -> float:
    """Images/s from the first mark to the last."""
    (begun, before), (ended, after) = marks[0], marks[-1]
    return (after - before) / max(ended - begun, 1e-9)
