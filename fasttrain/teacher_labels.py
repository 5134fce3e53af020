"""The format of a teacher's labels on disk. The tool that stores them and the run share it.

    OUT/view-0007-part-003.labels   the labels of some images in one view, in the order of their
                                    sample ids, and then the sha256 of these rows (32 bytes)
    OUT/labels.json                 what the labels belong to, the number of complete views, and
                                    the sha256 of each of their files

A row has the ids of the k most probable classes (uint16), the most probable first, and then their
probabilities (float16): 40 bytes for k = 10. A view is the windows, flips and augmentations of one
epoch: see `sampling.View`. They are functions of seed, view and sample, so nothing of them is
stored, and a row is found by view and sample id.
"""

import hashlib
import json
import mmap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fasttrain import commands, config, files, matching
from fasttrain.digests import code_digest
from fasttrain.faults import Fault
from fasttrain.schedule import Plan
from fasttrain.shards import Split

FORMAT_VERSION = 1
INDEX = "labels.json"
PART_SAMPLES = 2**15  # images in a file; the last file of a view may have fewer
KEPT_VIEWS = 2  # whose files stay mapped: the loader reads ahead into the next one
# The settings of [data] that decide an image's pixels. The decoder may change them by a few levels.
PIXELS = (
    *("crop_px", "crop_area", "crop_ratio", "interpolation", "flip", "augment", "augment_ops"),
    *("augment_magnitude", "color_jitter", "erase"),
)
# The modules that cut, mirror and augment images.
CODE = ("augment", "pipeline", "resize", "resize_gpu", "rng", "sampling")


class LabelsError(Fault, ValueError):
    """A teacher's labels cannot be used. The message says why, and what to do."""


class Teacher(BaseModel):
    """The network that gave the labels."""

    model_config = ConfigDict(extra="forbid")

    name: str
    weights: str  # digest
    px: int | None  # side to which it resized the images; None: as they are
    precision: str


class Subject(BaseModel):
    """What the labels belong to."""

    model_config = ConfigDict(extra="forbid")

    data: str  # digest of the training split's index
    classes: list[str]
    pixels: dict[str, Any]  # PIXELS
    draw_seed: int
    code: str  # digest of CODE

    def differences(self, other: "Subject") -> list[str]:
        """Names what differs in another subject, such as `data.crop_px: 224 -> 192`."""
        found = []
        if self.data != other.data:
            found.append(f"the data set: {self.data[:12]} -> {other.data[:12]}")
        if classes := matching.differences(self.classes, other.classes):
            found.append(f"its classes differ: {classes}")
        found += [
            f"data.{key}: {json.dumps(value)} -> {json.dumps(other.pixels.get(key))}"
            for key, value in self.pixels.items()
            if value != other.pixels.get(key)
        ]
        if self.draw_seed != other.draw_seed:
            found.append(f"the seed of the draws: {self.draw_seed} -> {other.draw_seed}")
        return found


class Index(BaseModel):
    """The contents of `labels.json`."""

    model_config = ConfigDict(extra="forbid")

    version: int
    subject: Subject
    teacher: Teacher
    top_k: Annotated[int, Field(ge=1)]
    num_samples: Annotated[int, Field(ge=1)]
    part_samples: Annotated[int, Field(ge=1)]
    decoder: str  # for people
    made_by: str  # version of fasttrain, for people
    sha256: list[list[str]]  # of the files of each complete view

    @property
    def row(self) -> np.dtype[Any]:
        """The dtype of a row."""
        return np.dtype([("ids", "<u2", (self.top_k,)), ("probabilities", "<f2", (self.top_k,))])

    def parts_of(self, view: int) -> list["Part"]:
        """The files of a view, in the order of their samples."""
        starts = range(0, self.num_samples, self.part_samples)
        return [
            Part(view, number, first, min(first + self.part_samples, self.num_samples))
            for number, first in enumerate(starts)
        ]


