"""Bytes of the shards, read ahead of the decoder, several reads at a time.

mmap     views of the mapped tars: nothing is copied; threads page in what comes next, so that
         nobody waits for storage in a page fault; they rest while all is in memory already
pread    copies into buffers of our own, each lent to one batch at a time
"""

import ctypes
import errno
import mmap
import os
import resource
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain import config
from fasttrain.sampling import Draw, Piece
from fasttrain.shards import Split

CHUNK = 16  # images that one task of a reading thread takes on
SUSPICION = 16  # batches that are paged in after one for which storage had to be asked
RECHECK_S = 0.05  # sizes of mapped tars: at every batch, but no more often; 0.8 us a tar
PIECE_BYTES = 4 << 20  # the kernel is told of large ranges in pieces of this size
_MADV_POPULATE_READ = 22  # Linux 5.14: maps pages and waits for them, with an error and no SIGBUS


class DataError(config.Fault, RuntimeError):
    """A batch could not be read; names the samples at fault."""


class BadSamples(DataError):
    """The bytes of these samples are not those that were indexed, or do not fit the index."""

    def __init__(self, split: Split, samples: Sequence[int], what: str) -> None:
        listed = [split.describe(sample) for sample in samples]
        super().__init__("\n  ".join([f"{what}:", *listed]) + remedy(split))
        self.samples = samples


def remedy(split: Split) -> str:
    """The last line of an error about the files of a data set."""
    return (
        f"\nfind all that is damaged with: python tools/verify_shards.py {split.root}\n"
        "and copy it anew or make the data set again"
    )


class Places(NamedTuple):
    """Where the bytes of a batch's images lie."""

    shards: list[int]
    offsets: list[int]
    sizes: list[int]


def places_of(split: Split, draw: Draw, windows_only: bool) -> Places:
    """The bytes of a draw's images; of raw images, where asked, only the rows of their windows."""
    ids = draw.ids
    offsets, sizes = split.offset[ids].astype(np.int64), split.size[ids].astype(np.int64)
    if split.store == "raw":
        row = 3 * split.width[ids].astype(np.int64)
        height = split.height[ids].astype(np.int64)
        offsets += sizes - row * height  # the pixels come last
        sizes = row * height
        if windows_only:
            offsets += row * draw.windows[:, 1].astype(np.int64)
            sizes = row * draw.windows[:, 3].astype(np.int64)
    return Places(split.shard[ids].tolist(), offsets.tolist(), sizes.tolist())


