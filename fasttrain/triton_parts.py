"""What the Triton kernels of convolutions share: activations, checks, and sums of partial sums."""

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


@triton.jit
def _plus(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    return a + b


@triton.jit
def column_sums(values: tl.tensor) -> tl.tensor:
    """Sums over the rows of a matrix."""
    return tl.reduce(values, 0, _plus)  # `tl.sum` does not run in an interpreter set up later


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU, where Triton's interpreter runs the programs."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def images_like(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """As many images as `x` has, channels-last and not yet written."""
    return x.new_empty(len(x), height, width, channels).permute(0, 3, 1, 2)


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


# --------------------------------------------------------------------------------------------------
# Partial sums
# --------------------------------------------------------------------------------------------------

_CELLS = 4096  # partial sums that a program adds at a time


def fold(partial: Tensor, first: int, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Adds up partial sums, in float64 and in a fixed order, by one kernel.

    Args:
        partial: float32 `(N, G, C)`, contiguous: N sums of G parts for each of C channels.
        first: how many of the N sums the first result has.
        transposed: the first result is `(C, first)`.
    Returns:
        The first sums, float32 `(first, C)`, and the others, `(N - first, C)`. They share no
        memory, as an operator's results must not.
    """
    number, groups, channels = partial.shape
    found = partial.new_empty((channels, first) if transposed else (first, channels))
    others = partial.new_empty(number - first, channels)
    rows, block = _fold_tile(groups, channels)
    with torch.cuda.device_of(partial):
        _fold[triton.cdiv(channels, block), number](
            partial, found, others if len(others) else found, groups, channels, first,
            TRANSPOSED=transposed, ROWS=rows, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return found, others


def fold_dots(partial: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Adds up the sums of a gradient, and of its products with x.

    Args:
        partial: float32 `(2, N, G, C)`, contiguous: the sums of g, then those of g * x.
        table: float32 `(N, 4, C)`: rows 2 and 3 are rstd and nmean.
    Returns:
        The sums of g, and those of g * (x * rstd + nmean), float32 `(N, C)`.
    """
    _, number, groups, channels = partial.shape
    sums = partial.new_empty(number, channels)
    dots = torch.empty_like(sums)
    rows, block = _fold_tile(groups, channels)
    with torch.cuda.device_of(partial):
        _fold_dots[triton.cdiv(channels, block), number](
            partial, table, sums, dots, groups, channels, ROWS=rows, BLOCK=block, num_warps=4
        )
    return sums, dots


def _fold_tile(groups: int, channels: int) -> tuple[int, int]:
    """Rows and columns of a tile: few columns where there are many parts."""
    block = 128 if groups < 16 else 32 if channels > 16 else 16
    return min(int(triton.next_power_of_2(groups)), _CELLS // block), block


@triton.jit
def _added_up(
    partial: tl.tensor,
    groups: tl.tensor,
    c: tl.tensor,
    C: tl.tensor,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """The sums of all parts, float64."""
    row = tl.arange(0, ROWS)
    total = tl.full([ROWS, c.shape[0]], 0.0, tl.float64)
    for first in range(0, groups, ROWS):
        at = first + row
        inside = (at < groups)[:, None] & (c < C)[None, :]
        part = tl.load(partial + (at[:, None] * C + c[None, :]), mask=inside, other=0.0)
        total += part.to(tl.float64)
    return column_sums(total)


@triton.jit(do_not_specialize=["groups", "C", "FIRST"])
def _fold(
    partial: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    groups: tl.tensor,
    C: tl.tensor,
    FIRST: tl.tensor,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1)
    wide = n.to(tl.int64)
    total = _added_up(partial + wide * groups * C, groups, c, C, ROWS).to(tl.float32)
    if n < FIRST:
        at = c * FIRST + n if TRANSPOSED else n * C + c
        tl.store(first + at, total, mask=c < C)
    else:
        tl.store(second + (n - FIRST) * C + c, total, mask=c < C)


@triton.jit(do_not_specialize=["groups", "C"])
def _fold_dots(
    partial: tl.tensor,
    table: tl.tensor,
    sums: tl.tensor,
    dots: tl.tensor,
    groups: tl.tensor,
    C: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1)
    wide = n.to(tl.int64)
    total = _added_up(partial + wide * groups * C, groups, c, C, ROWS)
    wide += tl.num_programs(1)
    with_x = _added_up(partial + wide * groups * C, groups, c, C, ROWS)
    rstd = tl.load(table + n * (4 * C) + 2 * C + c, mask=c < C, other=0.0)
    nmean = tl.load(table + n * (4 * C) + 3 * C + c, mask=c < C, other=0.0)
    dot = rstd.to(tl.float64) * with_x + nmean.to(tl.float64) * total  # the two may cancel out
    tl.store(sums + n * C + c, total.to(tl.float32), mask=c < C)
    tl.store(dots + n * C + c, dot.to(tl.float32), mask=c < C)
