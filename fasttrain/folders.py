"""Lists folders of images: train/<class>/ and val/<class>/, and common variants of them.

A split may be a folder of class folders, a folder of class tars, or an official archive. It may
also be a flat folder with labels beside it. If there are classes and no splits, a share of each
class becomes val.
"""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from fasttrain import imagenet
from fasttrain.archives import packed_tars, plain_tars
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

_PEEK = 100  # number of entries that are read to see what a folder holds


# --------------------------------------------------------------------------------------------------
# Finding splits and classes
# --------------------------------------------------------------------------------------------------


def children(folder: Path) -> list[Path]:
    """Returns the folders in `folder` that may be splits or classes."""
    found = [path for path in folder.iterdir() if not is_clutter(path.name) and path.is_dir()]
    return sorted(found)


def split_folders(root: Path) -> dict[str, list[Path]]:
    """Returns the folders in `root` that are named like splits, by split.

    A name is a whole word such as `train`, in any case. If no folder has such a name, a name that
    contains one such word counts too (`training_set`). In this case one folder must be train, and
    `root` must not hold classes too.
    """
    folders = children(root) if root.is_dir() else []
    exact = {path: path.name.lower() for path in folders if path.name.lower() in SPLIT_OF}
    if exact and len(exact) < len(folders) and all(map(_is_class, exact)):
        return {}  # as in bus/, car/ and train/, which are three classes
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
    """Returns whether a folder holds images and no folders, and the image names give no class."""
    files = [path for path in islice(folder.iterdir(), _PEEK) if path.is_file()]
    images = [path for path in files if is_image(path.name)]
    unnamed = [path for path in images if imagenet.named_label(path.name) is None]
    return bool(unnamed) and not children(folder) and not imagenet.tiny_labels(folder)


def holds_classes(folder: Path) -> bool:
    """Returns whether `folder` holds folders of images, or tars that are named like classes."""
    found = list(islice(folder.iterdir(), _PEEK)) if folder.is_dir() else []
    if any(imagenet.is_class_tar(path) for path in found):
        return True
    inner = [path for path in found if not is_clutter(path.name) and path.is_dir()]
    inner += [path / "images" for path in inner if (path / "images").is_dir()]
    return any(
        path.is_symlink() or (is_image(path.name) and path.is_file())
        for each in inner[:_PEEK]
        for path in islice(each.iterdir(), _PEEK)
    )


def is_at(root: Path) -> bool:
    """Returns whether `root` holds splits as folders, or classes as folders or tars."""
    found = [path for paths in split_folders(root).values() for path in paths]
    if any(not _holds_only_tars(path) for path in found):
        return True
    return not any(map(_is_other_tar, plain_tars(root))) and holds_classes(root)


def _holds_only_tars(folder: Path) -> bool:
    """Returns whether a folder holds tars that are not named like classes, and no folders."""
    if children(folder):
        return False
    if any(map(_is_other_tar, plain_tars(folder))):
        return True
    return bool(packed_tars(folder)) and not _has_images(folder)


def _has_images(folder: Path) -> bool:
    return any(is_image(path.name) for path in islice(folder.iterdir(), _PEEK))


def _is_other_tar(path: Path) -> bool:
    return not imagenet.is_class_tar(path)


# --------------------------------------------------------------------------------------------------
# Scanning
# --------------------------------------------------------------------------------------------------


def scan_imagefolder(root: Path, scan: Scan, label_roots: Iterable[Path] = ()) -> None:
    """Lists the wanted splits in `root`.

    Args:
        label_roots: folders that may hold the labels of a flat val. By default these are `root` and
            three folders above it, because Kaggle's CLS-LOC is three folders deep.
    Raises:
        ShardError: a split, a class or a label is missing, or names are ambiguous.
    """
    label_roots = tuple(label_roots) or (root, *root.absolute().parents[:3])
    for split, path in _split_paths(root, scan).items():
        if path.is_dir():
            _scan_split(split, path, scan, label_roots)
        else:
            read = imagenet.train_tar if split == "train" else imagenet.val_tar
            scan.splits[split] += read(path, scan)


def _split_paths(root: Path, scan: Scan) -> dict[str, Path]:
    """Returns the folder or archive of every wanted split."""
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
    chosen = {split: paths[0] for split, paths in found.items() if split == "train"}
    if source:
        chosen["val"] = found[source][0]
    if scan.options.val_fraction is not None and source == "val":
        raise ShardError(
            f"--val-fraction: the source has a val split already ({chosen['val']}); leave the "
            "option out"
        )
    if not found and (scan.options.val_only or scan.options.val_fraction is not None):
        return {scan.wanted[0]: root}
    missing = [split for split in scan.wanted if split not in chosen]
    if missing:
        raise ShardError(_what_is_missing(root, missing[0], bool(found)))
    return {split: chosen[split] for split in scan.wanted}


def _note_dangling(root: Path, found: dict[str, list[Path]], scan: Scan) -> None:
    """Records broken links that are named like splits. Considers test only if it is needed."""
    for path in root.iterdir():
        split = SPLIT_OF.get(path.name.lower())
        is_needed = split in scan.wanted or (split == "test" and "val" not in found)
        if is_needed and path.is_symlink() and not path.exists():
            scan.add_dangling(path)
    scan.check_links()


