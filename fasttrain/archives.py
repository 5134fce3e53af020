"""Lists the members of tars with the offsets of their bytes. Extracts nothing."""

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fasttrain.listing import Scan, is_clutter, kind_of
from fasttrain.shards import ShardError

MAX_IMAGE_BYTES = 1 << 30  # ImageNet's largest image has 16 MB
LINKS = "links or devices in tars"
_COMPRESSED = {  # first bytes -> method, command that unpacks
    b"\x1f\x8b": ("gzip", "zcat"),
    b"BZh": ("bzip2", "bzcat"),
    b"\xfd7zXZ": ("xz", "xzcat"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstdcat"),
}
_LFS = b"version https://git-lfs"
_PACKED = re.compile(r".+\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz)", re.IGNORECASE)


def plain_tars(folder: Path) -> list[Path]:
    """Returns the files in `folder` that are named .tar or .TAR, by name, without clutter."""
    found = (path for path in folder.glob("*.[tT][aA][rR]") if not is_clutter(path.name))
    return sorted(found)


def packed_tars(folder: Path) -> list[Path]:
    """Returns the files in `folder` that are named like compressed tars, by name."""
    found = (path for path in folder.iterdir() if not is_clutter(path.name))
    return sorted(path for path in found if _PACKED.fullmatch(path.name))


def unpack_command(path: Path) -> str:
    """Returns a command that unpacks a compressed tar to a plain tar beside it."""
    end = path.name[path.name.lower().rindex(".t") :]
    method = next((m for m in ("bz", "xz", "zst", "lz4") if m in end.lower()), "gzip")
    tool = {"bz": "bzip2", "zst": "zstd"}.get(method, method)
    return f"{tool} -dc < {path.name} > {path.name.removesuffix(end)}.tar"


class _Window(io.RawIOBase):
    """A part of a file that can be read like a file, to read a tar inside a tar."""

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
    """A regular file in a tar."""

    name: str
    offset: int  # of its bytes, in the outermost file
    size: int  # bytes


def members(path: Path, scan: Scan, start: int = 0, size: int | None = None) -> Iterator[Member]:
    """Yields the regular files of an uncompressed tar. Counts links and devices as left out.

    Args:
        path: the tar, or a file that contains it.
        scan: counts what is left out.
        start: offset of the tar in the file, in bytes.
        size: size of the tar in bytes; None: up to the end of the file.
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
                    # tarfile would keep every header: a gigabyte for ImageNet.
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
            f"{path} is damaged: {error}; compare its MD5 with the published one and download it "
            "again"
        ) from None


def _check_head(path: Path, head: bytes) -> None:
    for magic, (method, command) in _COMPRESSED.items():
        if head.startswith(magic):
            raise ShardError(
                f"{path} is compressed ({method}) and does not allow random access\n"
                f"unpack it to a plain tar: {command} < {path.name} > x && mv x {path.name}"
            )
    if head == _LFS:
        raise ShardError(f"{path} is a Git LFS pointer, not the tar: download it with git lfs pull")


def images(path: Path, scan: Scan, start: int = 0, size: int | None = None) -> Iterator[Member]:
    """Yields the members that are images by their names. Counts the others as left out.

    The arguments are those of `members`.

    Raises:
        ShardError: the tar is damaged, or an image has a gigabyte or more.
    """
    for member in members(path, scan, start, size):
        if kind := kind_of(member.name):
            scan.skip(kind)
            continue
        if member.size > MAX_IMAGE_BYTES:
            raise ShardError(
                f"{path}: {member.name!r} has a gigabyte or more, so it is not a photograph: "
                "remove it"
            )
        yield member
