"""Makes batches on the device from draws and bytes.

DaliMaker      DALI decodes, cuts, resizes, augments, mirrors and normalises
WindowMaker    on a CPU without augmentations: DALI decodes the windows, `resize` does the rest
KernelMaker    raw images on a GPU: one copy per batch, and one kernel that does the rest
"""

import contextlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fasttrain import config, decoder, sampling
from fasttrain.batch import Batch, Placement
from fasttrain.decoder import Decoder
from fasttrain.feed import Feed, MakeReader
from fasttrain.gather import Packer
from fasttrain.lane import Lane, pinned
from fasttrain.order import Order
from fasttrain.reading import (
    BadSamples,
    DataError,
    ShardReader,
    faults_of,
    plain_grey,
    remedy,
)
from fasttrain.resize import Pending, Resizer
from fasttrain.sampling import Draw
from fasttrain.shards import Split
from fasttrain.teacher_labels import StoredLabels


def decoder_of(split: Split, data: config.Data, placement: Placement) -> Decoder:
    """The decoder of a split's images. Its strategy is `raw`, `cpu`, or one of the GPU's."""
    if split.store == "raw":
        return Decoder("raw")
    chosen = placement.decoder or decoder.as_recipe_says(data)
    if chosen.strategy == "auto":  # a guess, because nothing was tried: `decoding` tries
        return replace(chosen, strategy="gpu_full" if placement.device.type == "cuda" else "cpu")
    return chosen


def maker_for(
    order: Order, placement: Placement, stored: StoredLabels | None = None
) -> "DaliMaker | WindowMaker | KernelMaker":
    """The fastest maker for these images, settings and device.

    Args:
        stored: a teacher's labels, which the batches shall have too.
    """
    strategy = decoder_of(order.split, order.data, placement).strategy
    if strategy == "raw" and kernel_works(order.data, placement, order.training):
        return KernelMaker(order, placement, stored)
    on_cpu = placement.device.type == "cpu" and strategy in ("cpu", "raw")
    # On a CPU, DALI's resizing would take most of the time: see `resize`.
    if order.training and on_cpu and not sampling.augmented(order.data):
        return WindowMaker(order, placement, stored)
    return DaliMaker(order, placement, "train" if order.training else "val", stored)


# --------------------------------------------------------------------------------------------------
# DALI
# --------------------------------------------------------------------------------------------------


def _dali() -> ModuleType:
    """Returns `fasttrain.pipeline`. It is imported late, because DALI may not be installed."""
    try:
        from fasttrain import pipeline
    except ModuleNotFoundError as error:
        raise DataError(
            f"these images need DALI, which is not installed here ({error}): pip install "
            "nvidia-dali-cuda130; for CUDA 12, see the README"
        ) from None
    return pipeline


def labels_of(split: Split, draw: Draw, device: torch.device) -> Tensor:
    """Labels int64 `(B,)` of a draw, on the device."""
    labels = torch.from_numpy(split.label[draw.ids].astype(np.int64))
    return labels.to(device, non_blocking=True)


def soft_of(stored: StoredLabels | None, draw: Draw, device: torch.device) -> Tensor | None:
    """The teacher's labels of a draw on the device, int16 `(B, 2, k)`; None if there are none."""
    if stored is None:
        return None
    labels = torch.from_numpy(stored.take(draw.view, draw.ids))
    if device.type == "cuda":  # only a copy from pinned memory lets this thread go on
        labels = labels.pin_memory()
    return labels.to(device, non_blocking=True)


