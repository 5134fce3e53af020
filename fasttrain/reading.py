"""Reads bytes of the shards ahead of the decoder, several reads at a time.

mmap     gives views of the mapped tars and copies nothing. Threads page in the next batches, so
         that the decoder does not wait for storage in page faults. The threads pause while all
         bytes are in memory already.
pread    copies into buffers of its own. Each buffer is lent to one batch at a time.
"""

import ctypes
import errno
import io
import mmap
import os
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fasttrain import commands, config
from fasttrain.faults import Fault
from fasttrain.sampling import Draw, Piece
from fasttrain.shards import PPM_HEADER, Split

OTHER_FILES = 16  # files that a process opens in addition to the tars: logs, checkpoints, modules
CHUNK = 16  # images per task of a reading thread
PAGE_IN_AFTER_MISS = 16  # after a read from storage, page in this many batches
PIECE_BYTES = 4 << 20  # large ranges are announced to the kernel in pieces of this size
_MADV_POPULATE_READ = 22  # Linux 5.14: maps pages and waits; a failure is an error, not SIGBUS


class DataError(Fault, RuntimeError):
    """A batch could not be read."""


class BadSamples(DataError):
    """Samples whose bytes differ from those that were indexed, or do not fit the index."""

    def __init__(self, split: Split, faults: Mapping[int, str], what: str = "damaged") -> None:
        """
        Args:
            faults: the fault of each bad sample.
            what: begins the message.
        """
        listed = [f"sample {s}, {split.describe(s)}: {fault}" for s, fault in faults.items()]
        super().__init__("\n  ".join([f"{what}:", *listed]) + remedy(split))
        self.faults = faults


def remedy(split: Split) -> str:
    """The last line of an error about the files of a data set."""
    return (
        f"\nlist all damaged files with: {commands.command('verify_shards')} {split.root}\n"
        "then copy them again, or make the data set again"
    )


def raise_file_limit() -> int:
    """Raises this process's limit of open files to the hard limit; returns the new limit.

    Each mapped tar holds a file descriptor, and ImageNet has more tars than the usual limit of
    1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):
        hard = soft
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def check_open_files(*splits: Split) -> None:
    """Checks that this process may open the tars of all these splits at the same time.

    Raises:
        DataError: it may not open so many files.
    """
    limit, opened = raise_file_limit(), len(os.listdir("/proc/self/fd"))
    tars = sum(len(split.shard_paths) for split in splits)
    if opened + tars + OTHER_FILES > limit:
        raise _too_many_files(splits[0], tars, limit)


def _too_many_files(split: Split, tars: int, limit: int) -> DataError:
    needed = max(1024, 1 << (tars + 256).bit_length())
    return DataError(
        f"{split.root}: {tars:,} tars must be open at once, but a process may open only {limit:,} "
        f"files here: raise the hard limit to {needed:,} (docker run --ulimit nofile={needed}, "
        "/etc/security/limits.conf, or ask the administrator)"
    )


def faults_of(
    split: Split, samples: Iterable[int], images: Iterable[memoryview], checksums: bool = True
) -> dict[int, str]:
    """Checks the checksums and headers of samples; returns the fault of each bad one.

    Args:
        images: all bytes of each sample.
        checksums: False checks only the headers.
    """
    faults = {}
    for sample, image in zip(samples, images, strict=True):
        if checksums and zlib.crc32(image) != split.crc32[sample]:
            faults[sample] = "its bytes changed: its crc32 is not the one in the index"
        elif fault := _size_fault(split, sample, image):
            faults[sample] = fault
    return faults


def _size_fault(split: Split, sample: int, image: memoryview) -> str:
    """The fault if the index gives this image another size than its bytes; else empty."""
    listed = int(split.width[sample]), int(split.height[sample])
    ppm = b"P6\n%d %d\n" % listed
    if image[: len(ppm)] == ppm or _frame_size(image) == listed:
        return ""
    try:
        found = Image.open(io.BytesIO(image)).size
    except Exception:  # Pillow documents no full list: OSError, DecompressionBombError, and more
        return "its first bytes are not those of an image"
    return "" if found == listed else f"{found} pixels, but {listed} in {split.name}.index"


def _frame_size(image: memoryview) -> tuple[int, int]:
    """Width and height from the frame header of a JPEG; zeros if `_frame_header` does not find it.

    Takes 1 us per image; Pillow takes 50.
    """
    if not (start := _frame_header(image)):
        return 0, 0
    width = image[start + 7] << 8 | image[start + 8]
    return width, image[start + 5] << 8 | image[start + 6]


def _frame_header(image: memoryview) -> int:
    """Offset of a JPEG's frame header; 0 if a plain walk over the segments does not find it."""
    offset = 2
    while offset + 12 <= len(image) and image[offset] == 0xFF:
        marker, high, low = image[offset + 1 : offset + 4]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return offset
        offset += 2 + (high << 8 | low)
    return 0


