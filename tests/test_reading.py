"""Every way of reading gives the same bytes, and a fault names the tar and the place."""

import gc
import io
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from fasttrain import config, loaders, reading, sampling, shards
from fasttrain.batch import Placement
from fasttrain.config import Optim, Train
from fasttrain.feed import Feed
from fasttrain.order import TrainingOrder
from fasttrain.reading import BufferPool, DataError, ShardReader, plain_grey, ranges_of
from fasttrain.schedule import make_plan
from fasttrain.shards import Split

CPU = Placement(torch.device("cpu"), half=False, threads=1)


def feed_for(split: Split, num_batches: int, **settings: object) -> Feed:
    chosen = config.Data.model_validate({"root": split.root, **settings})
    plan = make_plan(Train(global_batch_size=8), Optim(), split.num_samples, 1)
    order = TrainingOrder(split, chosen, plan, 0)
    return Feed(order, range(num_batches), windows_only=False, make_reader=ShardReader)


@pytest.mark.parametrize("read", ["mmap", "pread"])
@pytest.mark.parametrize("ahead", [0, 1, 5, 50])
def test_bytes_are_those_of_the_tars(split: Split, read: str, ahead: int) -> None:
    tars = [path.read_bytes() for path in split.shard_paths]
    feed = feed_for(split, 12, read=read, read_ahead=ahead)
    for number in range(12):
        draw, views = feed(number)
        for sample, view in zip(draw.ids, views, strict=True):
            start = int(split.offset[sample])
            assert view == tars[split.shard[sample]][start : start + int(split.size[sample])]
        assert len(feed.draws) == min(ahead + 1, 12 - number)
        assert feed.done(number) is draw
    feed.close()


def test_a_buffer_is_never_lent_twice() -> None:
    pool = BufferPool(2)
    first, second = pool.lend(0, 10), pool.lend(1, 20)
    assert len(first) >= 10 and len(second) >= 20 and not np.shares_memory(first, second)
    with pytest.raises(RuntimeError, match=r"no read buffer is free for batch 2: batches \[0, 1\]"):
        pool.lend(2, 5)
    pool.give_back(0)
    assert np.shares_memory(pool.lend(2, 5), first)


@pytest.mark.parametrize("too_few", [1, 2, 3])
def test_a_ring_that_is_too_small_is_an_error_and_not_a_corrupted_batch(
    split: Split, monkeypatch: pytest.MonkeyPatch, too_few: int
) -> None:
    settings = config.Data(root=split.root, read="pread", read_ahead=0, queue_depth=4, crop_px=32)
    plan = make_plan(Train(global_batch_size=8), Optim(), split.num_samples, 1)
    monkeypatch.setattr(reading, "BufferPool", lambda size: BufferPool(too_few))
    with pytest.raises(RuntimeError, match="the pool of buffers is too small"):
        list(loaders.train_batches(split, settings, plan, 0, CPU, 0))


def test_mapped_and_copied_bytes_give_the_same_pixels(split: Split) -> None:
    plan = make_plan(Train(global_batch_size=8, epochs=6), Optim(), split.num_samples, 1)
    found = [
        list(loaders.train_batches(split, settings, plan, 0, CPU, 0))
        for settings in (
            config.Data(root=split.root, read="mmap", crop_px=32),
            config.Data(root=split.root, read="pread", crop_px=32, queue_depth=1, read_ahead=0),
            config.Data(root=split.root, read="pread", crop_px=32, queue_depth=3, read_ahead=9),
        )
    ]
    for batches in zip(*found, strict=True):
        assert all(torch.equal(batch.images, batches[0].images) for batch in batches)


@pytest.mark.parametrize("read", ["mmap", "pread"])
def test_a_shard_that_shrinks_in_use_is_named(
    dataset: Path, tmp_path: Path, read: Literal["mmap", "pread"]
) -> None:
    root = Path(shutil.copytree(dataset, tmp_path / "shrinks"))
    split = shards.open_split(root, "train")
    reader = ShardReader(split, config.Data(root=root, read=read), num_buffers=4)
    ranges = ranges_of(split, sampling.eval_draw(split, config.Data(), 11, 0, 1, 0), False)
    reader.start(0, ranges)
    reader.take(0)
    path = split.shard_paths[0]
    path.write_bytes(path.read_bytes()[:4096])
    reader.start(1, ranges)
    with pytest.raises(DataError, match=r"train-000000.tar changed its size while in use"):
        reader.take(1)  # and not SIGBUS
    reader.close()


