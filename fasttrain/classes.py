"""Reads class names and settles their order, which gives the labels."""

import json
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fasttrain.imagenet import WNID
from fasttrain.listing import Found, Scan
from fasttrain.shards import MANIFEST, ShardError

FILES = ("classes.txt", "classnames.txt")  # in a source: one class name per line, by label


def read_list(path: Path) -> tuple[str, ...]:
    """Reads class names in the order of their labels.

    Args:
        path: a text file with one name per line; or the folder of a data set, a checkpoint or a
            run, each of which stores its class names.
    Raises:
        ShardError: the list cannot be read, is empty, or holds a name twice.
    """
    source = _of_folder(path) if path.is_dir() else path
    try:
        text = source.read_text(encoding="utf-8")
        found = json.loads(text)["classes"] if source.suffix == ".json" else _lines(text)
    except OSError as error:
        raise ShardError(f"--classes {source}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ShardError(
            f"--classes {source}: expected a text file with one class per line, or a data set or a "
            "checkpoint"
        ) from None
    fault = _fault_of(found)
    if fault:
        raise ShardError(f"--classes {source}: {fault}")
    return tuple(found)


def _of_folder(path: Path) -> Path:
    states = [path / "state.json", *sorted(path.glob("checkpoints/step_*/state.json"))[-1:]]
    for found in (path / MANIFEST, *states):
        if found.exists():
            return found
    raise ShardError(
        f"--classes {path}: neither a data set ({MANIFEST}) nor a checkpoint (state.json) is there"
    )


def _lines(text: str) -> list[str]:
    return text.rstrip("\n").split("\n") if text.strip() else []


def _fault_of(names: Sequence[str]) -> str | None:
    if not names or "" in names:
        return "has an empty line" if names else "holds no class"
    name, number = Counter(names).most_common(1)[0]
    return f"the class {name} occurs {number} times" if number > 1 else None


def find_list(root: Path, scan: Scan) -> tuple[str, ...] | None:
    """Returns the class names that the user gives, or those of a list in `root`, if any."""
    if scan.options.classes is not None:
        return scan.options.classes
    for path in (root / name for name in FILES):
        if path.exists():
            names = _lines(path.read_text(encoding="utf-8"))
            if fault := _fault_of(names):
                scan.say(f"{path} is not used: {fault}")
                continue
            scan.say(f"the {len(names):,} classes are in the order of {path}")
            return tuple(names)
    return None


def name_numbers(
    scan: Scan,
    numbered: Mapping[str, list[tuple[Found, int]]],
    wnids: Mapping[int, str],
    listed: tuple[str, ...] | None = None,
) -> None:
    """Turns numeric labels into class names. Adds the images to `scan.splits`, sets `scan.classes`.

    Args:
        numbered: images with their labels, by split.
        wnids: WordNet ids by label, for the labels where they are known.
        listed: names by label, if there is a list.
    Raises:
        ShardError: a label is negative or beyond the end of the list.
    """
    labels = sorted({label for found in numbered.values() for _, label in found})
    if any(label < 0 for label in labels):
        raise ShardError(
            f"label {labels[0]}: a negative label means no label; give files that have labels"
        )
    known = [wnids.get(label) for label in labels]
    # The WordNet ids must sort as the labels do. Otherwise the numbers mean something else.
    by_wnid = None not in known and known == sorted(set(known), key=str)
    if listed is not None and not (by_wnid and set(known) <= set(listed)):
        if labels and labels[-1] >= len(listed):
            from_one = labels[0] == 1 and labels[-1] == len(listed)
            raise ShardError(
                f"label {labels[-1]}: the list of classes ends at {len(listed) - 1}; "
                + (
                    "the labels seem to count from 1: put a line for label 0, such as unused, "
                    "first in the list"
                    if from_one
                    else "give the whole list (--classes FILE)"
                )
            )
        names = {label: listed[label] for label in labels}
    elif by_wnid:
        names = {label: str(wnid) for label, wnid in zip(labels, known, strict=True)}
    else:
        names = {label: f"{label:06d}" for label in labels}
    for split, found in numbered.items():
        scan.splits[split] += [item._replace(label=names[label]) for item, label in found]
    scan.classes = listed


