"""The images of sources that cannot be read at random, unpacked once into plain files.

    OUT/fasttrain-spool-train-1a2b3c4d-NAME.bin     the bytes of all images of the file NAME
    OUT/fasttrain-spool-train-1a2b3c4d-NAME.json    name, label, offset and size of each, and
                                                    which state of the file NAME they are from

Both files appear whole or not at all, so a kill loses at most the file that was being unpacked.
What was unpacked is used again only for the same state of the file: its size, modification time
and last bytes. A .bin has the modification time of its source, as if images were read from there.
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

from fasttrain import files
from fasttrain.listing import Found, Options, Scan
from fasttrain.shards import SPLITS, ShardError

SPOOL = "fasttrain-spool-"  # how the names of unpacked files begin
_TAIL = 1 << 16  # bytes

Item = tuple[str, Any, bytes]  # name, label, bytes of an image
Run = Callable[[Sequence[Callable[[], Any]]], Iterable[Any]]


class Job(NamedTuple):
    """A compressed file to unpack, and the split that its images belong to."""

    root: Path  # of the source
    name: str  # of the file, below root
    split: str
    columns: tuple[str, ...] = ()  # those to read, where the file is a table

    @property
    def path(self) -> Path:
        return self.root / self.name


Read = Callable[[Job], Iterator[Item]]


class Unpacked(NamedTuple):
    """An image that was unpacked: its bytes are `size` at `offset` of the file `place`."""

    place: Path
    offset: int
    size: int
    name: str
    label: Any  # as the source has it


def unpack(jobs: Sequence[Job], read: Read, folder: Path, run: Run) -> None:
    """Unpacks every file into `folder`, in parallel, unless an earlier call did.

    Raises:
        ShardError: a file is damaged.
    """
    # In random order: the parts of an array of jobs then share the work.
    for _ in run([partial(_fill, read, folder, job) for job in random.sample(jobs, len(jobs))]):
        pass


def unpack_all(jobs: Sequence[Job], read: Read, scan: Scan) -> dict[str, list[tuple[Found, Any]]]:
    """Unpacks every file of a source, in parallel: the images by split, with their labels.

    Without a folder to unpack to, only looks at the files: there are no images then.

    Raises:
        ShardError: a file is damaged.
    """
    scan.archives = _digest(jobs, scan.options)
    found: dict[str, list[tuple[Found, Any]]] = {split: [] for split in SPLITS}
    if scan.spool is None:
        return found
    size = sum(job.path.stat().st_size for job in jobs)
    scan.say(
        f"unpacking {len(jobs)} files ({size / 1e9:.1f} GB) to {scan.spool}, as they cannot be "
        "read at random; removed at the end"
    )
    unpack(jobs, read, scan.spool, scan.run)
    for job in jobs:
        for place, offset, num_bytes, name, label in unpacked(job, scan.spool):
            found[job.split].append((Found(place, offset, num_bytes, "", name), label))
    return found


def unpacked(job: Job, folder: Path) -> Iterator[Unpacked]:
    """The images of a file that `unpack` was called for, in the order of the file."""
    path, rows_path = _paths(job, folder)
    for name, label, offset, size in json.loads(rows_path.read_bytes())["rows"]:
        yield Unpacked(path, offset, size, name, label)


def _paths(job: Job, folder: Path) -> tuple[Path, Path]:
    # Files in different folders may have the same name, so the digest of the whole name is added.
    digest = hashlib.sha256(job.name.encode()).hexdigest()[:8]
    path = folder / f"{SPOOL}{job.split}-{digest}-{job.path.name}.bin"
    return path, path.with_suffix(".json")


def _state(job: Job) -> list[Any]:
    """What changes when the file or the choice of columns does; of JSON types."""
    with job.path.open("rb") as file:
        found = os.fstat(file.fileno())
        # The end of a gzip file is its checksum; that of a parquet file lists all its parts.
        file.seek(max(0, found.st_size - _TAIL))
        tail = hashlib.sha256(file.read(_TAIL)).hexdigest()
    return [found.st_size, found.st_mtime_ns, tail, list(job.columns)]


def _digest(jobs: Sequence[Job], options: Options) -> str:
    """Of files and how they are read: the same wherever they lie and whenever they were copied."""
    draw = options.val_fraction and (options.val_fraction, options.seed)
    found: list[Any] = [options.val_only, draw, options.classes, options.by_number]
    for job in jobs:
        size, _, tail, columns = _state(job)
        found.append([job.name, job.split, size, tail, columns])
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _made(path: Path) -> list[int]:
    """What tells an unpacked file from another under its name."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _is_unpacked(state: list[Any], path: Path, rows_path: Path) -> bool:
    try:
        kept = json.loads(rows_path.read_bytes())
        return bool(kept["state"] == state and kept["made"] == _made(path))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _fill(read: Read, folder: Path, job: Job) -> None:
    path, rows_path = _paths(job, folder)
    state = _state(job)
    if _is_unpacked(state, path, rows_path):
        return
    rows_path.unlink(missing_ok=True)  # it would not be true of the new .bin
    # JPEGs hardly compress: a file that grows twentyfold holds no photographs.
    limit = 20 * job.path.stat().st_size + (1 << 20)
    try:
        rows = _write(path, read(job), limit)
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, KeyError) as error:
        if isinstance(error, ShardError) or getattr(error, "errno", None):
            raise
        raise ShardError(f"{job.path} is damaged: {error}; load it anew") from None
    if _state(job) != state:
        path.unlink(missing_ok=True)
        raise ShardError(
            f"{job.path} was changed while it was unpacked; start again once it is complete"
        )
    mtime = state[1]
    os.utime(path, ns=(mtime, mtime))
    kept = {"state": state, "made": _made(path), "rows": rows}
    files.write_bytes(rows_path, json.dumps(kept).encode())


def _write(path: Path, images: Iterable[Item], limit: int) -> list[tuple[str, Any, int, int]]:
    rows, end = [], 0
    with files.atomic(path) as file:
        for name, label, data in images:
            if end + len(data) > limit:
                raise ShardError(f"{path.name}: expands beyond {limit:,} bytes: refused")
            rows.append((name, label, end, len(data)))
            file.write(data)
            end += len(data)
    return rows
