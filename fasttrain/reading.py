"""Bytes of the shards, read ahead of the decoder, several reads at a time.

mmap     views of the mapped tars: nothing is copied; threads page in what comes next, so that
         nobody waits for storage in a page fault; they rest while all is in memory already
pread    copies into buffers of our own, each lent to one batch at a time
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

from fasttrain import config
from fasttrain.faults import Fault
from fasttrain.sampling import Draw, Piece
from fasttrain.shards import PPM_HEADER, Split

OTHER_FILES = 16  # that a process opens beside the tars: logs, checkpoints, modules
CHUNK = 16  # images that one task of a reading thread takes on
SUSPICION = 16  # batches that are paged in after one for which storage had to be asked
PIECE_BYTES = 4 << 20  # the kernel is told of large ranges in pieces of this size
_MADV_POPULATE_READ = 22  # Linux 5.14: maps pages and waits for them, with an error and no SIGBUS


class DataError(Fault, RuntimeError):
    """A batch could not be read; names the samples at fault."""


class BadSamples(DataError):
    """Samples whose bytes are not those that were indexed, or do not fit the index."""

    def __init__(self, split: Split, faults: Mapping[int, str], what: str = "damaged") -> None:
        """`faults` says of each sample what is wrong with it."""
        listed = [f"sample {s}, {split.describe(s)}: {fault}" for s, fault in faults.items()]
        super().__init__("\n  ".join([f"{what}:", *listed]) + remedy(split))
        self.faults = faults


def remedy(split: Split) -> str:
    """The last line of an error about the files of a data set."""
    return (
        f"\nfind all that is damaged with: python tools/verify_shards.py {split.root}\n"
        "and copy it anew or make the data set again"
    )


def raise_file_limit() -> int:
    """Lets this process open as many files as it ever may; returns how many those are.

    A mapped tar holds a descriptor, and ImageNet has more tars than the usual limit of 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):
        hard = soft
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def check_open_files(*splits: Split) -> None:
    """Checks that the tars of all these splits may be open at the same time.

    Raises:
        DataError: this process may not open as many files.
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
        "/etc/security/limits.conf, or ask whoever runs the machine)"
    )


def faults_of(
    split: Split, samples: Iterable[int], images: Iterable[memoryview], checksums: bool = True
) -> dict[int, str]:
    """What is wrong with samples, of each that is not right, by its checksum and its header.

    Args:
        images: all bytes of each of the samples.
    """
    faults = {}
    for sample, image in zip(samples, images, strict=True):
        if checksums and zlib.crc32(image) != split.crc32[sample]:
            faults[sample] = "not as it was written, its crc32 is not the index's"
        elif fault := _size_fault(split, sample, image):
            faults[sample] = fault
    return faults


def _size_fault(split: Split, sample: int, image: memoryview) -> str:
    """How the index is wrong about the size of an image with these bytes; empty if it is right."""
    listed = int(split.width[sample]), int(split.height[sample])
    ppm = b"P6\n%d %d\n" % listed
    if image[: len(ppm)] == ppm or _frame_size(image) == listed:
        return ""
    try:
        found = Image.open(io.BytesIO(image)).size
    except Exception:  # OSError, DecompressionBombError, ...: there is no saying which
        return "no header of an image"
    return "" if found == listed else f"{found} pixels, but {listed} in {split.name}.index"


def _frame_size(image: memoryview) -> tuple[int, int]:
    """Width and height in the frame header of a JPEG; zeros where it is not easy to find.

    1 us an image, where Pillow takes 50.
    """
    if not (at := _frame_header(image)):
        return 0, 0
    return image[at + 7] << 8 | image[at + 8], image[at + 5] << 8 | image[at + 6]


def _frame_header(image: memoryview) -> int:
    """Where the frame header of a JPEG begins; 0 where it is not easy to find."""
    at = 2
    while at + 12 <= len(image) and image[at] == 0xFF:
        marker, high, low = image[at + 1 : at + 4]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return at
        at += 2 + (high << 8 | low)
    return 0


def plain_grey(image: memoryview) -> memoryview:
    """A JPEG that a GPU's hardware decoder decodes as CPUs do.

    The sampling factors of a greyscale image have no meaning. Some encoders write others than
    1 x 1, and of such images an H200 made another picture, without an error (DALI 2.4, nvImageCodec
    0.9, 2026-11-27). Those alone are returned as a copy, with 1 x 1 in the header.
    """
    at = _frame_header(image)
    if not at or image[at + 9] != 1 or image[at + 11] == 0x11:
        return image
    copy = bytearray(image)
    copy[at + 11] = 0x11
    return memoryview(copy)


class Places(NamedTuple):
    """Where the bytes of a batch's images lie, each `(B,)`."""

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
    """The parts of `memory` that begin at `starts`."""
    pairs = zip(starts.tolist(), sizes.tolist(), strict=True)
    return [memory[start : start + size] for start, size in pairs]


