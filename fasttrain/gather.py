"""Bytes of whole batches of raw images, side by side in one buffer each, for one copy to a GPU.

Threads copy them out of the mapped tars by `process_vm_readv`, asked for our own process: one call
takes on up to 1024 ranges, without the interpreter's lock, and where a file has shrunk it returns
an error, where a plain copy would be SIGBUS. A plain copy of each image takes 37 us on a core,
this 45 (170 KB, two cores of an AMD EPYC, 2026-11-27); but it takes the lock anew for each image,
and waits up to 5 ms for it while another thread runs Python. It is used where the system forbids
the call.
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
    DataError,
    Places,
    Ring,
    ShardReader,
    faults_of,
    remedy,
    views_of,
)
from fasttrain.shards import Split

RANGES = 1024  # that one call takes: IOV_MAX of Linux
SMALLEST_TASK = 16  # images


class Packed(NamedTuple):
    """The bytes of a batch."""

    buffer: NDArray[np.uint8]  # (N,): the head, then the images, without gaps
    starts: NDArray[np.int64]  # (B,): where in it each image begins


@dataclass(slots=True)
class _Batch:
    """A batch on its way."""

    places: Places
    verified: Sequence[int]
    shards: list[int]
    paging: list[Future[dict[int, str]]] = field(default_factory=list)
    packed: Packed | None = None
    copying: list[Future[dict[int, str]]] = field(default_factory=list)


class Packer(ShardReader):
    """A `ShardReader` whose `take` gives a `Packed`.

    Mapped tars are paged in as far ahead as those of any reader, but copied only one batch ahead:
    pinned memory is dear. Tars that are not mapped are read straight into the buffers.
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
            in_flight: batches between `start` and `give_back`.
            head_bytes: left free in front of a buffer, for each image of its batch.
            make: gives a buffer of so many bytes.
        """
        super().__init__(split, data, in_flight)
        # Mapped: the batch taken, the next one, and one that is still on its way to the device.
        self.ring = Ring(3 if self.mapped else in_flight, make)
        self.head_bytes = head_bytes
        self.bases = np.zeros(len(split.shard_paths), np.uint64)  # addresses of the maps
        self.batches: dict[int, _Batch] = {}
        self.threads = data.read_threads
        self.copiers = ThreadPoolExecutor(data.read_threads, "gather")
        self.move = _Mover()

    def start(self, number: int, places: Places, verified: Sequence[int] = ()) -> None:
        shards = np.unique(places.shards).tolist()
        for shard in shards:
            self._open(shard)
            if self.mapped:
                self.bases[shard] = self.addresses[shard]
        self.batches[number] = batch = _Batch(places, verified, shards)
        if not self.mapped:
            self._copy(number)
        elif not self._resting(number):
            triples = places.triples()
            for first in range(0, len(triples), CHUNK):
                part = triples[first : first + CHUNK]
                batch.paging.append(self.pool.submit(self._read, part, (), ()))

    def take(self, number: int) -> Packed:  # type: ignore[override]
        """The bytes of a started batch; waits for them, and begins to copy those of the next.

        Raises:
            BadSamples: they were to be verified, and some are damaged.
            DataError: they could not be read.
        """
        begun = time.perf_counter()
        batch = self.batches[number]
        for task in batch.paging:
            task.result()
        # Before the copy, which would take zeros for what a file has lost of its last page.
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
        return packed._replace(starts=packed.starts + starts)

    def give_back(self, number: int) -> None:
        del self.batches[number]
        self.ring.give_back(number)

    def close(self) -> None:
        # Before the maps go, which a copy may still read.
        self.copiers.shutdown(cancel_futures=True)
        super().close()

    def _copy(self, number: int) -> None:
        """Begins to copy the bytes of a batch into a buffer."""
        batch = self.batches[number]
        shards, offsets, sizes = batch.places
        head = len(sizes) * self.head_bytes
        ends = head + np.cumsum(sizes)
        starts, end = ends - sizes, int(ends[-1])
        buffer = self.ring.lend(number, end)[:end]
        batch.packed = Packed(buffer, starts)
        # Few tasks, as each asks for the interpreter's lock.
        size = max(SMALLEST_TASK, -(-len(sizes) // self.threads))
        for first in range(0, len(sizes), size):
            part = slice(first, first + size)
            places = Places(shards[part], offsets[part], sizes[part])
            task = self.copiers.submit(
                self._copy_part, places, buffer, starts[part], batch.verified[part]
            )
            batch.copying.append(task)

    def _copy_part(
        self,
        places: Places,
        buffer: NDArray[np.uint8],
        starts: NDArray[np.int64],
        verified: Sequence[int],
    ) -> dict[int, str]:
        """What a thread does: copies bytes, and says what is wrong with those to be verified."""
        if self.mapped:
            sources = self.bases[places.shards] + places.offsets.astype(np.uint64)
            copied = self.move(buffer.ctypes.data + int(starts[0]), sources, places.sizes)
            if copied < len(sources):
                raise self._unreadable(int(places.shards[copied]), int(places.offsets[copied]))
        else:
            views = views_of(memoryview(buffer), starts, places.sizes)  # type: ignore[arg-type]
            self._pread(places.triples(), views)
        if not verified:
            return {}
        views = views_of(memoryview(buffer), starts, places.sizes)  # type: ignore[arg-type]
        return faults_of(self.split, verified, views)

    def _unreadable(self, shard: int, offset: int) -> DataError:
        if self.mmaps[shard].size() != self.split.shard_bytes[shard]:
            return self._changed(shard)
        path = self.split.shard_paths[shard]
        return DataError(f"{path} at byte {offset}: cannot be read{remedy(self.split)}")


class _Mover:
    """Copies ranges of this process's memory to one place, one behind the other."""

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

        Returns the number of ranges that were copied whole, all but for a fault.
        """
        if not self.by_system:
            starts = target + np.cumsum(sizes) - sizes
            for start, source, size in zip(
                starts.tolist(), sources.tolist(), sizes.tolist(), strict=True
            ):
                ctypes.memmove(start, source, size)  # lets other threads run
            return len(sizes)
        ends, done = np.cumsum(sizes), 0
        while (first := int(np.searchsorted(ends, done, "right"))) < len(sizes):
            rows = slice(first, first + RANGES)
            ranges = np.stack([sources[rows], sizes[rows].astype(np.uint64)], 1)
            # A call may end within a range: at 2 GB, or where memory was short.
            begun = done - int(ends[first] - sizes[first])
            ranges[0] += np.array([begun, -begun], np.int64).astype(np.uint64)
            copied = self._ask(target + done, ranges)
            if copied <= 0:
                return first
            done += copied
        return len(sizes)

    def _ask(self, target: int, ranges: NDArray[np.uint64]) -> int:
        """One call for `ranges` `(n, 2)`, addresses and sizes. Returns how many bytes it copied."""
        into = np.array([target, ranges[:, 1].sum()], np.uint64)
        assert self.read
        return int(self.read(os.getpid(), into.ctypes.data, 1, ranges.ctypes.data, len(ranges), 0))

    def _is_permitted(self) -> bool:
        """Tries it on a few bytes: containers may forbid the call, and old kernels lack it."""
        there, here = np.arange(64, dtype=np.uint8), np.zeros(64, np.uint8)
        ranges = np.array([[there.ctypes.data, 32], [there.ctypes.data + 32, 32]], np.uint64)
        if self._ask(here.ctypes.data, ranges) == 64:
            return bool((here == there).all())
        code = ctypes.get_errno()
        if code not in (errno.EPERM, errno.ENOSYS, errno.EACCES, errno.EFAULT):
            raise OSError(code, os.strerror(code), "process_vm_readv")
        return False
