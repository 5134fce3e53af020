"""The listing of a source: its images, their labels and locations, and what was left out.

This module also walks through folders. It counts what it leaves out: hidden files, folders that
tools leave among images, files of other kinds, and broken links.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain.shards import SPLITS, ShardError

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .bmp .gif .webp .tif .tiff .ppm .pgm .pbm .pnm".split()
)
UNREAD_SUFFIXES = frozenset(".heic .heif .avif .jxl .jp2 .jpx .svg .psd .dng .cr2 .nef".split())
_CLUTTER = frozenset(  # names of folders that file servers and tools make
    "@eadir @recycle @recently-snapshot #recycle #snapshot __macosx __pycache__ $recycle.bin "
    "lost+found".split()
) | {"system volume information"}


class Found(NamedTuple):
    """An image of a source, not yet read.

    Its bytes are the `size` bytes at `offset` of the archive `container`. If the offset is -1, they
    are the file `container/name`.
    """

    container: Path
    offset: int
    size: int
    label: str  # the name of its class
    name: str  # its file name, or its path below the class's folder
    mtime: int = -1  # of that file, in ns since 1970; -1 for an image in an archive


@dataclass(slots=True)
class Listing:
    """The images of a split in sorted order, as columns, because there may be over a million.

    Every array has the shape (images,).
    """

    names: list[str]  # class/file
    labels: NDArray[np.int32]
    containers: list[Path]  # archives and folders
    container: NDArray[np.int32]  # index into `containers`
    offset: NDArray[np.int64]
    size: NDArray[np.int64]  # bytes
    mtime: NDArray[np.int64]  # modification time of the file that holds it, in ns since 1970

    def __len__(self) -> int:
        return len(self.names)

    def take(self, positions: NDArray[np.integer]) -> "Listing":
        """Returns the images at these positions, and only the containers that hold them."""
        used, container = np.unique(self.container[positions], return_inverse=True)
        return Listing(
            names=[self.names[position] for position in positions],
            labels=self.labels[positions],
            containers=[self.containers[number] for number in used],
            container=container.astype(np.int32),
            offset=self.offset[positions],
            size=self.size[positions],
            mtime=self.mtime[positions],
        )


@dataclass(frozen=True, slots=True)
class Options:
    """The user's choices about how to read a source."""

    allow_partial: bool = False  # leave out broken links and images without a class
    in_place: bool = False  # index the tars of the source, and write no others
    val_only: bool = False  # the source has no train split
    val_fraction: float | None = None  # the share of every class of train that becomes val
    seed: int = 0  # with which that share is drawn
    classes: tuple[str, ...] | None = None  # all classes, in the order of their labels
    by_number: bool = False  # class names are numbers: sort by value, or look up in `classes`
    label_key: str | None = None  # for WebDataset tars: the member or JSON key with the label
    image_column: str | None = None  # for parquet files
    label_column: str | None = None  # for parquet files


DEFAULTS = Options()


@dataclass(slots=True)
class Source:
    """A source, listed and checked."""

    form: str
    classes: tuple[str, ...]
    splits: dict[str, Listing]
    skipped: dict[str, int]  # number of files and members that were left out, by kind
    archives: str = ""  # digest of the files that had to be unpacked first; empty if none had to

    @property
    def ignored(self) -> int:
        """The number of files and members that were left out."""
        return sum(self.skipped.values())


