"""Reads the stand-in's log, and replaces cuDNN. Import it in a process that runs on the stand-in.

cuDNN's convolutions and BatchNorm become functions that launch one kernel each. Their results have
the shapes, dtypes and layouts of cuDNN's results.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LIBRARY = ctypes.CDLL("libcuda.so.1")
LIBRARY.standin_log.restype = ctypes.c_char_p
OVERRIDES = torch.library.Library("aten", "IMPL")
ATEN = torch.ops.aten


def log() -> list[str]:
    """The lines that were logged since the last call."""
    return LIBRARY.standin_log().decode().splitlines()


def note(line: str) -> None:
    """Writes a line into the log."""
    LIBRARY.standin_note(line.encode())


def is_channels_last(tensor: Tensor) -> bool:
    """True if a tensor is channels-last, or is broadcast and so has no layout of its own."""
    broadcast = any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    return broadcast or tensor.is_contiguous(memory_format=torch.channels_last)


def check_layout(what: str, *tensors: Tensor | None) -> None:
    """Logs a line "LOST ..." for each tensor `(B, C, H, W)` that is not channels-last."""
    for tensor in tensors:
        if tensor is not None and tensor.ndim == 4 and not is_channels_last(tensor):
            note(f"LOST {what} {tuple(tensor.shape)} {tensor.stride()}")


class Layouts(TorchDispatchMode):
    """Checks the layout of every operator's results, in forward and backward, except views."""

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple) else (result,)
        if not operator.is_view:
            check_layout(str(operator), *(r for r in results if isinstance(r, Tensor)))
        return result


@contextmanager
def marked(holder: Any, name: str, phase: str) -> Iterator[None]:
    """Logs when the function `holder.name` begins and ends, as `phase`."""
    function = getattr(holder, name)

    def marking(*args: Any, **kwargs: Any) -> Any:
        note(f"begin {phase}")
        try:
            return function(*args, **kwargs)
        finally:
            note(f"end {phase}")

    setattr(holder, name, marking)
    yield
    setattr(holder, name, function)


def outside(lines: list[str], kinds: tuple[str, ...]) -> list[str]:
    """The lines that begin with one of `kinds` and were logged outside each phase of `marked`."""
    found, depth = [], 0
    for line in lines:
        kind = line.split(" ", 1)[0]
        depth += (kind == "begin") - (kind == "end")
        if kind in kinds and not depth:
            found.append(line)
    return found


def _convolution(images: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    shape = ATEN.convolution(images.to("meta"), weight.to("meta"), None, *how).shape
    check_layout("convolution", images, weight)
    return images.new_empty(shape).to(memory_format=torch.channels_last).fill_(0)


def _convolution_backward(
    gradient: Tensor, images: Tensor, weight: Tensor, bias_sizes: Any, *how: Any
) -> tuple[Tensor | None, ...]:
    *_, wanted = how
    check_layout("convolution_backward", gradient, images, weight)
    last = torch.channels_last
    return (
        torch.zeros_like(images, memory_format=last) if wanted[0] else None,
        torch.zeros_like(weight, memory_format=last) if wanted[1] else None,
        gradient.new_zeros(bias_sizes) if wanted[2] else None,
    )


def _batch_norm(images: Tensor, *others: Any) -> tuple[Tensor, ...]:
    check_layout("batch_norm", images)
    reserve = images.new_empty(0, dtype=torch.uint8)
    return *ATEN.native_batch_norm(images, *others), reserve


def _batch_norm_backward(
    images: Tensor, gradient: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    check_layout("batch_norm_backward", images, gradient)
    *statistics, epsilon, _ = others
    return ATEN.native_batch_norm_backward(gradient, images, *statistics, True, epsilon, [True] * 3)


for _name, _function in {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "cudnn_batch_norm": _batch_norm,
    "cudnn_batch_norm_backward": _batch_norm_backward,
}.items():
    OVERRIDES.impl(_name, _function, "CUDA")
