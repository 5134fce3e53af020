"""The DALI graph that turns images' bytes into batches. Needs DALI: import this module late."""

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
from fasttrain.decoder import Decoder
from fasttrain.resize import MEAN, STD
from fasttrain.sampling import Augment


class Form(NamedTuple):
    """Which graph to build."""

    kind: str  # `train`, `val` or `windows`: see `_graph`
    decoder: Decoder  # its strategy is not `auto`
    largest: tuple[int, int]  # height and width of the largest image: memory for the decoder


class Target(Protocol):
    """The device, dtype and threads of a graph; `batch.Placement` is one."""

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
    target: Target,
    batch_size: int,
) -> Any:
    """Builds the pipeline, ready to `run`.

    Args:
        source: returns the inputs of a batch, given its index from 0: see `_graph`.
        batch_size: size of the largest batch.
    """
    pipeline = graph_of(form, settings, source, target, batch_size)
    pipeline.build()
    return pipeline


def graph_of(
    form: Form,
    settings: config.Data,
    source: Callable[[int], Any],
    target: Target,
    batch_size: int,
) -> Any:
    """The pipeline of `build`, not built yet: this needs no GPU."""
    gpu = target.device.type == "cuda"
    graph = _graph(
        source=source,
        form=form,
        settings=settings,
        mixed={
            "device": "mixed",
            "hw_decoder_load": form.decoder.load_for(target.threads),
            "jpeg_fancy_upsampling": settings.jpeg_fancy_upsampling,
            "preallocate_height_hint": form.largest[0],
            "preallocate_width_hint": form.largest[1],
            # With affinity, the threads of all pipelines of all processes would share the first
            # cores.
            "affine": False,
        }
        if gpu and form.decoder.strategy.startswith("gpu")
        else {},
        gpu=gpu,
        half=target.half,
        batch_size=batch_size,
        num_threads=target.threads,
        device_id=target.device.index if gpu else None,
        prefetch_queue_depth=settings.queue_depth,
        enable_conditionals=form.kind == "train" and settings.augment != "none",
    )
    _remove_generated()
    return graph


def _remove_generated() -> None:
    """Removes the Python files that DALI generates for a graph with conditionals.

    They are not needed once they are imported. DALI removes them when Python exits, but not if the
    process is killed.
    """
    for name, module in [*sys.modules.items()]:
        if name.startswith("__autograph_generated_file") and module.__file__:
            with contextlib.suppress(OSError):
                os.remove(module.__file__)


# These functions return DALI's own lists, which enter the pipeline unchanged. That takes 5.2 us per
# image in all. With a Python list, DALI inspects each image again under the interpreter's lock.
# That takes 7.1 us, and 11.3 us with a layout given to `external_source` (1024 images, two cores of
# an AMD EPYC, DALI 2.4, 2026-11-27).


def bytes_of(views: Sequence[memoryview]) -> TensorListCPU:
    """Encoded images for `build`'s source, uncopied."""
    return _listed([TensorCPU(view, "") for view in views], "")


def pixels_of(views: Sequence[memoryview], widths: Sequence[int]) -> TensorListCPU:
    """Raw images, or some of their rows, for `build`'s source, uncopied.

    Args:
        views: bytes of RGB pixels, row by row.
        widths: width of each image in pixels.
    """
    images = [
        TensorCPU(view.cast("B", (len(view) // (3 * width), width, 3)), "HWC")
        for view, width in zip(views, widths, strict=True)
    ]
    return _listed(images, "HWC")


def _listed(images: list[TensorCPU], layout: str) -> TensorListCPU:
    return TensorListCPU(images, layout, contiguous=False)  # type: ignore[call-overload]


def tensor_of(images: TensorListCPU | TensorListGPU) -> Tensor:
    """The images that `run` returned as one tensor, `(B, H, W, 3)`, uncopied."""
    tensor: Any = images.as_tensor()
    if isinstance(images, TensorListCPU):
        return torch.from_dlpack(tensor)
    # -1: no stream waits. By default torch's current stream would wait, and in a loader's thread
    # that is the stream that trains. Nothing is read too early: DALI documents that `run` without a
    # stream returns once the images are complete. Nothing is overwritten too early: when the tensor
    # dies, a DALI thread waits for the whole device before it frees the memory (dltensor.h:
    # EnqueueForDeletion; and in the library DLTensorGraveyard::run, cudaDeviceSynchronize).
    return torch.from_dlpack(tensor.__dlpack__(stream=-1))


@pipeline_def
def _graph(
    source: Callable[[int], Any],
    form: Form,
    settings: config.Data,
    mixed: dict[str, Any],
    gpu: bool,
    half: bool,
) -> Any:
    """Decodes, cuts, resizes, augments and normalises a batch.

    `train` cuts windows of whole pixels and resizes them. `val` resizes windows with fractional
    corners out of whole images. Both differ from PIL's pixels by at most 1/255. `windows` only cuts
    windows. On a CPU, the GPU's strategies decode on the CPU.

    Args:
        source: returns these inputs, given a batch's index: the images' bytes (or their pixels,
            uint8 `(h, w, 3)`); the corners (y, x) and sizes (h, w) of the windows; the flips; the
            output size (h, w); the columns of `augment.inputs`.
        mixed: arguments for a decoder on the GPU; empty if the CPU decodes.
        half: make float16 images instead of float32.
    Returns:
        Normalised images `(B, S, S, 3)`; or windows uint8 `(h, w, 3)`.
    """
    kind, decode = form.kind, form.decoder.strategy
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
    """Mirrors images `(B, S, S, 3)` if `flip` is 1, and normalises; float16 or float32."""
    return fn.crop_mirror_normalize(
        images,
        mirror=flip,
        mean=[255 * value for value in MEAN],
        std=[255 * value for value in STD],
        dtype=types.FLOAT16 if half else types.FLOAT,
        output_layout="HWC",
    )