def test_bytes_that_are_in_memory_are_not_paged_in_again(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PAGE_IN_AFTER_MISS", 3)
    faults = 0  # of this process, that had to ask storage
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_majflt=faults))
    reader = ShardReader(split, config.Data(root=split.root), num_buffers=4)
    ranges = ranges_of(split, sampling.eval_draw(split, config.Data(), 8, 0, 1, 0), False)

    def is_paged_in(number: int) -> bool:
        reader.start(number, ranges)
        reader.take(number)
        return bool(reader.started[number][1])

    assert [is_paged_in(number) for number in range(6)] == [True] * 4 + [False] * 2
    faults = 1
    assert [is_paged_in(number) for number in range(6, 12)] == [True] * 4 + [False] * 2
    reader.close()


def test_verified_samples_are_read_by_threads_even_if_paging_in_rests(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PAGE_IN_AFTER_MISS", -1)
    reader = ShardReader(split, config.Data(root=split.root), num_buffers=4)
    draw = sampling.eval_draw(split, config.Data(), 8, 0, 1, 0)
    for number, verified in enumerate(((), draw.ids.tolist())):
        reader.start(number, ranges_of(split, draw, False), verified)
        assert bool(reader.started[number][1]) == bool(verified)
        reader.take(number)
    reader.close()


def test_the_size_of_a_jpeg_is_read_as_pillow_reads_it(split: Split) -> None:
    tars = [path.read_bytes() for path in split.shard_paths]
    for sample in range(split.num_samples):
        start, size = int(split.offset[sample]), int(split.size[sample])
        image = tars[split.shard[sample]][start : start + size]
        listed = split.width[sample], split.height[sample]
        assert reading._frame_size(memoryview(image)) == listed
    assert not any(any(reading._frame_size(memoryview(image[:end]))) for end in range(100))
    assert not any(reading._frame_size(memoryview(bytes([0xFF] * 999))))
    frame = image.index(bytes([0xFF, 0xC0]))
    huge = image[: frame + 5] + bytes([0xFF] * 4) + image[frame + 9 :]  # for Pillow, a bomb
    for damaged in (huge, image[: frame + 5], image[:3], b""):
        (fault,) = reading.faults_of(split, [sample], [memoryview(damaged)], False).values()
        assert fault == "its first bytes are not those of an image"


def test_a_shard_that_shrinks_while_nothing_is_paged_in_is_named(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PAGE_IN_AFTER_MISS", -1)
    root = Path(shutil.copytree(dataset, tmp_path / "shrinks"))
    split = shards.open_split(root, "train")
    reader = ShardReader(split, config.Data(root=root), num_buffers=4)
    ranges = ranges_of(split, sampling.eval_draw(split, config.Data(), 11, 0, 1, 0), False)
    reader.start(0, ranges)
    assert not reader.started[0][1]
    os.truncate(split.shard_paths[0], 4096)
    with pytest.raises(DataError, match=r"train-000000.tar changed its size while in use"):
        reader.take(0)  # and not SIGBUS
    reader.close()


def test_a_kernel_without_populate_reads_ahead(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = feed_for(split, 3)
    real = feed.reader.madvise

    def without_populate(start: Any, length: Any, advice: Any) -> Any:
        return real(
            start, length, -1 if advice == reading._MADV_POPULATE_READ else advice
        )  # EINVAL

    monkeypatch.setattr(feed.reader, "madvise", without_populate)
    draw, views = feed(0)
    assert [len(view) for view in views] == split.size[draw.ids].tolist()
    feed.close()


@pytest.fixture
def raw_split(raw: Path) -> Split:
    return shards.open_split(raw, "train")


def test_of_raw_images_only_the_rows_of_the_windows_are_read(raw_split: Split) -> None:
    plan = make_plan(Train(global_batch_size=8), Optim(), raw_split.num_samples, 1)
    draw = sampling.train_draw(raw_split, config.Data(), plan, 0, 0)
    tars = [path.read_bytes() for path in raw_split.shard_paths]
    whole, rows = (ranges_of(raw_split, draw, windows_only) for windows_only in (False, True))
    for number, sample in enumerate(draw.ids):
        _, y, _, h = draw.windows[number].tolist()
        width = int(raw_split.width[sample])
        pixels = 3 * width * int(raw_split.height[sample])
        assert whole.sizes[number] == pixels
        assert rows.sizes[number] == 3 * width * h
        assert rows.offsets[number] == whole.offsets[number] + 3 * width * y
        end = whole.offsets[number] + pixels
        assert end == int(raw_split.offset[sample]) + int(raw_split.size[sample])
        assert end <= len(tars[raw_split.shard[sample]])


def test_raw_and_jpeg_shards_give_the_same_training_images(raw_split: Split, split: Split) -> None:
    plan = make_plan(Train(global_batch_size=9, epochs=6), Optim(), raw_split.num_samples, 1)
    settings = config.Data(crop_px=48)
    for read in ("mmap", "pread"):
        chosen = settings.model_copy(update={"read": read})
        pairs = zip(
            loaders.train_batches(raw_split, chosen, plan, 0, CPU, 0),
            loaders.train_batches(split, settings, plan, 0, CPU, 0),
            strict=True,
        )
        for ours, theirs in pairs:
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)


def test_raw_and_jpeg_shards_give_the_same_validation_images(raw: Path, dataset: Path) -> None:
    settings = config.Data(eval_resize_px=40, eval_crop_px=32)
    found = [
        torch.cat([b.images for b in loaders.eval_loader(s, settings, 4, 0, 1, CPU)])
        for s in (shards.open_split(raw, "val"), shards.open_split(dataset, "val"))
    ]
    assert torch.equal(*found)


def test_grey_images_reach_a_gpu_with_plain_sampling_factors() -> None:
    """They decode to the same pixels. An image with plain factors is not copied."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (37, 53, 3)).astype(np.uint8)
    for mode in ("L", "RGB"):
        for subsampling in (-1, 0, 1, 2):
            for progressive in (False, True):
                file = io.BytesIO()
                picture = Image.fromarray(pixels).convert(mode)
                picture.save(file, "JPEG", subsampling=subsampling, progressive=progressive)
                image = memoryview(file.getvalue())
                found = plain_grey(image)
                changed = [n for n, (a, b) in enumerate(zip(image, found, strict=True)) if a != b]
                assert (found is image) == (mode == "RGB" or subsampling < 1)
                assert len(changed) == (found is not image)
                same = np.asarray(Image.open(io.BytesIO(found)))
                assert (same == np.asarray(Image.open(file))).all()
    assert plain_grey(memoryview(b"no JPEG at all")) == b"no JPEG at all"


# --------------------------------------------------------------------------------------------------
# The limit of open files
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def limit() -> Iterator[Callable[[int, int], None]]:
    """Sets the soft limit of this process, so that it may open at most this many more files.

    The system limits the numbers of descriptors, not how many there are. A new file gets the lowest
    free number, and other tests may leave gaps. So the limit counts from the lowest free number.
    """
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def set_limit(more: int, hard: int = before[1]) -> None:
        gc.collect()  # else it may close files, and so make gaps, while the test runs
        os.close(free := os.open(os.devnull, os.O_RDONLY))
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, hard))

    yield set_limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_soft_limit_of_open_files_is_raised(split: Split, limit: Callable) -> None:
    limit(2)
    reading.check_open_files(split)
    assert len(set(resource.getrlimit(resource.RLIMIT_NOFILE))) == 1
    limit(2)
    feed_for(split, 2).close()


def test_a_hard_limit_of_open_files_that_is_too_low_is_refused(
    split: Split, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    val = shards.open_split(dataset, "val")
    allowed = len(os.listdir("/proc/self/fd")) + reading.OTHER_FILES + 4
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10, allowed))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: None)
    reading.check_open_files(split)  # 4 tars
    with pytest.raises(DataError) as error:
        reading.check_open_files(split, val)
    assert str(error.value) == (
        f"{dataset}: 5 tars must be open at once, but a process may open only {allowed} files "
        "here: raise the hard limit to 1,024 (docker run --ulimit nofile=1024, "
        "/etc/security/limits.conf, or ask the administrator)"
    )
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10, 10))
    with pytest.raises(DataError, match="4 tars must be open at once"):
        ShardReader(split, config.Data(root=dataset), 1)


def test_running_out_of_file_handles_is_explained(split: Split, limit: Callable) -> None:
    feed = feed_for(split, 2, read="pread")
    high = [os.dup(0) for _ in range(8)]
    for file in high[:-1]:  # makes gaps below the last one
        os.close(file)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit(0, hard)
    with pytest.raises(DataError, match="tars must be open at once, but a process may open only"):
        feed(0)
    os.close(high[-1])
    feed.close()