@dataclass(slots=True)
class Scan:
    """The state of one scan of a source: its inputs, and what the form's scanner collects."""

    spool: Path | None = None  # folder to unpack files to; None: unpack nothing, find no images
    run: Callable[[Sequence[Callable[[], Any]]], Iterable[Any]] = list  # runs tasks in parallel
    say: Callable[[str], None] = lambda text: None  # prints a line for the user
    options: Options = DEFAULTS
    splits: dict[str, list[Found]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    skipped: Counter[str] = field(default_factory=Counter)
    dangling: list[Path] = field(default_factory=list)  # broken links
    archives: str = ""  # digest of the files that must be unpacked first
    classes: Iterable[str] | None = None  # in order, if the source lists them; else those of train

    @property
    def wanted(self) -> tuple[str, ...]:
        """The splits that the source must hold."""
        if self.options.val_only:
            return ("val",)
        return ("train",) if self.options.val_fraction is not None else SPLITS

    def skip(self, kind: str, number: int = 1) -> None:
        """Counts `number` files of one kind as left out."""
        self.skipped[kind] += number

    def add_dangling(self, link: Path) -> None:
        """Records a broken link."""
        self.dangling.append(link)
        self.skip("links that lead nowhere")

    def check_links(self) -> None:
        """Raises ShardError if there are broken links, unless a partial source is allowed."""
        if not self.dangling or self.options.allow_partial:
            return
        raise ShardError(
            f"{self.describe_dangling()}\nrestore the files that they point to (git-annex: git "
            "annex get .), or leave them out with --allow-partial"
        )

    def describe_dangling(self) -> str:
        """Says how many links are broken, and names the first."""
        number, first = len(self.dangling), min(self.dangling)
        links = f"{number:,} links lead" if number > 1 else "1 link leads"
        return f"{links} nowhere, the first: {first} -> {first.readlink()}"


# --------------------------------------------------------------------------------------------------
# Which files are images, by their names
# --------------------------------------------------------------------------------------------------


def is_image(name: str) -> bool:
    """Returns whether a file of this name or path is an image to train on."""
    return not kind_of(name)


def kind_of(name: str) -> str:
    """Returns why a file of this name or path is left out; empty for an image."""
    *folders, file = name.split("/")
    for folder in folders:
        if folder not in ("", ".", "..") and is_clutter(folder):
            return f"in {folder}/"
    if is_clutter(file):
        return "hidden"
    suffix = Path(file).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return ""
    return f"*{suffix}" if suffix else "without a suffix"


def is_clutter(name: str) -> bool:
    """Returns whether a file or folder is hidden, or was left by a file server or a tool."""
    return name.startswith(".") or name.casefold() in _CLUTTER


# --------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------


def entries(folder: Path, scan: Scan) -> Iterator[os.DirEntry[str]]:
    """Yields the files and folders in `folder` by name, but no clutter and no broken links."""
    with os.scandir(folder) as found:
        listed = sorted(found, key=lambda entry: entry.name)
    for entry in listed:
        path = Path(entry.path)
        if is_clutter(entry.name):
            if entry.is_dir(follow_symlinks=False):
                files = sum(len(names) for *_, names in os.walk(path))
                scan.skip(f"in {entry.name}/", files)
            else:
                scan.skip("hidden")
        elif entry.is_symlink() and not path.exists():
            scan.add_dangling(path)
        else:
            yield entry


def images_below(folder: Path, scan: Scan, label: str) -> Iterator[Found]:
    """Yields the images in `folder` and in the folders below it. Follows links.

    Raises:
        ShardError: a link leads back to a folder that contains the link.
    """
    pending = [(folder, frozenset({_identity(folder)}))]
    while pending:
        current, above = pending.pop()
        for entry in entries(current, scan):
            path = Path(entry.path)
            if entry.is_dir():
                identity = _identity(path)
                if identity in above:
                    raise ShardError(
                        f"{path} is a link to a folder that contains it: remove the link"
                    )
                pending.append((path, above | {identity}))
            elif kind := kind_of(entry.name):
                scan.skip(kind)
            else:
                found, name = entry.stat(), path.relative_to(folder).as_posix()
                yield Found(folder, -1, found.st_size, label, name, found.st_mtime_ns)


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def image_file(folder: Path, label: str, name: str) -> Found:
    """Describes the image file `folder/name`."""
    found = (folder / name).stat()
    return Found(folder, -1, found.st_size, label, name, found.st_mtime_ns)


# --------------------------------------------------------------------------------------------------
# Listings
# --------------------------------------------------------------------------------------------------


def make_listing(images: list[Found], labels: Mapping[str, int]) -> Listing:
    """Lists the images, sorted by class and name.

    Args:
        images: is sorted in place.
        labels: the label of every class name.
    """
    images.sort(key=lambda item: (item.label, item.name, item.container, item.offset))
    containers = {path: n for n, path in enumerate({item.container: None for item in images})}
    archives = {item.container for item in images if item.offset >= 0}
    mtimes = {path: path.stat().st_mtime_ns for path in archives}
    return Listing(
        names=[f"{item.label}/{item.name}" for item in images],
        labels=np.fromiter((labels[item.label] for item in images), np.int32),
        containers=list(containers),
        container=np.fromiter((containers[item.container] for item in images), np.int32),
        offset=np.fromiter((item.offset for item in images), np.int64),
        size=np.fromiter((item.size for item in images), np.int64),
        mtime=np.fromiter((mtimes.get(item.container, item.mtime) for item in images), np.int64),
    )
