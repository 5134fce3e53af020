"""Which samples, windows, flips and augmentations: pure functions of (seed, epoch, sample).

    global batch of step s in epoch e = order(seed, e)[i * B : (i + 1) * B]    i = s in its epoch
    micro-batch m of rank r           = rows [g * b, (g + 1) * b) of it        g = m * W + r
    order(seed, e)                    = a permutation of all samples; shuffled in blocks, of those
                                        of a few tars at a time, the tars themselves in random order

So any number W of processes sees the same global batches, and with equal `micro_batch_size` b the
same groups of images in BatchNorm.
"""

from collections.abc import Set
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain import config, rng
from fasttrain.rng import Stream, uniform
from fasttrain.schedule import Plan, crop_px_at
from fasttrain.shards import Split

TRIES = 10  # at a window that fits; torchvision's number, as the next three are
MAGNITUDE_BINS = 31
ERASE_AREA = (0.02, 0.33)  # of the training crop
ERASE_RATIO = (0.3, 3.3)  # height over width
NUM_OPERATIONS = 14  # `augment.OPERATIONS` lists them


class Augment(NamedTuple):
    """How the images of a batch are changed once they are cut; None for what is switched off.

    `operations` holds N times a place in `augment.OPERATIONS`, a magnitude bin, and 1 where the
    magnitude is negative; `jitter` the factors of brightness, contrast and saturation, and degrees
    of hue; `erase` a window, y, x, height, width in pixels of the training crop: whole numbers, but
    float32, as DALI takes no others, and all 0 where nothing is erased.
    """

    operations: NDArray[np.int32] | None = None  # (B, N, 3)
    jitter: NDArray[np.float32] | None = None  # (B, 4)
    erase: NDArray[np.float32] | None = None  # (B, 4)


class Draw(NamedTuple):
    """The samples of one batch and how each is cut.

    `windows` are x, y, width, height in source pixels: int32 in training; in validation float32,
    as a centre crop of the resized image rarely falls on whole source pixels.
    """

    ids: NDArray[np.int64]  # (B,)
    windows: NDArray[np.int32] | NDArray[np.float32]  # (B, 4)
    flips: NDArray[np.bool_]  # (B,)
    out_px: int  # side of the images that come out
    augment: Augment = Augment()


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, split: Split, block: int) -> NDArray[np.int32]:
    """The order of all samples in an epoch, int32: over everything, or over `block` tars at a time.

    Takes 0.1 s for ImageNet: ask for the next epoch's ahead of time.
    """
    if block:
        blocks = np.empty(len(split.shard_paths), np.int64)  # of each tar
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
    """Tars that are shuffled together; 0 where all are."""
    return data.shuffle_shards if data.shuffle == "blocks" else 0


class Piece(NamedTuple):
    """A range of bytes of a shard that will be read soon."""

    shard: int
    start: int
    stop: int


def pieces_ahead(
    split: Split, data: config.Data, plan: Plan, step: int, rank: int, first: bool
) -> list[Piece]:
    """What process `rank` announces to the kernel before update `step`, shuffled in blocks.

    While a block is trained on, the tars of the next one are announced in step with it, a process
    taking its share of each piece: together they name every byte once, tar by tar.
    The `first` update of a process announces the rest of its own block as well.
    """
    epoch, place = divmod(step, plan.steps_per_epoch)
    size = block_size(data)
    begin, end = (n * plan.global_batch_size for n in (place, place + 1))
    if place + 1 == plan.steps_per_epoch:  # what is dropped counts as done
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
    """Share `rank` of the part [low, high) of a block's bytes, its tars one after another."""
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
    """Micro-batch `number` of a rank, counted from the start of the run.

    With 2 ranks, 8 images per update and 2 per micro-batch, rank 1 gets rows 2 and 3 of the first
    global batch, then rows 6 and 7.

    Args:
        bad: damaged samples. Others stand in for them.
    """
    step, micro = divmod(number, plan.accumulation)
    epoch, step_of_epoch = divmod(step, plan.steps_per_epoch)
    order = epoch_order(plan.seed, epoch, split, block_size(data))
    group = micro * plan.world_size + rank
    first = step_of_epoch * plan.global_batch_size + group * plan.micro_batch_size
    ids = order[first : first + plan.micro_batch_size].astype(np.int64)
    if bad:
        ids = stand_ins(plan.seed, epoch, ids, bad, split.num_samples)
    sizes = split.width[ids], split.height[ids]
    windows = crop_windows(plan.seed, epoch, ids, sizes, data.crop_area, data.crop_ratio)
    flips = np.zeros(len(ids), bool)
    if data.flip:
        flips = uniform(plan.seed, Stream.FLIP, epoch, ids) < 0.5
    out_px = crop_px_at(epoch, data.crop_px)
    return Draw(ids, windows, flips, out_px, augment_draw(plan.seed, epoch, ids, data, out_px))


