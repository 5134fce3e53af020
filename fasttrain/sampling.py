"""Draws samples, windows, flips and augmentations: pure functions of (seed, epoch, sample).

The windows, flips and augmentations of an epoch are a view of the images. Each epoch has its own
view, or views repeat. They may have a seed of their own: see `config.Distill`.

    global batch of step s in epoch e = order(seed, e)[i * B : (i + 1) * B]    i = s in its epoch
    micro-batch m of rank r           = rows [g * b, (g + 1) * b) of it        g = m * W + r
    order(seed, e)                    = a permutation of all samples

With `shuffle = "blocks"`, the order shuffles the tars, cuts them into blocks of a few tars, and
shuffles the samples within each block.

So the global batches do not depend on the world size W. With equal `micro_batch_size` b, the groups
of images in BatchNorm do not either.
"""

from collections.abc import Set
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain import config, rng
from fasttrain.rng import Stream, uniform
from fasttrain.schedule import Plan, image_px
from fasttrain.shards import Split

# The first four are torchvision's constants.
TRIES = 10  # to draw a window that fits
MAGNITUDE_BINS = 31
ERASE_AREA = (0.02, 0.33)  # fraction of the training crop
ERASE_RATIO = (0.3, 3.3)  # height / width
NUM_OPERATIONS = 14  # `augment.OPERATIONS` lists them


class Augment(NamedTuple):
    """The augmentations of a batch, after the images are cut. None means switched off.

    operations: `(B, N, 3)`: index into `augment.OPERATIONS`; magnitude bin; 1 if the magnitude is
        negative, else 0.
    jitter: `(B, 4)`: factors of brightness, contrast and saturation; hue in degrees.
    erase: `(B, 4)`: y, x, height, width of a window, in pixels of the training crop; all 0 to erase
        nothing. They are whole numbers as float32, because DALI takes no integers here.
    """

    operations: NDArray[np.int32] | None = None
    jitter: NDArray[np.float32] | None = None
    erase: NDArray[np.float32] | None = None


class Draw(NamedTuple):
    """The samples of one batch, and how to cut each.

    `windows` are x, y, width, height in source pixels: int32 in training, float32 in validation. In
    validation, a centre crop of the resized image rarely begins at a whole source pixel.
    """

    ids: NDArray[np.int64]  # (B,)
    windows: NDArray[np.int32] | NDArray[np.float32]  # (B, 4)
    flips: NDArray[np.bool_]  # (B,)
    out_px: int  # side of the batch's images
    augment: Augment = Augment()
    view: int = 0  # in training: see `View`


class View(NamedTuple):
    """What decides how each sample is cut, mirrored and augmented."""

    seed: int
    number: int  # the epoch whose draws these are
    out_px: int  # side of the images


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, split: Split, block: int) -> NDArray[np.int32]:
    """The order of all samples in an epoch, int32 `(N,)`.

    Takes 0.1 s for ImageNet: call it ahead of time for the next epoch. The result is cached.

    Args:
        block: the number of tars that are shuffled together; 0 shuffles the whole split.
    """
    if block:
        blocks = np.empty(len(split.shard_paths), np.int64)  # the block of each tar
        blocks[_shard_order(seed, epoch, split)] = np.arange(len(blocks)) // block
        keys = rng.hash64(seed, Stream.ORDER, epoch, np.arange(split.num_samples))
        order = np.lexsort([keys, np.repeat(blocks, split.shard_samples)]).astype(np.int32)
    else:
        order = rng.permutation(seed, Stream.ORDER, epoch, split.num_samples)
    order.setflags(write=False)
    return order


def _shard_order(seed: int, epoch: int, split: Split) -> NDArray[np.int32]:
    return rng.permutation(seed, Stream.BLOCKS, epoch, len(split.shard_paths))


def block_size(data: config.Data) -> int:
    """The number of tars that are shuffled together; 0 if the whole split is."""
    return data.shuffle_shards if data.shuffle == "blocks" else 0


class Piece(NamedTuple):
    """A byte range [start, stop) of a shard that will be read soon."""

    shard: int
    start: int
    stop: int