def plain_grey(image: memoryview) -> memoryview:
    """Makes a greyscale JPEG safe for a GPU's hardware decoder; returns other images unchanged.

    The sampling factors of a greyscale image have no meaning. Some encoders write factors other
    than 1 x 1. An H200 decoded such images to wrong pixels without an error (DALI 2.4, nvImageCodec
    0.9, 2026-11-27). For these images the result is a copy with 1 x 1 in the header.
    """
    start = _frame_header(image)
    if not start or image[start + 9] != 1 or image[start + 11] == 0x11:
        return image
    copy = bytearray(image)
    copy[start + 11] = 0x11
    return memoryview(copy)


class Ranges(NamedTuple):
    """The byte ranges of a batch's images in the shards, each array `(B,)`."""

    shards: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def triples(self) -> list[tuple[int, int, int]]:
        """Shard, offset and size of each image."""
        columns = (column.tolist() for column in self)
        return list(zip(*columns, strict=True))


def views_of(
    memory: memoryview, starts: NDArray[np.int64], sizes: NDArray[np.int64]
) -> list[memoryview]:
    """Views of `memory` that begin at `starts` and have `sizes` bytes."""
    pairs = zip(starts.tolist(), sizes.tolist(), strict=True)
    return [memory[start : start + size] for start, size in pairs]


def ranges_of(split: Split, draw: Draw, windows_only: bool, whole: bool = False) -> Ranges:
    """The byte ranges of a draw's images. An encoded image gives all bytes, a raw one its pixels.

    Args:
        windows_only: a raw image gives only the rows of its window.
        whole: a raw image gives all bytes too.
    Raises:
        BadSamples: the number of a raw image's bytes does not fit its size in the index.
    """
    ids = draw.ids
    offsets, sizes = split.offset[ids].astype(np.int64), split.size[ids].astype(np.int64)
    if split.store == "raw":
        row = 3 * split.width[ids].astype(np.int64)
        pixels = row * split.height[ids]
        wrong = (pixels == 0) | (pixels > sizes) | (sizes > pixels + PPM_HEADER)
        if wrong.any():
            fault = f"the number of its bytes does not fit its size in {split.name}.index"
            raise BadSamples(split, dict.fromkeys(ids[wrong].tolist(), fault))
        if not whole:
            offsets += sizes - pixels  # the pixels follow the header
            sizes = pixels
        if windows_only and not whole:
            offsets += row * draw.windows[:, 1].astype(np.int64)
            sizes = row * draw.windows[:, 3].astype(np.int64)
    return Ranges(split.shard[ids].astype(np.int64), offsets, sizes)


