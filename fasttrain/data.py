"""Bytes from the tars, DALI pipelines, and the loaders around them.

    draw (ids, windows, flips, ...)     from `sampling`, a pure function of the batch's number
      -> views of the mapped tars       uncopied; page faults are taken by DALI's threads
      -> DALI: decode, cut, resize, augment, mirror, normalise    on the GPU where there is one
      -> Batch(images, labels, draw)    on the device, channels-last

One thread per loader drives DALI and keeps a queue of finished batches; the training thread only
takes from it.
"""

import queue
import threading
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from fasttrain import augment, config, sampling
from fasttrain.sampling import Augment, Draw
from fasttrain.schedule import Plan
from fasttrain.shards import Split

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's RGB in [0, 1], as everybody uses them
STD = (0.229, 0.224, 0.225)


class Batch(NamedTuple):
    """A micro-batch on the device."""

    images: Tensor  # (B, 3, S, S), channels_last, normalised; fp16 on a GPU under AMP, else fp32
    labels: Tensor  # (B,) int64
    draw: Draw | None = None  # what was drawn for it


class DataError(config.Fault, RuntimeError):
    """A batch could not be read; names the samples at fault."""


# --------------------------------------------------------------------------------------------------
# DALI
# --------------------------------------------------------------------------------------------------


class Placement(NamedTuple):
    """Where batches are made and in which form."""

    device: torch.device
    half: bool  # images as fp16 rather than fp32
    threads: int  # of DALI on the CPU


@pipeline_def
def _pipeline(
    source: Callable[[int], Any],
    training: bool,
    settings: config.Data,
    out_px: int,
    decode: str,
    gpu: bool,
    half: bool,
) -> tuple[Any, Any]:
    """Images `(B, S, S, 3)` and labels `(B,)` from what `source` gives for a batch's number.

    `source` returns encoded bytes, labels, corners (y, x) and sizes (h, w) of the windows, flips,
    and what `augment.inputs` names. Both kinds of windows reach PIL's pixels (at most 1/255 off):
    whole-pixel windows are cut first and then resized, fractional ones are resized out of the whole
    image.
    """
    kinds = [types.UINT8, types.INT64, *[types.INT32 if training else types.FLOAT] * 2, types.INT32]
    extra = augment.inputs(settings) if training else {}
    encoded, labels, corner, size, flip, *given = fn.external_source(
        source,
        num_outputs=5 + len(extra),
        batch=True,
        no_copy=True,
        dtype=kinds + [kind for kind, _ in extra.values()],
        ndim=[1, 0, 1, 1, 0] + [dimensions for _, dimensions in extra.values()],
    )
    changes = Augment(**{name: given[place] for place, name in enumerate(extra)})
    rgb = {
        "device": "cpu" if decode == "cpu" else "mixed",
        "output_type": types.RGB,
        "adjust_orientation": False,
    }
    resize: dict[str, Any] = {"size": [out_px, out_px], "interp_type": types.INTERP_LINEAR}
    if not training:
        images = fn.decoders.image(encoded, **rgb)
        resize |= {"roi_start": corner, "roi_end": corner + size}
    elif decode == "gpu_full":
        images = fn.slice(fn.decoders.image(encoded, **rgb), start=corner, shape=size, axes=[0, 1])
    else:
        images = fn.decoders.image_slice(encoded, start=corner, shape=size, axes=[0, 1], **rgb)
    if gpu:
        images, labels = images.gpu(), labels.gpu()
    images = fn.resize(images, antialias=True, **resize)
    images = augment.augment(images, changes, settings)
    images = fn.crop_mirror_normalize(
        images,
        mirror=flip,
        mean=[255 * value for value in MEAN],
        std=[255 * value for value in STD],
        dtype=types.FLOAT16 if half else types.FLOAT,
        output_layout="HWC",
    )
    return augment.erase(images, changes), labels


def _build_pipeline(
    source: Callable[[int], Any],
    training: bool,
    batch_size: int,
    data: config.Data,
    place: Placement,
) -> Any:
    gpu = place.device.type == "cuda"
    decode = data.decode
    if decode == "auto":
        decode = "gpu_full" if gpu else "cpu"
    if not gpu and decode != "cpu":
        raise DataError(f"[data] decode = {decode}: this process has no GPU; use cpu or auto")
    pipeline = _pipeline(
        source=source,
        training=training,
        settings=data,
        out_px=data.crop_px if training else data.eval_crop_px,
        decode=decode,
        gpu=gpu,
        half=place.half,
        batch_size=batch_size,
        num_threads=place.threads,
        device_id=place.device.index if gpu else None,
        prefetch_queue_depth=data.queue_depth,
        enable_conditionals=training and data.augment != "none",
    )
    pipeline.build()
    return pipeline


# --------------------------------------------------------------------------------------------------
# Loaders
# --------------------------------------------------------------------------------------------------


