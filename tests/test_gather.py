"""The buffer of a batch of raw images holds the bytes of the tars, or an error is raised."""

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasttrain import config, gather, shards
from fasttrain.config import Optim, Train
from fasttrain.feed import Feed
from fasttrain.gather import Packer
from fasttrain.order import TrainingOrder
from fasttrain.reading import BadSamples, DataError, ranges_of
from fasttrain.schedule import make_plan
from fasttrain.shards import Split

HEAD = 24  # bytes an image


def feed_for(split: Split, num_batches: int, verify: bool = False, **settings: Any) -> Feed:
    chosen = config.Data(root=split.root, verify="always" if verify else "off", **settings)
    plan = make_plan(Train(global_batch_size=40, epochs=99), Optim(), split.num_samples, 1)
    return Feed(
        TrainingOrder(split, chosen, plan, 0),
        range(num_batches),
        windows_only=True,
        make_reader=partial(Packer, head_bytes=HEAD),
    )


@pytest.mark.parametrize("by_system", [True, False])
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("settings", [{}, {"read": "pread"}, {"read_ahead": 0, "queue_depth": 1}])
def test_batches_are_the_rows_of_the_windows(
    raw: Path, monkeypatch: pytest.MonkeyPatch, by_system: bool, verify: bool, settings: Any
) -> None:
    monkeypatch.setattr(gather, "MAX_RANGES", 7)  # several calls a task
    split = shards.open_split(raw, "train")
    tars = [path.read_bytes() for path in split.shard_paths]
    feed = feed_for(split, 9, verify, **settings)
    assert isinstance(feed.reader, Packer)
    if not by_system:
        feed.reader.copy_ranges.by_system = False
    for number in range(9):
        draw, packed = feed(number)
        shards_of, offsets, sizes = ranges_of(split, draw, windows_only=True)
        assert packed.starts[0] >= 40 * HEAD
        for place, start in enumerate(packed.starts):
            first, size = offsets[place], sizes[place]
            found = packed.buffer[start : start + size].tobytes()
            assert found == tars[shards_of[place]][first : first + size]
        if number:
            feed.done(number - 1)
    feed.close()


def test_a_read_that_ends_early_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    move = gather._RangeCopier()
    if not move.by_system:
        pytest.skip("process_vm_readv is not permitted here")
    real, asked = move._call, []

    def short(target: int, ranges: Any) -> int:
        asked.append(len(ranges))
        cut, left = ranges.copy(), 1000
        for row in range(len(cut)):
            cut[row, 1] = min(int(cut[row, 1]), left)
            left -= int(cut[row, 1])
        return real(target, cut)

    monkeypatch.setattr(move, "_call", short)
    source = np.random.default_rng(0).integers(0, 256, 10_000).astype(np.uint8)
    starts, sizes = np.array([5000, 0, 300, 9000]), np.array([700, 2500, 1, 1000])
    target = np.zeros(sizes.sum(), np.uint8)
    sources = (source.ctypes.data + starts).astype(np.uint64)
    assert move(target.ctypes.data, sources, sizes) == 4
    parts = [source[a : a + n] for a, n in zip(starts, sizes, strict=True)]
    assert (target == np.concatenate(parts)).all() and len(asked) == 5
    sources[2] = 4096  # an address where nothing is
    assert move(target.ctypes.data, sources, sizes) == 2


@pytest.mark.parametrize("read", ["mmap", "pread"])
def test_damaged_images_are_named_if_they_are_verified(
    raw: Path, tmp_path: Path, read: str
) -> None:
    split = shards.open_split(Path(shutil.copytree(raw, tmp_path / "raw")), "train")
    path, offset = split.shard_paths[split.shard[5]], int(split.offset[5])
    tar = bytearray(path.read_bytes())
    tar[offset + 100] ^= 1
    path.write_bytes(tar)
    feed = feed_for(split, 3, read=read)
    feed(0)
    feed.close()
    feed = feed_for(split, 3, verify=True, read=read)
    with pytest.raises(BadSamples, match=r"sample 5, (.|\n)*its bytes changed"):
        for number in range(3):
            feed(number)
    feed.close()


@pytest.mark.parametrize("read", ["mmap", "pread"])
@pytest.mark.parametrize("late", [True, False])
def test_a_shard_that_shrinks_in_use_is_named(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str, late: bool
) -> None:
    split = shards.open_split(Path(shutil.copytree(raw, tmp_path / "raw")), "train")
    feed = feed_for(split, 3, read=read, read_ahead=0)
    feed(0)
    if late and read == "mmap":  # between a look at the size and the copy
        assert isinstance(feed.reader, Packer)
        if not feed.reader.copy_ranges.by_system:
            pytest.skip("process_vm_readv is not permitted here")
        monkeypatch.setattr(feed.reader, "_check_sizes", lambda shards: None)
    for path in split.shard_paths:
        os.truncate(path, 4096)
    with pytest.raises(DataError, match=r"train-00000.\.tar changed its size while in use"):
        feed(1)  # and not SIGBUS
    feed.close()
