"""The loaders: batches on the device, made ahead of the training thread.

    draw (ids, windows, flips, ...)     from `sampling`, a pure function of the batch's number
      -> bytes of the images            from `reading`, ahead of time, uncopied
      -> decode, cut, resize, augment, mirror, normalise
            GPU    DALI does all of it, there; raw images are gathered into one buffer a batch,
                   copied at once and finished by one kernel
            CPU    DALI decodes the windows, `resize` does the rest; where images are augmented,
                   DALI does it all
      -> Batch(images, labels, draw)    on the device, channels-last

One thread per loader drives this and keeps a queue of finished batches; the training thread only
takes from it.
"""

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fasttrain import config, sampling
from fasttrain.forecast import Stages
from fasttrain.gather import Packer
from fasttrain.lane import Lane, pinned
from fasttrain.reading import BadSamples, DataError, Feed, faults_of, plain_grey, remedy
from fasttrain.resize import Pending, Resizer
from fasttrain.sampling import Draw, Piece
from fasttrain.schedule import Plan
from fasttrain.shards import Split


class Batch(NamedTuple):
    """A micro-batch on the device."""

    images: Tensor  # (B, 3, S, S), channels_last, normalised; fp16 on a GPU under AMP, else fp32
    labels: Tensor  # (B,) int64
    draw: Draw | None = None  # what was drawn for it


class Placement(NamedTuple):
    """Where batches are made and in which form."""

    device: torch.device
    half: bool  # images as fp16 rather than fp32
    threads: int  # that decode on the CPU


# --------------------------------------------------------------------------------------------------
# Loaders
# --------------------------------------------------------------------------------------------------


def decode_of(split: Split, data: config.Data, place: Placement) -> str:
    """How the images of a split are decoded: `raw`, `cpu`, or a strategy of the GPU."""
    if split.store == "raw":
        return "raw"
    if data.decode == "auto":  # untested; `decoding.choose` tests
        return "gpu_full" if place.device.type == "cuda" else "cpu"
    return data.decode


def by_kernel(data: config.Data, place: Placement, training: bool) -> bool:
    """Whether raw images are finished by `resize_gpu`; where it fails, says so and why, once."""
    changed = training and (data.augment != "none" or any(data.color_jitter))
    if place.device.type != "cuda" or changed:
        return False
    fault = _kernel_fault(place.device, data.interpolation == "bicubic", place.half)
    return not fault


@lru_cache
def _kernel_fault(device: torch.device, cubic: bool, half: bool) -> str:
    try:
        from fasttrain import resize_gpu
    except ImportError as error:
        fault = str(error)
    else:
        fault = resize_gpu.fault(device, cubic, half)
    if fault:
        _to_stderr(
            f"raw images: the kernel that resizes them does not run on {device} ({fault}), so DALI "
            "does it, more slowly; Triton and a C compiler would mend it"
        )
    return fault


