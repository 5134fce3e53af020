"""Reads ImageNet's own files: the official archives and the labels of the validation images."""

import csv
import io
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fasttrain.archives import images, members
from fasttrain.listing import Found, Scan, Source
from fasttrain.shards import ShardError

COUNTS = {"classes": 1000, "train": 1_281_167, "val": 50_000}
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
MD5 = {  # of the official archives; torchvision's ImageNet checks the same sums
    TRAIN_TAR: "1d675b47d978889d74fa0da5fadfb00e",
    VAL_TAR: "29b22e2961454d5413ddabcf34fc5622",
    "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
}
WNID = re.compile(r"n\d{8}")  # the WordNet id of a class
_DOUBLED = re.compile(r"_(n\d{8})$")  # the class, which Hugging Face appends to the file name
_VAL_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")
_DEVKIT = "ILSVRC2012_devkit_t12"
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
TINY_LABELS = "val_annotations.txt"

LabelOf = Callable[[str], str]  # file name of an image -> its class


# --------------------------------------------------------------------------------------------------
# Labels of validation images
# --------------------------------------------------------------------------------------------------


def devkit_labels(root: Path) -> LabelOf | None:
    """Reads the classes from the devkit in `root`, packed or unpacked; None if there is no devkit.

    Raises:
        ShardError: the devkit is damaged, or scipy is missing.
    """
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
            raise ShardError(f"{packed} is damaged: {error}; download it again") from None
    else:
        return None
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ShardError(
            "scipy reads the devkit's meta.mat, but is missing: pip install -e '.[sources]'"
        ) from None
    # The devkit has its own order of classes, and also numbers inner nodes of the hierarchy.
    synsets = np.atleast_1d(loadmat(io.BytesIO(files["meta.mat"]), squeeze_me=True)["synsets"])
    wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if s["num_children"] == 0}
    truth = [wnids[int(line)] for line in files[_GROUND_TRUTH].split()]

    def label_of(name: str) -> str:
        match = _VAL_NUMBER.match(name)
        number = int(match[1]) if match else 0
        if not 1 <= number <= len(truth):
            raise ShardError(
                f"val/{name}: the devkit has labels for images 1 to {len(truth):,} only"
            )
        return truth[number - 1]

    return label_of


def kaggle_labels(root: Path) -> LabelOf | None:
    """Reads the classes from Kaggle's LOC_val_solution.csv in `root`; None if it is not there.

    Raises:
        ShardError: a column is missing.
    """
    path = root / "LOC_val_solution.csv"
    if not path.exists():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
            raise ShardError(f"{path}: expected the columns ImageId and PredictionString")
        wnids = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    return _by_table({f"{image}.JPEG": wnid for image, wnid in wnids.items()}, path)


def tiny_labels(root: Path) -> LabelOf | None:
    """Reads the classes from Tiny ImageNet's val_annotations.txt in `root`; None without the file.

    Each line holds a file name, a class and a box, separated by tabs.

    Raises:
        ShardError: a line has no class.
    """
    path = root / TINY_LABELS
    if not path.exists():
        return None
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]
    short = next((number for number, row in enumerate(rows, 1) if len(row) < 2), None)
    if short:
        raise ShardError(f"{path}, line {short}: expected an image, a tab and its class")
    return _by_table({row[0]: row[1] for row in rows}, path)


def _by_table(classes: dict[str, str], path: Path) -> LabelOf:
    # Copies differ in their suffixes: .JPEG, .jpg, .png.
    by_stem = {Path(name).stem: label for name, label in classes.items()}

    def label_of(name: str) -> str:
        try:
            return by_stem[Path(name).stem]
        except KeyError:
            raise ShardError(f"val/{name}: {path} has no row for it") from None

    return label_of


def named_label(name: str) -> str | None:
    """Returns the class in an image's name, as in n01440764_10026.JPEG or x_n01440764.JPEG."""
    stem = Path(name).stem
    found = _DOUBLED.search(stem)
    if found:
        return found[1]
    wnid = WNID.match(stem)
    return wnid[0] if wnid else None


