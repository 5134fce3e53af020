"""Folders of images: train/<class>/ and val/<class>/, and the ways in which people's differ.

A split may be a folder of classes, a folder of the classes' tars, a flat folder with labels beside
it, or the official archive. Where there are classes and no splits, a share of them becomes val.
"""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from fasttrain import imagenet
from fasttrain.imagenet import LabelOf
from fasttrain.listing import (
    Found,
    Scan,
    entries,
    image_file,
    images_below,
    is_clutter,
    is_image,
    kind_of,
)
from fasttrain.shards import ShardError
from fasttrain.splits import SPLIT_OF, settle_test, words

_LOOKED_AT = 100  # entries of a folder, to see what it holds


# --------------------------------------------------------------------------------------------------
# What lies where
# --------------------------------------------------------------------------------------------------


def children(folder: Path) -> list[Path]:
    """The folders in `folder` that may be splits or classes."""
    found = [path for path in folder.iterdir() if not is_clutter(path.name) and path.is_dir()]
    return sorted(found)


def split_folders(root: Path) -> dict[str, list[Path]]:
    """The folders in `root` that are splits by their names, by split.

    Names are whole words such as `train`, in any case. Where no folder has such a name, names that
    hold one such word are taken too (`training_set`), if train is there and no class beside it.
    """
    folders = children(root) if root.is_dir() else []
    exact = {path: path.name.lower() for path in folders if path.name.lower() in SPLIT_OF}
    if exact and len(exact) < len(folders) and all(map(_is_class, exact)):
        return {}  # bus/, car/ and train/ are three classes
    if not exact:
        inside = {path: min(named) for path in folders if len(named := words(path.name)) == 1}
        others = [path for path in folders if path not in inside]
        has_both = {"train"} < {SPLIT_OF[word] for word in inside.values()}
        if has_both and not any(map(_is_class, others)) and not all(map(_is_class, inside)):
            exact = inside
    found: dict[str, list[Path]] = {}
    for path, word in exact.items():
        found.setdefault(SPLIT_OF[word], []).append(path)
    return found


def _is_class(folder: Path) -> bool:
    """Whether a folder holds images and nothing else, and their names give no class."""
    looked_at = [path for path in islice(folder.iterdir(), _LOOKED_AT) if path.is_file()]
    images = [path for path in looked_at if is_image(path.name)]
    unnamed = [path for path in images if imagenet.named_label(path.name) is None]
    return bool(unnamed) and not children(folder) and not imagenet.tiny_labels(folder)


def holds_classes(folder: Path) -> bool:
    """Whether the folders in `folder` hold images, or it holds tars that are named like classes."""
    looked_at = list(islice(folder.iterdir(), _LOOKED_AT)) if folder.is_dir() else []
    if any(imagenet.is_class_tar(path) for path in looked_at):
        return True
    places = [path for path in looked_at if not is_clutter(path.name) and path.is_dir()]
    places += [place / "images" for place in places if (place / "images").is_dir()]
    return any(
        path.is_symlink() or (is_image(path.name) and path.is_file())
        for place in places[:_LOOKED_AT]
        for path in islice(place.iterdir(), _LOOKED_AT)
    )


def is_at(root: Path) -> bool:
    """Whether `root` holds splits as folders, or classes as folders or tars."""
    found = [path for paths in split_folders(root).values() for path in paths]
    if any(not _holds_tars_alone(path) for path in found):
        return True
    return not any(map(_is_other_tar, root.glob("*.tar"))) and holds_classes(root)


def _holds_tars_alone(folder: Path) -> bool:
    tars = list(folder.glob("*.tar"))
    return bool(tars) and not children(folder) and any(map(_is_other_tar, tars))


def _is_other_tar(path: Path) -> bool:
    return not is_clutter(path.name) and not imagenet.is_class_tar(path)


# --------------------------------------------------------------------------------------------------
# Scanning
# --------------------------------------------------------------------------------------------------


