"""Depthwise convolution for training on a GPU: one Triton kernel for each direction.

As they load, the kernels apply the BatchNorm and the activation that come before the convolution.
As they store, they add up the sums that the BatchNorm after it needs. So each direction reads and
writes each tensor of images once.

How the work is cut: strips of S columns cut an image. A program holds BLOCK pairs of a strip and a
channel, channels fastest, so that its accesses are contiguous. It walks down the rows of some
images. Neighbours along a row are registers of one thread. Neighbours along a column are kept in
registers from row to row. So BatchNorm and activation are computed (S + K - 1) / S times for a
value, not K * K times.

Step i of the walk takes the STRIDE input rows from i * STRIDE on. They touch the output rows
i - LAG ... i + AHEAD. Columns are alike: the S * STRIDE input columns of a strip touch its S output
columns, LAG columns on the left and AHEAD on the right.

A program loads the next row before it computes with the one that it has. Without this, it waits for
memory at each row: backward took 1.7 to 3.2 times as long on an H200.

Batch size, height and width are numbers at run time: other image sizes compile nothing.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttrain.triton_parts import (
    activate,
    check_tensors,
    fold,
    fold_dots,
    images_like,
    processors,
    through_activation,
)

BLOCK = 256  # pairs of a strip and a channel in a program


class Tile(NamedTuple):
    """How the work is cut."""

    columns: int  # S: output columns of a strip
    programs: int  # for each multiprocessor; more than run at a time even out the work
    unroll: int = 1  # backward: steps of the loop over rows that are written out
    # With 4 warps, a thread has two channels, and a warp accesses 128 contiguous bytes of bfloat16.
    # With 2 warps, the loops have a tenth fewer instructions, but weights take twice the registers.
    warps: int = 4
    registers: int | None = None  # of a thread, at most: with 128, a multiprocessor runs 16 warps


# By kernel size and stride. The first tile was the fastest of 3 to 5 for the layers of Large at
# batch 1024 on an H200. There the kernels reach 40 to 80 % of the speed of a copy: see
# recipes/RECORDS.md. `layer_trials` measures both tiles on the GPU of a run. With the second one a
# thread needs fewer registers, so more warps run at a time: strips are narrower, or, in the 5 x 5
# kernels backward, a thread has one channel. With the first tile these run 8 warps on a
# multiprocessor. On an H200 it issued instructions in about half of its cycles, by their number and
# the time. Where strips of the first tile are narrow, those of the second are wider.
#
# Unrolling makes the 5 x 5 kernel with stride 1 up to 15 % faster, and compiles for 20 to 30 s
# instead of 10. Strips of 4 columns would compile for a minute: Triton's pass for coalesced
# accesses takes nearly all of that, and grows with the square of the loop.
FORWARD_TILES = {
    (3, 1): (Tile(8, 12), Tile(4, 12)),
    (3, 2): (Tile(2, 12), Tile(4, 12)),
    (5, 1): (Tile(7, 8), Tile(4, 12)),
    (5, 2): (Tile(4, 12), Tile(2, 12)),
}
BACKWARD_TILES = {
    (3, 1): (Tile(4, 3), Tile(2, 4)),
    (3, 2): (Tile(2, 3), Tile(1, 4)),
    (5, 1): (Tile(2, 2, 5), Tile(2, 2, 5, 8, 128)),
    (5, 2): (Tile(2, 2), Tile(2, 2, 1, 8, 128)),
}


def depthwise(
    x: Tensor,
    table: Tensor | None,
    weight: Tensor,
    stride: int,
    act: int,
    per_image: bool,
    tile: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Depthwise convolution of act(x * scale + shift), zero-padded by half the kernel.

    The sums are those of the output before it is rounded to its dtype. They are added up in an
    order that depends only on the shapes, on the tile and on the kind of GPU.

    Args:
        x: images `(B, C, H, W)`, channels-last, on a GPU: bfloat16, float16 or float32. C is a
            multiple of 8.
        table: float32 `(1, 4, C)`, rows scale, shift, rstd, nmean. Without it, x is convolved
            as it is.
        weight: `(C, 1, K, K)`, K is 3 or 5.
        stride: 1 or 2.
        act: 0 none, 1 ReLU, 2 hard-swish. Only with a table.
        per_image: one sum for each image.
        tile: 1 or 2.
    Returns:
        y `(B, C, ceil(H / stride), ceil(W / stride))`, like x; the sums of y over positions,
        float32 `(B, C)` if `per_image`, else over images too, `(1, C)`; the sums of y * y, float32
        `(C,)`.
    Raises:
        ValueError: the kernels do not take such tensors.
    """
    _check([x], [table], weight, stride)
    batch, channels, height, width = x.shape
    side = weight.shape[2]
    y = images_like(x, channels, -(-height // stride), -(-width // stride))
    cutting = FORWARD_TILES[side, stride][tile - 1]
    cut = _cut(y, cutting)
    totals = 1 if per_image else 2
    partial = x.new_empty(totals, cut.groups * cut.strips, channels, dtype=torch.float32)
    of_images = None
    if per_image:
        of_images = x.new_empty(batch, cut.strips, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):  # by default Triton uses the thread's current device
        _forward[cut.blocks, cut.groups](
            x, table, weight, y, partial, of_images, batch, height, width,
            C=channels, K=side, STRIDE=stride, ACT=act,
            S=cutting.columns, BLOCK=BLOCK, num_warps=cutting.warps, maxnreg=cutting.registers,
        )  # fmt: skip
    squares, sums = fold(partial, 1)
    if of_images is not None:
        sums, _ = fold(of_images, batch)
    return y, sums, squares[0]


def depthwise_backward(
    grad: Tensor,
    y: Tensor,
    affine: Tensor,
    x: Tensor,
    table: Tensor | None,
    weight: Tensor,
    stride: int,
    act: int,
    tile: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both gradients of `depthwise`, from the same loads.

    The gradient of y is alpha * grad + beta + kappa * y. The sums are those of dx before it is
    rounded to its dtype. Their order is fixed as in `depthwise`.

    Args:
        grad, y: like the output of `depthwise`.
        affine: float32 `(N, 3, C)`, rows alpha, beta, kappa. N is 1 or B.
        x, table, weight, stride, act: as given to `depthwise`.
        tile: 1 or 2.
    Returns:
        The gradient of x * scale + shift, like x (of x itself without a table); the gradient of
        the weight, float32 `(C, 1, K, K)`; the sums of the first over images and positions, float32
        `(1, C)`, and those of its products with x * rstd + nmean. Without a table both are
        empty, `(0,)`.
    Raises:
        ValueError: the kernels do not take such tensors.
    """
    _check([x, grad, y], [affine, table], weight, stride)
    batch, channels, height, width = x.shape
    side = weight.shape[2]
    taps = side * side
    dx = images_like(x, channels, height, width)
    cutting = backward_tiles(side, stride, channels)[tile - 1]
    cut = _cut(y, cutting)
    partial = x.new_empty(taps, cut.groups * cut.strips, channels, dtype=torch.float32)
    of_x = None
    if table is not None:
        of_x = x.new_empty(2, 1, cut.groups * cut.strips, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward[cut.blocks, cut.groups](
            grad, y, affine, x, table, weight, dx, partial, of_x, batch, height, width,
            C=channels, K=side, STRIDE=stride, ACT=act, PER_IMAGE=len(affine) > 1,
            S=cutting.columns, UNROLL=cutting.unroll, BLOCK=BLOCK, num_warps=cutting.warps,
            maxnreg=cutting.registers,
        )  # fmt: skip
    dweight, _ = fold(partial, taps, transposed=True)
    dweight = dweight.view(weight.shape)
    if table is None or of_x is None:
        empty = dweight.new_empty(0)
        return dx, dweight, empty, empty.clone()  # an operator's results must not share memory
    return dx, dweight, *fold_dots(of_x, table)


def _check(images: list[Tensor], tables: list[Tensor | None], weight: Tensor, stride: int) -> None:
    """Raises ValueError if the kernels would read such tensors wrongly."""
    size = tuple(weight.shape[2:])
    if size not in ((3, 3), (5, 5)) or stride not in (1, 2):
        raise ValueError(f"kernel {size} with stride {stride}: must be 3 x 3 or 5 x 5 with 1 or 2")
    channels = images[0].shape[1]
    if channels % 8 or len(weight) != channels:
        raise ValueError(f"{channels} channels, {len(weight)} filters: must be equal, in eights")
    check_tensors(images, tables)


def backward_tiles(side: int, stride: int, channels: int) -> tuple[Tile, Tile]:
    """Both tiles of `depthwise_backward` for a kernel of this side."""
    if channels >= 256 and (side, stride) == (3, 1):
        # Layers with many channels have small images: narrow strips fit into 14 columns.
        return Tile(2, 3), Tile(4, 3)
    return BACKWARD_TILES[side, stride]


class _Cut(NamedTuple):
    """The programs of a launch."""

    strips: int  # of a row
    blocks: int  # programs along a row
    groups: int  # of images: a program takes every groups-th image


def _cut(y: Tensor, tile: Tile) -> _Cut:
    """Cuts the work on output images into programs.

    Programs take about equally many images each. There are few of them, so that there are few
    partial sums to fold.
    """
    batch, channels, _, width = y.shape
    strips = triton.cdiv(width, tile.columns)
    blocks = triton.cdiv(strips * channels, BLOCK)
    groups = max(1, tile.programs * processors(y.device) // blocks)
    rounds = triton.cdiv(batch, groups)
    return _Cut(strips, blocks, triton.cdiv(batch, rounds))


# --------------------------------------------------------------------------------------------------
# Parts of the kernels
# --------------------------------------------------------------------------------------------------

# Hard-swish and ReLU are 0 here, and so are their slopes. Values outside an image become this one.
_OFF = tl.constexpr(-4.0)


@triton.jit
def _columns(first: tl.tensor, width: tl.tensor, live: tl.tensor, N: tl.constexpr) -> tl.tuple:
    """Which of the N columns from `first` on are in the image."""
    inside: tl.tuple = ()
    for j in tl.static_range(N):
        inside += (live & (first + j >= 0) & (first + j < width),)
    return inside


@triton.jit
def _if_valid(inside: tl.tuple, valid: tl.tensor, N: tl.constexpr) -> tl.tuple:
    """`inside` of a row that may be outside the image."""
    both: tl.tuple = ()
    for j in tl.static_range(N):
        both += (inside[j] & valid,)
    return both


@triton.jit
def _load_row(row: tl.tensor, inside: tl.tuple, C: tl.constexpr, N: tl.constexpr) -> tl.tuple:
    """N neighbours along a row; 0 outside the image."""
    values: tl.tuple = ()
    for j in tl.static_range(N):
        values += (tl.load(row + j * C, mask=inside[j], other=0.0),)
    return values


@triton.jit
def _load_rows(
    image: tl.tensor,
    first: tl.tensor,
    height: tl.tensor,
    pitch: tl.tensor,
    inside: tl.tuple,
    C: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tuple:
    """N neighbours along each of ROWS rows. Below the image, its last row is read again."""
    values: tl.tuple = ()
    for p in tl.static_range(ROWS):
        row = tl.minimum(first + p, height - 1)
        values += _load_row(image + row * pitch, inside, C, N)
    return values


@triton.jit
def _weights(weight: tl.tensor, c: tl.tensor, TAPS: tl.constexpr) -> tl.tuple:
    taps: tl.tuple = ()
    for t in tl.static_range(TAPS):
        taps += (tl.load(weight + c * TAPS + t).to(tl.float32),)
    return taps


@triton.jit
def _zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr) -> tl.tuple:
    zeros: tl.tuple = ()
    for _ in tl.static_range(COUNT):
        zeros += (tl.full([BLOCK], 0.0, tl.float32),)
    return zeros


# --------------------------------------------------------------------------------------------------
# Forward
# --------------------------------------------------------------------------------------------------


@triton.jit
def _activated_row(
    raw: tl.tuple, affine: tl.tuple, inside: tl.tuple, ACT: tl.constexpr, N: tl.constexpr
) -> tl.tuple:
    """The activations of N neighbours along a row; 0 outside the image."""
    scale, shift = affine
    row: tl.tuple = ()
    for j in tl.static_range(N):
        a = activate(raw[j].to(tl.float32) * scale + shift, ACT)
        row += (tl.where(inside[j], a, 0.0),)
    return row


@triton.jit
def _floats(raw: tl.tuple, inside: tl.tuple, N: tl.constexpr) -> tl.tuple:
    row: tl.tuple = ()
    for j in tl.static_range(N):
        row += (tl.where(inside[j], raw[j].to(tl.float32), 0.0),)
    return row


@triton.jit
def _row_sums(
    acc: tl.tuple,
    a: tl.tuple,
    w: tl.tuple,
    KH: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    S: tl.constexpr,
) -> tl.tuple:
    """Adds an input row's share to the sums `acc` of one output row."""
    grown: tl.tuple = ()
    for s in tl.static_range(S):
        y = acc[s]
        for kw in tl.static_range(K):
            y += a[s * STRIDE + kw] * w[KH * K + kw]
        grown += (y,)
    return grown


@triton.jit
def _put_row(
    row: tl.tensor,
    acc: tl.tuple,
    stored: tl.tuple,
    sums: tl.tuple,
    C: tl.constexpr,
    S: tl.constexpr,
) -> tl.tuple:
    """Stores an output row. Returns the sums of it and of its squares, added to `sums`."""
    total, squares = sums
    for s in tl.static_range(S):
        tl.store(row + s * C, acc[s].to(row.dtype.element_ty), mask=stored[s])
        y = tl.where(stored[s], acc[s], 0.0)
        total += y
        squares += y * y
    return total, squares


@triton.jit(do_not_specialize=["B", "H", "W"])
def _forward(
    x: tl.tensor,
    table: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    partial: tl.tensor,
    of_images: tl.tensor,
    B: tl.tensor,
    H: tl.tensor,
    W: tl.tensor,
    C: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    ACT: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Keeps the unfinished output rows i - LAG ... i + AHEAD, and adds each input row to them."""
    PAD: tl.constexpr = K // 2
    LAG: tl.constexpr = PAD // STRIDE
    ROWS: tl.constexpr = LAG + (STRIDE - 1 + PAD) // STRIDE + 1
    READ: tl.constexpr = (S - 1) * STRIDE + K  # columns that a strip reads
    HO = (H + STRIDE - 1) // STRIDE
    WO = (W + STRIDE - 1) // STRIDE
    strips = (WO + S - 1) // S
    g = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    strip = g // C
    c = g % C
    live = strip < strips
    inside = _columns(strip * (S * STRIDE) - PAD, W, live, READ)
    stored = _columns(strip * S, WO, live, S)
    x_strip = (strip * (S * STRIDE) - PAD) * C + c
    y_strip = strip * (S * C) + c
    w = _weights(weight, c, K * K)
    if table is not None:
        affine = (tl.load(table + c), tl.load(table + C + c))
    total = tl.full([BLOCK], 0.0, tl.float32)
    squares = tl.full([BLOCK], 0.0, tl.float32)
    wide = tl.program_id(1).to(tl.int64) * 0  # a batch may have more than 2^31 values
    first = x + (tl.program_id(1) + wide) * (H * W * C) + x_strip
    ahead = _load_rows(first, 0, H, W * C, inside, C, READ, STRIDE)
    for n in range(tl.program_id(1), B, tl.num_programs(1)):
        y_image = y + (n + wide) * (HO * WO * C) + y_strip
        acc = _zeros(ROWS * S, BLOCK)
        for i in range(HO):
            loaded = ahead
            ends = i + 1 == HO
            image = tl.where(ends, tl.minimum(n + tl.num_programs(1), B - 1), n)
            below = tl.where(ends, 0, (i + 1) * STRIDE)
            x_image = x + (image + wide) * (H * W * C) + x_strip
            ahead = _load_rows(x_image, below, H, W * C, inside, C, READ, STRIDE)
            for p in tl.static_range(STRIDE):
                ok = inside if p == 0 else _if_valid(inside, i * STRIDE + p < H, READ)
                raw = loaded[p * READ : p * READ + READ]
                if table is not None:
                    a = _activated_row(raw, affine, ok, ACT, READ)
                else:
                    a = _floats(raw, ok, READ)
                grown: tl.tuple = ()
                for q in tl.static_range(ROWS):
                    unfinished = acc[q * S : q * S + S]
                    for kh in tl.static_range(K):
                        if kh == p + PAD + (LAG - q) * STRIDE:
                            unfinished = _row_sums(unfinished, a, w, kh, K, STRIDE, S)
                    grown += unfinished
                acc = grown
            if i >= LAG:
                row = y_image + (i - LAG) * (WO * C)
                total, squares = _put_row(row, acc, stored, (total, squares), C, S)
            acc = acc[S:] + _zeros(S, BLOCK)
        for q in tl.static_range(LAG):  # no input row below the image adds to these rows
            if HO - LAG + q >= 0:
                row = y_image + (HO - LAG + q) * (WO * C)
                total, squares = _put_row(row, acc[q * S :], stored, (total, squares), C, S)
        if of_images is not None:
            tl.store(of_images + n * (strips * C) + g, total, mask=live)
            total = tl.full([BLOCK], 0.0, tl.float32)
    at = tl.program_id(1) * (strips * C) + g
    tl.store(partial + at, squares, mask=live)
    if of_images is None:
        tl.store(partial + tl.num_programs(1) * (strips * C) + at, total, mask=live)


# --------------------------------------------------------------------------------------------------
# Backward
# --------------------------------------------------------------------------------------------------


@triton.jit
def _gradient_row(
    raw: tl.tuple, affine: tl.tuple, inside: tl.tuple, valid: tl.tensor, N: tl.constexpr
) -> tl.tuple:
    """The gradient of N neighbours along a row of y; 0 outside the image.

    `raw` are N values of grad, then N of y.
    """
    alpha, beta, kappa = affine
    ok = _if_valid(inside, valid, N)
    row: tl.tuple = ()
    for j in tl.static_range(N):
        d = raw[N + j].to(tl.float32) * kappa + beta
        d = raw[j].to(tl.float32) * alpha + d
        row += (tl.where(ok[j], d, 0.0),)
    return row


@triton.jit
def _input_gradient(
    d: tl.tuple,
    w: tl.tuple,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tensor:
    """The gradient of one column of a strip, in the input row ROW of a step.

    ROW and COLUMN are relative to the input value that the first tap of d[0] touches.
    """
    da = tl.full(w[0].shape, 0.0, tl.float32)
    for kh in tl.static_range(K):
        for kw in tl.static_range(K):
            if (ROW - kh) % STRIDE == 0 and (COLUMN - kw) % STRIDE == 0:
                da += d[(ROW - kh) // STRIDE * WIDE + (COLUMN - kw) // STRIDE] * w[kh * K + kw]
    return da


@triton.jit
def _tap_sum(
    tap: tl.tensor,
    d: tl.tuple,
    a: tl.tuple,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDE: tl.constexpr,
    IN: tl.constexpr,
) -> tl.tensor:
    """Adds the share of an input row to the weight gradient of a tap."""
    if ROW % STRIDE == 0:
        for s in tl.static_range(IN):
            if (COLUMN + s) % STRIDE == 0:
                tap += d[ROW // STRIDE * WIDE + (COLUMN + s) // STRIDE] * a[s]
    return tap


@triton.jit
def _input_row(
    raw: tl.tuple,
    dx_row: tl.tensor,
    inside: tl.tuple,
    of_x: tl.tuple,
    d: tl.tuple,
    w: tl.tuple,
    dw: tl.tuple,
    sums: tl.tuple,
    ROW: tl.constexpr,
    TABLE: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    ACT: tl.constexpr,
    S: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tuple:
    """Stores the gradient of an input row.

    Returns `dw` and `sums` with its share.
    """
    IN: tl.constexpr = S * STRIDE
    FIRST: tl.constexpr = K // 2 // STRIDE * STRIDE + K // 2  # of a strip's columns, from d[0]
    scale, shift = of_x
    total, dots = sums
    a: tl.tuple = ()
    for s in tl.static_range(IN):
        da = _input_gradient(d, w, ROW, FIRST + s, K, STRIDE, WIDE)
        e = raw[s].to(tl.float32)
        if TABLE:
            z = tl.where(inside[s], e * scale + shift, 0.0 if ACT == 0 else _OFF)
            da = through_activation(da, z, ACT)
            if ACT == 0:
                da = tl.where(inside[s], da, 0.0)
            total += da
            dots += da * e
            a += (activate(z, ACT),)
        else:
            a += (tl.where(inside[s], e, 0.0),)
        tl.store(dx_row + s * C, da.to(dx_row.dtype.element_ty), mask=inside[s])
    grown: tl.tuple = ()
    for kh in tl.static_range(K):
        for kw in tl.static_range(K):
            tap = dw[kh * K + kw]
            grown += (_tap_sum(tap, d, a, ROW - kh, FIRST - kw, STRIDE, WIDE, IN),)
    return grown, (total, dots)


@triton.jit(do_not_specialize=["B", "H", "W"])
def _backward(
    grad: tl.tensor,
    y: tl.tensor,
    affine: tl.tensor,
    x: tl.tensor,
    table: tl.tensor,
    weight: tl.tensor,
    dx: tl.tensor,
    partial: tl.tensor,
    of_sums: tl.tensor,
    B: tl.tensor,
    H: tl.tensor,
    W: tl.tensor,
    C: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    ACT: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    S: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Keeps the gradients of the output rows i - LAG ... i + AHEAD in a ring.

    An input row then has all it needs for its own gradient and for its share of the weight's.
    UNROLL is 1 or ROWS. With ROWS, a new row takes the registers of the oldest one. With 1, all
    other rows move to other registers in each step.
    """
    PAD: tl.constexpr = K // 2
    LAG: tl.constexpr = PAD // STRIDE
    AHEAD: tl.constexpr = (STRIDE - 1 + PAD) // STRIDE
    WIDE: tl.constexpr = LAG + S + AHEAD  # output columns that a strip's inputs touch
    IN: tl.constexpr = S * STRIDE  # input columns of a strip
    ROWS: tl.constexpr = LAG + AHEAD + 1
    HO = (H + STRIDE - 1) // STRIDE
    WO = (W + STRIDE - 1) // STRIDE
    strips = (WO + S - 1) // S
    g = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    strip = g // C
    c = g % C
    live = strip < strips
    inside = _columns(strip * IN, W, live, IN)
    out_inside = _columns(strip * S - LAG, WO, live, WIDE)
    in_strip = strip * (IN * C) + c
    out_strip = (strip * S - LAG) * C + c
    w = _weights(weight, c, K * K)
    if table is not None:
        of_x = (tl.load(table + c), tl.load(table + C + c))
    else:
        of_x = (w[0], w[0])  # not used
    if not PER_IMAGE:
        of_y = (tl.load(affine + c), tl.load(affine + C + c), tl.load(affine + 2 * C + c))
    sums = (tl.full([BLOCK], 0.0, tl.float32), tl.full([BLOCK], 0.0, tl.float32))
    dw = _zeros(K * K, BLOCK)
    wide = tl.program_id(1).to(tl.int64) * 0  # a batch may have more than 2^31 values
    for n in range(tl.program_id(1), B, tl.num_programs(1)):
        x_image = x + (n + wide) * (H * W * C) + in_strip
        dx_image = dx + (n + wide) * (H * W * C) + in_strip
        grad_image = grad + (n + wide) * (HO * WO * C) + out_strip
        y_image = y + (n + wide) * (HO * WO * C) + out_strip
        if PER_IMAGE:
            own = affine + n * (3 * C) + c
            of_y = (tl.load(own), tl.load(own + C), tl.load(own + 2 * C))
        # Row i of y lies in d at (i + LAG) % ROWS. Rows outside are 0.
        d = _zeros(LAG * WIDE, BLOCK)
        for q in tl.static_range(AHEAD):
            early = _load_rows(grad_image, q, HO, WO * C, out_inside, C, WIDE, 1)
            early += _load_rows(y_image, q, HO, WO * C, out_inside, C, WIDE, 1)
            d += _gradient_row(early, of_y, out_inside, q < HO, WIDE)
        d += _zeros(WIDE, BLOCK)
        of_d = _load_rows(grad_image, AHEAD, HO, WO * C, out_inside, C, WIDE, 1)
        of_d += _load_rows(y_image, AHEAD, HO, WO * C, out_inside, C, WIDE, 1)
        of_a = _load_rows(x_image, 0, H, W * C, inside, C, IN, STRIDE)
        for first in range(0, HO, UNROLL):
            for u in tl.static_range(UNROLL):
                if first + u < HO:
                    new = first + u + AHEAD
                    row = _gradient_row(of_d, of_y, out_inside, new < HO, WIDE)
                    loaded = of_a
                    of_d = _load_rows(grad_image, new + 1, HO, WO * C, out_inside, C, WIDE, 1)
                    of_d += _load_rows(y_image, new + 1, HO, WO * C, out_inside, C, WIDE, 1)
                    below = (first + u + 1) * STRIDE
                    of_a = _load_rows(x_image, below, H, W * C, inside, C, IN, STRIDE)
                    d = (
                        d[: (u + ROWS - 1) % ROWS * WIDE]
                        + row
                        + d[((u + ROWS - 1) % ROWS + 1) * WIDE :]
                    )
                    for p in tl.static_range(STRIDE):
                        at = (first + u) * STRIDE + p
                        ok = inside if p == 0 else _if_valid(inside, at < H, IN)
                        dw, sums = _input_row(
                            loaded[p * IN : p * IN + IN], dx_image + at * (W * C), ok, of_x,
                            d[u * WIDE :] + d[: u * WIDE], w, dw, sums, LAG * STRIDE + PAD + p,
                            table is not None, C, K, STRIDE, ACT, S, WIDE,
                        )  # fmt: skip
            d = d[UNROLL % ROWS * WIDE :] + d[: UNROLL % ROWS * WIDE]
    part = tl.program_id(1) * (strips * C) + g
    size = tl.num_programs(1) * (strips * C)
    for t in tl.static_range(K * K):
        tl.store(partial + t * size + part, dw[t], mask=live)
    if table is not None:
        tl.store(of_sums + part, sums[0], mask=live)
        tl.store(of_sums + size + part, sums[1], mask=live)
