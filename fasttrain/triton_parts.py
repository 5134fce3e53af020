"""What the Triton kernels of convolutions share: activations, and checks of tensors."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of images


@triton.jit
def activate(z: tl.tensor, ACT: tl.constexpr) -> tl.tensor:
    """Applies an activation: 0 none, 1 ReLU, 2 hard-swish."""
    if ACT == 1:  # NaN stays NaN, as in torch: the guard against bad updates must see it
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACT == 2:
        return z * tl.minimum(tl.maximum(z * (1 / 6) + 0.5, 0.0), 1.0)
    return z


@triton.jit
def through_activation(da: tl.tensor, z: tl.tensor, ACT: tl.constexpr) -> tl.tensor:
    """The gradient before the activation of z, given the one after it."""
    if ACT == 1:
        return tl.where(z > 0.0, da, 0.0)
    if ACT == 2:
        gate = tl.minimum(tl.maximum(z * (1 / 6) + 0.5, 0.0), 1.0)
        return da * tl.where(tl.abs(z) < 3.0, z * (1 / 3) + 0.5, gate)
    return da


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU, where Triton's interpreter runs the programs."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def images_like(x: Tensor, channels: int) -> Tensor:
    """Channels-last images of the size of `x`, not yet written."""
    batch, _, height, width = x.shape
    return x.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)


def check_tensors(images: list[Tensor], tables: list[Tensor | None]) -> None:
    """Raises ValueError if the kernels would read such images or tables wrongly."""
    dtype = images[0].dtype
    if dtype not in DTYPES:
        raise ValueError(f"images of {dtype}: must be of {', '.join(map(str, DTYPES))}")
    for image in images:
        if image.dtype != dtype or not image.is_contiguous(memory_format=torch.channels_last):
            raise ValueError("all images must be channels-last and have one dtype")
    for table in tables:
        if table is not None and (table.dtype != torch.float32 or not table.is_contiguous()):
            raise ValueError("tables must be contiguous and have dtype float32")