def scan_imagefolder(root: Path, scan: Scan, label_roots: Iterable[Path] = ()) -> None:
    """Lists train and val, wherever in `root` each of them is.

    Args:
        label_roots: folders that may hold labels of a flat val; by default `root` and those above.
    """
    label_roots = tuple(label_roots) or (root, *root.absolute().parents[:3])  # CLS-LOC: three deep
    places = _places(root, scan)
    for split, place in places.items():
        if place.is_dir():
            _scan_split(split, place, scan, label_roots)
        else:
            read = imagenet.train_tar if split == "train" else imagenet.val_tar
            scan.splits[split] += read(place, scan)


def _places(root: Path, scan: Scan) -> dict[str, Path]:
    """The folder or archive of every split that is wanted."""
    found = split_folders(root)
    _note_dangling(root, found, scan)
    for split, name in (("train", imagenet.TRAIN_TAR), ("val", imagenet.VAL_TAR)):
        is_empty = all(not any(path.iterdir()) for path in found.get(split, []))
        if is_empty and (root / name).exists():
            found[split] = [root / name]
    for split, paths in found.items():
        if len(paths) > 1:
            raise ShardError(
                f"{root}: {' and '.join(f'{path.name}/' for path in paths)} both name the {split} "
                "split: move one of them out of the source"
            )
    source = settle_test({split: [f"{p[0].name}/"] for split, p in found.items()}, scan)
    places = {split: paths[0] for split, paths in found.items() if split == "train"}
    if source:
        places["val"] = found[source][0]
    if scan.options.val_fraction is not None and source == "val":
        raise ShardError(f"{places['val']} is there: leave out --val-fraction to use it as val")
    if not found and (scan.options.val_only or scan.options.val_fraction is not None):
        return {scan.wanted[0]: root}
    missing = [split for split in scan.wanted if split not in places]
    if missing:
        raise ShardError(_what_is_missing(root, missing[0], bool(found)))
    return {split: places[split] for split in scan.wanted}


def _note_dangling(root: Path, found: dict[str, list[Path]], scan: Scan) -> None:
    """Notes links in place of split folders that lead nowhere, of test only if it is needed."""
    for path in root.iterdir():
        split = SPLIT_OF.get(path.name.lower())
        is_needed = split in scan.wanted or (split == "test" and "val" not in found)
        if is_needed and path.is_symlink() and not path.exists():
            scan.dangle(path)
    scan.check_links()


def _what_is_missing(root: Path, split: str, has_splits: bool) -> str:
    above = split_folders(root.absolute().parent)
    if root.name.lower() in SPLIT_OF and len(above) > 1:
        return (
            f"{root} is one split of {root.absolute().parent}: name that folder as SOURCE (or "
            "--val-only, to take this one alone as val)"
        )
    if has_splits and split == "val":
        return (
            f"{root}: there is no folder val/; expected train/<class>/ and val/<class>/ (valid, "
            "validation, dev and test will do)\n--val-fraction 0.1 draws a tenth of every class of "
            "train instead"
        )
    if has_splits:
        return (
            f"{root}: there is no folder train/; expected train/<class>/ and val/<class>/\n"
            "--val-only makes a data set to evaluate on"
        )
    classes = [path.name for path in children(root)] or [p.stem for p in root.glob("*.tar")]
    some = ", ".join(sorted(classes)[:3]) + (", ..." if len(classes) > 3 else "")
    return (
        f"{root} holds classes ({some}) and no splits\n--val-fraction 0.1 draws a tenth of every "
        "class as val; --val-only takes all as val, to evaluate on"
    )


def _scan_split(split: str, folder: Path, scan: Scan, label_roots: Iterable[Path]) -> None:
    found: dict[str, list[Found]] = {}
    tars: list[Path] = []
    flat: list[str] = []
    label_of = imagenet.tiny_labels(folder)
    for entry in entries(folder, scan):
        path = Path(entry.path)
        if entry.is_dir():
            if label_of and entry.name == "images":
                found[""] = [_labelled(item, label_of) for item in images_below(path, scan, "")]
            else:
                found[entry.name] = _scan_class(split, path, scan)
        elif imagenet.is_class_tar(path):
            tars.append(path)
        elif kind := kind_of(entry.name):
            scan.skip(kind)
        else:
            flat.append(entry.name)
    for path in tars:
        _add_tar(path, found, scan)
    _check_depth(folder, found)
    for images in found.values():
        scan.splits[split] += images
    if flat:
        scan.splits[split] += _flat(split, folder, flat, scan, label_roots)


