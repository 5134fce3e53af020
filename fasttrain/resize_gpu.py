"""Turns windows of raw images into a normalised batch, by one Triton kernel on the GPU.

Like PIL and `resize`, the kernel first resizes along rows and rounds to whole steps of 1/255, then
resizes along columns. So a value differs from theirs only if a sum is halfway between two
steps.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from fasttrain.resize import MEAN, STD
from fasttrain.sampling import Draw

# A buffer begins with a head. It holds for each image its start, its label and a row of the table.
COLUMNS = 14  # of the table, int32; x, y and their steps are float32 values in the same bits
HEAD_BYTES = 2 * 8 + 4 * COLUMNS  # per image

# A Triton program makes a tile: this many rows of an image, and this many of a row's 3 * S values.
# Compiled for sm_90, 8 rows take 48 registers with Triton 3.8 and 80 with 3.6; 16 rows take 96 and
# 161. None spills. The inner loop has 8.2 and 11.8 instructions per value and tap with 8 rows, 7.1
# and 10.4 with 16. `tools/benchmarks/record/packed.py` measures the times.
TILE_ROWS = 8
TILE_VALUES = 128
WARPS = 4

# normalised = byte * scale + shift
_R_SCALE, _G_SCALE, _B_SCALE = (tl.constexpr(1 / (255 * std)) for std in STD)
_R_SHIFT, _G_SHIFT, _B_SHIFT = (
    tl.constexpr(-mean / std) for mean, std in zip(MEAN, STD, strict=True)
)


class Head(NamedTuple):
    """Views of a buffer's first `B * HEAD_BYTES` bytes."""

    starts: Any  # int64 (B,): offset of each image in the buffer, in bytes
    labels: Any  # int64 (B,)
    table: Any  # int32 (B, COLUMNS), see `_resize`


def head_of(buffer: Any, num_images: int) -> Head:
    """The head of a buffer.

    Args:
        buffer: uint8 `(N,)`, a NumPy array or a tensor.
    """
    torch_types = isinstance(buffer, Tensor)
    longs, ints = (torch.int64, torch.int32) if torch_types else (np.int64, np.int32)
    end = 16 * num_images
    pair = buffer[:end].view(longs)
    table = buffer[end : HEAD_BYTES * num_images].view(ints)
    return Head(pair[:num_images], pair[num_images:], table.reshape(num_images, COLUMNS))


def write_head(
    head: Head,
    draw: Draw,
    starts: NDArray[np.int64],
    sizes: tuple[NDArray[np.uint16], NDArray[np.uint16]],
    labels: NDArray[np.uint16],
) -> None:
    """Writes the inputs of the kernel into the head of a batch.

    Args:
        starts: `(B,)`, offset of each image's first row in the buffer; in training, of the first
            row of its window.
        sizes: width and height of the images, `(B,)` each.
        labels: `(B,)`.
    """
    width, height = (size.astype(np.int32) for size in sizes)
    whole = draw.windows.dtype == np.float32  # validation: taps may read outside the window
    x, y, w, h = draw.windows.T
    zeros = np.zeros_like(width)
    table = head.table
    table[:, 0] = 3 * width
    table[:, 1], table[:, 2] = (zeros, width) if whole else (x, x + w)
    table[:, 3], table[:, 4] = zeros, height if whole else h
    table[:, 5] = draw.flips
    floats = table[:, 6:10].view(np.float32)
    floats[:, 0], floats[:, 1] = x, y if whole else 0
    floats[:, 2], floats[:, 3] = w / draw.out_px, h / draw.out_px
    erase = np.zeros((len(x), 4), np.int32)
    if draw.augment.erase is not None:
        erase = draw.augment.erase.astype(np.int32)
    table[:, 10:12], table[:, 12:14] = erase[:, :2], erase[:, :2] + erase[:, 2:]
    head.starts[:], head.labels[:] = starts, labels