def known_wnids(items: Iterable[tuple[Found, int]]) -> dict[int, str]:
    """Returns WordNet ids by label, taken from the images whose names begin with one."""
    wnids: dict[int, str] = {}
    for found, label in items:
        if wnid := WNID.match(found.name):
            wnids.setdefault(label, wnid[0])
    return wnids


def settle(root: Path, scan: Scan) -> tuple[str, ...]:
    """Returns the classes in the order of their labels. Checks that every image has one of them.

    Raises:
        ShardError: val has a class that train lacks, or an image's class is not in the list.
    """
    first = "train" if "train" in scan.wanted else "val"
    own = {item.label for item in scan.splits[first]}
    _check_names(root, own)
    listed = scan.options.classes or (tuple(scan.classes) if scan.classes is not None else None)
    if listed is not None:
        if scan.options.by_number:
            _replace_numbers(scan, listed)
            own = {item.label for item in scan.splits[first]}
        _check(root, scan, set(listed), "the list of classes does not have")
        missing = len(set(listed) - own)
        if missing:
            scan.say(f"{missing:,} of the {len(listed):,} classes have no image in {first}")
        return listed
    _check(root, scan, own, "train does not have")
    _say_alike(scan, own)
    numbers = all(name.isdecimal() for name in own)
    if scan.options.by_number:
        if not numbers:
            name = min(name for name in own if not name.isdecimal())
            raise ShardError(f"--classes-by-number: the class {name} is not a number")
        return tuple(sorted(own, key=lambda name: (int(name), name)))
    ordered = tuple(sorted(own))
    if numbers and list(ordered) != sorted(own, key=int):
        scan.say(
            f"the class names are numbers and are sorted as text: {', '.join(ordered[:3])} are "
            "labels 0, 1 and 2; --classes-by-number sorts them as numbers"
        )
    return ordered


def _check_names(root: Path, names: set[str]) -> None:
    """Raises ShardError if a class name cannot be kept as a line of UTF-8."""
    encoding = sys.getfilesystemencoding()
    for name in sorted(names):
        if encoding != "utf-8" and not name.isascii():
            raise ShardError(
                f"{root}: the class {name!a} was read as {encoding}, as the locale of this process "
                "says: set PYTHONUTF8=1"
            )
        # Python keeps bytes that are not UTF-8 as surrogates, which become question marks here.
        is_text = name.encode(errors="replace").decode() == name
        if not is_text or len(name.splitlines()) != 1:
            raise ShardError(
                f"{root}: the class {name!a} "
                + ("has a line break in its name" if is_text else "has a name that is not UTF-8")
                + ": rename its folder (convmv renames many), or change the label"
            )


def _replace_numbers(scan: Scan, listed: tuple[str, ...]) -> None:
    for images in scan.splits.values():
        for position, item in enumerate(images):
            if not item.label.isdecimal() or int(item.label) >= len(listed):
                raise ShardError(
                    f"--classes-by-number: the class {item.label} is not a number from 0 to "
                    f"{len(listed) - 1}"
                )
            images[position] = item._replace(label=listed[int(item.label)])


def _same(one: str, other: str) -> bool:
    """Returns whether two names differ only in case, blanks, or Unicode form (as on Macs)."""
    return _plain(one) == _plain(other)


def _plain(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _say_alike(scan: Scan, names: set[str]) -> None:
    """Warns of two classes whose names look the same."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        other = seen.setdefault(_plain(name), name)
        if other != name:
            scan.say(
                f"WARNING: {other!a} and {name!a} are two classes; if they are one, rename one"
            )


def _check(root: Path, scan: Scan, classes: set[str], why_unknown: str) -> None:
    for split, images in scan.splits.items():
        unknown = sorted({item.label for item in images} - classes)
        if unknown:
            (first, *_) = (item for item in images if item.label == unknown[0])
            more = f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
            alike = next((name for name in sorted(classes) if _same(name, unknown[0])), None)
            numbers = all(name.isdecimal() for name in unknown)
            raise ShardError(
                f"{root}: {split} holds images of {unknown[0]}{more}, a class that {why_unknown}, "
                f"the first: {first.name} in {first.container}"
                + (
                    f"\n{alike!a} and {unknown[0]!a} look the same but differ: rename one of them"
                    if alike
                    else ""
                )
                + (
                    "\nif the folder names are numbers, --classes-by-number takes folder 7 as "
                    "class 7 of the list, counted from 0"
                    if numbers and scan.options.classes
                    else ""
                )
            )
