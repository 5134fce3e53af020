"""1 x 1 convolution for training on a GPU: one Triton kernel for each direction.

As they load, the kernels apply the BatchNorm, the gate and the activation that come before the
convolution. As they store, they add up the sums that the BatchNorm after it needs. So each
direction reads and writes each tensor of images once.

The convolution is a matrix product: a row is one position of one image, a column one channel. A
program walks over tiles of rows. Forward, it makes a block of output channels, and takes the input
channels in steps. Backward, it holds a block of input channels and all output channels: then both
gradients come from the same loads, and the weight's stays in registers during the whole walk.

With squeeze-excite, each image has its own row of the table. Then a tile does not cross images, and
backward a program takes whole images, so that it adds up an image's sums once.

Batch size, height and width are numbers at run time: other image sizes compile nothing anew.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttrain.triton_parts import (
    activate,
    check_tensors,
    column_sums,
    fold,
    fold_dots,
    images_like,
    processors,
    through_activation,
)

ROWS = 64  # of a tile; twice as many where there are few channels


class Tile(NamedTuple):
    """How the work is cut."""

    rows: int  # positions of a tile
    inputs: int  # input channels: of a step forward, of a program backward
    outputs: int  # output channels of a program
    warps: int  # of a program
    stages: int  # of the pipeline: tiles (forward: steps of input channels) loaded at a time
    registers: int | None = None  # of a thread, at most: with 128, a multiprocessor runs 16 warps


def _products_in_shared_memory(capability: int) -> bool:
    """True if tensor cores read from shared memory. Those of other GPUs read registers."""
    return capability in (9, 10)


def _most_inputs(capability: int, activated: bool) -> int:
    """Input channels of a tile at most.

    In registers, 64 activated input channels would need more of them than there are.
    """
    return 64 if _products_in_shared_memory(capability) or not activated else 32


def forward_tile(
    channels: int, filters: int, capability: int, activated: bool, tile: int = 1
) -> Tile:
    """A tile of a layer.

    Args:
        capability: the GPU's major compute capability.
        activated: there is a table.
        tile: 1 for the fastest of 4 to 6 for the layers of Large on an H200; 2 for one that makes
            half as many output channels, so that two programs run on a multiprocessor at a time.
            `layer_trials` measures both.
    """
    inputs = _power(channels, _most_inputs(capability, activated))
    outputs = _power(filters, 128)
    if tile == 2:
        warps = 4 if inputs * outputs <= 2048 else 8
        return Tile(ROWS, inputs, max(16, outputs // 2), warps, 3 if activated else 5, 128)
    if 128 < filters <= 256 < channels:
        # The wide input is read and activated once, not once for each block of outputs.
        inputs, outputs = 32, 256
    warps = 4 if inputs * outputs <= 2048 else 8
    wide = outputs == 16 or (activated and outputs <= 128)
    return Tile(2 * ROWS if wide else ROWS, inputs, outputs, warps, 3 if activated else 5)


def backward_tile(
    channels: int, filters: int, capability: int, activated: bool, ready: bool, tile: int = 1
) -> Tile:
    """A tile of a layer, found as that of `forward_tile`.

    With 128 registers, two programs of 8 warps run on a multiprocessor: while one waits for memory,
    the other one works.

    Args:
        ready: the gradient of the output is given, and not made from it.
        tile: 2 for another choice. Where tensor cores read shared memory (H100, H200), a program
            has up to 64 input channels and all registers. Elsewhere a program has half as many
            rows and input channels, so that two run.
    """
    outputs = _power(filters, filters)
    few = 128 if _products_in_shared_memory(capability) else None
    if tile == 2:
        if few:
            return Tile(ROWS, _power(channels, 64), outputs, 8, 2)
        first = backward_tile(channels, filters, capability, activated, ready)
        return first._replace(rows=ROWS // 2, inputs=max(16, first.inputs // 2), registers=128)
    if ready:
        return Tile(ROWS, _power(channels, 32), outputs, 8, 3, few)
    inputs = _power(channels, _most_inputs(capability, activated))
    if outputs <= 64:
        return Tile(ROWS, inputs, outputs, 4, 3, few)
    if outputs > 128:
        return Tile(ROWS, inputs, outputs, 8, 1)
    if few and inputs == 64:
        return Tile(ROWS, inputs, outputs, 4, 2)
    return Tile(ROWS, inputs, outputs, 8, 1, few)


def _power(channels: int, most: int) -> int:
    """A block for `channels`, or for `most` of them: a power of two from 16 on."""
    return max(16, int(triton.next_power_of_2(min(channels, most))))


def fits(x: Tensor, table: Tensor | None, weight: Tensor, backward: bool) -> bool:
    """True if a kernel should be faster than plain operators, which leave the product to cuBLAS.

    A kernel is not faster

    - in float32, where its products do not use tensor cores;
    - for project (with a table) where images are small: below 128 positions;
    - for expand (without a table) with more than 64 input channels: then several programs would
      read the wide output, or more registers be needed than there are.

    Backward there is none with more than 256 filters, whose gradients do not fit into registers.

    An H200 gave these limits, with the layers of Large at batch 1024: the kernels were timed, and
    so were the products of cuBLAS. What the other passes of the plain operators take was counted
    from their bytes, at 2.6 to 3.2 TB/s.

    Args:
        x, table, weight: as given to `pointwise`.
        backward: the question is about `pointwise_backward`.
    """
    if x.dtype == torch.float32 or not runs(weight, backward):
        return False  # only what the compiler can trace: no Triton, no device
    return weight.shape[1] <= 64 if table is None else x.shape[2] * x.shape[3] >= 2 * ROWS


def runs(weight: Tensor, backward: bool) -> bool:
    """True if there is a kernel for such weights, `(D, C, 1, 1)`."""
    filters, channels = weight.shape[:2]
    return not (channels % 8 or filters % 8 or (backward and filters > 256))


def pointwise(
    x: Tensor, table: Tensor | None, weight: Tensor, act: int, tile: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """1 x 1 convolution of act(x * scale + shift), or of x where `table` is None.

    The sums are those of the output before it is rounded to its dtype. They are added up in an
    order that depends only on the shapes, on the tile and on the kind of GPU.

    Args:
        x: images `(B, C, H, W)`, channels-last, on a GPU: bfloat16, float16, or float32, which is
            slow. C is a multiple of 8.
        table: float32 `(N, 4, C)`, rows scale, shift, rstd, nmean. N is 1 or B.
        weight: `(D, C, 1, 1)`, D is a multiple of 8.
        act: 0 none, 1 ReLU, 2 hard-swish. Only with a table.
        tile: 1 or 2.
    Returns:
        y `(B, D, H, W)`, like x; the sums of y over images and positions, float32 `(1, D)`; the
        sums of y * y, float32 `(D,)`.
    Raises:
        ValueError: the kernels do not take such tensors.
    """
    _check([x], [table], weight)
    filters, channels = weight.shape[:2]
    cutting = forward_tile(channels, filters, capability_of(x), table is not None, tile)
    blocks = triton.cdiv(filters, cutting.outputs)
    cut = _cut(x, cutting, blocks, _per_image(table), whole_runs=False)
    y = images_like(x, filters, *x.shape[2:])
    partial = x.new_empty(2, cut.groups, filters, dtype=torch.float32)
    with torch.cuda.device_of(x):  # by default Triton uses the thread's current device
        _forward[cut.blocks, cut.groups](
            x, table, _matrix(weight, x.dtype), y, partial, cut.runs, cut.length,
            C=channels, D=filters, ACT=act, PER_IMAGE=_per_image(table),
            TILE=cutting.rows, C_BLOCK=cutting.inputs, D_BLOCK=cutting.outputs,
            FOLD=_folds(cutting.outputs, cutting), num_warps=cutting.warps,
            num_stages=cutting.stages, maxnreg=cutting.registers,
        )  # fmt: skip
    sums, squares = fold(partial, 1)
    return y, sums, squares[0]


def pointwise_backward(
    grad: Tensor,
    y: Tensor | None,
    affine: Tensor | None,
    x: Tensor,
    table: Tensor | None,
    weight: Tensor,
    act: int,
    skip: Tensor | None,
    tile: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both gradients of `pointwise`, from the same loads.

    The gradient of y is alpha * grad + beta + kappa * y. The sums are those of dx before `skip` is
    added and before it is rounded to its dtype. Their order is fixed as in `pointwise`.

    Args:
        grad: like the output of `pointwise`.
        y: that output. None: `grad` is its gradient, and there is no `affine`.
        affine: float32 `(N, 3, D)`, rows alpha, beta, kappa. N is 1 or B.
        x, table, weight, act: as given to `pointwise`. D is at most 256.
        skip: like x, added to its gradient.
        tile: 1 or 2.
    Returns:
        dx, the gradient of x * scale + shift, like x (of x itself without a table); the gradient of
        the weight, float32 `(D, C, 1, 1)`; the sums of dx over the images that share a row of the
        table, float32 `(N, C)`, and those of its products with x * rstd + nmean. Without a table
        both are empty, `(0,)`.
    Raises:
        ValueError: the kernels do not take such tensors.
    """
    _check([x, grad, *(t for t in (y, skip) if t is not None)], [affine, table], weight)
    filters, channels = weight.shape[:2]
    if filters > 256:
        raise ValueError(f"{filters} filters: at most 256 fit into registers")
    per_image = _per_image(table) or _per_image(affine)
    activated = table is not None
    cutting = backward_tile(channels, filters, capability_of(x), activated, y is None, tile)
    blocks = triton.cdiv(channels, cutting.inputs)
    cut = _cut(x, cutting, blocks, per_image, whole_runs=per_image)
    dx = images_like(x, channels, *x.shape[2:])
    dweight = x.new_empty(cut.groups, filters, channels, dtype=torch.float32)
    partial = None
    if table is not None:
        rows = cut.runs if per_image else cut.groups
        partial = x.new_empty(2, rows, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward[cut.blocks, cut.groups](
            grad, y, affine, x, table, _matrix(weight, x.dtype), skip, dx, dweight, partial,
            cut.runs, cut.length,
            C=channels, D=filters, ACT=act, PER_IMAGE=per_image,
            TABLES=_per_image(table), AFFINES=_per_image(affine),
            TILE=cutting.rows, C_BLOCK=cutting.inputs, D_BLOCK=cutting.outputs,
            FOLD=_folds(cutting.inputs, cutting), num_warps=cutting.warps,
            num_stages=cutting.stages, maxnreg=cutting.registers,
        )  # fmt: skip
    of_weight, _ = fold(dweight.view(1, cut.groups, -1), 1)
    of_weight = of_weight.view(filters, channels, 1, 1)
    if table is None or partial is None:
        empty = of_weight.new_empty(0)
        return dx, of_weight, empty, empty.clone()  # an operator's results must not share memory
    return dx, of_weight, *fold_dots(partial.view(2, len(table), -1, channels), table)


def _check(images: list[Tensor], tables: list[Tensor | None], weight: Tensor) -> None:
    """Raises ValueError if the kernels would read such tensors wrongly."""
    check_tensors(images, tables)
    filters, channels = weight.shape[:2]
    if channels % 8 or filters % 8 or channels != images[0].shape[1]:
        raise ValueError(
            f"{filters} filters of {channels} channels for images of {images[0].shape[1]}: the "
            "channels must be equal, and all must be multiples of 8"
        )
    for table in tables:
        if table is not None and len(table) not in (1, len(images[0])):
            raise ValueError(f"{len(table)} rows of a table for {len(images[0])} images")


def _per_image(table: Tensor | None) -> bool:
    return table is not None and len(table) > 1


def capability_of(x: Tensor) -> int:
    """The major compute capability. Triton's interpreter makes the tiles of sm_90."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.flatten(1).to(dtype).contiguous()


def _folds(channels: int, tile: Tile) -> bool:
    """True if the sums of a tile are folded at once.

    Otherwise a thread adds each of its values to a register of its own, which takes a quarter of
    the instructions. Of registers it may take 32 for each of two sums.
    """
    return tile.rows * channels > 32 * 32 * tile.warps


class _Cut(NamedTuple):
    """The programs of a launch."""

    runs: int  # of positions that share a row of the table: all, or those of an image
    length: int  # positions of a run
    blocks: int  # programs along the channels; they run side by side and read the same rows
    groups: int  # of tiles or runs: a program takes every groups-th


def _cut(x: Tensor, tile: Tile, blocks: int, per_image: bool, whole_runs: bool) -> _Cut:
    """Cuts the work on images into programs.

    As many programs as run at the same time take about equally many tiles each. So there are few
    partial sums to fold.

    Args:
        blocks: programs along the channels.
        whole_runs: a program takes whole runs, not single tiles.
    """
    positions = x.shape[2] * x.shape[3]
    runs, length = (len(x), positions) if per_image else (1, len(x) * positions)
    units = runs if whole_runs else runs * triton.cdiv(length, tile.rows)
    resident = 16 // tile.warps  # programs of a multiprocessor: a thread has about 128 registers
    groups = max(1, resident * processors(x.device) // blocks)
    rounds = triton.cdiv(units, groups)
    return _Cut(runs, length, blocks, triton.cdiv(units, rounds))


# --------------------------------------------------------------------------------------------------
# The kernels
# --------------------------------------------------------------------------------------------------


@triton.jit
def _place(tile: tl.tensor, length: tl.tensor, row: tl.tensor, PER_IMAGE: tl.constexpr) -> tl.tuple:
    """Run and first position of a tile, and which of its rows are in the run."""
    run = 0
    first = tile * row.shape[0]
    if PER_IMAGE:
        tiles = (length + row.shape[0] - 1) // row.shape[0]
        run = tile // tiles
        first = (tile % tiles) * row.shape[0]
    return run, first, row < length - first


@triton.jit
def _mask(rows: tl.tensor, columns: tl.tensor, N: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Which values of a tile exist: `rows` does, and the column is one of N."""
    mask = rows[:, None]
    if N % BLOCK != 0:
        mask = mask & (columns < N)[None, :]
    return mask


@triton.jit
def _table_row(row: tl.tensor, at: tl.tensor, N: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Values of N channels; 0 beyond."""
    if N % BLOCK == 0:
        return tl.load(row + at)[None, :]
    return tl.load(row + at, mask=at < N, other=0.0)[None, :]


@triton.jit
def _weights(
    weight: tl.tensor,
    d: tl.tensor,
    c: tl.tensor,
    C: tl.constexpr,
    D: tl.constexpr,
) -> tl.tensor:
    """A block of the weights, one row for each output channel."""
    inside = (d < D)[:, None] & (c < C)[None, :]
    return tl.load(weight + d[:, None] * C + c[None, :], mask=inside, other=0.0)


@triton.jit
def _step(
    acc: tl.tensor,
    x: tl.tensor,
    table: tl.tensor,
    w: tl.tensor,
    rows: tl.tensor,
    row: tl.tensor,
    c: tl.tensor,
    C: tl.constexpr,
    ACT: tl.constexpr,
    C_BLOCK: tl.constexpr,
) -> tl.tensor:
    """Adds the share of a block of input channels to a tile of the output."""
    mask = _mask(rows, c, C, C_BLOCK)
    a = tl.load(x + (row[:, None] * C + c[None, :]), mask=mask, other=0.0)
    if table is not None:
        scale = _table_row(table, c, C, C_BLOCK)
        z = a.to(tl.float32) * scale + _table_row(table + C, c, C, C_BLOCK)
        a = activate(z, ACT).to(a.dtype)
    return tl.dot(a, w.T, acc, input_precision="ieee")


@triton.jit
def _added(total: tl.tensor, values: tl.tensor, FOLD: tl.constexpr) -> tl.tensor:
    return total + (column_sums(values) if FOLD else values)


@triton.jit
def _folded(total: tl.tensor, FOLD: tl.constexpr) -> tl.tensor:
    return total if FOLD else column_sums(total)


@triton.jit(do_not_specialize=["runs", "length"])
def _forward(
    x: tl.tensor,
    table: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    partial: tl.tensor,
    runs: tl.tensor,
    length: tl.tensor,
    C: tl.constexpr,
    D: tl.constexpr,
    ACT: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    FOLD: tl.constexpr,
    TILE: tl.constexpr,
    C_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
) -> None:
    """Makes D_BLOCK output channels of every tile that is this program's."""
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    c = tl.arange(0, C_BLOCK)
    row = tl.arange(0, TILE)
    if C <= C_BLOCK:
        w = _weights(weight, d, c, C, D)
    total = tl.full([D_BLOCK] if FOLD else [TILE, D_BLOCK], 0.0, tl.float32)
    squares = tl.full([D_BLOCK] if FOLD else [TILE, D_BLOCK], 0.0, tl.float32)
    wide = tl.program_id(1).to(tl.int64) * 0  # a batch may have more than 2^31 values
    for tile in range(tl.program_id(1), runs * ((length + TILE - 1) // TILE), tl.num_programs(1)):
        run, first, rows = _place(tile, length, row, PER_IMAGE)
        at = run * length + first + wide
        own = table
        if PER_IMAGE:
            own = table + run * (4 * C)
        acc = tl.full([TILE, D_BLOCK], 0.0, tl.float32)
        if C <= C_BLOCK:
            acc = _step(acc, x + at * C, own, w, rows, row, c, C, ACT, C_BLOCK)
        else:
            for c0 in range(0, C, C_BLOCK):
                block = _weights(weight, d, c0 + c, C, D)
                acc = _step(acc, x + at * C, own, block, rows, row, c0 + c, C, ACT, C_BLOCK)
        mask = _mask(rows, d, D, D_BLOCK)
        to = y + at * D + (row[:, None] * D + d[None, :])
        tl.store(to, acc.to(y.dtype.element_ty), mask=mask)
        if table is not None:  # rows outside became act(shift)
            acc = tl.where(rows[:, None], acc, 0.0)
        total = _added(total, acc, FOLD)
        squares = _added(squares, acc * acc, FOLD)
    out = partial + tl.program_id(1) * D + d
    tl.store(out, _folded(total, FOLD), mask=d < D)
    tl.store(out + tl.num_programs(1) * D, _folded(squares, FOLD), mask=d < D)


@triton.jit(do_not_specialize=["runs", "length"])
def _backward(
    grad: tl.tensor,
    y: tl.tensor,
    affine: tl.tensor,
    x: tl.tensor,
    table: tl.tensor,
    weight: tl.tensor,
    skip: tl.tensor,
    dx: tl.tensor,
    dweight: tl.tensor,
    partial: tl.tensor,
    runs: tl.tensor,
    length: tl.tensor,
    C: tl.constexpr,
    D: tl.constexpr,
    ACT: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    TABLES: tl.constexpr,
    AFFINES: tl.constexpr,
    FOLD: tl.constexpr,
    TILE: tl.constexpr,
    C_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
) -> None:
    """Makes the gradients of C_BLOCK input channels from every tile that is this program's.

    TABLES and AFFINES: there is one row of `table` and of `affine` for each image.
    """
    c = tl.program_id(0) * C_BLOCK + tl.arange(0, C_BLOCK)
    d = tl.arange(0, D_BLOCK)
    row = tl.arange(0, TILE)
    w = _weights(weight, d, c, C, D)
    if y is not None and not AFFINES:
        alpha = _table_row(affine, d, D, D_BLOCK)
        beta = _table_row(affine + D, d, D, D_BLOCK)
        kappa = _table_row(affine + 2 * D, d, D, D_BLOCK)
    if table is not None and not TABLES:
        scale = _table_row(table, c, C, C_BLOCK)
        shift = _table_row(table + C, c, C, C_BLOCK)
    # Tensor cores want 64 rows of a product at least.
    TURNED: tl.constexpr = D_BLOCK < 64 and C_BLOCK >= 64
    dw = tl.full([C_BLOCK, D_BLOCK] if TURNED else [D_BLOCK, C_BLOCK], 0.0, tl.float32)
    wide = tl.program_id(1).to(tl.int64) * 0  # a batch may have more than 2^31 values
    # A program takes whole images, or every num_programs-th tile of the only run.
    steps = tl.num_programs(1)
    for run in range(tl.program_id(1) if PER_IMAGE else 0, runs, steps if PER_IMAGE else 1):
        total = tl.full([C_BLOCK] if FOLD else [TILE, C_BLOCK], 0.0, tl.float32)
        dots = tl.full([C_BLOCK] if FOLD else [TILE, C_BLOCK], 0.0, tl.float32)
        if AFFINES:
            own = affine + run * (3 * D)
            alpha = _table_row(own, d, D, D_BLOCK)
            beta = _table_row(own + D, d, D, D_BLOCK)
            kappa = _table_row(own + 2 * D, d, D, D_BLOCK)
        if TABLES:
            gated = table + run * (4 * C)
            scale = _table_row(gated, c, C, C_BLOCK)
            shift = _table_row(gated + C, c, C, C_BLOCK)
        for tile in range(
            0 if PER_IMAGE else tl.program_id(1),
            (length + TILE - 1) // TILE,
            1 if PER_IMAGE else steps,
        ):
            at = run * length + tile * TILE + wide
            rows = row < length - tile * TILE
            mask = _mask(rows, d, D, D_BLOCK)
            of_y = at * D + (row[:, None] * D + d[None, :])
            dy = tl.load(grad + of_y, mask=mask, other=0.0)
            if y is not None:
                raw = tl.load(y + of_y, mask=mask, other=0.0).to(tl.float32)
                dy = dy.to(tl.float32) * alpha + (raw * kappa + beta)
                dy = tl.where(rows[:, None], dy, 0.0).to(x.dtype.element_ty)
            mask = _mask(rows, c, C, C_BLOCK)
            of_x = at * C + (row[:, None] * C + c[None, :])
            e = tl.load(x + of_x, mask=mask, other=0.0)
            a = e
            if table is not None:
                z = e.to(tl.float32) * scale + shift
                a = activate(z, ACT).to(e.dtype)
            if TURNED:
                dw = tl.dot(a.T, dy, dw, input_precision="ieee")
            else:
                dw = tl.dot(dy.T, a, dw, input_precision="ieee")
            da = tl.dot(dy, w, input_precision="ieee")  # 0 in rows outside, as dy is
            if table is not None:
                da = through_activation(da, z, ACT)
                with_x = da * e.to(tl.float32)
                total = _added(total, da, FOLD)
                dots = _added(dots, with_x, FOLD)
            if skip is not None:
                da += tl.load(skip + of_x, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx + of_x, da.to(dx.dtype.element_ty), mask=mask)
        if table is not None:
            out = partial + (run if PER_IMAGE else tl.program_id(1)) * C + c
            tl.store(out, _folded(total, FOLD), mask=c < C)
            out += (runs if PER_IMAGE else steps) * C
            tl.store(out, _folded(dots, FOLD), mask=c < C)
    block = dweight + tl.program_id(1) * (D * C)
    if TURNED:
        inside = (c < C)[:, None] & (d < D)[None, :]
        tl.store(block + (d[None, :] * C + c[:, None]), dw, mask=inside)
    else:
        inside = (d < D)[:, None] & (c < C)[None, :]
        tl.store(block + (d[:, None] * C + c[None, :]), dw, mask=inside)