def resize(buffer: Tensor, num_images: int, out_px: int, cubic: bool, half: bool) -> Tensor:
    """Resizes and normalises a batch.

    Args:
        buffer: uint8 `(N,)`, the head and then the pixels. Without a GPU, Triton's interpreter can
            run the kernel.
        out_px: side S of the images.
        cubic: bicubic interpolation instead of bilinear.
        half: make float16 images instead of float32.
    Returns:
        Images `(B, 3, S, S)`, channels-last, on the buffer's device.
    """
    head = head_of(buffer, num_images)
    images = torch.empty(
        num_images, out_px, out_px, 3,
        dtype=torch.float16 if half else torch.float32, device=buffer.device,
    )  # fmt: skip
    grid = (triton.cdiv(3 * out_px, TILE_VALUES), triton.cdiv(out_px, TILE_ROWS), num_images)
    with torch.cuda.device_of(buffer):  # by default Triton uses the thread's current device
        _resize[grid](
            images, buffer, head.starts, head.table, out_px,
            CUBIC=cubic, ROWS=TILE_ROWS, VALUES=TILE_VALUES, COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
    return images.permute(0, 3, 1, 2)


@functools.cache
def fault(device: torch.device, cubic: bool, half: bool) -> str:
    """Tests the kernel on a device; returns why it does not run there, or "" if it does.

    The first call compiles the kernel, which takes seconds. Triton needs a C compiler and a GPU
    that it supports.
    """
    memory = np.full(HEAD_BYTES + 48, 255, np.uint8)  # a head and 4 x 4 white pixels
    draw = Draw(np.zeros(1, np.int64), np.array([[0, 0, 4, 4]], np.int32), np.ones(1, bool), 8)
    side = np.full(1, 4, np.uint16)
    write_head(head_of(memory, 1), draw, np.full(1, HEAD_BYTES), (side, side), side)
    try:
        images = resize(torch.from_numpy(memory).to(device), 1, 8, cubic, half)
        found = images[0, :, 3, 3].tolist()
    except Exception as error:  # the compiler, Triton and CUDA have no common exception
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
    white = [(1 - mean) / std for mean, std in zip(MEAN, STD, strict=True)]
    return "" if np.allclose(found, white, atol=0.01) else f"white became {found}, not {white}"


# --------------------------------------------------------------------------------------------------
# The kernel
# --------------------------------------------------------------------------------------------------


@triton.jit
def _weight(distance: tl.tensor, CUBIC: tl.constexpr) -> tl.tensor:
    """The filter's weight at this distance from its centre, in units of its scale.

    Source: Pillow's triangle filter, and Keys' cubic filter with a = -0.5.
    """
    t = tl.abs(distance)
    if CUBIC:
        near = (1.5 * t - 2.5) * t * t + 1
        far = ((-0.5 * t + 2.5) * t - 4) * t + 2
        return tl.where(t < 1, near, tl.where(t < 2, far, 0.0))
    return tl.maximum(1 - t, 0.0)


@triton.jit
def _step(value: tl.tensor) -> tl.tensor:
    """Rounds to a whole step of 1/255 and clips, as PIL does after each direction."""
    return tl.minimum(tl.maximum(tl.floor(value + 0.5), 0.0), 255.0)


@triton.jit(do_not_specialize=["size"])
def _resize(
    images: tl.tensor,
    buffer: tl.tensor,
    starts: tl.tensor,
    table: tl.tensor,
    size: tl.tensor,
    CUBIC: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Makes one tile of one image.

    The columns of the table are: bytes per source row; left, right, top and bottom limit of the
    taps; 1 if mirrored; x and y of the window's corner; source pixels per output pixel along x and
    y; top, left, bottom and right of the erased window, in output pixels.
    """
    image = tl.program_id(2)
    line = table + image * COLUMNS
    pitch = tl.load(line)
    left, right = tl.load(line + 1), tl.load(line + 2)
    top, bottom = tl.load(line + 3), tl.load(line + 4)
    mirrored = tl.load(line + 5)
    x = tl.load(line + 6).to(tl.float32, bitcast=True)
    y = tl.load(line + 7).to(tl.float32, bitcast=True)
    step_x = tl.load(line + 8).to(tl.float32, bitcast=True)
    step_y = tl.load(line + 9).to(tl.float32, bitcast=True)
    pixels = buffer + tl.load(starts + image)

    # A row's values are R, G, B of one pixel after another, so that stores are contiguous.
    # Values of a tile beyond the image repeat its border and are not stored.
    own_value = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    own_row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    value, row = tl.minimum(own_value, 3 * size - 1), tl.minimum(own_row, size - 1)
    column, channel = value // 3, value % 3
    source_column = tl.where(mirrored != 0, size - 1 - column, column)

    reach: tl.constexpr = 2 if CUBIC else 1
    filter_x, filter_y = tl.maximum(step_x, 1.0), tl.maximum(step_y, 1.0)
    per_x, per_y = 1 / filter_x, 1 / filter_y
    centre_x = x + (source_column.to(tl.float32) + 0.5) * step_x
    centre_y = y + (row.to(tl.float32) + 0.5) * step_y
    # An open interval of length n holds at most ceil(n) whole numbers.
    taps_x = tl.ceil(2 * reach * filter_x).to(tl.int32)
    taps_y = tl.ceil(2 * reach * filter_y).to(tl.int32)
    first_x = tl.floor(centre_x - reach * filter_x + 0.5).to(tl.int32)
    first_y = tl.floor(centre_y - reach * filter_y + 0.5).to(tl.int32)

    total_x = tl.full([VALUES], 0.0, tl.float32)
    for tap in range(taps_x):
        at_x = first_x + tap
        weight_x = _weight((at_x.to(tl.float32) + 0.5 - centre_x) * per_x, CUBIC)
        total_x += tl.where((at_x >= left) & (at_x < right), weight_x, 0.0)
    scale_x = 1 / total_x

    result = tl.full([ROWS, VALUES], 0.0, tl.float32)
    total_y = tl.full([ROWS], 0.0, tl.float32)
    for tap_y in range(taps_y):
        at_y = first_y + tap_y
        weight_y = _weight((at_y.to(tl.float32) + 0.5 - centre_y) * per_y, CUBIC)
        weight_y = tl.where((at_y >= top) & (at_y < bottom), weight_y, 0.0)
        total_y += weight_y
        # Taps outside have weight 0. Their address is clamped, so that all reads are valid.
        from_y = tl.minimum(tl.maximum(at_y, top), bottom - 1) * pitch
        resized = tl.full([ROWS, VALUES], 0.0, tl.float32)
        for tap_x in range(taps_x):
            at_x = first_x + tap_x
            weight_x = _weight((at_x.to(tl.float32) + 0.5 - centre_x) * per_x, CUBIC) * scale_x
            weight_x = tl.where((at_x >= left) & (at_x < right), weight_x, 0.0)
            from_x = tl.minimum(tl.maximum(at_x, left), right - 1) * 3 + channel
            byte = tl.load(pixels + (from_y[:, None] + from_x[None, :]))
            resized += weight_x[None, :] * byte.to(tl.float32)
        result += weight_y[:, None] * _step(resized)
    result = _step(result * (1 / total_y)[:, None])

    scale = tl.where(channel == 0, _R_SCALE, tl.where(channel == 1, _G_SCALE, _B_SCALE))
    shift = tl.where(channel == 0, _R_SHIFT, tl.where(channel == 1, _G_SHIFT, _B_SHIFT))
    result = result * scale[None, :] + shift[None, :]
    erased_y = (row >= tl.load(line + 10)) & (row < tl.load(line + 12))
    erased_x = (column >= tl.load(line + 11)) & (column < tl.load(line + 13))
    result = tl.where(erased_y[:, None] & erased_x[None, :], 0.0, result)  # ImageNet's mean
    target = images + image.to(tl.int64) * size * size * 3
    target += row[:, None] * (3 * size) + value[None, :]
    stored = (own_row < size)[:, None] & (own_value < 3 * size)[None, :]
    tl.store(target, result.to(images.dtype.element_ty), mask=stored)
