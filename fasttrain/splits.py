"""Finds the split of a file or folder from the words in its name, and draws val from train."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from fasttrain.listing import Found, Scan
from fasttrain.shards import ShardError

SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def words(name: str) -> set[str]:
    """Returns the words of a name that name a split. For `strain-val-0` that is `val` alone."""
    return {word for word in re.findall("[a-z]+", name.lower()) if word in SPLIT_OF}


def word_of(path: PurePosixPath) -> str | None:
    """Returns the word that gives the split of a file, from its name or from a folder above it.

    Args:
        path: relative to the source.
    Returns:
        A key of `SPLIT_OF`; None if no name gives a split.
    Raises:
        ShardError: the names contradict each other.
    """
    found = words(path.name)
    splits = {SPLIT_OF[word] for word in found}
    folders = [folder for folder in path.parent.parts[::-1] if words(folder)]
    home = folders[0].lower() if folders and folders[0].lower() in SPLIT_OF else None
    if len(splits) == 1 and (home is None or SPLIT_OF[home] in splits):
        return min(found)
    if splits and (home is None or len(splits) == 1):
        named = sorted(splits | ({SPLIT_OF[home]} if home else set()))
        raise ShardError(
            f"{path} names several splits ({', '.join(named)}): rename it, or move it into a "
            "folder train/ or val/ and leave the other word out of its name"
        )
    if home is not None:
        return home
    around = set().union(*(words(folder) for folder in folders[:1]))
    return min(around) if len({SPLIT_OF[word] for word in around}) == 1 else None


def one_word_each(found: Iterable[str]) -> None:
    """Checks that at most one word names each split. `val` beside `dev` may be two data sets.

    Raises:
        ShardError: two words name the same split.
    """
    of_split: dict[str, set[str]] = {}
    for word in found:
        of_split.setdefault(SPLIT_OF[word], set()).add(word)
    for split, both in of_split.items():
        if len(both) > 1:
            raise ShardError(
                f"{' and '.join(sorted(both))} both name the {split} split: keep the one that you "
                "want, and move the other out of the source"
            )


def settle_test(found: dict[str, list[str]], scan: Scan) -> str | None:
    """Chooses the split whose files become val: val, or test if there is no val. Tells the user.

    Args:
        found: the names of files or folders, by split.
    Returns:
        "val", "test", or None if neither can be used.
    """
    if found.get("val"):
        if found.get("test"):
            scan.say(f"{_some(found['test'])} left out: test is not used if there is a val split")
        return "val"
    if not found.get("test"):
        return None
    if scan.options.val_fraction is not None:
        scan.say(f"{_some(found['test'])} left out: val is drawn from train")
        return None
    scan.say(f"there is no val split: {_some(found['test'])} used as val")
    return "test"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1:,} more are" if len(names) > 1 else " is"
    return f"{names[0]}{more}"


def hold_out(images: list[Found], fraction: float, seed: int) -> tuple[list[Found], list[Found]]:
    """Draws a share of every class for validation. Returns (train, val).

    The draw depends on a hash of the seed, the class and the file name, so every machine draws the
    same files. Adding or removing a file moves at most one other file between the splits. A class
    of two images or more has at least one in each split.
    """
    of_class: dict[str, list[Found]] = {}
    for item in images:
        of_class.setdefault(item.label, []).append(item)
    train: list[Found] = []
    val: list[Found] = []
    for items in of_class.values():
        items.sort(key=lambda item: _draw_key(item, seed))
        count = min(max(1, round(fraction * len(items))), len(items) - 1)
        val += items[:count]
        train += items[count:]
    return train, val


def _draw_key(item: Found, seed: int) -> tuple[bytes, str, int]:
    text = f"{seed}/{item.label}/{item.name}".encode("utf-8", "surrogateescape")
    return hashlib.sha256(text).digest(), item.container.name, item.offset