def pieces_ahead(
    split: Split, data: config.Data, plan: Plan, step: int, rank: int, first: bool
) -> list[Piece]:
    """The byte ranges that `rank` announces to the kernel before update `step`.

    This is for `shuffle = "blocks"`. While the ranks train on a block, they announce the tars of
    the next block at the same pace, tar by tar. Each rank announces its share, so that together
    they announce each byte once.

    Args:
        first: True for the first update of the process. It also announces the rest of its own
            block.
    """
    epoch, step_of_epoch = divmod(step, plan.steps_per_epoch)
    size = block_size(data)
    begin, end = (n * plan.global_batch_size for n in (step_of_epoch, step_of_epoch + 1))
    if step_of_epoch + 1 == plan.steps_per_epoch:  # samples that the epoch drops count as done
        end = split.num_samples
    blocks = _blocks(plan.seed, epoch, split, size)
    rows = np.cumsum([0, *(sum(split.shard_samples[s] for s in block) for block in blocks)])
    following = [*blocks, _blocks(plan.seed, epoch + 1, split, size)[0]]
    pieces = []
    for number, block in enumerate(blocks):
        low, high = max(begin, int(rows[number])), min(end, int(rows[number + 1]))
        if low >= high:
            continue
        length = int(rows[number + 1] - rows[number])
        since, until = ((row - int(rows[number])) / length for row in (low, high))
        if first:
            pieces += _pieces(split, block, since, 1.0, rank, plan.world_size)
        pieces += _pieces(split, following[number + 1], since, until, rank, plan.world_size)
    return pieces


@lru_cache(maxsize=4)
def _blocks(seed: int, epoch: int, split: Split, size: int) -> list[list[int]]:
    order = _shard_order(seed, epoch, split).tolist()
    return [order[first : first + size] for first in range(0, len(order), size)]


def _pieces(
    split: Split, block: list[int], low: float, high: float, rank: int, world_size: int
) -> list[Piece]:
    """The share of `rank` in the fraction [low, high) of a block's bytes, tar after tar."""
    total = sum(split.shard_bytes[shard] for shard in block)
    share = (high - low) / world_size
    first, last = (int(total * (low + share * n)) for n in (rank, rank + 1))
    pieces, start = [], 0
    for shard in block:
        stop = start + split.shard_bytes[shard]
        if first < stop and start < last:
            pieces.append(Piece(shard, max(first, start) - start, min(last, stop) - start))
        start = stop
    return pieces


def train_draw(
    split: Split,
    data: config.Data,
    plan: Plan,
    rank: int,
    number: int,
    bad: Set[int] = frozenset(),
) -> Draw:
    """Draws micro-batch `number` of a rank, counted from the start of the run.

    Example: there are 2 ranks, 8 images per update and 2 per micro-batch. Then rank 1 gets rows 2
    and 3 of the first global batch, and next rows 6 and 7.

    Args:
        bad: damaged samples, which are replaced by others.
    """
    step, micro = divmod(number, plan.accumulation)
    epoch, step_of_epoch = divmod(step, plan.steps_per_epoch)
    order = epoch_order(plan.seed, epoch, split, block_size(data))
    group = micro * plan.world_size + rank
    first = step_of_epoch * plan.global_batch_size + group * plan.micro_batch_size
    ids = order[first : first + plan.micro_batch_size].astype(np.int64)
    if bad:
        ids = replace_bad(plan.seed, epoch, ids, bad, split.num_samples)
    view = View(plan.draw_seed, plan.view_of(epoch), image_px(step, plan, data))
    return view_draw(split, data, view, ids)


def view_draw(split: Split, data: config.Data, view: View, ids: NDArray[np.int64]) -> Draw:
    """Draws how samples `ids` `(B,)` are cut, mirrored and augmented in a view."""
    seed, number, out_px = view
    sizes = split.width[ids], split.height[ids]
    windows = crop_windows(seed, number, ids, sizes, data.crop_area, data.crop_ratio)
    flips = np.zeros(len(ids), bool)
    if data.flip:
        flips = uniform(seed, Stream.FLIP, number, ids) < 0.5
    augment = augment_draw(seed, number, ids, data, out_px)
    return Draw(ids, windows, flips, out_px, augment, number)


def replace_bad(
    seed: int, epoch: int, ids: NDArray[np.int64], bad: Set[int], num_samples: int
) -> NDArray[np.int64]:
    """Replaces each bad id in `ids` `(B,)` by a good one, drawn by (seed, epoch, id).

    Some of the `num_samples` samples must be good.
    """
    ids = ids.copy()
    for row in np.flatnonzero(np.isin(ids, [*bad])):
        for attempt in range(2**32):
            drawn = rng.hash64(seed, Stream.STAND_IN, epoch, ids[row : row + 1], attempt)
            if (stand_in := int(drawn[0] % num_samples)) not in bad:
                ids[row] = stand_in
                break
    return ids