def undoubled(name: str) -> str:
    """Restores ImageNet's name: n01440764_10026_n01440764.JPEG -> n01440764_10026.JPEG."""
    path = Path(name)
    return _DOUBLED.sub("", path.stem) + path.suffix


# --------------------------------------------------------------------------------------------------
# Archives
# --------------------------------------------------------------------------------------------------


def is_official(root: Path) -> bool:
    """Returns whether `root` holds one of the official archives."""
    return (root / TRAIN_TAR).exists() or (root / VAL_TAR).exists()


def is_class_tar(path: Path) -> bool:
    """Returns whether a file is named like one of the 1,000 tars in the official train archive."""
    return path.suffix.lower() == ".tar" and bool(WNID.fullmatch(path.stem))


def class_tar(path: Path, scan: Scan) -> Iterator[Found]:
    """Yields the images of the tar of one class, such as n01440764.tar."""
    for member in images(path, scan):
        name = Path(member.name).name
        yield Found(path, member.offset, member.size, path.stem, name)


def train_tar(path: Path, scan: Scan) -> Iterator[Found]:
    """Yields the images of the official train archive, a tar that holds one tar per class."""
    for inner in members(path, scan):
        wnid = Path(inner.name).stem
        if not (inner.name.endswith(".tar") and WNID.fullmatch(wnid)):
            scan.skip("not the tar of a class")
            continue
        for member in images(path, scan, inner.offset, inner.size):
            yield Found(path, member.offset, member.size, wnid, Path(member.name).name)


def val_tar(path: Path, scan: Scan) -> Iterator[Found]:
    """Yields the images of the official val archive. A file beside it gives their labels.

    Raises:
        ShardError: the file with the labels is missing or damaged.
    """
    label_of = devkit_labels(path.parent) or kaggle_labels(path.parent)
    if label_of is None:
        raise ShardError(
            f"{path.parent / _DEVKIT}.tar.gz is missing: it holds the labels of the validation "
            "images (Kaggle's LOC_val_solution.csv does too)"
        )
    for member in images(path, scan):
        name = Path(member.name).name
        yield Found(path, member.offset, member.size, label_of(name), name)


def scan_official(root: Path, scan: Scan) -> None:
    """Lists the official archives of the wanted splits."""
    archives = {"train": (root / TRAIN_TAR, train_tar), "val": (root / VAL_TAR, val_tar)}
    for split in scan.wanted:
        path, read = archives[split]
        if not path.exists():
            raise ShardError(
                f"{path} is missing: add it, or a folder {split}/ of its contents"
                + ("" if split == "train" else "; --val-fraction 0.05 draws val from train")
            )
    for split in scan.wanted:
        path, read = archives[split]
        scan.splits[split] += read(path, scan)


# --------------------------------------------------------------------------------------------------
# Completeness
# --------------------------------------------------------------------------------------------------


def faults(source: Source) -> list[str]:
    """Says what a source of ImageNet-1k lacks. Returns nothing for other sources.

    The official archives, Kaggle's and Hugging Face's are ImageNet by their form. Any other source
    counts as ImageNet if it has a train split and at least 500 classes with WordNet ids. A source
    of val alone does not: ImageNet-V2 has the same classes and fewer images.
    """
    wnids = sum(bool(WNID.fullmatch(name)) for name in source.classes)
    is_whole = wnids >= 500 and "train" in source.splits
    if source.form not in ("official", "kaggle", "hf-tar") and not is_whole:
        return []
    counts = {"classes": len(source.classes)}
    counts |= {split: len(listing) for split, listing in source.splits.items()}
    return [
        f"{name}: {counts[name]:,} instead of {expected:,}"
        for name, expected in COUNTS.items()
        if name in counts and counts[name] != expected
    ]
