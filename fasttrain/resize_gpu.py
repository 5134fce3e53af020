"""Windows of raw images -> a normalised batch, in one Triton kernel on the GPU.

PIL's pixels: rows are resized first and rounded to whole steps of 1/255, then columns, as PIL and
`resize` do it, so a value differs from theirs where a sum falls on the border between two steps.
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

# In front of a batch's pixels, for each image: where it begins, its label, a row of the table.
COLUMNS = 14  # of the table, int32; x, y and their steps are float32 in the same bits
HEAD_BYTES = 2 * 8 + 4 * COLUMNS

# A program makes so many rows of an image, and of the 3 * S values of a row. Compiled for sm_90, 8
# rows take 48 registers with Triton 3.8 and 80 with 3.6, 16 rows 96 and 161, and none spills; the
# inner loop has 8.2 and 11.8 instructions a value and tap with 8 rows, 7.1 and 10.4 with 16. Not
# timed: `tools/benchmarks/record/packed.py` does so.
TILE_ROWS = 8
TILE_VALUES = 128
WARPS = 4

# Normalising: a step of 1/255, and 0.
_R_SCALE, _G_SCALE, _B_SCALE = (tl.constexpr(1 / (255 * std)) for std in STD)
_R_SHIFT, _G_SHIFT, _B_SHIFT = (
    tl.constexpr(-mean / std) for mean, std in zip(MEAN, STD, strict=True)
)


class Head(NamedTuple):
    """Views of a buffer's first `B * HEAD_BYTES` bytes."""

    starts: Any  # int64 (B,): the byte of the buffer at which an image begins
    labels: Any  # int64 (B,)
    table: Any  # int32 (B, COLUMNS), see `_resize`


def head_of(buffer: Any, num_images: int) -> Head:
    """The head of a buffer, a NumPy array or a tensor of uint8."""
    torch_types = isinstance(buffer, Tensor)
    longs, ints = (torch.int64, torch.int32) if torch_types else (np.int64, np.int32)
    end = 16 * num_images
    pair = buffer[:end].view(longs)
    table = buffer[end : HEAD_BYTES * num_images].view(ints)
    return Head(pair[:num_images], pair[num_images:], table.reshape(num_images, COLUMNS))


def describe(
    head: Head,
    draw: Draw,
    starts: NDArray[np.int64],
    sizes: tuple[NDArray[np.uint16], NDArray[np.uint16]],
    labels: NDArray[np.uint16],
) -> None:
    """Writes what the kernel needs to know of a batch.

    Args:
        starts: where in the buffer the first row of each image begins: in training, of its window.
        sizes: width and height of the images.
    """
    width, height = (size.astype(np.int32) for size in sizes)
    whole = draw.windows.dtype == np.float32  # validation: taps may leave the window
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
    """Images `(B, 3, S, S)`, channels_last, float16 or float32, normalised, on the buffer's device.

    Args:
        buffer: uint8 `(N,)`, a `Head` and the pixels; where no GPU is, Triton's interpreter reads
            it.
    """
    head = head_of(buffer, num_images)
    images = torch.empty(
        num_images, out_px, out_px, 3,
        dtype=torch.float16 if half else torch.float32, device=buffer.device,
    )  # fmt: skip
    grid = (triton.cdiv(3 * out_px, TILE_VALUES), triton.cdiv(out_px, TILE_ROWS), num_images)
    with torch.cuda.device_of(buffer):  # or Triton takes the thread's current device
        _resize[grid](
            images, buffer, head.starts, head.table, out_px,
            CUBIC=cubic, ROWS=TILE_ROWS, VALUES=TILE_VALUES, COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
    return images.permute(0, 3, 1, 2)


@functools.cache
def fault(device: torch.device, cubic: bool, half: bool) -> str:
    """Why the kernel does not run on a device; empty where it does. Compiles it at first: seconds.

    Triton needs a C compiler for this, and a GPU that it knows.
    """
    memory = np.full(HEAD_BYTES + 48, 255, np.uint8)  # and 4 x 4 white pixels
    draw = Draw(np.zeros(1, np.int64), np.array([[0, 0, 4, 4]], np.int32), np.ones(1, bool), 8)
    side = np.full(1, 4, np.uint16)
    describe(head_of(memory, 1), draw, np.full(1, HEAD_BYTES), (side, side), side)
    try:
        images = resize(torch.from_numpy(memory).to(device), 1, 8, cubic, half)
        found = images[0, :, 3, 3].tolist()
    except Exception as error:  # of a compiler, of Triton, of CUDA: there is no list
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[-1] if lines else 'no more is known'}"
    white = [(1 - mean) / std for mean, std in zip(MEAN, STD, strict=True)]
    return "" if np.allclose(found, white, atol=0.01) else f"white became {found}, not {white}"


# --------------------------------------------------------------------------------------------------
# The kernel
# --------------------------------------------------------------------------------------------------


@triton.jit
def _weight(distance: tl.tensor, CUBIC: tl.constexpr) -> tl.tensor:
    """Of a pixel at this distance from the centre, in units of the filter.

    Source: Pillow's triangle, and Keys' cubic with a = -0.5.
    """
    t = tl.abs(distance)
    if CUBIC:
        near = (1.5 * t - 2.5) * t * t + 1
        far = ((-0.5 * t + 2.5) * t - 4) * t + 2
        return tl.where(t < 1, near, tl.where(t < 2, far, 0.0))
    return tl.maximum(1 - t, 0.0)


@triton.jit
def _step(value: tl.tensor) -> tl.tensor:
    """Rounded to a whole step of 1/255, as PIL does after each direction."""
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
    """One tile of one image.

    Its row of the table: bytes of a source row; left, right, top, bottom, within which taps lie;
    1 if mirrored; x, y of the window's corner and source pixels an output pixel along x, y; top,
    left, bottom, right of what is erased, in output pixels.
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

    # A row's values, pixel by pixel and R, G, B in each: stores are then in one piece.
    # What a tile has beyond the image repeats its border, and is not stored.
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
    # An open interval of this length holds no more whole numbers than this.
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
        # Taps outside weigh nothing; read is from within the image all the same.
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
