"""The forms in which users hold labelled images: recognised by looking, listed without extraction.

Every form ends in the same listing: images named `class/file` in sorted order, with their label and
the place of their bytes. So the same photographs give the same shards, whatever form they came in.
A class's label is its position among the sorted class names (of ImageNet: the WordNet ids).

Nothing from a source is executed, unpickled or extracted, and no name in it becomes a path.
"""

import csv
import io
import itertools
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain import parquet, spool
from fasttrain.shards import SPLITS, ShardError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
IMAGENET_COUNTS = {"classes": 1000, "train": 1_281_167, "val": 50_000}
MD5 = {  # of the official archives, as torchvision's ImageNet checks them
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
    "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
}
MAX_IMAGE_BYTES = 1 << 30  # of one member; ImageNet's largest image has 16 MB
_WNID = re.compile(r"n\d{8}")
_DOUBLED = re.compile(r"_n\d{8}$")  # Hugging Face appends the class to the name
_VAL_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")
_DEVKIT = "ILSVRC2012_devkit_t12"
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


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


@dataclass(slots=True)
class Source:
    """A source, listed and checked."""

    form: str
    classes: tuple[str, ...]
    splits: dict[str, Listing]
    ignored: int  # files and members that are no images by name or kind


@dataclass(slots=True)
class _Scan:
    """What a form's scanner gathers, and what it may use."""

    spool: Path = Path()  # folder for what must be unpacked first
    run: Callable[[Sequence[Callable[[], Any]]], Iterable[Any]] = list  # tasks, in parallel
    say: Callable[[str], None] = lambda text: None
    splits: dict[str, list[Found]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    ignored: int = 0
    classes: Iterable[str] | None = None  # where the form names them; else those of train


# --------------------------------------------------------------------------------------------------
# Archives
# --------------------------------------------------------------------------------------------------


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


def _members(path: Path, scan: _Scan, start: int = 0, size: int | None = None) -> Iterator[Member]:
    """The plain files of an uncompressed tar, or of one that lies within a file.

    Links, devices and folders are counted as ignored; their names lead nowhere.
    """
    try:
        with path.open("rb") as file:
            whole = path.stat().st_size
            window = _Window(file, start, whole - start if size is None else size)
            with tarfile.open(fileobj=window, mode="r:") as tar:
                for member in tar:
                    # tarfile keeps every header, which is a gigabyte for ImageNet.
                    tar.members = []  # type: ignore[attr-defined]
                    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                        scan.ignored += not member.isdir()
                        continue
                    if member.offset_data + member.size > window.size:
                        raise tarfile.ReadError(f"{member.name!r} reaches past its end")
                    yield Member(member.name, start + member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(
            f"{path} is damaged: {error}; compare its MD5 with the published one and load it anew"
        ) from None


def _is_image(name: str) -> bool:
    path = Path(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


# --------------------------------------------------------------------------------------------------
# ImageNet's own label files
# --------------------------------------------------------------------------------------------------


def _devkit_labels(root: Path) -> Callable[[str], str] | None:
    """Class of a validation image by its name, from the devkit beside it, packed or unpacked."""
    folder, packed = root / _DEVKIT, root / f"{_DEVKIT}.tar.gz"
    names = ("meta.mat", _GROUND_TRUTH)
    if (folder / "data").is_dir():
        files = {name: (folder / "data" / name).read_bytes() for name in names}
    elif packed.exists():
        try:
            with tarfile.open(packed, "r:gz") as tar:
                files = {
                    name: tar.extractfile(f"{_DEVKIT}/data/{name}").read()  # type: ignore[union-attr]
                    for name in names
                }
        except (tarfile.TarError, KeyError, AttributeError, EOFError, OSError) as error:
            raise ShardError(f"{packed} is damaged: {error}; load it anew") from None
    else:
        return None
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ShardError(
            "the devkit's meta.mat is read with scipy: pip install -e '.[sources]'"
        ) from None
    # The devkit numbers the classes in an order of its own, and inner nodes of the hierarchy too.
    synsets = np.atleast_1d(loadmat(io.BytesIO(files["meta.mat"]), squeeze_me=True)["synsets"])
    wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if s["num_children"] == 0}
    truth = [wnids[int(line)] for line in files[_GROUND_TRUTH].split()]

    def label_of(name: str) -> str:
        match = _VAL_NUMBER.match(name)
        number = int(match[1]) if match else 0
        if not 1 <= number <= len(truth):
            raise ShardError(f"val/{name}: the devkit has labels for images 1 to {len(truth):,}")
        return truth[number - 1]

    return label_of


def _kaggle_labels(root: Path) -> Callable[[str], str] | None:
    """Class of a validation image by its name, from Kaggle's LOC_val_solution.csv."""
    path = root / "LOC_val_solution.csv"
    if not path.exists():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
            raise ShardError(f"{path}: expected the columns ImageId and PredictionString")
        wnids = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}

    def label_of(name: str) -> str:
        try:
            return wnids[Path(name).stem]
        except KeyError:
            raise ShardError(f"val/{name}: {path} has no row for it") from None

    return label_of


# --------------------------------------------------------------------------------------------------
# Forms
# --------------------------------------------------------------------------------------------------


def _scan_folder(root: Path, scan: _Scan, label_roots: Iterable[Path]) -> None:
    """train/<class>/*, and val/ likewise or flat beside labels in one of `label_roots`."""
    for split in SPLITS:
        if not (root / split).is_dir():
            raise ShardError(
                f"{root}: there is no folder {split}/; expected train/<class>/ and val/<class>/"
            )
        for entry in _visible(root / split):
            if entry.is_dir():
                before = len(scan.splits[split])
                for path in entry.rglob("*"):
                    if not path.is_file():
                        continue
                    if _is_image(path.name):
                        name = path.relative_to(entry).as_posix()
                        scan.splits[split].append(_file(entry, entry.name, name))
                    else:
                        scan.ignored += 1
                if split == "train" and len(scan.splits[split]) == before:
                    raise ShardError(f"{entry} holds no images; remove the class or fill it")
    flat = [path for path in _visible(root / "val") if path.is_file() and _is_image(path.name)]
    scan.ignored += sum(p.is_file() for s in SPLITS for p in _visible(root / s)) - len(flat)
    if flat:
        readers = (reader(place) for place in label_roots for reader in _LABEL_READERS)
        label_of = next((reader for reader in readers if reader), None)
        if label_of is None:
            raise ShardError(
                f"{flat[0]} lies outside any class folder: sort val/ into classes, or put "
                f"{_DEVKIT}.tar.gz or Kaggle's LOC_val_solution.csv beside it"
            )
        scan.splits["val"] += [_file(root / "val", label_of(p.name), p.name) for p in flat]


def _file(folder: Path, label: str, name: str) -> Found:
    """An image that is a file of its own, `name` below `folder`."""
    found = (folder / name).stat()
    return Found(folder, -1, found.st_size, label, name, found.st_mtime_ns)


_LABEL_READERS = (_devkit_labels, _kaggle_labels)


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _scan_imagefolder(root: Path, scan: _Scan) -> None:
    _scan_folder(root, scan, (root, *root.absolute().parents[:3]))  # CLS-LOC lies three deep


def _kaggle_images(root: Path) -> Path:
    return root / "ILSVRC" / "Data" / "CLS-LOC"


def _scan_kaggle(root: Path, scan: _Scan) -> None:
    _scan_folder(_kaggle_images(root), scan, (root,))


def _scan_official(root: Path, scan: _Scan) -> None:
    for needed in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        if not (root / needed).exists():
            raise ShardError(f"{root / needed} is missing: both archives are needed")
    label_of = _devkit_labels(root)
    if label_of is None:
        raise ShardError(
            f"{root / _DEVKIT}.tar.gz is missing: it holds the labels of the validation images"
        )
    train, val = root / "ILSVRC2012_img_train.tar", root / "ILSVRC2012_img_val.tar"
    for inner in _members(train, scan):
        wnid = Path(inner.name).stem
        if not (inner.name.endswith(".tar") and _WNID.fullmatch(wnid)):
            scan.ignored += 1
            continue
        for member in _images(train, scan, inner.offset, inner.size):
            scan.splits["train"].append(
                Found(train, member.offset, member.size, wnid, Path(member.name).name)
            )
    for member in _images(val, scan):
        name = Path(member.name).name
        scan.splits["val"].append(Found(val, member.offset, member.size, label_of(name), name))


def _images(path: Path, scan: _Scan, start: int = 0, size: int | None = None) -> Iterator[Member]:
    for member in _members(path, scan, start, size):
        if _is_image(member.name):
            if member.size > MAX_IMAGE_BYTES:
                raise ShardError(f"{path}: {member.name!r} has a gigabyte or more: no photograph")
            yield member
        else:
            scan.ignored += 1


def _wds_split(path: Path) -> str | None:
    name = path.name.lower()
    for split, words in (("train", ("train",)), ("val", ("validation", "val", "test"))):
        if any(word in name for word in words):
            return split
    return None


class WdsSample(NamedTuple):
    """An image of a WebDataset tar and its label, both members that follow each other."""

    image: Member
    label: Member


def wds_samples(path: Path) -> Iterator[WdsSample]:
    """The samples of a WebDataset tar: members of one key, which ends at the first dot.

    Raises:
        ShardError: the tar is damaged, or an image has no .cls or the other way round.
    """

    def key_of(member: Member) -> str:
        folder, _, base = member.name.rpartition("/")
        return f"{folder}/{base.partition('.')[0]}"

    for key, group in itertools.groupby(_members(path, _Scan()), key_of):
        members = list(group)
        images = [m for m in members if _is_image(m.name)]
        labels = [m for m in members if m.name.endswith(".cls")]
        if len(images) == len(labels) == 1:
            yield WdsSample(images[0], labels[0])
        elif images or labels:
            raise ShardError(
                f"{path}: sample {key.lstrip('/')} has {len(images)} images and {len(labels)} .cls"
            )


def _scan_webdataset(root: Path, scan: _Scan) -> None:
    """Tars of <key>.jpg and <key>.cls; a key that names a WordNet id names its class."""
    numbered: dict[str, list[tuple[Found, int]]] = {split: [] for split in SPLITS}
    wnids: dict[int, str] = {}
    for path in sorted(root.glob("*.tar")):
        split = _wds_split(path)
        if split is None:
            raise ShardError(f"{path}: expected train or val in the name of a tar")
        with path.open("rb") as file:
            for image, member in wds_samples(path):
                file.seek(member.offset)
                text = file.read(min(member.size, 32))
                try:
                    label = int(text)
                except ValueError:
                    message = f"{path}: {member.name} holds {text!r}, no number"
                    raise ShardError(message) from None
                name = f"{Path(image.name).name.partition('.')[0]}.JPEG"
                found = Found(path, image.offset, image.size, "", name)
                numbered[split].append((found, label))
                if wnid := _WNID.match(name):
                    wnids.setdefault(label, wnid[0])
    _name_classes(scan, numbered, wnids)


def _name_classes(
    scan: _Scan, numbered: Mapping[str, list[tuple[Found, int]]], wnids: Mapping[int, str]
) -> None:
    """Turns labels that are numbers into class names: WordNet ids where those are known."""
    labels = sorted({label for found in numbered.values() for _, label in found})
    if any(label < 0 for label in labels):
        raise ShardError(f"label {labels[0]}: images without a label cannot be trained on")
    known = [wnids.get(label) for label in labels]
    # Only if they sort as the labels do: otherwise the numbers mean something else.
    if None in known or known != sorted(set(known), key=str):
        names = {label: f"{label:06d}" for label in labels}
    else:
        names = {label: str(wnid) for label, wnid in zip(labels, known, strict=True)}
    for split, found in numbered.items():
        scan.splits[split] += [item._replace(label=names[label]) for item, label in found]
    scan.classes = names.values()


# --------------------------------------------------------------------------------------------------
# Forms that cannot be read at random: unpacked first
# --------------------------------------------------------------------------------------------------


def _unpack_all(
    jobs: Sequence[spool.Job], read: spool.Read, scan: _Scan
) -> dict[str, list[tuple[Found, Any]]]:
    """Unpacks every file of a source, in parallel, and lists what came out: images and labels."""
    size = sum(job.path.stat().st_size for job in jobs)
    scan.say(
        f"unpacking {len(jobs)} files ({size / 1e9:.1f} GB) to {scan.spool}, as they cannot be "
        "read at random; removed at the end"
    )
    spool.unpack(jobs, read, scan.spool, scan.run)
    splits: dict[str, list[tuple[Found, Any]]] = {split: [] for split in SPLITS}
    for job in jobs:
        for place, offset, size, name, label in spool.unpacked(job, scan.spool):
            splits[job.split].append((Found(place, offset, size, "", _undoubled(name)), label))
    return splits


def _need_both_splits(root: Path, jobs: Sequence[spool.Job]) -> None:
    """Checks that no split is missing, before hours are spent on unpacking the other one."""
    for split in SPLITS:
        if not any(job.split == split for job in jobs):
            raise ShardError(
                f"{root}: there are no files of {split}, only {jobs[0].name} and the like; "
                f"load those of {split} too"
            )


def _scan_parquet(root: Path, scan: _Scan) -> None:
    """Hugging Face: columns image{bytes, path} and label, which is a number."""
    jobs, others = parquet.files(root)
    scan.ignored += others
    _need_both_splits(root, jobs)
    numbered = _unpack_all(jobs, parquet.read, scan)
    wnids: dict[int, str] = {}
    for found, label in numbered["train"]:
        if wnid := _WNID.match(found.name):
            wnids.setdefault(label, wnid[0])
    _name_classes(scan, numbered, wnids)


def _read_tar_gz(job: spool.Job) -> Iterator[tuple[str, str, bytes]]:
    path = job.path
    with tarfile.open(path, "r|gz") as tar:
        for member in tar:
            if not (member.isreg() and _is_image(member.name)):
                continue
            doubled = re.search(r"_(n\d{8})\.\w+$", member.name)
            if doubled is None or member.size > MAX_IMAGE_BYTES:
                raise ShardError(
                    f"{path}: {member.name!r}: expected a class at the end of its name"
                )
            file = tar.extractfile(member)
            assert file is not None
            yield Path(member.name).name, doubled[1], file.read()


def _scan_hf_tar(root: Path, scan: _Scan) -> None:
    """Hugging Face's older form: train_images_*.tar.gz and val_images.tar.gz."""
    folder = root if [*root.glob("train_images*.tar.gz")] else root / "data"
    jobs = [
        spool.Job(folder, path.name, split)
        for split in SPLITS
        for path in sorted(folder.glob(f"{split}_images*.tar.gz"))
    ]
    scan.ignored += len([*folder.glob("test_images*.tar.gz")])
    _need_both_splits(root, jobs)
    for split, found in _unpack_all(jobs, _read_tar_gz, scan).items():
        scan.splits[split] += [item._replace(label=label) for item, label in found]


def _undoubled(name: str) -> str:
    """n01440764_10026_n01440764.JPEG -> n01440764_10026.JPEG, ImageNet's own name."""
    path = Path(name)
    return _DOUBLED.sub("", path.stem) + path.suffix


# --------------------------------------------------------------------------------------------------
# All forms
# --------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """A form of source: what a person calls it, what gives it away, and who lists it."""

    description: str
    sign: str
    is_at: Callable[[Path], bool]
    scan: Callable[[Path, _Scan], None]


FORMS = {
    "official": Form(
        "the official archives",
        "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz",
        lambda root: any((root / f"ILSVRC2012_img_{split}.tar").exists() for split in SPLITS),
        _scan_official,
    ),
    "kaggle": Form(
        "Kaggle's download",
        "ILSVRC/Data/CLS-LOC/ and LOC_val_solution.csv",
        lambda root: _kaggle_images(root).is_dir(),
        _scan_kaggle,
    ),
    "parquet": Form(
        "Hugging Face parquet files",
        "train-*.parquet and validation-*.parquet, here or in data/",
        lambda root: any(root.glob("*.parquet")) or any(root.glob("data/*.parquet")),
        _scan_parquet,
    ),
    "hf-tar": Form(
        "Hugging Face archives",
        "train_images_*.tar.gz and val_images.tar.gz, here or in data/",
        lambda root: any(root.glob("train_images*.gz")) or any(root.glob("data/train_images*.gz")),
        _scan_hf_tar,
    ),
    "webdataset": Form(
        "WebDataset tars",
        "*train*.tar and *val*.tar with <key>.jpg and <key>.cls",
        lambda root: any(root.glob("*.tar")),
        _scan_webdataset,
    ),
    "imagefolder": Form(
        "an ImageFolder",
        "train/<class>/ and val/<class>/, or val/ flat beside the devkit or LOC_val_solution.csv",
        lambda root: (root / "train").is_dir(),
        _scan_imagefolder,
    ),
}


def recognise(root: Path) -> str:
    """The name of the form that lies at `root`.

    Raises:
        ShardError: none does; lists them all with what is missing.
    """
    for name, form in FORMS.items():
        if form.is_at(root):
            return name
    missing = "\n".join(f"  {name}: {f.description}: {f.sign}" for name, f in FORMS.items())
    what = "holds none of the forms that are recognised" if root.is_dir() else "is not a folder"
    raise ShardError(f"{root} {what}:\n{missing}")


def scan(
    root: Path,
    form: str,
    spool: Path,
    run: Callable[[Sequence[Callable[[], Any]]], Iterable[Any]],
    say: Callable[[str], None],
) -> Source:
    """Lists the images of a source.

    Args:
        form: a key of `FORMS`.
        spool: folder for what must be unpacked before it can be read at random.
        run: runs tasks in parallel and gives their results.
        say: told what a person may want to know.
    Raises:
        ShardError: a split, a class or the labels are missing, or an archive is damaged.
    """
    if not root.is_dir():
        raise ShardError(f"{root} is not a folder")
    found = _Scan(spool, run, say)
    FORMS[form].scan(root, found)
    classes = tuple(sorted(set(found.classes or (item.label for item in found.splits["train"]))))
    labels = {name: label for label, name in enumerate(classes)}
    for split, images in found.splits.items():
        if not images:
            raise ShardError(f"{root}: no images of {split} were found")
        unknown = {item.label for item in images} - labels.keys()
        if unknown:
            raise ShardError(
                f"{root}: {split} holds images of {min(unknown)}, a class that train does not have"
            )
    splits = {split: _listing(images, labels) for split, images in found.splits.items()}
    return Source(form, classes, splits, found.ignored)


def _listing(images: list[Found], labels: Mapping[str, int]) -> Listing:
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


def imagenet_faults(source: Source) -> list[str]:
    """How a source that is ImageNet-1k differs from the whole of it; of others, nothing.

    Official and Kaggle's archives are ImageNet, and so is whatever has at least 500 classes that
    are called by WordNet ids.
    """
    wnids = sum(bool(_WNID.fullmatch(name)) for name in source.classes)
    if source.form not in ("official", "kaggle", "hf-tar") and wnids < 500:
        return []
    counts = {"classes": len(source.classes)}
    counts |= {split: len(listing) for split, listing in source.splits.items()}
    return [
        f"{name}: {counts[name]:,} instead of {expected:,}"
        for name, expected in IMAGENET_COUNTS.items()
        if counts[name] != expected
    ]