class _ShardBytes:
    """The bytes of a split's images as views of its memory-mapped tars.

    Fresh views each time and never written to: DALI reads them after they were handed over, and
    holds them until it has.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self.maps: dict[int, NDArray[np.uint8]] = {}

    def __getitem__(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        shards, offsets = self.split.shard[ids].tolist(), self.split.offset[ids].tolist()
        sizes = self.split.size[ids].tolist()
        for shard in set(shards) - self.maps.keys():
            self.maps[shard] = self._map(shard)
        places = zip(shards, offsets, sizes, strict=True)
        return [self.maps[shard][offset : offset + size] for shard, offset, size in places]

    def _map(self, shard: int) -> NDArray[np.uint8]:
        path = self.split.shard_paths[shard]
        mapped = np.asarray(np.memmap(path, np.uint8, "r"))
        if len(mapped) != self.split.shard_bytes[shard]:  # a read past its end would be SIGBUS
            raise DataError(f"{path} changed its size while in use; copy it anew")
        return mapped


class Loader:
    """Iterates over `num_batches` batches, drawn by `draw_of(number)` and made ahead by a thread.

    Each iteration starts at batch 0 with a pipeline of its own. Batches come in order; an error of
    the thread is raised where its batch would have come.
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
    ) -> None:
        self.split = split
        self.draw_of = draw_of
        self.num_batches = num_batches
        self.queue_depth = data.queue_depth
        self.build = partial(
            _build_pipeline, training=training, batch_size=batch_size, data=data, place=place
        )
        self.device = place.device
        self.bytes = _ShardBytes(split)

    def __iter__(self) -> Iterator[Batch]:
        ready: queue.Queue[Batch | BaseException] = queue.Queue(self.queue_depth)
        closed = threading.Event()
        thread = threading.Thread(target=self._produce, args=(ready, closed), daemon=True)
        thread.start()
        try:
            for _ in range(self.num_batches):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.set()
            thread.join()

    def _produce(
        self, ready: "queue.Queue[Batch | BaseException]", closed: threading.Event
    ) -> None:
        """The thread: drives DALI and puts what comes out, batch or error, into `ready`."""

        def put(item: Batch | BaseException) -> None:
            while not closed.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        inside: dict[int, Draw] = {}  # draws of the batches that DALI works on

        def source(number: int) -> tuple[Any, ...]:
            # An empty batch would kill DALI, so a process without a share never gets here.
            if number >= self.num_batches or closed.is_set():
                raise StopIteration
            inside[number] = draw = self.draw_of(number)
            labels = self.split.label[draw.ids].astype(np.int64)
            x, y, w, h = draw.windows.T
            corners, sizes = np.stack([y, x], 1), np.stack([h, w], 1)
            extra = [column for column in draw.augment if column is not None]
            return self.bytes[draw.ids], labels, corners, sizes, draw.flips.astype(np.int32), *extra

        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # per thread: from_dlpack waits on its stream
            pipeline = self.build(source)
            for number in range(self.num_batches):
                try:
                    images, labels = (torch.from_dlpack(out.as_tensor()) for out in pipeline.run())
                except DataError:  # of our own source, and already clear
                    raise
                except RuntimeError as error:
                    raise self._at_fault(inside[number].ids, error) from error
                # DALI writes (B, H, W, C); seen as (B, C, H, W) that is channels_last, uncopied.
                put(Batch(images.permute(0, 3, 1, 2), labels, inside.pop(number)))
                if closed.is_set():
                    return
        except BaseException as error:
            put(error)

    def _at_fault(self, ids: NDArray[np.int64], error: RuntimeError) -> DataError:
        """DALI rarely names the sample it could not decode, so the checksums are asked."""
        damaged = [
            self.split.describe(int(sample))
            for sample, data in zip(ids, self.bytes[ids], strict=True)
            if zlib.crc32(data.tobytes()) != self.split.crc32[sample]
        ]
        if damaged:
            listed = "\n  ".join(damaged)
            return DataError(f"these samples are not as they were written:\n  {listed}")
        return DataError(f"DALI could not decode a batch, though its bytes are intact: {error}")


def train_batches(
    split: Split,
    data: config.Data,
    plan: Plan,
    rank: int,
    place: Placement,
    first_step: int,
) -> Iterator[Batch]:
    """The training micro-batches of process `rank`, from update `first_step` to the run's end."""

    def draw_of(number: int) -> Draw:
        done, micro = divmod(number, plan.accumulation)
        step = first_step + done
        if micro == 0 and step % plan.steps_per_epoch == 0:  # the next epoch's order, ahead of time
            upcoming = (plan.seed, plan.epoch_of(step) + 1, plan.num_samples)
            threading.Thread(target=sampling.epoch_order, args=upcoming, daemon=True).start()
        return sampling.train_draw(split, data, plan, step, rank, micro)

    num_batches = (plan.total_steps - first_step) * plan.accumulation
    return iter(Loader(split, data, place, True, draw_of, num_batches, plan.micro_batch_size))


def eval_loader(
    split: Split, data: config.Data, batch_size: int, rank: int, world_size: int, place: Placement
) -> Loader:
    """Process `rank`'s share of the validation images: over all processes, each exactly once."""
    draw_of = partial(sampling.eval_draw, split, data, batch_size, rank, world_size)
    num_batches = sampling.num_eval_batches(split.num_samples, batch_size, rank, world_size)
    return Loader(split, data, place, False, draw_of, num_batches, batch_size)
