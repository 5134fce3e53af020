"""Counter-based random draws: every number is a pure function of (seed, stream, counters...).

There is no hidden state, so a draw is the same on any number of processes and after any restart.
NumPy does not promise stable streams across versions, so the hash is implemented here. Tests pin it
by golden values. A change of the hash changes every run: then also raise the format versions of
checkpoints and shards.

Source: SplitMix64's finaliser, Steele, Lea and Flood, doi:10.1145/2660193.2660195, with the
constants of Stafford's variant 13.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: spreads small counters
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_MASK = 2**64 - 1


class Stream(IntEnum):
    """What a draw is for. Each purpose has its own number."""

    SHARDS = 1  # order of the images when shards are written
    ORDER = 2  # order of the samples within an epoch
    CROP_AREA = 3
    CROP_RATIO = 4
    CROP_X = 5
    CROP_Y = 6
    FLIP = 7
    TORCH = 8  # seed of torch's generator before each micro-batch (dropout)
    INIT = 9  # seed of torch's generator before the network is initialised
    OPERATION = 10  # of RandAugment or TrivialAugment
    MAGNITUDE = 11
    SIGN = 12
    JITTER = 13
    ERASE = 14  # whether an image is erased
    ERASE_AREA = 15
    ERASE_RATIO = 16
    ERASE_X = 17
    ERASE_Y = 18
    MIX = 19  # seed of torch's generator before a micro-batch is mixed (MixUp, CutMix)
    BLOCKS = 20  # order of the tars within an epoch, if `data.shuffle` is `blocks`
    STAND_IN = 21  # which sample replaces a damaged one
    SCALE = 22  # side of the images of an update, if `data.scales_px` names several


def hash64(seed: int, stream: Stream, *counters: ArrayLike) -> NDArray[np.uint64]:
    """Hashes each tuple of counters to a uint64. Counters broadcast as NumPy arrays do.

    >>> hash64(0, Stream.ORDER, np.arange(2)).shape
    (2,)
    """
    counters = (seed, int(stream), *counters)
    first = next((n for n, c in enumerate(counters) if not isinstance(c, int)), len(counters))
    start = 0
    for number in counters[:first]:  # as below, but in Python: NumPy is slow for single numbers
        start = start + (int(number) + 1) * int(_GOLDEN) & _MASK  # type: ignore[arg-type]
        start = (start ^ start >> 30) * int(_M1) & _MASK
        start = (start ^ start >> 27) * int(_M2) & _MASK
        start ^= start >> 31
    state = np.array([start], np.uint64)  # 1-d: NumPy warns if a single number overflows
    for counter in counters[first:]:
        state = state + (np.atleast_1d(counter).astype(np.uint64) + np.uint64(1)) * _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * _M1
        state = (state ^ (state >> np.uint64(27))) * _M2
        state = state ^ (state >> np.uint64(31))
    return state


def uniform(seed: int, stream: Stream, *counters: ArrayLike) -> NDArray[np.float64]:
    """Draws in [0, 1) with 53 random bits, float64, in the shape of the broadcast counters."""
    return (hash64(seed, stream, *counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, stream: Stream, counter: int, length: int) -> NDArray[np.int32]:
    """A permutation of `range(length)`, int32: the stable argsort of the positions' hashes."""
    keys = hash64(seed, stream, counter, np.arange(length))
    return np.argsort(keys, kind="stable").astype(np.int32)