class DaliMaker:
    """Runs a DALI graph over the batches of a feed."""

    lane: Lane | None = None

    def __init__(
        self, order: Order, placement: Placement, kind: str, stored: StoredLabels | None = None
    ) -> None:
        """
        Args:
            kind: the kind of the graph: see `pipeline.Form`.
        """
        self.stored = stored
        self.order, self.split, self.data = order, order.split, order.data
        self.placement = placement
        self.kind = kind
        self.decoder = decoder_of(order.split, order.data, placement)
        self.raw = self.decoder.strategy == "raw"
        self.windows_only = self.raw and order.training
        self.make_reader: MakeReader = ShardReader
        self.current: tuple[Feed, threading.Event] | None = None  # the arguments of `run`
        self.kept: Any = None  # DALI's pipeline, reused by the next iteration

    def make(self, feed: Feed, closed: threading.Event) -> Iterator[Batch]:
        """Yields the batches of a feed, until `closed` is set."""
        pipeline = _dali()
        for images, draw in self.run(feed, closed):
            # DALI writes (B, H, W, C). Viewed as (B, C, H, W), that is channels-last, uncopied.
            pixels = pipeline.tensor_of(images).permute(0, 3, 1, 2)
            device = self.placement.device
            soft = soft_of(self.stored, draw, device)
            yield Batch(pixels, labels_of(self.split, draw, device), draw, soft)

    def run(self, feed: Feed, closed: threading.Event) -> Iterator[tuple[Any, Draw]]:
        """Yields DALI's output for each batch, as DALI's own lists, and the batch's draw."""
        self.current = feed, closed
        graph, self.kept = self.kept or self._build(), None
        made = 0
        try:
            for number in feed.numbers:
                try:
                    (images,) = graph.run()
                except DataError:  # raised by `_source`: the message is complete
                    raise
                except RuntimeError as error:
                    raise self._fault(feed, error) from error
                made += 1
                yield images, feed.done(number)
        finally:
            if made == len(feed.numbers) and not self.order.training:
                # Keep the pipeline: building one for each evaluation takes seconds on a GPU.
                with contextlib.suppress(StopIteration):
                    graph.run()  # lets DALI see that the source is exhausted
                graph.reset()
                self.kept = graph
            self.current = None

    def _build(self) -> Any:
        pipeline = _dali()
        height, width = self.split.height, self.split.width
        largest = int(np.multiply(height, width, dtype=np.int64).argmax())
        form = pipeline.Form(self.kind, self.decoder, (int(height[largest]), int(width[largest])))
        return pipeline.build(form, self.data, self._source, self.placement, self.order.batch_size)

    def _source(self, index: int) -> tuple[Any, ...]:
        """The inputs of DALI's graph for the feed's batch at `index`, from 0."""
        assert self.current
        feed, closed = self.current
        # DALI crashes on an empty batch. So a rank without batches never runs the graph.
        if index >= len(feed.numbers) or closed.is_set():
            raise StopIteration
        draw, views = feed(feed.numbers[index])
        if self.kind == "val" and not self.raw:
            # A window outside its image would crash the process.
            if faults := faults_of(self.split, draw.ids.tolist(), views, checksums=False):
                raise BadSamples(self.split, faults)
        images, corner, size = self._cut(draw, views)
        if self.kind == "windows":
            return images, corner, size
        out = np.full((len(views), 2), draw.out_px, np.float32)
        changes = [column for column in draw.augment if column is not None]
        return images, corner, size, draw.flips.astype(np.int32), out, *changes

    def _cut(self, draw: Draw, views: list[memoryview]) -> tuple[Any, Any, Any]:
        """Images as DALI's lists; corner (y, x) and size (h, w) of each window, `(B, 2)`."""
        pipeline = _dali()
        x, y, w, h = draw.windows.T
        if self.raw:
            images = pipeline.pixels_of(views, self.split.width[draw.ids].tolist())
            y = np.zeros_like(y) if self.kind == "train" else y  # the feed has cut the rows
        else:
            if self.decoder.strategy.startswith("gpu"):
                views = [plain_grey(view) for view in views]
            images = pipeline.bytes_of(views)
        return images, np.stack([y, x], 1), np.stack([h, w], 1)

    def _fault(self, feed: Feed, error: RuntimeError) -> DataError:
        """Finds the damaged sample by checksums and headers, because DALI rarely names it."""
        faults: dict[int, str] = {}
        for number in feed.reader.started if not self.raw else ():
            ids = feed.draws[number].ids.tolist()
            faults |= faults_of(self.split, ids, feed.reader.take(number))
        if faults:
            return BadSamples(self.split, faults)
        return DataError(
            f"DALI could not decode a batch, although its bytes are intact: {error}"
            f"{remedy(self.split)}"
        )


# --------------------------------------------------------------------------------------------------
# The CPU
# --------------------------------------------------------------------------------------------------


