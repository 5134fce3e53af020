"""The loader: makes batches on the device, ahead of the training thread.

    draw (ids, windows, flips, ...)     from `order`, a pure function of the batch's number
      -> bytes of the images            from `feed`, ahead of time, uncopied
      -> decode, cut, resize, augment, mirror, normalise      by one of `makers`
      -> Batch(images, labels, draw)    on the device, channels-last

One thread per loader makes the batches and fills a queue. The training thread only takes batches
from the queue.
"""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

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
from fasttrain.teacher_labels import StoredLabels


class Loader:
    """Iterates over the batches of an order, in order. A thread makes them ahead.

    An error of the thread is raised in place of the batch that failed. The loader reports damaged
    samples to the order. If the order replaces them, the thread makes batches again, beginning with
    the one that failed. `stages` sums the durations over all iterations.

    Raises:
        DataError: a batch could not be made. Iterating raises it.
        LabelsError: a file of the teacher's labels is missing or was changed.
    """

    def __init__(
        self,
        order: Order,
        placement: Placement,
        stages: Stages | None = None,
        stored: StoredLabels | None = None,
    ) -> None:
        """
        Args:
            stored: a teacher's labels, which the batches shall have too.
        """
        self.order = order
        self.placement = placement
        self.stages = stages or Stages()
        self.maker = maker_for(order, placement, stored)
        self.iteration = 0

    def __iter__(self) -> Iterator[Batch]:
        self.iteration += 1
        numbers, depth = self.order.numbers(self.iteration), self.order.data.queue_depth
        ready: queue.Queue[Batch | BaseException] = queue.Queue(depth)
        closed = threading.Event()
        if isinstance(self.maker, KernelMaker):
            # In memory: the batch being made, those in the queue, and two in use.
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
                    parts = (item.images, item.labels, item.soft)
                    lane.take([part for part in parts if part is not None])
                yield item
                if lane:
                    lane.give_back()
        finally:
            closed.set()
            thread.join()

    def _produce(
        self, numbers: range, ready: "queue.Queue[Batch | BaseException]", closed: threading.Event
    ) -> None:
        """The thread's function: puts each batch, or the error that ends it, into `ready`."""

        def put(item: Batch | BaseException) -> None:
            while not closed.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        done = 0
        try:
            if self.placement.device.type == "cuda":
                # The device is a setting per thread, and from_dlpack waits on its stream.
                torch.cuda.set_device(self.placement.device)
            while done < len(numbers) and not closed.is_set():
                try:
                    for _ in self._make_batches(numbers[done:], put, closed):
                        done += 1
                except BadSamples as error:
                    self.order.replace(error)
        except BaseException as error:
            put(error)

    def _make_batches(
        self, numbers: range, put: Callable[[Batch], None], closed: threading.Event
    ) -> Iterator[None]:
        """Makes the batches with these numbers, puts each into the queue, and times the stages."""
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
    """A loader for a rank's share of the validation batches.

    All ranks together have each image once.
    """
    return Loader(EvaluationOrder(split, data, batch_size, rank, world_size), placement)


def spread_batches(
    split: Split, data: config.Data, batch_size: int, number: int, placement: Placement
) -> Iterator[Batch]:
    """Batches of about `number` images of a whole split, with the pixels of an evaluation.

    They are every n-th batch of the split. The last one may be smaller.
    """
    wanted = math.ceil(number / batch_size)
    every = max(1, math.ceil(split.num_samples / batch_size) // wanted)
    return islice(eval_loader(split, data, batch_size, 0, every, placement), wanted)


def measure(
    split: Split, data: config.Data, plan: Plan, rank: int, placement: Placement, seconds: float
) -> tuple[float, bool]:
    """Measures the speed of this process's training input alone, without training.

    Args:
        seconds: duration of the measurement.
    Returns:
        Images/s; and True if the speeds of the first and the second half differ by less than a
        quarter. If they do not, other work on the machine disturbed the measurement.
    """
    on_gpu = placement.device.type == "cuda"
    micro = plan.micro_batch_size if on_gpu else min(plan.micro_batch_size, 32)
    small = replace(plan, micro_batch_size=micro, accumulation=1, total_steps=plan.schedule_steps)
    # The first batch includes the start of threads, buffers and pipeline, and the queues fill
    # meanwhile. After this many batches, the queues hold as many as at the end of the measurement.
    unmeasured = min(1 + 2 * data.queue_depth, small.total_steps - 1)
    # No warnings: the run itself reports the samples that it replaces.
    order = TrainingOrder(split, data, small, rank, warn=lambda text: None)
    batches = iter(Loader(order, placement))
    marks = [(time.perf_counter(), 0)]  # time and number of images so far
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
    (begun, images_then), (ended, images_now) = marks[0], marks[-1]
    return (images_now - images_then) / max(ended - begun, 1e-9)