class Loader:
    """Iterates over `num_batches` batches, drawn by `draw_of(number)` and made ahead by a thread.

    Each iteration starts at batch 0. Batches come in order; an error of the thread is raised where
    its batch would have come. `stages` adds up over all iterations.

    Where `replace` is given, samples that turn out to be damaged are reported to it: if it returns,
    the batches are made anew from the one that failed, by draws without them.
    """

    def __init__(
        self,
        split: Split,
        data: config.Data,
        place: Placement,
        training: bool,
        draw_of: Callable[[int], Draw],
        num_batches: int,
        batch_size: int,  # of the largest batch
        pieces_of: Callable[[int], Sequence[Piece]] | None = None,
        stages: Stages | None = None,
        verify: Callable[[int, int], bool] = lambda number, passes: False,
        replace: Callable[[BadSamples], None] | None = None,
    ) -> None:
        """`verify` says whether a batch is verified, given its number and that of the iteration,
        from 1."""
        self.split = split
        self.passes = 0
        self.replace = replace
        self.data = data
        self.place = place
        self.num_batches = num_batches
        self.batch_size = batch_size
        self.stages = stages or Stages()
        self.decode = decode_of(split, data, place)
        self.raw = self.decode == "raw"
        # Where DALI resizes on a CPU, it takes most of the time: see `resize`.
        self.on_cpu = (
            training
            and place.device.type == "cpu"
            and self.decode in ("cpu", "raw")
            and not sampling.augmented(data)
        )
        self.by_kernel = self.raw and by_kernel(data, place, training)
        self.lane: Lane | None = None  # of the iteration that goes on, where a kernel finishes
        self.training = training
        self.given: tuple[Feed, threading.Event] | None = None  # what `_source` gives DALI
        self.kept: Any = None  # DALI's pipeline, for the next iteration
        self.kind = "windows" if self.on_cpu else "train" if training else "val"
        self.open_feed = partial(
            Feed, split, data, draw_of, num_batches, self.raw and training, pieces_of,
            lambda number: verify(number, self.passes),
        )  # fmt: skip
        if self.by_kernel:
            from fasttrain import resize_gpu

            make = pinned if place.device.type == "cuda" else None
            packer = partial(Packer, head_bytes=resize_gpu.HEAD_BYTES, make=make)
            self.open_feed = partial(self.open_feed, read=packer)

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        ready: queue.Queue[Batch | BaseException] = queue.Queue(self.data.queue_depth)
        closed = threading.Event()
        # At work: the batch being made, those that are ready, and two that are used.
        self.lane = Lane(self.place.device, self.data.queue_depth + 3) if self.by_kernel else None
        thread = threading.Thread(target=self._produce, args=(ready, closed), daemon=True)
        thread.start()
        try:
            for _ in range(self.num_batches):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                if self.lane:
                    self.lane.take([item.images, item.labels])
                yield item
                if self.lane:
                    self.lane.give_back()
        finally:
            closed.set()
            thread.join()

    def _produce(
        self, ready: "queue.Queue[Batch | BaseException]", closed: threading.Event
    ) -> None:
        """The thread: puts what is made, batch or error, into `ready`."""

        def put(item: Batch | BaseException) -> None:
            while not closed.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        done = 0
        try:
            if self.place.device.type == "cuda":
                # Per thread: from_dlpack waits on its stream.
                torch.cuda.set_device(self.place.device)
            while done < self.num_batches and not closed.is_set():
                try:
                    for _ in self._made(done, put, closed):
                        done += 1
                except BadSamples as error:
                    if self.replace is None:
                        raise
                    self.replace(error)
        except BaseException as error:
            put(error)

    def _made(
        self, first: int, put: Callable[[Batch], None], closed: threading.Event
    ) -> Iterator[None]:
        """Makes the batches from `first` on, each of which it has `put`."""
        feed = self.open_feed(first=first)
        make = self._by_dali
        if self.by_kernel or self.on_cpu:
            make = self._by_kernel if self.by_kernel else self._resized
        begun, cpu_begun, waited_s = time.perf_counter(), time.thread_time(), 0.0
        room_s = self.lane.waited_s if self.lane else 0.0
        try:
            for batch in make(feed, closed):
                made, storage_s = time.perf_counter(), feed.reader.waited_s - waited_s
                put(batch)
                if closed.is_set():
                    return
                now, cpu_now = time.perf_counter(), time.thread_time()
                full_s = now - made
                if self.lane:
                    full_s += self.lane.waited_s - room_s
                    room_s = self.lane.waited_s
                self.stages.storage_s += storage_s
                self.stages.decode_s += now - begun - storage_s - full_s
                self.stages.full_s += full_s
                self.stages.thread_s += cpu_now - cpu_begun
                self.stages.images += len(batch.labels)
                begun, cpu_begun, waited_s = now, cpu_now, feed.reader.waited_s
                yield
        finally:
            feed.close()

    def _by_dali(self, feed: Feed, closed: threading.Event) -> Iterator[Batch]:
        pipeline = _dali()

        for images, draw in self._run_dali(feed, closed):
            # DALI writes (B, H, W, C); seen as (B, C, H, W) that is channels_last, uncopied.
            pixels = pipeline.tensor_of(images).permute(0, 3, 1, 2)
            yield Batch(pixels, self._labels(draw), draw)

    def _by_kernel(self, feed: Feed, closed: threading.Event) -> Iterator[Batch]:
        """Raw images: one copy to the device and one kernel there for each batch."""
        from fasttrain import resize_gpu

        assert self.lane
        lane, split, cubic = self.lane, self.split, self.data.interpolation == "bicubic"
        # One buffer there for all batches: the next is copied once the kernel has read the last,
        # as both are given to one stream.
        there = torch.empty(0, dtype=torch.uint8, device=self.place.device)
        copied: Any = None  # happens when the last batch's pinned buffer has been read
        try:
            for number in range(feed.num_batches):
                draw, packed = feed(number)
                if not lane.begin(closed):
                    return
                size, ids = len(draw.ids), draw.ids
                head = resize_gpu.head_of(packed.buffer, size)
                image_size = split.width[ids], split.height[ids]
                resize_gpu.describe(head, draw, packed.starts, image_size, split.label[ids])
                with lane.work():
                    here = torch.from_numpy(packed.buffer)
                    if len(there) < len(here):
                        there = there.new_empty(len(here) * 5 // 4)
                    there[: len(here)].copy_(here, non_blocking=True)
                    copying = lane.event()
                    images = resize_gpu.resize(there, size, draw.out_px, cubic, self.place.half)
                    labels = resize_gpu.head_of(there, size).labels.clone()
                if number:
                    if copied:
                        copied.synchronize()
                    feed.done(number - 1)
                copied = copying
                lane.finish()
                yield Batch(images, labels, draw)
        finally:
            lane.close()  # so that no pinned buffer is freed while it is read

    def _resized(self, feed: Feed, closed: threading.Event) -> Iterator[Batch]:
        """On a CPU: while the windows of one batch are resized, those of the next are decoded."""
        resizer = Resizer(self.place.threads, self.data.interpolation)
        try:
            before: tuple[Pending, Draw, Any] | None = None
            for windows, draw, owner in self._windows(feed, closed):
                now = resizer.start(windows, draw.flips, draw.out_px), draw, owner
                if before:
                    yield self._finished(*before)
                before = now
            if before:
                yield self._finished(*before)
        finally:
            resizer.close()

    def _finished(self, pending: Pending, draw: Draw, owner: Any) -> Batch:
        """`owner` is what holds the windows; it is kept up to here."""
        return Batch(pending.result(), self._labels(draw), draw)

    def _windows(
        self, feed: Feed, closed: threading.Event
    ) -> Iterator[tuple[list[NDArray[np.uint8]], Draw, Any]]:
        """Windows uint8 `(h, w, 3)` of each batch, and what holds their memory."""
        if not self.raw:
            for images, draw in self._run_dali(feed, closed):
                yield [np.asarray(images[place]) for place in range(len(draw.ids))], draw, images
            return
        for number in range(feed.num_batches):
            draw, rows = feed(number)
            widths, windows = self.split.width[draw.ids].tolist(), draw.windows.tolist()
            yield (
                [
                    np.frombuffer(part, np.uint8).reshape(h, width, 3)[:, x : x + w]
                    for part, width, (x, _, w, h) in zip(rows, widths, windows, strict=True)
                ],
                draw,
                feed,
            )
            # Handed to the resizer, which is done with them one batch later.
            if number:
                feed.done(number - 1)

    def _run_dali(self, feed: Feed, closed: threading.Event) -> Iterator[tuple[Any, Draw]]:
        """What DALI makes of each batch."""
        pipeline = _dali()

        self.given = feed, closed
        graph, self.kept = self.kept, None
        if graph is None:
            height, width = self.split.height, self.split.width
            at = int(np.multiply(height, width, dtype=np.int64).argmax())
            form = pipeline.Form(self.kind, self.decode, (int(height[at]), int(width[at])))
            graph = pipeline.build(form, self.data, self._source, self.place, self.batch_size)
        made = 0
        try:
            for number in range(feed.num_batches):
                try:
                    (images,) = graph.run()
                except DataError:  # of our own source, and already clear
                    raise
                except RuntimeError as error:
                    raise self._at_fault(feed, error) from error
                made += 1
                yield images, feed.done(number)
        finally:
            if made == feed.num_batches and not self.training:
                # To build another one for each evaluation takes seconds on a GPU.
                with contextlib.suppress(StopIteration):
                    graph.run()  # asks the source, which has nothing left
                graph.reset()
                self.kept = graph
            self.given = None

    def _source(self, number: int) -> tuple[Any, ...]:
        """What DALI is given for batch `number` of the feed."""
        pipeline = _dali()

        assert self.given
        feed, closed = self.given
        # An empty batch would kill DALI, so a process without a share never gets here.
        if number >= feed.num_batches or closed.is_set():
            raise StopIteration
        draw, views = feed(number)
        if self.kind == "val" and not self.raw:
            # Windows that are not all within their image are a crash of the process.
            faults = faults_of(self.split, draw.ids.tolist(), views, checksums=False)
            if faults:
                raise BadSamples(self.split, faults)
        x, y, w, h = draw.windows.T
        if self.raw:
            images = pipeline.pixels_of(views, self.split.width[draw.ids].tolist())
            y = np.zeros_like(y) if self.kind == "train" else y  # rows are cut already
        else:
            if self.decode.startswith("gpu"):
                views = [plain_grey(view) for view in views]
            images = pipeline.bytes_of(views)
        cut = images, np.stack([y, x], 1), np.stack([h, w], 1)
        if self.kind == "windows":
            return cut
        out = np.full((len(views), 2), draw.out_px, np.float32)
        changes = [column for column in draw.augment if column is not None]
        return *cut, draw.flips.astype(np.int32), out, *changes

    def _labels(self, draw: Draw) -> Tensor:
        labels = torch.from_numpy(self.split.label[draw.ids].astype(np.int64))
        return labels.to(self.place.device, non_blocking=True)

    def _at_fault(self, feed: Feed, error: RuntimeError) -> DataError:
        """DALI rarely names the sample that it could not decode: asks checksums, then headers."""
        faults: dict[int, str] = {}
        for number in feed.reader.started if not self.raw else ():
            faults |= faults_of(
                self.split, feed.draws[number].ids.tolist(), feed.reader.take(number)
            )
        if faults:
            return BadSamples(self.split, faults)
        return DataError(
            f"DALI could not decode a batch, though its bytes are intact: {error}"
            f"{remedy(self.split)}"
        )


def _dali() -> ModuleType:
    """`fasttrain.pipeline`, imported where it is needed, as DALI may not be there."""
    try:
        from fasttrain import pipeline
    except ModuleNotFoundError as error:
        raise DataError(
            f"these images are made by DALI, which is not installed here ({error}): pip install "
            "nvidia-dali-cuda130, or for CUDA 12 as the README says"
        ) from None
    return pipeline


def _to_stderr(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def train_batches(
    split: Split,
    data: config.Data,
    plan: Plan,
    rank: int,
    place: Placement,
    first_step: int,
    stages: Stages | None = None,
    warn: Callable[[str], object] = _to_stderr,
) -> Iterator[Batch]:
    """The training micro-batches of process `rank`, from update `first_step` to the run's end.

    `warn` is told once of each sample that is replaced, in a thread of the loader.

    Raises:
        DataError: while iterating; a batch could not be made.
    """
    bad: dict[int, str] = {}  # samples that are replaced from here on, and why

    def replace_bad(error: BadSamples) -> None:
        assert not error.faults.keys() <= bad.keys()  # or it would never end
        bad.update(error.faults)
        if len(bad) > min(data.max_bad_samples, split.num_samples // 2):
            what = "damaged, and more than may be replaced (data.max_bad_samples, or half of all)"
            raise BadSamples(split, bad, what) from error
        warn(f"{error}\n{len(bad)} damaged samples so far are replaced by others")

    def verify(number: int, passes: int) -> bool:
        epoch = plan.epoch_of(first_step + number // plan.accumulation)
        return data.verify == "always" or (data.verify == "first_epoch" and epoch == 0)

    def draw_of(number: int) -> Draw:
        done, micro = divmod(number, plan.accumulation)
        step = first_step + done
        if micro == 0 and step % plan.steps_per_epoch == 0:  # the next epoch's order, ahead of time
            upcoming = (plan.seed, plan.epoch_of(step) + 1, split, sampling.block_size(data))
            threading.Thread(target=sampling.epoch_order, args=upcoming, daemon=True).start()
        return sampling.train_draw(split, data, plan, step, rank, micro, bad.keys())

    def pieces_of(number: int) -> Sequence[Piece]:
        done, micro = divmod(number, plan.accumulation)
        if micro:
            return ()
        return sampling.pieces_ahead(split, data, plan, first_step + done, rank, number == 0)

    num_batches = (plan.total_steps - first_step) * plan.accumulation
    return iter(
        Loader(
            split, data, place, True, draw_of, num_batches, plan.micro_batch_size,
            pieces_of if data.shuffle == "blocks" else None, stages, verify,
            replace_bad if data.on_bad_sample == "replace" else None,
        )
    )  # fmt: skip


def measure(
    split: Split, data: config.Data, plan: Plan, rank: int, place: Placement, seconds: float
) -> tuple[float, bool]:
    """Images/s of this process's training input with nothing else to do, over `seconds`.

    Also returns whether they were steady: the speeds of the first and the second half differ by
    less than a quarter. Other work on the machine disturbs a measurement that is not.
    """
    micro = plan.micro_batch_size if place.device.type == "cuda" else min(plan.micro_batch_size, 32)
    small = replace(plan, micro_batch_size=micro, accumulation=1, total_steps=plan.schedule_steps)
    # With the first came threads, buffers and the pipeline. The next were ready by then, in part:
    # so many that what is ready when the clock starts is as much as when it stops.
    unmeasured = min(1 + 2 * data.queue_depth, small.total_steps - 1)
    # Of samples that are replaced, the run itself will tell.
    batches = train_batches(split, data, small, rank, place, 0, warn=lambda text: None)
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


def eval_loader(
    split: Split, data: config.Data, batch_size: int, rank: int, world_size: int, place: Placement
) -> Loader:
    """Process `rank`'s share of the validation images: over all processes, each exactly once."""
    draw_of = partial(sampling.eval_draw, split, data, batch_size, rank, world_size)
    num_batches = sampling.num_eval_batches(split.num_samples, batch_size, rank, world_size)
    checked = {"off": 0, "first_epoch": 1, "always": sys.maxsize}[data.verify]
    return Loader(
        split, data, place, False, draw_of, num_batches, batch_size,
        verify=lambda number, passes: passes <= checked,
    )  # fmt: skip
