"""Unpacks sources that do not allow random access, once, into plain files.

    OUT/fasttrain-spool-train-1a2b3c4d-NAME.bin     the bytes of all images of the file NAME
    OUT/fasttrain-spool-train-1a2b3c4d-NAME.json    name, label, offset and size of each image, and
                                                    the state of the file NAME that they are from

Both files are written atomically, so a kill loses at most the file that is being unpacked. Unpacked
images are used again only if the state of NAME is the same. The state is its size, modification
time and last bytes, and the version of the rules by which fasttrain reads it. The .bin gets the
modification time of NAME, because a sharding compares those times.
"""

import hashlib
import json
import os
import random
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fasttrain import files, shards
from fasttrain.listing import Found, Options, Scan
from fasttrain.shards import SPLITS, ShardError

SPOOL = "fasttrain-spool-"  # the first part of the name of every unpacked file
_TAIL_BYTES = 1 << 16

Item = tuple[str, Any, bytes]  # name, label and bytes of an image
Run = Callable[[Sequence[Callable[[], Any]]], Iterable[Any]]


class Job(NamedTuple):
    """A compressed file to unpack, and the split that its images belong to."""

    root: Path  # the folder of the source
    name: str  # path of the file, relative to root
    split: str
    columns: tuple[str, ...] = ()  # the columns to read, if the file is a table

    @property
    def path(self) -> Path:
        return self.root / self.name


Read = Callable[[Job], Iterator[Item]]


class Unpacked(NamedTuple):
    """An unpacked image: the `size` bytes at `offset` of the file `path`."""

    path: Path
    offset: int
    size: int
    name: str
    label: Any  # as the source gives it


def unpack(jobs: Sequence[Job], read: Read, folder: Path, run: Run) -> None:
    """Unpacks every file into `folder`, in parallel. Skips files that an earlier call unpacked.

    Raises:
        ShardError: a file is damaged.
    """
    # The order is random, so that the parts of a job array unpack different files.
    tasks = [partial(_unpack_one, read, folder, job) for job in random.sample(jobs, len(jobs))]
    for _ in run(tasks):
        pass


def unpack_all(jobs: Sequence[Job], read: Read, scan: Scan) -> dict[str, list[tuple[Found, Any]]]:
    """Unpacks every file of a source, in parallel, and sets `scan.archives`.

    Returns:
        The images with their labels, by split. If `scan.spool` is None, nothing is unpacked and
        there are no images.
    Raises:
        ShardError: a file is damaged.
    """
    scan.archives = _digest(jobs, scan.options)
    found: dict[str, list[tuple[Found, Any]]] = {split: [] for split in SPLITS}
    if scan.spool is None:
        return found
    size = sum(job.path.stat().st_size for job in jobs)
    scan.say(
        f"unpacking {len(jobs)} files ({size / 1e9:.1f} GB) to {scan.spool}, because they do not "
        "allow random access; the unpacked files are removed at the end"
    )
    unpack(jobs, read, scan.spool, scan.run)
    for job in jobs:
        for path, offset, num_bytes, name, label in unpacked(job, scan.spool):
            found[job.split].append((Found(path, offset, num_bytes, "", name), label))
    return found


def unpacked(job: Job, folder: Path) -> Iterator[Unpacked]:
    """Yields the images of a file that `unpack` has unpacked, in the order of the file."""
    path, rows_path = _paths(job, folder)
    for name, label, offset, size in json.loads(rows_path.read_bytes())["rows"]:
        yield Unpacked(path, offset, size, name, label)


def _paths(job: Job, folder: Path) -> tuple[Path, Path]:
    # The digest tells apart files of the same name in different folders.
    digest = hashlib.sha256(job.name.encode()).hexdigest()[:8]
    path = folder / f"{SPOOL}{job.split}-{digest}-{job.path.name}.bin"
    return path, path.with_suffix(".json")


def _state(job: Job) -> list[Any]:
    """Returns values of JSON types that change if the file or the way of reading it changes."""
    with job.path.open("rb") as file:
        found = os.fstat(file.fileno())
        # A gzip file ends with its checksum, a parquet file with a list of all its parts.
        file.seek(max(0, found.st_size - _TAIL_BYTES))
        tail = hashlib.sha256(file.read(_TAIL_BYTES)).hexdigest()
    return [found.st_size, found.st_mtime_ns, tail, list(job.columns), shards.READING_RULES]


def _digest(jobs: Sequence[Job], options: Options) -> str:
    """Returns a digest of the files and of how they are read.

    It does not depend on the folder of the files or on their modification times.
    """
    draw = options.val_fraction and (options.val_fraction, options.seed)
    found: list[Any] = [options.val_only, draw, options.classes, options.by_number]
    for job in jobs:
        size, _, tail, columns, _ = _state(job)
        found.append([job.name, job.split, size, tail, columns])
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _fingerprint(path: Path) -> list[int]:
    """Returns size and modification time, to detect that a .bin was replaced."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _is_unpacked(state: list[Any], path: Path, rows_path: Path) -> bool:
    try:
        kept = json.loads(rows_path.read_bytes())
        return bool(kept["state"] == state and kept["made"] == _fingerprint(path))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _unpack_one(read: Read, folder: Path, job: Job) -> None:
    path, rows_path = _paths(job, folder)
    state = _state(job)
    if _is_unpacked(state, path, rows_path):
        return
    rows_path.unlink(missing_ok=True)  # it describes the old .bin
    # JPEGs hardly compress, so a file that grows twentyfold holds no photographs.
    limit = 20 * job.path.stat().st_size + (1 << 20)
    try:
        rows = _write(path, read(job), limit)
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, KeyError) as error:
        if isinstance(error, ShardError) or getattr(error, "errno", None):
            raise
        raise ShardError(f"{job.path} is damaged: {error}; download it again") from None
    if _state(job) != state:
        path.unlink(missing_ok=True)
        raise ShardError(
            f"{job.path} was changed while it was unpacked; start again once it is complete"
        )
    mtime = state[1]
    os.utime(path, ns=(mtime, mtime))
    kept = {"state": state, "made": _fingerprint(path), "rows": rows}
    files.write_bytes(rows_path, json.dumps(kept).encode())


def _write(path: Path, images: Iterable[Item], limit: int) -> list[tuple[str, Any, int, int]]:
    rows, end = [], 0
    with files.atomic(path) as file:
        for name, label, data in images:
            if end + len(data) > limit:
                raise ShardError(
                    f"{path.name}: the file unpacks to more than {limit:,} bytes, so it does not "
                    "hold photographs: give a source of images"
                )
            rows.append((name, label, end, len(data)))
            file.write(data)
            end += len(data)
    return rows
