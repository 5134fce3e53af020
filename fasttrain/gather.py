"""Packs the raw images of a batch into one buffer, for a single copy to the GPU.

Threads copy the bytes out of the mapped tars by `process_vm_readv` on their own process. One call
copies up to 1024 ranges without the interpreter's lock. If a file has shrunk, the call returns an
error; a plain copy would raise SIGBUS. Per image and core, a plain copy takes 37 us and this one 45
(170 KB, two cores of an AMD EPYC, 2026-11-27). But the plain copy takes the interpreter's lock for
each image, and waits up to 5 ms for it while another thread runs Python. The plain copy is used
only if the system forbids the call.
"""

import ctypes
import errno
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain import config
from fasttrain.reading import (
    CHUNK,
    BadSamples,
    BufferPool,
    DataError,
    Ranges,
    ShardReader,
    faults_of,
    remedy,
    views_of,
)
from fasttrain.shards import Split

MAX_RANGES = 1024  # per call: IOV_MAX of Linux
SMALLEST_TASK = 16  # images


class Packed(NamedTuple):
    """The bytes of a batch."""

    buffer: NDArray[np.uint8]  # (N,): the head, then the images, without gaps
    starts: NDArray[np.int64]  # (B,): offset of each image in the buffer


@dataclass(slots=True)
class _Batch:
    """A batch between `start` and `give_back`."""

    ranges: Ranges
    verified: Sequence[int]
    shards: list[int]
    paging: list[Future[dict[int, str]]] = field(default_factory=list)
    packed: Packed | None = None
    copying: list[Future[dict[int, str]]] = field(default_factory=list)