class Part(NamedTuple):
    """A file: the rows of samples [first, last) in a view."""

    view: int
    number: int
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"view-{self.view:04d}-part-{self.number:03d}.labels"

    def size(self, row: np.dtype[Any]) -> int:
        """Bytes of the file."""
        return (self.last - self.first) * row.itemsize + hashlib.sha256().digest_size


def subject_of(recipe: config.Recipe, split: Split, draw_seed: int) -> Subject:
    """What the labels of a recipe belong to."""
    data = recipe.data.model_dump(mode="json")
    return Subject(
        data=split.digest,
        classes=list(split.classes),
        pixels={key: data[key] for key in PIXELS},
        draw_seed=draw_seed,
        code=code_digest(modules=CODE),
    )


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


def write_part(root: Path, part: Part, rows: NDArray[Any]) -> None:
    """Writes a file atomically.

    Args:
        rows: `(last - first,)`, of the dtype `Index.row`.
    Raises:
        OSError: the file system refused.
    """
    data = rows.tobytes()
    files.write_bytes(root / part.name, data + hashlib.sha256(data).digest())


def sha256_of(root: Path, part: Part, row: np.dtype[Any]) -> str | None:
    """Returns the sha256 of a file's rows; None if the file is missing or damaged."""
    try:
        data = (root / part.name).read_bytes()
    except OSError:
        return None
    length = part.size(row) - hashlib.sha256().digest_size
    found = hashlib.sha256(memoryview(data)[:length])
    return found.hexdigest() if data[length:] == found.digest() else None


def write_index(root: Path, index: Index) -> None:
    """Replaces `labels.json` atomically.

    Raises:
        OSError: the file system refused.
    """
    files.write_text(root / INDEX, index.model_dump_json(indent=1) + "\n")


def read_index(root: Path) -> Index:
    """Reads `labels.json`.

    Raises:
        LabelsError: the file is missing, damaged or of another format version.
    """
    path = root / INDEX
    try:
        content = dict(json.loads(path.read_bytes()))
        version = content.get("version")
        if version == FORMAT_VERSION:
            return Index.model_validate(content)
    except OSError as error:
        raise LabelsError(
            f"{root} holds no labels of a teacher ({INDEX}: {error.strerror}); make them with "
            f"{commands.command('label')} TEACHER RECIPE {root}"
        ) from None
    except (ValueError, TypeError, ValidationError):
        raise LabelsError(f"{path} is damaged; restore it, or make the labels again") from None
    raise LabelsError(
        f"{path} has format version {version}, but this fasttrain reads {FORMAT_VERSION}; make the "
        "labels again, or install the fasttrain that made them"
    )


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


