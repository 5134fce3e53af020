"""Tars read in place: members are listed with the offsets of their bytes, none is extracted."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fasttrain.listing import Scan, kind_of
from fasttrain.shards import ShardError

MAX_IMAGE_BYTES = 1 << 30  # of one member; ImageNet's largest image has 16 MB
LINKS = "links or devices in tars"
_COMPRESSED = {  # by their first bytes
    b"\x1f\x8b": ("gzip", "zcat"),
    b"BZh": ("bzip2", "bzcat"),
    b"\xfd7zXZ": ("xz", "xzcat"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstdcat"),
}
_LFS = b"version https://git-lfs"


class _Window(io.RawIOBase):
    """A part of a file, as a file: reads a tar inside a tar in place."""

    def __init__(self, file: io.BufferedReader, start: int, size: int) -> None:
        self.file, self.start, self.size, self.position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = base + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self.position)
        size = left if size < 0 else min(size, left)
        self.file.seek(self.start + self.position)
        data = self.file.read(size)
        self.position += len(data)
        return data


class Member(NamedTuple):
    """A plain file of a tar."""

    name: str
    offset: int  # in the outermost file
    size: int


def members(path: Path, scan: Scan, start: int = 0, size: int | None = None) -> Iterator[Member]:
    """The plain files of an uncompressed tar, or of one that lies within a file.

    Links and devices are counted as left out; their names lead nowhere.

    Raises:
        ShardError: the tar is compressed, damaged, or has a sparse member.
    """
    try:
        with path.open("rb") as file:
            if start == 0:
                _check_head(path, file.read(len(_LFS)))
            whole = path.stat().st_size
            window = _Window(file, start, whole - start if size is None else size)
            with tarfile.open(fileobj=window, mode="r:") as tar:
                for member in tar:
                    # tarfile keeps every header, which is a gigabyte for ImageNet.
                    tar.members = []  # type: ignore[attr-defined]
                    if member.issparse():
                        raise ShardError(
                            f"{path}: {member.name!r} is stored as a sparse file, which cannot be "
                            "read in place; make the tar again without --sparse"
                        )
                    if not member.isreg():
                        if not member.isdir():
                            scan.skip(LINKS)
                        continue
                    if member.offset_data + member.size > window.size:
                        raise tarfile.ReadError(f"{member.name!r} reaches past its end")
                    yield Member(member.name, start + member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(
            f"{path} is damaged: {error}; compare its MD5 with the published one and load it anew"
        ) from None


def _check_head(path: Path, head: bytes) -> None:
    for magic, (method, command) in _COMPRESSED.items():
        if head.startswith(magic):
            raise ShardError(
                f"{path} is compressed ({method}), and so cannot be read at random\n"
                f"unpack it to a plain tar: {command} < {path.name} > x && mv x {path.name}"
            )
    if head == _LFS:
        raise ShardError(f"{path} is a pointer of Git LFS, not the tar: load it with git lfs pull")


def images(path: Path, scan: Scan, start: int = 0, size: int | None = None) -> Iterator[Member]:
    """The members that are images by name; the others are counted as left out.

    Raises:
        ShardError: the tar is damaged, or an image has a gigabyte or more.
    """
    for member in members(path, scan, start, size):
        if kind := kind_of(member.name):
            scan.skip(kind)
            continue
        if member.size > MAX_IMAGE_BYTES:
            raise ShardError(f"{path}: {member.name!r} has a gigabyte or more: no photograph")
        yield member