def places_of(split: Split, draw: Draw, windows_only: bool, whole: bool = False) -> Places:
    """The bytes of a draw's images; of raw images their pixels, or but the rows of their windows.

    Args:
        whole: all bytes of raw images, too.
    Raises:
        BadSamples: the index gives raw images another size than they have bytes for.
    """
    ids = draw.ids
    offsets, sizes = split.offset[ids].astype(np.int64), split.size[ids].astype(np.int64)
    if split.store == "raw":
        row = 3 * split.width[ids].astype(np.int64)
        pixels = row * split.height[ids]
        wrong = (pixels == 0) | (pixels > sizes) | (sizes > pixels + PPM_HEADER)
        if wrong.any():
            fault = f"its bytes are not as many as its pixels in {split.name}.index ask for"
            raise BadSamples(split, dict.fromkeys(ids[wrong].tolist(), fault))
        if not whole:
            offsets += sizes - pixels  # they come last
            sizes = pixels
        if windows_only and not whole:
            offsets += row * draw.windows[:, 1].astype(np.int64)
            sizes = row * draw.windows[:, 3].astype(np.int64)
    return Places(split.shard[ids].astype(np.int64), offsets, sizes)


class Ring:
    """Buffers of which each is lent to one batch, and to no other before it was given back."""

    def __init__(self, size: int, make: Callable[[int], NDArray[np.uint8]] | None = None) -> None:
        """`make` gives a buffer of so many bytes; unset: of ordinary memory."""
        self.make = make or (lambda num_bytes: np.empty(num_bytes, np.uint8))
        self.free = [np.empty(0, np.uint8) for _ in range(size)]
        self.lent: dict[int, NDArray[np.uint8]] = {}

    def lend(self, number: int, num_bytes: int) -> NDArray[np.uint8]:
        """At least `num_bytes` bytes for batch `number`.

        Raises:
            RuntimeError: all are lent. DALI may still read any of them, so none may be reused.
        """
        if not self.free:
            raise RuntimeError(
                f"no read buffer is free for batch {number}: batches {sorted(self.lent)} are still "
                "being decoded; the ring is too small"
            )
        buffer = self.free.pop()
        if len(buffer) < num_bytes:
            del buffer  # before the larger one is made
            buffer = self.make(num_bytes * 5 // 4)
        self.lent[number] = buffer
        return buffer

    def give_back(self, number: int) -> None:
        self.free.append(self.lent.pop(number))


class _Started(NamedTuple):
    """A batch that is being read."""

    views: list[memoryview]  # of the bytes of each image
    tasks: list[Future[dict[int, str]]]
    shards: set[int]


class ShardReader:
    """Reads batches of a split in the background: `start`, then `take`, then `give_back`."""

    def __init__(self, split: Split, data: config.Data, num_buffers: int) -> None:
        check_open_files(split)
        self.split = split
        self.mapped = data.read == "mmap"
        self.ahead = data.read_ahead
        self.ring = Ring(num_buffers)
        self.pool = ThreadPoolExecutor(data.read_threads, "read")
        self.files: dict[int, int] = {}  # descriptors, of shards that are not mapped
        self.mmaps: dict[int, mmap.mmap] = {}
        self.maps: dict[int, memoryview] = {}
        self.addresses: dict[int, int] = {}
        self.started: dict[int, _Started] = {}
        self.waited_s = 0.0  # in `take`: for storage
        self.faults = 0  # of this process, so far, that had to ask storage
        self.last_miss: int | None = None  # the batch before which that number last rose
        self.madvise = ctypes.CDLL(None, use_errno=True).madvise  # lets other threads run
        self.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def start(self, number: int, places: Places, verified: Sequence[int] = ()) -> None:
        """Begins to read batch `number`; and to check it, if it is given which samples these are,
        of which `places` must be all bytes."""
        triples = places.triples()
        shards = {shard for shard, _, _ in triples}
        for shard in shards:
            self._open(shard)
        if self.mapped:
            views = [self.maps[shard][offset : offset + size] for shard, offset, size in triples]
            if self._resting(number) and not verified:
                self.started[number] = _Started(views, [], shards)
                return
        else:
            buffer = memoryview(self.ring.lend(number, int(places.sizes.sum())))  # type: ignore[arg-type]
            views = views_of(buffer, np.cumsum(places.sizes) - places.sizes, places.sizes)
        parts = [slice(start, start + CHUNK) for start in range(0, len(views), CHUNK)]
        tasks = [
            self.pool.submit(self._read, triples[part], views[part], verified[part])
            for part in parts
        ]
        self.started[number] = _Started(views, tasks, shards)

    def _resting(self, number: int) -> bool:
        """Whether all seems to be in memory, so that nothing need be paged in for this batch."""
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        if faults > self.faults or self.last_miss is None:
            self.faults, self.last_miss = faults, number
        return not self.ahead or number - self.last_miss > SUSPICION

    def announce(self, pieces: Sequence[Piece]) -> None:
        """Tells the kernel of ranges that will be read soon."""
        for shard, start, stop in pieces:
            self._open(shard)
            for offset in range(start, stop, PIECE_BYTES):
                size = min(PIECE_BYTES, stop - offset)
                self.pool.submit(self._will_need, shard, offset, size)

    def take(self, number: int) -> list[memoryview]:
        """The bytes of each image of a started batch, for reading only; waits for them.

        Raises:
            BadSamples: they were to be verified, and some are damaged.
            DataError: they could not be read.
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
        """Of what `take` gave, the part of each image that begins at `starts`."""
        triples = zip(views, starts.tolist(), sizes.tolist(), strict=True)
        return [view[start : start + size] for view, start, size in triples]

    def _check_sizes(self, shards: Iterable[int]) -> None:
        """Looks whether maps are as large as they were: a read past the end would be SIGBUS."""
        for shard in shards if self.mapped else ():  # 0.6 us each
            if self.mmaps[shard].size() != self.split.shard_bytes[shard]:
                raise self._changed(shard)

    def give_back(self, number: int) -> None:
        """What `take` gave is no longer read by anybody."""
        del self.started[number]
        if not self.mapped:
            self.ring.give_back(number)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        for file in self.files.values():
            os.close(file)
        # Maps end with their last view, which DALI may still hold.

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
                raise self._changed(shard)  # a read past the end of a map would be SIGBUS
            if self.mapped:  # which keeps a descriptor of its own
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
        places: Sequence[tuple[int, int, int]],
        views: Sequence[memoryview],
        verified: Sequence[int],
    ) -> dict[int, str]:
        """What a thread does: fetches bytes, and says what is wrong with those to be verified."""
        if self.mapped:
            self._page_in(places)
        else:
            self._pread(places, views)
        return faults_of(self.split, verified, views) if verified else {}

    def _page_in(self, places: Sequence[tuple[int, int, int]]) -> None:
        for shard, offset, size in places:
            if self._advise(shard, offset, size, _MADV_POPULATE_READ):
                code = ctypes.get_errno()
                if code == errno.EINVAL:  # an older kernel: read ahead without waiting
                    self._will_need(shard, offset, size)
                elif code == errno.EFAULT:
                    raise self._changed(shard)
                else:
                    path = self.split.shard_paths[shard]
                    raise DataError(
                        f"{path} at byte {offset}: {os.strerror(code)}{remedy(self.split)}"
                    )

    def _pread(self, places: Sequence[tuple[int, int, int]], views: Sequence[memoryview]) -> None:
        for (shard, offset, size), view in zip(places, views, strict=True):
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
