"""Copies shards to each node for `data.stage`. One process per node makes and removes the copy.

    STAGE/imagenet-1a2b3c4d5e6f/        the copy: the whole data set, or some of its tars
    STAGE/imagenet-1a2b3c4d5e6f.lock    locked by a process that copies

Runs that read the copy share a lock on its folder. The name contains a digest of the manifest, so a
data set that was made again is copied again.
"""

import hashlib
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fasttrain import config, files, forecast, shards
from fasttrain.shards import ShardError, Split

CHUNK = 4 << 20  # bytes read and written at a time
SAY_EVERY_S = 30.0
POLL_S = 0.2  # time between two exchanges of progress between the nodes


class Report(NamedTuple):
    """The progress of one node."""

    host: str
    done: int  # bytes that the copy has
    total: int  # bytes of the complete copy
    copied: int  # bytes of `done` that this run has copied
    finished: bool
    fault: str  # why the copy failed; "" if nothing is wrong


class _File(NamedTuple):
    name: str
    size: int
    sha256: str


class Staging:
    """Copies a data set to this node in threads. Waits if another run is copying it."""

    def __init__(self, root: Path, data: config.Data) -> None:
        """Starts copying the data set at `root`. `data.stage` must be set."""
        assert data.stage is not None
        self.root, self.data = root, data
        self.folder = folder_of(root, data.stage)
        self.total = self.done = self.copied = 0
        self.fault = ""
        self.used: int | None = None  # descriptor of the folder, locked while this run reads it
        self.counting = threading.Lock()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def report(self) -> Report:
        """Returns the progress of this node."""
        finished = not self.thread.is_alive()
        return Report(os.uname().nodename, self.done, self.total, self.copied, finished, self.fault)

    def release(self) -> None:
        """Ends the use of the copy. Removes it, unless it is to be kept or another run uses it."""
        if self.used is None:
            return
        try:
            if not self.data.stage_keep:
                with self._copying():
                    # If another run reads the copy, that run will remove it.
                    if files.lock(self.used, wait_s=0):
                        shutil.rmtree(self.folder)
        finally:
            os.close(self.used)
            self.used = None

    def _copying(self) -> AbstractContextManager[None]:
        """Holds the lock for changing the copy."""
        return files.locked(Path(f"{self.folder}.lock"))

    def _run(self) -> None:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with self._copying():
                self.folder.mkdir(exist_ok=True)
                self._copy_all()
                self.used = os.open(self.folder, os.O_RDONLY)
                files.lock(self.used, shared=True)
        except ShardError as error:
            self.fault = str(error)
        except Exception as error:  # it would be lost in this thread
            self.fault = (
                f"[data] stage = {self.data.stage}: {error}; correct that, name another folder, or "
                "unset data.stage"
            )

    def _copy_all(self) -> None:
        files.clear(self.folder)
        wanted = _files(self.root, self.data.stage_part)
        self.total = sum(file.size for file in wanted)
        missing = _missing(self.folder, wanted)
        self.done = self.total - sum(file.size for file in missing)
        check_room(self.root, self.data, self.total - self.done, free_bytes(self.folder))
        with ThreadPoolExecutor(self.data.read_threads, "stage") as pool:
            for future in [pool.submit(self._copy, file) for file in missing]:
                try:
                    future.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        if self.data.stage_part == 1:  # the copy is then a data set that `open_split` opens
            for name in (shards.MANIFEST_DIGEST, shards.MANIFEST):
                files.write_bytes(self.folder / name, (self.root / name).read_bytes())

    def _copy(self, file: _File) -> None:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
        with (
            (self.root / file.name).open("rb", buffering=0) as source,
            files.atomic(self.folder / file.name) as target,
        ):
            while count := source.readinto(buffer):
                digest.update(buffer[:count])
                target.write(buffer[:count])
                with self.counting:
                    self.done += count
                    self.copied += count
            if digest.hexdigest() != file.sha256:
                raise ShardError(
                    f"{self.root / file.name} is damaged: its sha256 is not that of "
                    f"{shards.MANIFEST}; copy it again or make the data set again"
                )


def folder_of(root: Path, stage: Path) -> Path:
    """Returns the folder of the copy of the data set at `root`."""
    digest = hashlib.sha256((root / shards.MANIFEST).read_bytes()).hexdigest()
    return stage / f"{root.resolve().name}-{digest[:12]}"


def bytes_to_copy(root: Path, data: config.Data) -> int:
    """Returns the number of bytes that the copy on this node still lacks."""
    assert data.stage is not None
    missing = _missing(folder_of(root, data.stage), _files(root, data.stage_part))
    return sum(file.size for file in missing)