class StoredLabels:
    """The labels for the images of a run. Files are mapped when a batch needs them."""

    def __init__(self, root: Path, index: Index, num_views: int) -> None:
        """
        Args:
            num_views: the views that the run uses.
        """
        self.root, self.index = root, index
        self.row = index.row
        used = [index.subject.model_dump(), index.top_k, index.sha256[:num_views]]
        self.digest = hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()
        self.num_views = num_views
        self.mapped: dict[int, list[NDArray[Any]]] = {}
        self.lock = threading.Lock()  # a run has one loader, but a tool may have more

    @property
    def about(self) -> str:
        """One line for people."""
        index = self.index
        return (
            f"the {index.top_k} most probable classes of {index.teacher.name}, from {self.root}; "
            f"{self.num_views} views of {index.num_samples:,} images"
        )

    def take(self, view: int, ids: NDArray[np.int64]) -> NDArray[np.int16]:
        """Returns the labels of samples `ids` `(B,)` in a view.

        Returns:
            `(B, 2, k)`: the bits of the class ids (uint16) and of their probabilities (float16).
        Raises:
            LabelsError: a file is missing or was changed.
        """
        parts = self._parts(view)
        rows = np.empty(len(ids), self.row)
        part, place = np.divmod(ids, self.index.part_samples)
        for number in np.unique(part):
            chosen = part == number
            rows[chosen] = parts[number][place[chosen]]
        return rows.view("<i2").reshape(len(ids), 2, self.index.top_k)

    def check(self, threads: int) -> None:
        """Compares the sha256 of all files that the run uses.

        Args:
            threads: the number of files that are read at a time.
        Raises:
            LabelsError: a file is missing or damaged.
        """
        wanted = {
            part: sha256
            for view in range(self.num_views)
            for part, sha256 in zip(self.index.parts_of(view), self.index.sha256[view], strict=True)
        }
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(lambda part: sha256_of(self.root, part, self.row), wanted)
            for part, sha256 in zip(wanted, found, strict=True):
                if sha256 != wanted[part]:
                    raise self._damaged(part)

    def check_sizes(self) -> None:
        """Checks that all files that the run uses are there and have the right size.

        Raises:
            LabelsError: a file is missing or has another size.
        """
        for view in range(self.num_views):
            for part in self.index.parts_of(view):
                self._check_size(part)

    def _parts(self, view: int) -> list[NDArray[Any]]:
        """The rows of each file of a view, mapped."""
        with self.lock:
            if view not in self.mapped:
                while len(self.mapped) >= KEPT_VIEWS:
                    del self.mapped[next(iter(self.mapped))]
                self.mapped[view] = [self._map(part) for part in self.index.parts_of(view)]
            return self.mapped[view]

    def _map(self, part: Part) -> NDArray[Any]:
        self._check_size(part)  # reading beyond the end of a mapped file would kill the process
        with (self.root / part.name).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Rows are read in random order, and all of them are read within the epoch.
        mapped.madvise(mmap.MADV_WILLNEED)
        return np.frombuffer(mapped, self.row, part.last - part.first)

    def _check_size(self, part: Part) -> None:
        try:
            size = (self.root / part.name).stat().st_size
        except OSError:
            size = -1
        if size != part.size(self.row):
            raise self._damaged(part)

    def _damaged(self, part: Part) -> LabelsError:
        return LabelsError(
            f"{self.root / part.name} is missing or damaged; restore it from a copy, or remove it "
            f"and run {commands.command('label')} with the options of then again, which makes only "
            "what is missing"
        )


def open_for(recipe: config.Recipe, plan: Plan, split: Split, check: bool) -> StoredLabels | None:
    """Opens the labels that a recipe names.

    Args:
        check: compare the checksum of every file. One process per node should do this.
    Returns:
        The labels; None if the recipe names none.
    Raises:
        LabelsError: the labels are missing, unfinished or damaged, or they belong to other images.
    """
    root = recipe.distill.labels
    if root is None:
        return None
    index = read_index(root)
    wanted = subject_of(recipe, split, plan.draw_seed)
    if differs := index.subject.differences(wanted):
        raise LabelsError(
            "\n  ".join([f"{root} holds labels of other images:", *differs])
            + "\nuse the old values, or make labels for the new ones in another folder: "
            + f"{commands.command('label')} TEACHER RECIPE NEW_FOLDER"
        )
    if index.subject.code != wanted.code and not recipe.distill.other_code:
        raise LabelsError(
            f"{root} holds labels of images that another code has made: fasttrain {index.made_by} "
            f"with the code {index.subject.code} of crops, flips and augmentations; here it is "
            f"{wanted.code}\ninstall that version, or make the labels again; if you know that the "
            "images are the same: --set distill.other_code=true"
        )
    needed, found = plan.num_views, len(index.sha256)
    if found < needed:
        of = "distill.views" if plan.views else "one for each epoch"
        raise LabelsError(
            f"{root} has the labels of {found} views, but this run needs {needed} ({of}): run "
            f"{commands.command('label')} again, which adds what is missing, or lower that number"
        )
    stored = StoredLabels(root, index, needed)
    stored.check_sizes()
    if check:
        stored.check(recipe.data.read_threads)
    return stored