class Ring:
    """Buffers of which each is lent to one batch, and to no other before it was given back."""

    def __init__(self, size: int) -> None:
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
            buffer = np.empty(num_bytes * 5 // 4, np.uint8)
        self.lent[number] = buffer
        return buffer

    def give_back(self, number: int) -> None:
        self.free.append(self.lent.pop(number))


class ShardReader:
    """Reads batches of a split in the background: `start`, then `take`, then `give_back`."""

    def __init__(self, split: Split, data: config.Data, num_buffers: int) -> None:
        self.split = split
        self.mapped = data.read == "mmap"
        self.ahead = data.read_ahead
        self.ring = Ring(num_buffers)
        self.pool = ThreadPoolExecutor(data.read_threads, "read")
        self.files: dict[int, int] = {}  # descriptors, of shards that are not mapped
        self.mmaps: dict[int, mmap.mmap] = {}
        self.maps: dict[int, memoryview] = {}
        self.addresses: dict[int, int] = {}
        self.started: dict[int, tuple[list[memoryview], list[Future[None]]]] = {}
        self.checks: dict[int, list[Future[list[int]]]] = {}
        self.shards: dict[int, set[int]] = {}  # of each batch that is started
        self.looked_at = 0.0  # when the sizes of mapped tars were last looked at
        self.waited_s = 0.0  # in `take`: for storage
        self.faults = 0  # of this process, so far, that had to ask storage
        self.last_miss = 0  # the batch before which that number last rose
        self.madvise = ctypes.CDLL(None, use_errno=True).madvise  # lets other threads run
        self.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def start(self, number: int, places: Places, samples: NDArray[np.int64] | None = None) -> None:
        """Begins to read batch `number`, and to compare the checksums of `samples`, if given."""
        self.shards[number] = set(places.shards)
        for shard in self.shards[number]:
            self._open(shard)
        if samples is not None:
            chunks = np.split(samples, range(CHUNK, len(samples), CHUNK))
            self.checks[number] = [self.pool.submit(self._check, c.tolist()) for c in chunks]
        triples = list(zip(*places, strict=True))
        if self.mapped:
            views = [self.maps[shard][offset : offset + size] for shard, offset, size in triples]
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
            if faults > self.faults:
                self.faults, self.last_miss = faults, number
            if not self.ahead or number - self.last_miss > SUSPICION:
                self.started[number] = views, []
                return
        else:
            buffer = memoryview(self.ring.lend(number, sum(places.sizes)))  # type: ignore[arg-type]
            ends = np.cumsum(places.sizes).tolist()
            views = [buffer[end - size : end] for end, size in zip(ends, places.sizes, strict=True)]
        read = self._page_in if self.mapped else self._pread
        parts = [slice(start, start + CHUNK) for start in range(0, len(views), CHUNK)]
        tasks = [self.pool.submit(read, triples[part], views[part]) for part in parts]
        self.started[number] = views, tasks

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
            BadSamples: of some, the checksums were compared and are others.
            DataError: they could not be read.
        """
        views, tasks = self.started[number]
        begun = time.perf_counter()
        for task in tasks:
            task.result()
        bad = [sample for check in self.checks.get(number, ()) for sample in check.result()]
        if bad:
            raise BadSamples(self.split, bad, "these samples are not as they were written")
        self._look_at_sizes(number)
        self.waited_s += time.perf_counter() - begun
        return views

    def give_back(self, number: int) -> None:
        """What `take` gave is no longer read by anybody."""
        del self.started[number], self.shards[number]
        self.checks.pop(number, None)
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

    def _page_in(self, places: Sequence[tuple[int, int, int]], views: Sequence[memoryview]) -> None:
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

    def _look_at_sizes(self, number: int) -> None:
        """A mapped tar that has shrunk would mean SIGBUS."""
        if self.mapped and time.monotonic() - self.looked_at > RECHECK_S:
            self.looked_at = time.monotonic()
            for shard in self.shards[number]:
                if self.mmaps[shard].size() != self.split.shard_bytes[shard]:
                    raise self._changed(shard)

    def _check(self, samples: list[int]) -> list[int]:
        """Those whose bytes, all of them, have another checksum than the index says."""
        split, bad = self.split, []
        for sample in samples:
            shard, size = int(split.shard[sample]), int(split.size[sample])
            place = shard, int(split.offset[sample]), size
            if self.mapped:
                view = self.maps[shard][place[1] : place[1] + size]
                self._page_in([place], [view])
            else:
                view = memoryview(bytearray(size))
                self._pread([place], [view])
            if zlib.crc32(view) != split.crc32[sample]:
                bad.append(sample)
        return bad

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


class Feed:
    """Draws and bytes of a loader's batches, `read_ahead` of them on their way at a time."""

    def __init__(
        self,
        split: Split,
        data: config.Data,
        draw_of: Callable[[int], Draw],
        num_batches: int,
        windows_only: bool = False,
        pieces_of: Callable[[int], Sequence[Piece]] | None = None,
        verify: Callable[[int], bool] = lambda number: False,
        first: int = 0,
    ) -> None:
        """From batch `first` on, which is number 0 to the caller of this feed."""
        num_batches -= first
        self.split = split
        self.first = first
        self.verify = verify
        self.draw_of = draw_of
        self.num_batches = num_batches
        self.windows_only = windows_only
        self.pieces_of = pieces_of
        self.ahead = data.read_ahead
        # In flight: those read ahead, those inside DALI, the one taken out, the one going in.
        self.reader = ShardReader(split, data, data.read_ahead + data.queue_depth + 2)
        self.draws: dict[int, Draw] = {}
        self.next = 0

    def __call__(self, number: int) -> tuple[Draw, list[memoryview]]:
        """The draw of batch `number` and the bytes of its images, in the order of the numbers."""
        begun = self.next
        while self.next <= min(number + self.ahead, self.num_batches - 1):
            asked = self.first + self.next
            self.draws[self.next] = draw = self.draw_of(asked)
            places = places_of(self.split, draw, self.windows_only)
            self.reader.start(self.next, places, draw.ids if self.verify(asked) else None)
            self.next += 1
        if self.pieces_of:  # behind the batches themselves, which are needed sooner
            for started in range(begun, self.next):
                self.reader.announce(self.pieces_of(self.first + started))
        return self.draws[number], self.reader.take(number)

    def done(self, number: int) -> Draw:
        """Batch `number` is decoded: its bytes may go."""
        self.reader.give_back(number)
        return self.draws.pop(number)

    def close(self) -> None:
        self.reader.close()
