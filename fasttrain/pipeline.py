"""The DALI graph that turns bytes of images into batches. Needs DALI; `data` imports it late."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.tensors import TensorCPU

from fasttrain import augment, config
from fasttrain.resize import MEAN, STD
from fasttrain.sampling import Augment


class Form(NamedTuple):
    """Which graph is built."""

    kind: str  # `train`, `val` or `windows`, see `_graph`
    decode: str  # `raw` where the images are pixels, else as `data.decode`
    largest: tuple[int, int]  # height and width of an image, for buffers that need not grow


class Place(Protocol):
    """Where it runs; `data.Placement` is one."""

    @property
    def device(self) -> torch.device: ...
    @property
    def half(self) -> bool: ...
    @property
    def threads(self) -> int: ...


def build(
    form: Form,
    settings: config.Data,
    source: Callable[[int], Any],
    place: Place,
    batch_size: int,
) -> Any:
    """The pipeline, ready to `run`; `source` is asked for batches by their numbers from 0.

    Args:
        batch_size: of the largest batch.
    """
    gpu = place.device.type == "cuda"
    pipeline = _graph(
        source=source,
        form=form,
        settings=settings,
        gpu=gpu,
        half=place.half,
        batch_size=batch_size,
        num_threads=place.threads,
        device_id=place.device.index if gpu else None,
        prefetch_queue_depth=settings.queue_depth,
        enable_conditionals=form.kind == "train" and settings.augment != "none",
    )
    pipeline.build()
    return pipeline


def bytes_of(views: Sequence[memoryview]) -> list[TensorCPU]:
    """Images as they are stored, for `build`'s source."""
    return [TensorCPU(view, "") for view in views]


def pixels_of(views: Sequence[memoryview], widths: Sequence[int]) -> list[TensorCPU]:
    """Raw images, or rows of them, of these widths, for `build`'s source."""
    return [
        TensorCPU(np.frombuffer(view, np.uint8).reshape(-1, width, 3), "HWC")
        for view, width in zip(views, widths, strict=True)
    ]


@pipeline_def
def _graph(
    source: Callable[[int], Any], form: Form, settings: config.Data, gpu: bool, half: bool
) -> Any:
    """What DALI makes of what `source` gives for a batch's number.

    `source` returns the images' bytes (or their pixels, uint8 `(h, w, 3)`), corners (y, x) and
    sizes (h, w) of the windows, flips, the size (h, w) of the images that come out, and what
    `augment.inputs` names.

    The kind `train` cuts whole-pixel windows and then resizes them, `val` resizes fractional
    windows out of whole images: both reach PIL's pixels (at most 1/255 off). `windows` stops at the
    windows. On a CPU, the GPU's ways of decoding decode there.

    Returns:
        Images `(B, S, S, 3)`, normalised; or windows uint8 `(h, w, 3)`.
    """
    kind, decode, largest = form
    source_type = types.FLOAT if kind == "val" else types.INT32  # of the windows
    extra = augment.inputs(settings) if kind == "train" else {}
    inputs = [(types.UINT8, 3 if decode == "raw" else 1), (source_type, 1), (source_type, 1)]
    if kind != "windows":
        inputs += [(types.INT32, 0), (types.FLOAT, 1), *extra.values()]
    images, corner, size, *more = fn.external_source(
        source,
        num_outputs=len(inputs),
        batch=True,
        no_copy=True,
        dtype=[dtype for dtype, _ in inputs],
        ndim=[ndim for _, ndim in inputs],
        layout=["HWC" if decode == "raw" else "", *[""] * (len(inputs) - 1)],
    )
    window = {"start": corner, "shape": size, "axes": [0, 1]}
    rgb: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False, "device": "cpu"}
    if gpu and decode.startswith("gpu"):
        rgb |= {
            "device": "mixed",
            "hw_decoder_load": settings.hw_decoder_load,
            "preallocate_height_hint": largest[0],
            "preallocate_width_hint": largest[1],
        }
    if decode != "raw" and (kind == "val" or decode == "gpu_full"):
        images = fn.decoders.image(images, **rgb)
    elif decode != "raw":
        images = fn.decoders.image_slice(images, **window, **rgb)
    if kind != "val" and decode in ("raw", "gpu_full"):
        images = fn.slice(images, **window)
    if kind == "windows":
        return images
    flip, out, *given = more
    changes = Augment(**{name: given[place] for place, name in enumerate(extra)})
    if gpu:
        images = images.gpu()
    resize: dict[str, Any] = {
        "size": out,
        "interp_type": {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[
            settings.interpolation
        ],
    }
    if kind == "val":
        resize |= {"roi_start": corner, "roi_end": corner + size}
    images = fn.resize(images, antialias=True, **resize)
    if kind == "train":
        images = augment.augment(images, changes, settings)
    images = fn.crop_mirror_normalize(
        images,
        mirror=flip,
        mean=[255 * value for value in MEAN],
        std=[255 * value for value in STD],
        dtype=types.FLOAT16 if half else types.FLOAT,
        output_layout="HWC",
    )
    return augment.erase(images, changes)
