"""The DALI graph that turns bytes of images into batches. Needs DALI; `data` imports it late."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.tensors import TensorCPU, TensorListCPU, TensorListGPU
from torch import Tensor

from fasttrain import augment, config
from fasttrain.resize import MEAN, STD
from fasttrain.sampling import Augment


class Form(NamedTuple):
    """Which graph is built."""

    kind: str  # `train`, `val` or `windows`, see `_graph`
    decode: str  # `raw` where the images are pixels, else as `data.decode`
    largest: tuple[int, int]  # height and width of the largest image, see `_graph`


class Place(Protocol):
    """Where it runs; `Placement` is one."""

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
    pipeline = graph_of(form, settings, source, place, batch_size)
    pipeline.build()
    return pipeline


def graph_of(
    form: Form,
    settings: config.Data,
    source: Callable[[int], Any],
    place: Place,
    batch_size: int,
) -> Any:
    """The pipeline of `build` before it is built: its graph alone, for which no GPU is needed."""
    gpu = place.device.type == "cuda"
    graph = _graph(
        source=source,
        form=form,
        settings=settings,
        mixed={
            "device": "mixed",
            "hw_decoder_load": load_of(settings, place.threads),
            "jpeg_fancy_upsampling": settings.jpeg_fancy_upsampling,
            "preallocate_height_hint": form.largest[0],
            "preallocate_width_hint": form.largest[1],
            # Threads that are bound to the first cores would share them with the threads of every
            # other pipeline, and of every other process here.
            "affine": False,
        }
        if gpu and form.decode.startswith("gpu")
        else {},
        gpu=gpu,
        half=place.half,
        batch_size=batch_size,
        num_threads=place.threads,
        device_id=place.device.index if gpu else None,
        prefetch_queue_depth=settings.queue_depth,
        enable_conditionals=form.kind == "train" and settings.augment != "none",
    )
    _remove_generated()
    return graph


def _remove_generated() -> None:
    """Removes the files of Python that DALI writes of a graph with conditions, once imported.

    DALI itself removes them when Python ends, but not where a process is stopped or killed.
    """
    for name, module in [*sys.modules.items()]:
        if name.startswith("__autograph_generated_file") and module.__file__:
            with contextlib.suppress(OSError):
                os.remove(module.__file__)


# A list of DALI's own goes into the pipeline as it is. Of a Python list, DALI looks at each image
# again, under the interpreter's lock: 7.1 us an image in all instead of 5.2, and 11.3 with a layout
# given to `external_source` (1024 images, two cores of an AMD EPYC, DALI 2.4, 2026-11-27).


def bytes_of(views: Sequence[memoryview]) -> TensorListCPU:
    """Images as they are stored, uncopied, for `build`'s source."""
    return _listed([TensorCPU(view, "") for view in views], "")


def pixels_of(views: Sequence[memoryview], widths: Sequence[int]) -> TensorListCPU:
    """Raw images, or rows of them, of these widths, uncopied, for `build`'s source."""
    images = [
        TensorCPU(view.cast("B", (len(view) // (3 * width), width, 3)), "HWC")
        for view, width in zip(views, widths, strict=True)
    ]
    return _listed(images, "HWC")


def _listed(images: list[TensorCPU], layout: str) -> TensorListCPU:
    return TensorListCPU(images, layout, contiguous=False)  # type: ignore[call-overload]


def tensor_of(images: TensorListCPU | TensorListGPU) -> Tensor:
    """The images that `run` returned, as one tensor, uncopied."""
    tensor: Any = images.as_tensor()
    if isinstance(images, TensorListCPU):
        return torch.from_dlpack(tensor)
    # -1: no stream waits. By default torch's current stream would, which in a loader's thread is
    # the stream that trains. Nothing is read too early: `run` without a stream returns once the
    # images are complete, as DALI documents it. Nothing is overwritten too early: when the tensor
    # dies, a thread of DALI waits for the whole device before it frees the memory (dltensor.h:
    # EnqueueForDeletion; and in the library DLTensorGraveyard::run, cudaDeviceSynchronize).
    return torch.from_dlpack(tensor.__dlpack__(stream=-1))


def load_of(settings: config.Data, threads: int) -> float:
    """The part of a batch for the GPU's JPEG decoder, where it has one.

    `auto` takes 7 / (7 + threads), an estimate: the decoder of a Hopper GPU does as much as some
    seven CPU threads that decode with the GPU's cores. 0.30 with 16 threads, 0.10 with 64.
    """
    load = settings.hw_decoder_load
    return round(7 / (7 + threads), 2) if load == "auto" else load


@pipeline_def
def _graph(
    source: Callable[[int], Any],
    form: Form,
    settings: config.Data,
    mixed: dict[str, Any],
    gpu: bool,
    half: bool,
) -> Any:
    """What DALI makes of what `source` gives for a batch's number.

    `source` returns the images' bytes (or their pixels, uint8 `(h, w, 3)`), corners (y, x) and
    sizes (h, w) of the windows, flips, the output size (h, w), and what `augment.inputs` names.

    `train` cuts windows of whole pixels and resizes them. `val` resizes windows of fractions of
    pixels out of whole images. Both reach PIL's pixels to 1/255. `windows` ends with the windows.
    On a CPU, the GPU's strategies decode there.

    Args:
        mixed: arguments of a decoder on the GPU; empty where the CPU decodes.
        half: images as float16.
    Returns:
        Images `(B, S, S, 3)`, normalised; or windows uint8 `(h, w, 3)`.
    """
    kind, decode, _ = form
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
    )
    window = {"start": corner, "shape": size, "axes": [0, 1]}
    rgb = {"output_type": types.RGB, "adjust_orientation": False, "device": "cpu"} | mixed
    if decode != "raw" and (kind == "val" or decode == "gpu_full"):
        images = fn.decoders.image(images, **rgb)
    elif decode != "raw":
        images = fn.decoders.image_slice(images, **window, **rgb)
    if kind != "val" and decode in ("raw", "gpu_full"):
        images = fn.slice(images, **window)
    if kind == "windows":
        return images
    flip, out, *given = more
    changes = Augment(**{name: given[number] for number, name in enumerate(extra)})
    if gpu:
        images = images.gpu()
    window = {"roi_start": corner, "roi_end": corner + size} if kind == "val" else {}
    kernel = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
    images = fn.resize(
        images, antialias=True, size=out, interp_type=kernel[settings.interpolation], **window
    )
    if kind == "train":
        images = augment.augment(images, changes, settings)
    images = _normalised(images, flip, half and changes.erase is None)
    return augment.erase(images, changes, half)


def _normalised(images: Any, flip: Any, half: bool) -> Any:
    """Images `(B, S, S, 3)`, mirrored where `flip` is 1, normalised; float16 or float32."""
    return fn.crop_mirror_normalize(
        images,
        mirror=flip,
        mean=[255 * value for value in MEAN],
        std=[255 * value for value in STD],
        dtype=types.FLOAT16 if half else types.FLOAT,
        output_layout="HWC",
    )