def crop_windows(
    seed: int,
    epoch: int,
    ids: NDArray[np.int64],
    sizes: tuple[NDArray[np.uint16], NDArray[np.uint16]],
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> NDArray[np.int32]:
    """Draws the windows of a random resized crop.

    Up to ten tries draw a window of random area and log-uniform aspect ratio. If none fits into the
    image, the result is the largest centred window with a permitted ratio.

    Args:
        sizes: widths and heights of the images, each `(B,)`.
        area: smallest and largest area, as a fraction of the image.
        ratio: smallest and largest width / height.
    Returns:
        x, y, width, height, int32 `(B, 4)`, within the image.

    Source: torchvision.transforms.RandomResizedCrop; Going deeper, arXiv:1409.4842, section 6.
    """
    full_w, full_h = (size.astype(np.int64) for size in sizes)

    def draw_sizes(rows: NDArray[np.int64], tries: NDArray[np.int64]) -> tuple[Any, ...]:
        """Width, height, and True if the window fits, `(rows, tries)` each."""
        key = (epoch, ids[rows, None], tries)
        full = full_w[rows, None], full_h[rows, None]
        target = full[0] * full[1] * _between(uniform(seed, Stream.CROP_AREA, *key), *area)
        aspect = np.exp(_between(uniform(seed, Stream.CROP_RATIO, *key), *np.log(ratio)))
        w = np.rint(np.sqrt(target * aspect)).astype(np.int64)
        h = np.rint(np.sqrt(target / aspect)).astype(np.int64)
        return w, h, (w > 0) & (h > 0) & (w <= full[0]) & (h <= full[1])

    w, h, fits = (found[:, 0] for found in draw_sizes(np.arange(len(ids)), np.arange(1)))
    again = np.flatnonzero(~fits)  # few rows: only they need further tries
    if len(again):
        more_w, more_h, more_fit = draw_sizes(again, np.arange(1, TRIES))
        first = more_fit.argmax(1)[:, None]  # the first try that fits; 0 if none does
        w[again] = np.take_along_axis(more_w, first, 1)[:, 0]
        h[again] = np.take_along_axis(more_h, first, 1)[:, 0]
        fits[again] = more_fit.any(1)
    x = (uniform(seed, Stream.CROP_X, epoch, ids) * (full_w - w + 1)).astype(np.int64)
    y = (uniform(seed, Stream.CROP_Y, epoch, ids) * (full_h - h + 1)).astype(np.int64)
    drawn = np.stack([x, y, w, h], 1)  # (B, 4)
    if not fits.all():
        drawn = np.where(fits[:, None], drawn, _centred_windows(full_w, full_h, ratio))
    return drawn.astype(np.int32)


def _between(u: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return low + (high - low) * u


def _centred_windows(
    width: NDArray[np.int64], height: NDArray[np.int64], ratio: tuple[float, float]
) -> NDArray[np.int64]:
    h = np.where(width < ratio[0] * height, np.rint(width / ratio[0]).astype(np.int64), height)
    w = np.where(width > ratio[1] * height, np.rint(height * ratio[1]).astype(np.int64), width)
    w, h = np.clip(w, 1, width), np.clip(h, 1, height)
    return np.stack([(width - w) // 2, (height - h) // 2, w, h], 1)


def augmented(data: config.Data) -> tuple[str, ...]:
    """The fields of `Augment` that `data` switches on, in their order."""
    on = data.augment != "none", any(data.color_jitter), bool(data.erase)
    return tuple(name for name, is_on in zip(Augment._fields, on, strict=True) if is_on)


def augment_draw(
    seed: int, epoch: int, ids: NDArray[np.int64], data: config.Data, crop_px: int
) -> Augment:
    """Draws the augmentations that `data` switches on for samples `ids` `(B,)`.

    Args:
        crop_px: side of the training crop.

    Source: RandAugment, arXiv:1909.13719; TrivialAugment, arXiv:2103.10158; and for the jitter
    torchvision.transforms.ColorJitter.
    """
    operations = jitter = erase = None
    columns = augmented(data)
    if "operations" in columns:
        number = data.augment_ops if data.augment == "rand" else 1
        key = (epoch, ids[:, None], np.arange(number))
        operation = uniform(seed, Stream.OPERATION, *key) * NUM_OPERATIONS  # (B, N)
        if data.augment == "rand":
            magnitude = np.full_like(operation, data.augment_magnitude)
        else:
            magnitude = uniform(seed, Stream.MAGNITUDE, *key) * MAGNITUDE_BINS
        negative = uniform(seed, Stream.SIGN, *key) < 0.5
        operations = np.stack([operation, magnitude, negative], -1).astype(np.int32)
    if "jitter" in columns:
        *strengths, hue = data.color_jitter
        low = np.array([*(max(0, 1 - strength) for strength in strengths), -360 * hue])
        high = np.array([*(1 + strength for strength in strengths), 360 * hue])
        u = uniform(seed, Stream.JITTER, epoch, ids[:, None], np.arange(4))  # (B, 4)
        jitter = (low + (high - low) * u).astype(np.float32)
    if "erase" in columns:
        erase = erase_windows(seed, epoch, ids, data.erase, crop_px)
    return Augment(operations, jitter, erase)


def erase_windows(
    seed: int, epoch: int, ids: NDArray[np.int64], probability: float, crop_px: int
) -> NDArray[np.float32]:
    """Draws windows to erase in square images.

    Args:
        probability: of erasing a window in an image.
        crop_px: side of the images.
    Returns:
        y, x, height, width, float32 `(B, 4)`; all 0 to erase nothing.

    Source: torchvision.transforms.RandomErasing; Random Erasing, arXiv:1708.04896, algorithm 1.
    """
    key = (epoch, ids[:, None], np.arange(TRIES))
    target = crop_px**2 * _between(uniform(seed, Stream.ERASE_AREA, *key), *ERASE_AREA)
    aspect = np.exp(_between(uniform(seed, Stream.ERASE_RATIO, *key), *np.log(ERASE_RATIO)))
    h, w = np.rint(np.sqrt(target * aspect)), np.rint(np.sqrt(target / aspect))  # (B, tries)
    fits = (h < crop_px) & (w < crop_px)
    rows, first = np.arange(len(ids)), fits.argmax(1)
    h, w = h[rows, first], w[rows, first]  # (B,)
    y = np.floor(uniform(seed, Stream.ERASE_Y, epoch, ids) * (crop_px - h + 1))
    x = np.floor(uniform(seed, Stream.ERASE_X, epoch, ids) * (crop_px - w + 1))
    erased = fits.any(1) & (uniform(seed, Stream.ERASE, epoch, ids) < probability)
    return np.where(erased[:, None], np.stack([y, x, h, w], 1), 0).astype(np.float32)


def num_eval_batches(num_samples: int, batch_size: int, rank: int, world_size: int) -> int:
    """Number of a rank's validation batches. Ranks may differ by one, and a rank may have none."""
    num_batches = -(-num_samples // batch_size)
    return len(range(rank, num_batches, world_size))


def eval_draw(
    split: Split, data: config.Data, batch_size: int, rank: int, world_size: int, number: int
) -> Draw:
    """Validation batch `number` of a rank. The batches of all ranks hold each image exactly once.

    Batches follow the order of the shards and go to the ranks in turn. The last batch of all may be
    smaller.
    """
    first = (number * world_size + rank) * batch_size
    ids = np.arange(first, min(first + batch_size, split.num_samples), dtype=np.int64)
    windows = center_windows(
        split.width[ids], split.height[ids], data.eval_resize_px, data.eval_crop_px
    )
    return Draw(ids, windows, np.zeros(len(ids), bool), data.eval_crop_px)


def center_windows(
    width: NDArray[np.uint16], height: NDArray[np.uint16], resize_px: int, crop_px: int
) -> NDArray[np.float32]:
    """The windows of source pixels that remain after resizing and cropping the centre.

    As in torchvision, the resized longer side is rounded down. The crop's corner is rounded to the
    nearest whole number, and a half to the even one.

    Args:
        width: of the images, `(B,)`.
        height: of the images, `(B,)`.
        resize_px: length of the shorter side after resizing.
        crop_px: side of the crop.
    Returns:
        x, y, width, height in source pixels, float32 `(B, 4)`.

    Source: torchvision.transforms.functional: resize, center_crop.
    """
    source = np.stack([width, height], 1).astype(np.int64)
    short = source.min(1, keepdims=True)
    resized = np.where(source == short, resize_px, resize_px * source // short)  # (B, 2)
    corner = np.rint((resized - crop_px) / 2)
    scale = source / resized
    return np.concatenate([corner * scale, crop_px * scale], 1).astype(np.float32)
