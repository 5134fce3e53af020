"""ImageNet's own files: the official archives, and the files that label validation images."""

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
MD5 = {  # of the official archives, as torchvision's ImageNet checks them
    TRAIN_TAR: "1d675b47d978889d74fa0da5fadfb00e",
    VAL_TAR: "29b22e2961454d5413ddabcf34fc5622",
    "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
}
WNID = re.compile(r"n\d{8}")  # a class's WordNet id
_DOUBLED = re.compile(r"_(n\d{8})$")  # Hugging Face appends the class to the name
_VAL_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")
_DEVKIT = "ILSVRC2012_devkit_t12"
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_TINY_LABELS = "val_annotations.txt"

LabelOf = Callable[[str], str]  # class of an image by its file name


# --------------------------------------------------------------------------------------------------
# Labels of validation images
# --------------------------------------------------------------------------------------------------


def devkit_labels(root: Path) -> LabelOf | None:
    """Classes from the devkit in `root`, packed or unpacked."""
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


def kaggle_labels(root: Path) -> LabelOf | None:
    """Classes from Kaggle's LOC_val_solution.csv in `root`."""
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
    """Classes from Tiny ImageNet's val_annotations.txt in `root`: name, class and box, by tabs."""
    path = root / _TINY_LABELS
    if not path.exists():
        return None
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]
    short = next((number for number, row in enumerate(rows, 1) if len(row) < 2), None)
    if short:
        raise ShardError(f"{path}, line {short}: expected an image and its class, with a tab")
    return _by_table({row[0]: row[1] for row in rows}, path)


def _by_table(classes: dict[str, str], path: Path) -> LabelOf:
    # The ends of names differ between copies: .JPEG, .jpg, .png.
    by_stem = {Path(name).stem: label for name, label in classes.items()}

    def label_of(name: str) -> str:
        try:
            return by_stem[Path(name).stem]
        except KeyError:
            raise ShardError(f"val/{name}: {path} has no row for it") from None

    return label_of


def named_label(name: str) -> str | None:
    """The class in an image's own name: n01440764_10026.JPEG, or x_n01440764.JPEG."""
    stem = Path(name).stem
    found = _DOUBLED.search(stem)
    if found:
        return found[1]
    wnid = WNID.match(stem)
    return wnid[0] if wnid else None


def undoubled(name: str) -> str:
    """n01440764_10026_n01440764.JPEG -> n01440764_10026.JPEG, ImageNet's own name."""
    path = Path(name)
    return _DOUBLED.sub("", path.stem) + path.suffix


# --------------------------------------------------------------------------------------------------
# Archives
# --------------------------------------------------------------------------------------------------


def is_official(root: Path) -> bool:
    """Whether one of the official archives lies in `root`."""
    return (root / TRAIN_TAR).exists() or (root / VAL_TAR).exists()


def is_class_tar(path: Path) -> bool:
    """Whether a file is named like one of the 1,000 tars in the official archive of train."""
    return path.suffix == ".tar" and bool(WNID.fullmatch(path.stem))


def class_tar(path: Path, scan: Scan) -> Iterator[Found]:
    """The images of the tar of one class, n01440764.tar."""
    for member in images(path, scan):
        name = Path(member.name).name
        yield Found(path, member.offset, member.size, path.stem, name)


def train_tar(path: Path, scan: Scan) -> Iterator[Found]:
    """The images of the official archive of train: a tar of the classes' tars."""
    for inner in members(path, scan):
        wnid = Path(inner.name).stem
        if not (inner.name.endswith(".tar") and WNID.fullmatch(wnid)):
            scan.skip("no tar of a class")
            continue
        for member in images(path, scan, inner.offset, inner.size):
            yield Found(path, member.offset, member.size, wnid, Path(member.name).name)


def val_tar(path: Path, scan: Scan) -> Iterator[Found]:
    """The images of the official archive of val, labelled by a file beside it."""
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
    """Both official archives, or the one that is wanted."""
    archives = {"train": (root / TRAIN_TAR, train_tar), "val": (root / VAL_TAR, val_tar)}
    for split in scan.wanted:
        path, read = archives[split]
        if not path.exists():
            raise ShardError(
                f"{path} is missing: both archives are needed, or a folder {split}/ of what was in "
                "it" + ("" if split == "train" else "; --val-fraction 0.05 draws val from train")
            )
    for split in scan.wanted:
        path, read = archives[split]
        scan.splits[split] += read(path, scan)


# --------------------------------------------------------------------------------------------------
# Completeness
# --------------------------------------------------------------------------------------------------


def faults(source: Source) -> list[str]:
    """How a source that is ImageNet-1k differs from the whole of it; of others, nothing.

    Official and Kaggle's archives are ImageNet, and so is whatever has at least 500 classes that
    are called by WordNet ids. Without a split to train on, only the former are looked at:
    ImageNet-V2 has the same classes and fewer images.
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