def _scan_class(split: str, folder: Path, scan: Scan) -> list[Found]:
    before = len(scan.dangling)
    images = list(images_below(folder, scan, folder.name))
    if not images and split == scan.wanted[0]:
        scan.check_links()
        if len(scan.dangling) == before:
            tar = next(folder.glob("*.tar"), None)
            raise ShardError(
                f"{tar} lies too deep: tars must lie in {folder.parent} itself"
                if tar
                else f"{folder} holds no images; remove the class or fill it"
            )
        scan.say(f"the class {folder.name} is left out: all its links lead nowhere")
    return images


def _labelled(item: Found, label_of: LabelOf) -> Found:
    return item._replace(label=label_of(item.name))


def _add_tar(path: Path, found: dict[str, list[Found]], scan: Scan) -> None:
    """Takes the tar of a class, unless the class was unpacked beside it."""
    images = list(imagenet.class_tar(path, scan))
    unpacked = found.get(path.stem)
    if unpacked is None:
        found[path.stem] = images
    elif len(unpacked) == len(images):
        scan.skip("tars of classes that are unpacked beside them")
    else:
        raise ShardError(
            f"{path} holds {len(images):,} images, the folder {path.stem}/ beside it "
            f"{len(unpacked):,}: unpack it again, or move one of the two away"
        )


def _check_depth(folder: Path, found: dict[str, list[Found]]) -> None:
    """Checks that the only class is none that holds the classes: train/train/cat/1.jpg."""
    if len(found) != 1:
        return
    ((name, images),) = found.items()
    inner = {item.name.partition("/")[0] for item in images}
    if name and len(inner) > 1 and all("/" in item.name for item in images):
        raise ShardError(
            f"{folder} holds a single folder, {name}/, and that {len(inner)} folders of images "
            f"({', '.join(sorted(inner)[:3])}): move them up, as the first is read as the class"
        )


def _flat(
    split: str, folder: Path, names: list[str], scan: Scan, label_roots: Iterable[Path]
) -> list[Found]:
    """Images that lie in no class's folder, with the labels that a file or their names give."""
    label_of = imagenet.tiny_labels(folder)
    if split == "val" and label_of is None:
        readers = (imagenet.devkit_labels, imagenet.kaggle_labels)
        tables = (reader(place) for place in label_roots for reader in readers)
        label_of = next(filter(None, tables), None)
    if label_of is not None:
        return [image_file(folder, label_of(name), name) for name in names]
    named = {name: imagenet.named_label(name) for name in names}
    lost = [name for name, label in named.items() if label is None]
    if not lost:
        return [image_file(folder, label, name) for name, label in named.items() if label]
    if scan.options.allow_partial and split == "train":
        scan.skip("outside any class folder", len(names))
        return []
    remedy = "move it into one, or leave such images out with --allow-partial"
    if split == "val":
        remedy = (
            f"sort {folder.name}/ into classes, or put ILSVRC2012_devkit_t12.tar.gz or Kaggle's "
            "LOC_val_solution.csv beside it"
        )
        if SPLIT_OF.get(folder.name.lower()) == "test":
            remedy += "; or draw val from train with --val-fraction 0.1"
    raise ShardError(f"{folder / lost[0]} lies outside any class folder: {remedy}")


# --------------------------------------------------------------------------------------------------
# Kaggle's download
# --------------------------------------------------------------------------------------------------


def kaggle_images(root: Path) -> Path:
    """Where the images of Kaggle's download lie."""
    return root / "ILSVRC" / "Data" / "CLS-LOC"


def scan_kaggle(root: Path, scan: Scan) -> None:
    """Kaggle's download: train/ by classes, val/ flat."""
    scan_imagefolder(kaggle_images(root), scan, (root,))
