"""The images of sources that cannot be read at random, unpacked once into plain files.

    OUT/fasttrain-spool-train-NAME.bin     the bytes of all images of the file NAME, end to end
    OUT/fasttrain-spool-train-NAME.json    name, label, offset and size of each

Both files appear whole or not at all, so a kill loses at most the file that was being unpacked.
"""

import json
import random
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fasttrain.shards import ShardError, atomic

SPOOL = "fasttrain-spool-"  # how the names of unpacked files begin

Item = tuple[str, Any, bytes]  # name, label, bytes of an image
Read = Callable[[Path], Iterator[Item]]
Run = Callable[[Sequence[Callable[[], Any]]], Iterable[Any]]


class Job(NamedTuple):
    """A compressed file to unpack, and the split that its images belong to."""

    path: Path
    split: str


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


def unpacked(job: Job, folder: Path) -> Iterator[Unpacked]:
    """The images of a file that `unpack` was called for, in the order of the file."""
    path, rows_path = _paths(job, folder)
    for name, label, offset, size in json.loads(rows_path.read_bytes()):
        yield Unpacked(path, offset, size, name, label)


def _paths(job: Job, folder: Path) -> tuple[Path, Path]:
    path = folder / f"{SPOOL}{job.split}-{job.path.name}.bin"
    return path, path.with_suffix(".json")


def _fill(read: Read, folder: Path, job: Job) -> None:
    path, rows_path = _paths(job, folder)
    if rows_path.exists():
        return
    # JPEGs hardly compress: a file that grows twentyfold holds no photographs.
    limit = 20 * job.path.stat().st_size + (1 << 20)
    try:
        rows = _write(path, read(job.path), limit)
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, KeyError) as error:
        if isinstance(error, ShardError) or getattr(error, "errno", None):
            raise
        raise ShardError(f"{job.path} is damaged: {error}; load it anew") from None
    with atomic(rows_path) as file:
        file.write(json.dumps(rows).encode())


def _write(path: Path, images: Iterable[Item], limit: int) -> list[tuple[str, Any, int, int]]:
    rows, end = [], 0
    with atomic(path) as file:
        for name, label, data in images:
            if end + len(data) > limit:
                raise ShardError(f"{path.name}: expands beyond {limit:,} bytes: refused")
            rows.append((name, label, end, len(data)))
            file.write(data)
            end += len(data)
    return rows