def check_room(root: Path, data: config.Data, needed: int, free: int) -> None:
    """Checks that `needed` bytes of the data set at `root` fit into `free` bytes.

    Raises:
        ShardError: they do not fit. The message names the part that would.
    """
    if needed <= free:
        return
    fixed, whole = (sum(file.size for file in _files(root, part)) for part in (0.0, 1.0))
    part = math.floor(95 * (free - fixed) / max(1, whole - fixed)) / 100
    raise ShardError(
        f"[data] stage = {data.stage}: {needed / 1e9:,.1f} GB are to be copied, and "
        f"{free / 1e9:,.1f} GB are free; make room, or name another folder"
        + (f", or copy a part: --set data.stage_part={part:.2f}" if part > 0 else "")
    )


def open_copy(split: Split, data: config.Data) -> Split:
    """Returns the split whose copied shards are read from this node's copy.

    Raises:
        ShardError: the copy is damaged.
    """
    assert data.stage is not None
    folder = folder_of(split.root, data.stage)
    if data.stage_part == 1:
        return shards.open_split(folder, split.name)
    paths = list(split.shard_paths)
    for number in range(_num_copied(split.name, len(paths), data.stage_part)):
        paths[number] = folder / paths[number].name
    return replace(split, shard_paths=tuple(paths))


def wait(
    mine: Staging | None,
    gather: Callable[[Report | None], Sequence[Report | None]],
    say: Callable[[str], Any],
) -> None:
    """Waits until all nodes have their copies. Every rank calls this.

    Args:
        mine: the copy that this process makes; None if another process of the node makes it.
        gather: collects the reports of all ranks. It is called every `POLL_S` seconds, so that no
            collective times out.
        say: prints progress.
    Raises:
        ShardError: a node could not make its copy.
    """
    begun = said = time.monotonic()
    while True:
        found = [each for each in gather(mine.report() if mine else None) if each]
        faults = [f"{each.host}: {each.fault}" for each in found if each.fault]
        if faults:
            raise ShardError("\n".join(faults))
        now = time.monotonic()
        done, total = (sum(getattr(each, name) for each in found) for name in ("done", "total"))
        copied = sum(each.copied for each in found)
        rate = copied / max(now - begun, 1e-9)
        if all(each.finished for each in found):
            break
        if now - said > SAY_EVERY_S:
            said = now
            slowest = min(found, key=lambda each: each.done / max(each.total, 1))
            say(
                f"stage: {done / max(total, 1):.0%} copied at {rate / 1e6:,.0f} MB/s; "
                f"{slowest.host} has {slowest.done / max(slowest.total, 1):.0%}"
            )
        time.sleep(POLL_S)
    say(
        f"stage: {total / 1e6:,.0f} MB on {len(found)} node{'s' * (len(found) > 1)}, of which "
        f"{copied / 1e6:,.0f} MB were copied and checked in {now - begun:.1f} s"
        + (f" ({rate / 1e6:,.0f} MB/s)" if copied else "")
    )


def free_bytes(folder: Path) -> int:
    """Returns the bytes that can be written into a folder. In a tmpfs, free memory limits them."""
    free = shutil.disk_usage(folder).free
    return min(free, forecast.available_bytes()) if file_system_of(folder) == "tmpfs" else free


def file_system_of(path: Path) -> str:
    """Returns the type of the file system of `path`, such as `ext4`, `tmpfs` or `nfs4`."""
    kinds = {}
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        kinds[Path(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), mount))] = kind
    path = path.resolve()
    return next(kinds[folder] for folder in (path, *path.parents) if folder in kinds)


def _missing(folder: Path, wanted: Sequence[_File]) -> list[_File]:
    """Returns the files that a copy lacks.

    Names and sizes suffice: a file appears in the copy only after its digest was verified.
    """

    def is_there(file: _File) -> bool:
        path = folder / file.name
        return path.exists() and path.stat().st_size == file.size

    return [file for file in wanted if not is_there(file)]


def _num_copied(split: str, num_shards: int, part: float) -> int:
    return math.ceil(part * num_shards) if split == "train" else num_shards


def _files(root: Path, part: float) -> list[_File]:
    """Lists the files to copy, in order: this part of the training tars, and all other files."""
    found = []
    for name, entry in shards.read_manifest(root)["splits"].items():
        index = entry["index"]
        found.append(_File(index["name"], index["size"], index["sha256"]))
        for shard in entry["shards"][: _num_copied(name, len(entry["shards"]), part)]:
            found.append(_File(shard["name"], shard["size"], shard["sha256"]))
            # DALI's index; training does not need it.
            idx = (root / shard["name"]).with_suffix(".idx")
            if idx.exists():
                found.append(_File(idx.name, idx.stat().st_size, shard["idx_sha256"]))
    return found
