"""What a source is listed as: its images with their labels and places, and what was left out.

Also the walk through folders, which names what it passes by: hidden files, folders that tools leave
among images, files of other kinds, and links that lead nowhere.
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
_CLUTTER = frozenset(  # folders that file servers and tools leave; hidden ones are known by the dot
    "@eadir @recycle @recently-snapshot #recycle #snapshot __macosx __pycache__ $recycle.bin "
    "lost+found".split()
) | {"system volume information"}


class Found(NamedTuple):
    """An image of a source, not yet looked into.

    Its bytes are `size` at `offset` of the archive `place`; with offset -1, the file `place/name`.
    """

    place: Path
    offset: int
    size: int
    label: str  # the name of its class
    name: str  # its file name, or path below the class's folder
    mtime: int = -1  # of that file, in ns since 1970; -1: that of the archive


@dataclass(slots=True)
class Listing:
    """The images of a split in sorted order; columns, as there may be more than a million."""

    names: list[str]  # class/file
    labels: NDArray[np.int32]
    places: list[Path]
    place: NDArray[np.int32]  # which of `places`
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    mtime: NDArray[np.int64]  # when the file that holds it was last changed: ns since 1970

    def __len__(self) -> int:
        return len(self.names)

    def take(self, positions: NDArray[np.integer]) -> "Listing":
        """The images at these positions, with only the places they lie in."""
        used, place = np.unique(self.place[positions], return_inverse=True)
        return Listing(
            names=[self.names[position] for position in positions],
            labels=self.labels[positions],
            places=[self.places[number] for number in used],
            place=place.astype(np.int32),
            offset=self.offset[positions],
            size=self.size[positions],
            mtime=self.mtime[positions],
        )


@dataclass(frozen=True, slots=True)
class Options:
    """How a source is to be read, where its form alone does not say."""

    allow_partial: bool = False  # leave out links that lead nowhere and images without a class
    in_place: bool = False  # the tars stay as they are
    val_only: bool = False  # there is nothing to train on
    val_fraction: float | None = None  # share of every class of train that becomes val
    seed: int = 0  # of that draw
    classes: tuple[str, ...] | None = None  # all classes, in the order of their labels
    by_number: bool = False  # names of classes are numbers: their order, or places in `classes`
    label_key: str | None = None  # of WebDataset tars: the member or JSON key with the label
    image_column: str | None = None  # of parquet files
    label_column: str | None = None  # of parquet files


DEFAULTS = Options()


@dataclass(slots=True)
class Source:
    """A source, listed and checked."""

    form: str
    classes: tuple[str, ...]
    splits: dict[str, Listing]
    skipped: dict[str, int]  # files and members that were left out, by kind
    archives: str = ""  # digest of the files that had to be unpacked first

    @property
    def ignored(self) -> int:
        """Number of files and members that were left out."""
        return sum(self.skipped.values())


@dataclass(slots=True)
class Scan:
    """What a form's scanner gathers, and what it may use."""

    spool: Path | None = None  # folder for what must be unpacked first; None: look at files alone
    run: Callable[[Sequence[Callable[[], Any]]], Iterable[Any]] = list  # tasks, in parallel
    say: Callable[[str], None] = lambda text: None
    options: Options = DEFAULTS
    splits: dict[str, list[Found]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    skipped: Counter[str] = field(default_factory=Counter)
    dangling: list[Path] = field(default_factory=list)  # links that lead nowhere
    archives: str = ""  # digest of the files that must be unpacked first
    classes: Iterable[str] | None = None  # in order, where the form names them; else those of train

    @property
    def wanted(self) -> tuple[str, ...]:
        """The splits that the source must hold."""
        if self.options.val_only:
            return ("val",)
        return ("train",) if self.options.val_fraction is not None else SPLITS

    def skip(self, kind: str, number: int = 1) -> None:
        """Counts files that are left out."""
        self.skipped[kind] += number

    def dangle(self, link: Path) -> None:
        """Notes a link that leads nowhere."""
        self.dangling.append(link)
        self.skip("links that lead nowhere")

    def check_links(self) -> None:
        """Raises ShardError if links lead nowhere, unless a partial source is allowed."""
        if not self.dangling or self.options.allow_partial:
            return
        raise ShardError(
            f"{self.about_links()}\nbring back what they point to (git-annex: git annex get .), or "
            "leave them out with --allow-partial"
        )

    def about_links(self) -> str:
        """How many links lead nowhere, and which is the first."""
        number, first = len(self.dangling), min(self.dangling)
        links = f"{number:,} links lead" if number > 1 else "1 link leads"
        return f"{links} nowhere, the first: {first} -> {first.readlink()}"


# --------------------------------------------------------------------------------------------------
# What is an image, by its name
# --------------------------------------------------------------------------------------------------


def is_image(name: str) -> bool:
    """Whether a name is that of an image to train on."""
    return not kind_of(name)


def kind_of(name: str) -> str:
    """Why a file or member is left out, by its name or path; empty for an image."""
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
    """Whether a file or folder is hidden, or was left there by a file server or a tool."""
    return name.startswith(".") or name.casefold() in _CLUTTER


# --------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------


def entries(folder: Path, scan: Scan) -> Iterator[os.DirEntry[str]]:
    """The files and folders in `folder`, by name, less clutter and links that lead nowhere."""
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
            scan.dangle(path)
        else:
            yield entry


def images_below(folder: Path, scan: Scan, label: str) -> Iterator[Found]:
    """The images in `folder` and the folders in it, links followed.

    Raises:
        ShardError: a link leads back to a folder that holds it.
    """
    pending = [(folder, frozenset({_identity(folder)}))]
    while pending:
        current, above = pending.pop()
        for entry in entries(current, scan):
            path = Path(entry.path)
            if entry.is_dir():
                identity = _identity(path)
                if identity in above:
                    raise ShardError(f"{path} is a link to a folder that holds it: remove the link")
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
    """An image that is a file of its own, `name` below `folder`."""
    found = (folder / name).stat()
    return Found(folder, -1, found.st_size, label, name, found.st_mtime_ns)


# --------------------------------------------------------------------------------------------------
# Listings
# --------------------------------------------------------------------------------------------------


def make_listing(images: list[Found], labels: Mapping[str, int]) -> Listing:
    """Sorts the images by class and name; `labels` gives the label of every class."""
    images.sort(key=lambda item: (item.label, item.name, item.place, item.offset))
    places = {place: number for number, place in enumerate({item.place: None for item in images})}
    archives = {item.place for item in images if item.offset >= 0}
    mtimes = {place: place.stat().st_mtime_ns for place in archives}
    return Listing(
        names=[f"{item.label}/{item.name}" for item in images],
        labels=np.fromiter((labels[item.label] for item in images), np.int32),
        places=list(places),
        place=np.fromiter((places[item.place] for item in images), np.int32),
        offset=np.fromiter((item.offset for item in images), np.int64),
        size=np.fromiter((item.size for item in images), np.int64),
        mtime=np.fromiter((mtimes.get(item.place, item.mtime) for item in images), np.int64),
    )