class BufferPool:
    """A pool of buffers. Each is lent to one batch until that batch gives it back."""

    def __init__(self, size: int, make: Callable[[int], NDArray[np.uint8]] | None = None) -> None:
        """
        Args:
            size: number of buffers.
            make: allocates a buffer of a given number of bytes; by default in ordinary memory.
        """
        self.make = make or (lambda num_bytes: np.empty(num_bytes, np.uint8))
        self.free = [np.empty(0, np.uint8) for _ in range(size)]
        self.lent: dict[int, NDArray[np.uint8]] = {}

    def lend(self, number: int, num_bytes: int) -> NDArray[np.uint8]:
        """Lends batch `number` a buffer of at least `num_bytes` bytes.

        Raises:
            RuntimeError: all buffers are lent. DALI may still read each, so none may be reused.
        """
        if not self.free:
            raise RuntimeError(
                f"no read buffer is free for batch {number}: batches {sorted(self.lent)} are still "
                "being decoded; the pool of buffers is too small"
            )
        buffer = self.free.pop()
        if len(buffer) < num_bytes:
            del buffer  # frees the memory before the larger buffer is made
            buffer = self.make(num_bytes * 5 // 4)
        self.lent[number] = buffer
        return buffer

    def give_back(self, number: int) -> None:
        """Takes back the buffer of batch `number`."""
        self.free.append(self.lent.pop(number))


class _Started(NamedTuple):
    """A batch that is being read."""

    views: list[memoryview]  # the bytes of each image
    tasks: list[Future[dict[int, str]]]
    shards: set[int]


class ShardReader:
    """Reads batches of a split in the background.

    For each batch, call `start`, then `take`, then `give_back`.
    """

    def __init__(self, split: Split, data: config.Data, num_buffers: int) -> None:
        """
        Args:
            num_buffers: the most batches between `start` and `give_back`.
        Raises:
            DataError: this process may not open all tars of the split.
        """
        check_open_files(split)
        self.split = split
        self.mapped = data.read == "mmap"
        self.ahead = data.read_ahead
        self.buffers = BufferPool(num_buffers)
        self.pool = ThreadPoolExecutor(data.read_threads, "read")
        self.files: dict[int, int] = {}  # descriptors, of shards that are not mapped
        self.mmaps: dict[int, mmap.mmap] = {}
        self.maps: dict[int, memoryview] = {}
        self.addresses: dict[int, int] = {}
        self.started: dict[int, _Started] = {}
        self.waited_s = 0.0  # time that `take` waited for storage
        self.major_faults = 0  # page faults of this process that read from storage
        self.last_miss: int | None = None  # the last batch at whose `start` that number had risen
        self.madvise = ctypes.CDLL(None, use_errno=True).madvise  # releases the interpreter's lock
        self.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def start(self, number: int, ranges: Ranges, verified: Sequence[int] = ()) -> None:
        """Begins to read batch `number`.

        Args:
            verified: if not empty, the ids of the batch's samples: compare them with the index.
                Then `ranges` must hold all bytes of each.
        """
        triples = ranges.triples()
        shards = {shard for shard, _, _ in triples}
        for shard in shards:
            self._open(shard)
        if self.mapped:
            views = [self.maps[shard][offset : offset + size] for shard, offset, size in triples]
            if self._seems_cached(number) and not verified:
                self.started[number] = _Started(views, [], shards)
                return
        else:
            buffer = memoryview(self.buffers.lend(number, int(ranges.sizes.sum())))  # type: ignore[arg-type]
            views = views_of(buffer, np.cumsum(ranges.sizes) - ranges.sizes, ranges.sizes)
        parts = [slice(start, start + CHUNK) for start in range(0, len(views), CHUNK)]
        tasks = [
            self.pool.submit(self._read, triples[part], views[part], verified[part])
            for part in parts
        ]
        self.started[number] = _Started(views, tasks, shards)

    def _seems_cached(self, number: int) -> bool:
        """True if all bytes seem to be in memory, so that this batch need not be paged in."""
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        if faults > self.major_faults or self.last_miss is None:
            self.major_faults, self.last_miss = faults, number
        return not self.ahead or number - self.last_miss > PAGE_IN_AFTER_MISS

    def announce(self, pieces: Sequence[Piece]) -> None:
        """Asks the kernel to read these ranges ahead."""
        for shard, start, stop in pieces:
            self._open(shard)
            for offset in range(start, stop, PIECE_BYTES):
                size = min(PIECE_BYTES, stop - offset)
                self.pool.submit(self._will_need, shard, offset, size)

    def take(self, number: int) -> list[memoryview]:
        """Waits for a started batch; returns the bytes of each image, read-only.

        Raises:
            BadSamples: the batch was verified, and some samples are damaged.
            DataError: the bytes could not be read.
        """
        views, tasks, shards = self.started[number]
        begun = time.perf_counter()
        faults: dict[int, str] = {}
        for task in tasks:
            faults |= task.result()
        if faults:
            raise BadSamples(self.split, faults)
        self._check_sizes(shards)
        self.waited_s += time.perf_counter() - begun
        return views

    def cut(
        self, views: list[memoryview], starts: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> list[memoryview]:
        """Cuts `sizes` bytes from `starts` on out of each view that `take` returned."""
        triples = zip(views, starts.tolist(), sizes.tolist(), strict=True)
        return [view[start : start + size] for view, start, size in triples]

    def _check_sizes(self, shards: Iterable[int]) -> None:
        """Checks that mapped files did not shrink: a read past the end would raise SIGBUS.

        Takes 0.6 us per file.
        """
        for shard in shards if self.mapped else ():
            if self.mmaps[shard].size() != self.split.shard_bytes[shard]:
                raise self._changed(shard)

    def give_back(self, number: int) -> None:
        """Ends the use of a batch. After this call, what `take` returned must not be read."""
        del self.started[number]
        if not self.mapped:
            self.buffers.give_back(number)

    def close(self) -> None:
        """Stops the threads and closes the files."""
        self.pool.shutdown(cancel_futures=True)
        for file in self.files.values():
            os.close(file)
        # A map is closed when its last view dies. DALI may still hold one.

    def _open(self, shard: int) -> None:
        if shard in self.files or shard in self.maps:
            return
        path = self.split.shard_paths[shard]
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            if error.errno == errno.EMFILE:
                tars = len(self.split.shard_paths)
                raise _too_many_files(self.split, tars, raise_file_limit()) from None
            raise DataError(f"{path}: {error.strerror}{remedy(self.split)}") from None
        try:
            if os.fstat(file).st_size != self.split.shard_bytes[shard]:
                raise self._changed(shard)  # a read past the end of a map would raise SIGBUS
            if self.mapped:  # the map duplicates the descriptor
                self.mmaps[shard] = mmap.mmap(file, 0, prot=mmap.PROT_READ)
                self.maps[shard] = memoryview(self.mmaps[shard])
                self.addresses[shard] = np.frombuffer(self.maps[shard], np.uint8).ctypes.data
            else:
                self.files[shard] = file
        finally:
            if shard not in self.files:
                os.close(file)

    def _read(
        self,
        triples: Sequence[tuple[int, int, int]],
        views: Sequence[memoryview],
        verified: Sequence[int],
    ) -> dict[int, str]:
        """A thread's task: reads bytes, and returns the faults of the `verified` samples."""
        if self.mapped:
            self._page_in(triples)
        else:
            self._pread(triples, views)
        return faults_of(self.split, verified, views) if verified else {}

    def _page_in(self, triples: Sequence[tuple[int, int, int]]) -> None:
        for shard, offset, size in triples:
            if self._advise(shard, offset, size, _MADV_POPULATE_READ):
                code = ctypes.get_errno()
                if code == errno.EINVAL:  # a kernel before 5.14: read ahead without waiting
                    self._will_need(shard, offset, size)
                elif code == errno.EFAULT:
                    raise self._changed(shard)
                else:
                    path = self.split.shard_paths[shard]
                    raise DataError(
                        f"{path} at byte {offset}: {os.strerror(code)}{remedy(self.split)}"
                    )

    def _pread(self, triples: Sequence[tuple[int, int, int]], views: Sequence[memoryview]) -> None:
        for (shard, offset, size), view in zip(triples, views, strict=True):
            done = 0
            while done < size:
                try:
                    count = os.preadv(self.files[shard], [view[done:]], offset + done)
                except OSError as error:
                    path = self.split.shard_paths[shard]
                    raise DataError(
                        f"{path} at byte {offset}: {error.strerror}{remedy(self.split)}"
                    ) from None
                if not count:
                    raise self._changed(shard)
                done += count

    def _will_need(self, shard: int, offset: int, size: int) -> None:
        if self.mapped:
            self._advise(shard, offset, size, mmap.MADV_WILLNEED)
        else:
            os.posix_fadvise(self.files[shard], offset, size, os.POSIX_FADV_WILLNEED)

    def _advise(self, shard: int, offset: int, size: int, advice: int) -> int:
        first = offset & -mmap.PAGESIZE
        return int(self.madvise(self.addresses[shard] + first, offset + size - first, advice))

    def _changed(self, shard: int) -> DataError:
        path = self.split.shard_paths[shard]
        return DataError(f"{path} changed its size while in use{remedy(self.split)}")