class WindowMaker:
    """Makes batches on a CPU. DALI decodes one batch while `resize` resizes the previous one."""

    lane: Lane | None = None

    def __init__(
        self, order: Order, placement: Placement, stored: StoredLabels | None = None
    ) -> None:
        self.split, self.data, self.placement = order.split, order.data, placement
        self.stored = stored
        self.dali = DaliMaker(order, placement, "windows")
        self.windows_only = self.dali.windows_only
        self.make_reader: MakeReader = ShardReader

    def make(self, feed: Feed, closed: threading.Event) -> Iterator[Batch]:
        """Yields the batches of a feed, until `closed` is set."""
        resizer = Resizer(self.placement.threads, self.data.interpolation)
        try:
            previous: tuple[Pending, Draw, Any] | None = None
            for windows, draw, owner in self._windows(feed, closed):
                now = resizer.start(windows, draw.flips, draw.out_px), draw, owner
                if previous:
                    yield self._finished(*previous)
                previous = now
            if previous:
                yield self._finished(*previous)
        finally:
            resizer.close()

    def _finished(self, pending: Pending, draw: Draw, owner: Any) -> Batch:
        """Waits for a batch's windows to be resized. `owner` keeps their memory until then."""
        device = self.placement.device
        labels, soft = labels_of(self.split, draw, device), soft_of(self.stored, draw, device)
        return Batch(pending.result(), labels, draw, soft)

    def _windows(
        self, feed: Feed, closed: threading.Event
    ) -> Iterator[tuple[list[NDArray[np.uint8]], Draw, Any]]:
        """Yields a batch's windows uint8 `(h, w, 3)`, its draw, and the owner of their memory."""
        if not self.dali.raw:
            for images, draw in self.dali.run(feed, closed):
                yield [np.asarray(images[row]) for row in range(len(draw.ids))], draw, images
            return
        for number in feed.numbers:
            draw, rows = feed(number)
            widths, windows = self.split.width[draw.ids].tolist(), draw.windows.tolist()
            cut = [
                np.frombuffer(part, np.uint8).reshape(h, width, 3)[:, x : x + w]
                for part, width, (x, _, w, h) in zip(rows, widths, windows, strict=True)
            ]
            yield cut, draw, feed
            # By now the resizer has finished the previous batch.
            if number > feed.numbers.start:
                feed.done(number - 1)


# --------------------------------------------------------------------------------------------------
# A kernel on the GPU
# --------------------------------------------------------------------------------------------------


def kernel_works(data: config.Data, placement: Placement, training: bool) -> bool:
    """True if `resize_gpu` can make batches of raw images for these settings and this device.

    Prints a warning once if the kernel fails on a GPU.
    """
    needs_dali = training and (data.augment != "none" or any(data.color_jitter))
    if placement.device.type != "cuda" or needs_dali:
        return False
    return not _kernel_fault(placement.device, data.interpolation == "bicubic", placement.half)


@lru_cache
def _kernel_fault(device: torch.device, cubic: bool, half: bool) -> str:
    try:
        from fasttrain import resize_gpu
    except ImportError as error:
        fault = str(error)
    else:
        fault = resize_gpu.fault(device, cubic, half)
    if fault:
        sys.stderr.write(
            f"WARNING: raw images: the kernel that resizes them does not run on {device} "
            f"({fault}), so DALI resizes them, more slowly; the kernel needs Triton and a C "
            "compiler\n"
        )
    return fault


class KernelMaker:
    """Makes batches of raw images on a GPU, by one copy and one kernel per batch."""

    def __init__(
        self, order: Order, placement: Placement, stored: StoredLabels | None = None
    ) -> None:
        from fasttrain import resize_gpu

        self.stored = stored
        self.split, self.data, self.placement = order.split, order.data, placement
        self.windows_only = order.training
        make = pinned if placement.device.type == "cuda" else None
        self.make_reader: MakeReader = partial(Packer, head_bytes=resize_gpu.HEAD_BYTES, make=make)
        self.lane: Lane | None = None  # of the current iteration; the loader sets it

    def make(self, feed: Feed, closed: threading.Event) -> Iterator[Batch]:
        """Yields the batches of a feed, until `closed` is set."""
        from fasttrain import resize_gpu

        assert self.lane
        lane, split, cubic = self.lane, self.split, self.data.interpolation == "bicubic"
        # One device buffer serves all batches: copies and kernels run in order on one stream.
        on_device = torch.empty(0, dtype=torch.uint8, device=self.placement.device)
        copied: Any = None  # an event: the device has read the previous batch's pinned buffer
        try:
            for number in feed.numbers:
                draw, packed = feed(number)
                if not lane.begin(closed):
                    return
                size, ids = len(draw.ids), draw.ids
                head = resize_gpu.head_of(packed.buffer, size)
                image_size = split.width[ids], split.height[ids]
                resize_gpu.write_head(head, draw, packed.starts, image_size, split.label[ids])
                with lane.work():
                    on_host = torch.from_numpy(packed.buffer)
                    if len(on_device) < len(on_host):
                        on_device = on_device.new_empty(len(on_host) * 5 // 4)
                    on_device[: len(on_host)].copy_(on_host, non_blocking=True)
                    copying = lane.event()
                    half = self.placement.half
                    images = resize_gpu.resize(on_device, size, draw.out_px, cubic, half)
                    labels = resize_gpu.head_of(on_device, size).labels.clone()
                    soft = soft_of(self.stored, draw, self.placement.device)
                if number > feed.numbers.start:
                    if copied:
                        copied.synchronize()
                    feed.done(number - 1)
                copied = copying
                lane.finish()
                yield Batch(images, labels, draw, soft)
        finally:
            lane.close()  # the device must not read a pinned buffer after it is freed