class Packer(ShardReader):
    """A `ShardReader` whose `take` returns a `Packed`.

    Mapped tars are paged in as far ahead as by a `ShardReader`, but copied only one batch ahead,
    because pinned memory is scarce. Tars that are not mapped are read straight into the buffers.
    """

    def __init__(
        self,
        split: Split,
        data: config.Data,
        in_flight: int,
        head_bytes: int = 0,
        make: Callable[[int], NDArray[np.uint8]] | None = None,
    ) -> None:
        """
        Args:
            in_flight: the most batches between `start` and `give_back`.
            head_bytes: bytes per image that are left free at the start of a buffer.
            make: allocates a buffer of a given number of bytes; by default in ordinary memory.
        """
        super().__init__(split, data, in_flight)
        # Mapped: the batch taken, the next one, and one that is still being copied to the device.
        self.buffers = BufferPool(3 if self.mapped else in_flight, make)
        self.head_bytes = head_bytes
        self.bases = np.zeros(len(split.shard_paths), np.uint64)  # addresses of the maps
        self.batches: dict[int, _Batch] = {}
        self.threads = data.read_threads
        self.copiers = ThreadPoolExecutor(data.read_threads, "gather")
        self.copy_ranges = _RangeCopier()

    def start(self, number: int, ranges: Ranges, verified: Sequence[int] = ()) -> None:
        """As `ShardReader.start`."""
        shards = np.unique(ranges.shards).tolist()
        for shard in shards:
            self._open(shard)
            if self.mapped:
                self.bases[shard] = self.addresses[shard]
        self.batches[number] = batch = _Batch(ranges, verified, shards)
        if not self.mapped:
            self._copy(number)
        elif not self._seems_cached(number):
            triples = ranges.triples()
            for first in range(0, len(triples), CHUNK):
                part = triples[first : first + CHUNK]
                batch.paging.append(self.pool.submit(self._read, part, (), ()))

    def take(self, number: int) -> Packed:  # type: ignore[override]
        """Waits for a started batch; returns its bytes, and begins to copy the next batch.

        Raises:
            BadSamples: the batch was verified, and some samples are damaged.
            DataError: the bytes could not be read.
        """
        begun = time.perf_counter()
        batch = self.batches[number]
        for task in batch.paging:
            task.result()
        # Check before the copy: if a file has lost bytes of its last page, zeros would be copied.
        self._check_sizes(batch.shards)
        for upcoming in (number, number + 1):
            if upcoming in self.batches and not self.batches[upcoming].packed:
                self._copy(upcoming)
        faults: dict[int, str] = {}
        for task in batch.copying:
            faults |= task.result()
        if faults:
            raise BadSamples(self.split, faults)
        self._check_sizes(batch.shards)
        self.waited_s += time.perf_counter() - begun
        assert batch.packed
        return batch.packed

    def cut(  # type: ignore[override]
        self, packed: Packed, starts: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> Packed:
        """Moves the start of each image by `starts`; the kernel needs no `sizes`."""
        return packed._replace(starts=packed.starts + starts)

    def give_back(self, number: int) -> None:
        """As `ShardReader.give_back`."""
        del self.batches[number]
        self.buffers.give_back(number)

    def close(self) -> None:
        """Stops the threads and closes the files."""
        # Stop the copies first, because they read the maps.
        self.copiers.shutdown(cancel_futures=True)
        super().close()

    def _copy(self, number: int) -> None:
        """Begins to copy the bytes of a batch into a buffer."""
        batch = self.batches[number]
        shards, offsets, sizes = batch.ranges
        head = len(sizes) * self.head_bytes
        ends = head + np.cumsum(sizes)
        starts, end = ends - sizes, int(ends[-1])
        buffer = self.buffers.lend(number, end)[:end]
        batch.packed = Packed(buffer, starts)
        # Few tasks: each one takes the interpreter's lock.
        size = max(SMALLEST_TASK, -(-len(sizes) // self.threads))
        for first in range(0, len(sizes), size):
            part = slice(first, first + size)
            ranges = Ranges(shards[part], offsets[part], sizes[part])
            task = self.copiers.submit(
                self._copy_part, ranges, buffer, starts[part], batch.verified[part]
            )
            batch.copying.append(task)

    def _copy_part(
        self,
        ranges: Ranges,
        buffer: NDArray[np.uint8],
        starts: NDArray[np.int64],
        verified: Sequence[int],
    ) -> dict[int, str]:
        """A thread's task: copies bytes, and returns the faults of the `verified` samples."""
        if self.mapped:
            sources = self.bases[ranges.shards] + ranges.offsets.astype(np.uint64)
            copied = self.copy_ranges(buffer.ctypes.data + int(starts[0]), sources, ranges.sizes)
            if copied < len(sources):
                raise self._unreadable(int(ranges.shards[copied]), int(ranges.offsets[copied]))
        else:
            views = views_of(memoryview(buffer), starts, ranges.sizes)  # type: ignore[arg-type]
            self._pread(ranges.triples(), views)
        if not verified:
            return {}
        views = views_of(memoryview(buffer), starts, ranges.sizes)  # type: ignore[arg-type]
        return faults_of(self.split, verified, views)

    def _unreadable(self, shard: int, offset: int) -> DataError:
        if self.mmaps[shard].size() != self.split.shard_bytes[shard]:
            return self._changed(shard)
        path = self.split.shard_paths[shard]
        return DataError(f"{path} at byte {offset}: cannot be read{remedy(self.split)}")


class _RangeCopier:
    """Copies ranges of this process's memory to one address, without gaps."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.read = getattr(libc, "process_vm_readv", None)
        if self.read:
            word = ctypes.c_ulong
            self.read.argtypes = [ctypes.c_int, ctypes.c_void_p, word, ctypes.c_void_p, word, word]
            self.read.restype = ctypes.c_ssize_t
        self.by_system = self.read is not None and self._is_permitted()

    def __call__(self, target: int, sources: NDArray[np.uint64], sizes: NDArray[np.int64]) -> int:
        """Copies `sizes` bytes each from the addresses `sources` to the address `target`.

        Returns:
            The number of ranges that were copied whole; fewer than given if one is unreadable.
        """
        if not self.by_system:
            starts = target + np.cumsum(sizes) - sizes
            for start, source, size in zip(
                starts.tolist(), sources.tolist(), sizes.tolist(), strict=True
            ):
                ctypes.memmove(start, source, size)  # releases the interpreter's lock
            return len(sizes)
        ends, done = np.cumsum(sizes), 0
        while (first := int(np.searchsorted(ends, done, "right"))) < len(sizes):
            rows = slice(first, first + MAX_RANGES)
            ranges = np.stack([sources[rows], sizes[rows].astype(np.uint64)], 1)
            # A call may end within a range: after 2 GB, or if memory is short.
            begun = done - int(ends[first] - sizes[first])
            ranges[0] += np.array([begun, -begun], np.int64).astype(np.uint64)
            copied = self._call(target + done, ranges)
            if copied <= 0:
                return first
            done += copied
        return len(sizes)

    def _call(self, target: int, ranges: NDArray[np.uint64]) -> int:
        """One system call for `ranges` `(n, 2)`, addresses and sizes; returns the bytes copied."""
        into = np.array([target, ranges[:, 1].sum()], np.uint64)
        assert self.read
        return int(self.read(os.getpid(), into.ctypes.data, 1, ranges.ctypes.data, len(ranges), 0))

    def _is_permitted(self) -> bool:
        """Tries the call on a few bytes: containers may forbid it, and old kernels lack it."""
        there, here = np.arange(64, dtype=np.uint8), np.zeros(64, np.uint8)
        ranges = np.array([[there.ctypes.data, 32], [there.ctypes.data + 32, 32]], np.uint64)
        if self._call(here.ctypes.data, ranges) == 64:
            return bool((here == there).all())
        code = ctypes.get_errno()
        if code not in (errno.EPERM, errno.ENOSYS, errno.EACCES, errno.EFAULT):
            raise OSError(code, os.strerror(code), "process_vm_readv")
        return False