def _what_is_missing(root: Path, split: str, has_splits: bool) -> str:
    above = split_folders(root.absolute().parent)
    if root.name.lower() in SPLIT_OF and len(above) > 1:
        return (
            f"{root} is one split of {root.absolute().parent}: name that folder as SOURCE, or take "
            "this split alone as val with --val-only"
        )
    if has_splits and split == "val":
        return (
            f"{root}: there is no folder val/; expected train/<class>/ and val/<class>/ (or valid, "
            "validation, dev or test)\n--val-fraction 0.1 draws a tenth of every class of train "
            "instead"
        )
    if has_splits:
        return (
            f"{root}: there is no folder train/; expected train/<class>/ and val/<class>/\n"
            "--val-only makes a data set to evaluate on"
        )
    classes = [path.name for path in children(root)] or [p.stem for p in plain_tars(root)]
    some = ", ".join(sorted(classes)[:3]) + (", ..." if len(classes) > 3 else "")
    return (
        f"{root} holds classes ({some}) and no splits\n--val-fraction 0.1 draws a tenth of every "
        "class as val; --val-only takes all images as val, to evaluate on"
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
    if label_of:
        _check_sorted(found, label_of, folder)
    for images in found.values():
        scan.splits[split] += images
    if flat:
        scan.splits[split] += _flat(split, folder, flat, scan, label_roots)


def _scan_class(split: str, folder: Path, scan: Scan) -> list[Found]:
    dangling_before = len(scan.dangling)
    images = list(images_below(folder, scan, folder.name))
    if not images and split == scan.wanted[0]:
        scan.check_links()
        if len(scan.dangling) == dangling_before:
            tar = next(iter(plain_tars(folder)), None)
            raise ShardError(
                f"{tar} is too deep: move it up, because tars must be in {folder.parent} itself"
                if tar
                else f"{folder} holds no images; remove the class or fill it"
            )
        scan.say(f"the class {folder.name} is left out: all its links lead nowhere")
    elif not images:
        scan.say(f"WARNING: {folder} holds no images")
    return images


def _check_sorted(found: dict[str, list[Found]], label_of: LabelOf, folder: Path) -> None:
    """Checks images that were sorted into classes while their table of labels was kept.

    Args:
        found: the images of each class, and under "" those in the folder images/.
    Raises:
        ShardError: the table gives another class, or the image is in images/ too.
    """
    unsorted = {Path(item.name).name for item in found.get("", [])}
    for name, images in found.items():
        for item in images if name else []:
            path = item.container / item.name
            if path.name in unsorted:
                raise ShardError(
                    f"{path} is also in {folder / 'images'} and would count twice: remove that "
                    "folder, or the folders of classes beside it"
                )
            label = _row(label_of, item.name)
            if label not in (None, name):
                raise ShardError(
                    f"{path} is in the class {name}, but {imagenet.TINY_LABELS} says {label}: move "
                    f"the image, or remove {imagenet.TINY_LABELS} if the folders are right"
                )


def _row(label_of: LabelOf, name: str) -> str | None:
    try:
        return label_of(name)
    except ShardError:  # the image was renamed or added
        return None


def _labelled(item: Found, label_of: LabelOf) -> Found:
    return item._replace(label=label_of(item.name))


def _add_tar(path: Path, found: dict[str, list[Found]], scan: Scan) -> None:
    """Adds the images of a class's tar, unless a folder beside it holds them unpacked."""
    images = list(imagenet.class_tar(path, scan))
    unpacked = found.get(path.stem)
    if unpacked is None:
        found[path.stem] = images
    elif len(unpacked) == len(images):
        scan.skip("tars of classes that are unpacked beside them")
    else:
        raise ShardError(
            f"{path} holds {len(images):,} images, but the folder {path.stem}/ beside it holds "
            f"{len(unpacked):,}: unpack the tar again, or move one of the two away"
        )


def _check_depth(folder: Path, found: dict[str, list[Found]]) -> None:
    """Checks that a single class is not a folder of classes, as in train/train/cat/1.jpg."""
    if len(found) != 1:
        return
    ((name, images),) = found.items()
    inner = {item.name.partition("/")[0] for item in images}
    if name and len(inner) > 1 and all("/" in item.name for item in images):
        raise ShardError(
            f"{folder} holds a single folder, {name}/, which holds {len(inner)} folders of images "
            f"({', '.join(sorted(inner)[:3])}): move these up, as {name} would be the only class"
        )


def _flat(
    split: str, folder: Path, names: list[str], scan: Scan, label_roots: Iterable[Path]
) -> list[Found]:
    """Returns images outside class folders, labelled by a file or by their own names.

    Raises:
        ShardError: an image has no label.
    """
    label_of = imagenet.tiny_labels(folder)
    if split == "val" and label_of is None:
        readers = (imagenet.devkit_labels, imagenet.kaggle_labels)
        tables = (reader(path) for path in label_roots for reader in readers)
        label_of = next(filter(None, tables), None)
    if label_of is not None:
        return [image_file(folder, label_of(name), name) for name in names]
    named = {name: imagenet.named_label(name) for name in names}
    unlabelled = [name for name, label in named.items() if label is None]
    if not unlabelled:
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
    raise ShardError(f"{folder / unlabelled[0]} is outside any class folder: {remedy}")


# --------------------------------------------------------------------------------------------------
# Kaggle's download
# --------------------------------------------------------------------------------------------------


def kaggle_images(root: Path) -> Path:
    """Returns the folder of the images in Kaggle's download."""
    return root / "ILSVRC" / "Data" / "CLS-LOC"


def scan_kaggle(root: Path, scan: Scan) -> None:
    """Lists Kaggle's download: train/ has class folders, val/ is flat."""
    scan_imagefolder(kaggle_images(root), scan, (root,))