def stand_ins(
    seed: int, epoch: int, ids: NDArray[np.int64], bad: Set[int], num_samples: int
) -> NDArray[np.int64]:
    """`ids` (B,), each that is `bad` replaced by one that is not, drawn by (seed, epoch, id).

    At least some of the `num_samples` samples must not be bad.
    """
    ids = ids.copy()
    for place in np.flatnonzero(np.isin(ids, [*bad])):
        for attempt in range(2**32):
            drawn = rng.hash64(seed, Stream.STAND_IN, epoch, ids[place : place + 1], attempt)
            if (stand_in := int(drawn[0] % num_samples)) not in bad:
                ids[place] = stand_in
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
    """Windows of a random resized crop: x, y, width, height, int32 `(B, 4)`, within the image.

    `sizes` are widths and heights of the images, each `(B,)`.

    Ten tries at a window of random area and log-uniform aspect ratio; where none fits, the largest
    centred window of a permitted ratio.

    Source: torchvision.transforms.RandomResizedCrop; Going deeper, arXiv:1409.4842, section 6.
    """
    full_w, full_h = (size.astype(np.int64) for size in sizes)

    def draw_sizes(rows: NDArray[np.int64], tries: NDArray[np.int64]) -> tuple[Any, ...]:
        """Width and height of those tries for those rows, and whether they fit: (rows, tries)."""
        key = (epoch, ids[rows, None], tries)
        full = full_w[rows, None], full_h[rows, None]
        target = full[0] * full[1] * _between(uniform(seed, Stream.CROP_AREA, *key), *area)
        aspect = np.exp(_between(uniform(seed, Stream.CROP_RATIO, *key), *np.log(ratio)))
        w = np.rint(np.sqrt(target * aspect)).astype(np.int64)
        h = np.rint(np.sqrt(target / aspect)).astype(np.int64)
        return w, h, (w > 0) & (h > 0) & (w <= full[0]) & (h <= full[1])

    w, h, fits = (found[:, 0] for found in draw_sizes(np.arange(len(ids)), np.arange(1)))
    again = np.flatnonzero(~fits)  # few: the other tries are drawn for them alone
    if len(again):
        more_w, more_h, more_fit = draw_sizes(again, np.arange(1, TRIES))
        first = more_fit.argmax(1)[:, None]  # the first that fits, or any where none does
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
    return tuple(name for name, asked in zip(Augment._fields, on, strict=True) if asked)


def augment_draw(
    seed: int, epoch: int, ids: NDArray[np.int64], data: config.Data, crop_px: int
) -> Augment:
    """What `data` asks to change in samples `ids`, cut to `crop_px`.

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
    """Windows to erase in square images: y, x, height, width, float32 `(B, 4)`; zeros for none.

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
    """Validation batches of a process: may be 0, and differ by one between processes."""
    num_batches = -(-num_samples // batch_size)
    return len(range(rank, num_batches, world_size))


def eval_draw(
    split: Split, data: config.Data, batch_size: int, rank: int, world_size: int, number: int
) -> Draw:
    """Validation batch `number` of process `rank`; all together hold each image exactly once.

    Batches are dealt in turn, in the order of the shards; the very last may be smaller.
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
    """The source pixels that "resize the shorter side, crop the centre" keeps, float32 `(B, 4)`.

    Rounds as torchvision does: the longer side down, the corner half to even.

    Source: torchvision.transforms.functional: resize, center_crop.
    """
    source = np.stack([width, height], 1).astype(np.int64)
    short = source.min(1, keepdims=True)
    resized = np.where(source == short, resize_px, resize_px * source // short)  # (B, 2)
    corner = np.rint((resized - crop_px) / 2)
    scale = source / resized
    return np.concatenate([corner * scale, crop_px * scale], 1).astype(np.float32)
