"""Reads WebDataset tars. The members of a sample are adjacent and share a key."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from fasttrain import classes
from fasttrain.archives import LINKS, Member, members, packed_tars, plain_tars, unpack_command
from fasttrain.imagenet import is_class_tar, is_official
from fasttrain.listing import Found, Options, Scan, is_image, kind_of
from fasttrain.shards import SPLITS, ShardError
from fasttrain.splits import SPLIT_OF, one_word_each, settle_test, word_of, words

_MAX_LABEL_BYTES = 1 << 20  # the most bytes to read from a member that holds a label
_NUMBER = re.compile(r"[+-]?\d+")
_FRACTION = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+)(e[+-]?\d+)?|nan", re.IGNORECASE)
Label = int | str


class WdsSample(NamedTuple):
    """An image of a WebDataset tar and its label."""

    image: Member
    label: Member


# --------------------------------------------------------------------------------------------------
# Samples of a tar
# --------------------------------------------------------------------------------------------------


def wds_samples(path: Path, scan: Scan | None = None) -> Iterator[WdsSample]:
    """Yields the samples of a tar. The key of a member ends at the first dot of its name.

    Leaves out hidden members, such as ._x.jpg, which a Mac adds.

    Args:
        scan: counts what is left out. Its option `label_key` is the suffix of the members that hold
            labels, or a key of the .json members; None takes the .cls members.
    Raises:
        ShardError: the tar is damaged, an image has no label, or a label has no image.
    """
    scan = scan or Scan()
    label_key = scan.options.label_key
    seen: set[str] = set()
    for key, group in itertools.groupby(_visible(path, scan), _key_of):
        listed = list(group)
        if key in seen:
            raise ShardError(_fault(path, key, listed, scan.options))
        seen.add(key)
        images = [member for member in listed if is_image(member.name)]
        labels = [member for member in listed if _is_label(member, listed, label_key)]
        if len(images) == len(labels) == 1:
            yield WdsSample(images[0], labels[0])
        elif pairs := _pairs(images, labels):
            yield from pairs
        elif images or labels:
            raise ShardError(_fault(path, key, listed, scan.options))
        else:
            scan.skip("members without an image or a label", len(listed))


def _visible(path: Path, scan: Scan) -> Iterator[Member]:
    for member in members(path, scan):
        kind = kind_of(member.name)
        if kind == "hidden" or kind.startswith("in "):
            scan.skip(kind)
        else:
            yield member


def _key_of(member: Member) -> str:
    folder, _, base = member.name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _ending(member: Member) -> str:
    return member.name.rpartition("/")[2].partition(".")[2].lower()


def _ends_with(member: Member, end: str) -> bool:
    return f".{_ending(member)}".endswith(f".{end.lower()}")


def _is_label(member: Member, sample: list[Member], label_key: str | None) -> bool:
    if label_key is None:
        return _ends_with(member, "cls")
    if any(_ends_with(other, label_key) for other in sample):
        return _ends_with(member, label_key)
    return _ends_with(member, "json")


def _pairs(images: list[Member], labels: list[Member]) -> list[WdsSample]:
    """Pairs images and labels whose names have more dots, such as photo.0.jpg and photo.0.cls.

    Returns nothing unless every image and every label has a partner.
    """
    by_stem = {member.name.rpartition(".")[0]: member for member in labels}
    stems = [member.name.rpartition(".")[0] for member in images]
    if len(set(stems)) != len(images) or len(by_stem) != len(labels) or set(stems) != set(by_stem):
        return []
    return [WdsSample(image, by_stem[stem]) for image, stem in zip(images, stems, strict=True)]


def _fault(path: Path, key: str, sample: list[Member], options: Options) -> str:
    """Says what is wrong with a sample, which members it has, and what to do."""
    name = key.removeprefix("/").removeprefix("./")
    found = ", ".join(f".{_ending(member)}" for member in sample[:6])
    label_key = options.label_key
    label = ".cls" if label_key is None else f".{label_key} or .json"
    scan = Scan()
    groups = [group for group, _ in itertools.groupby(_visible(path, scan), _key_of)]
    text = f"{path}: sample {name} holds {found}; expected one image and its label ({label})"
    if groups.count(key) > 1:
        return (
            f"{path} is not sorted, or was appended to: the members of sample {name} are not "
            "adjacent, but WebDataset readers need them adjacent\nmake it again from sorted files: "
            f"mkdir x && tar -xf {path.name} -C x && tar --sort=name -cf {path.name} -C x ."
        )
    if scan.skipped[LINKS]:
        text += (
            f"\nthe tar has {scan.skipped[LINKS]:,} links, which are not followed: make it with "
            "tar --hard-dereference --dereference"
        )
    if label_key is None:
        text += _where_labels_are(path, sample, options.in_place)
    return text


def _where_labels_are(path: Path, sample: list[Member], in_place: bool) -> str:
    """Suggests a --label-key if other members of the sample may hold its label."""
    instead = " (with a folder OUT in place of --in-place)" if in_place else ""
    with path.open("rb") as file:
        # The .json first: a .txt beside it is more often a caption than a label.
        for member in sorted(sample, key=lambda member: not _ends_with(member, "json")):
            data = _bytes_of(file, member)
            if _ends_with(member, "json"):
                keys = _json_keys(data)
                example = "label" if "label" in keys or not keys else keys[0]
                found = f"has the keys {', '.join(keys[:8])}" if keys else "has no keys"
                return (
                    f"\n{_short(member)} {found}: --label-key {example} takes the labels from there"
                    f"{instead}"
                )
            if _ends_with(member, "txt"):
                text = data[:40].decode(errors="replace")
                return (
                    f"\n{_short(member)} holds {text!r}: --label-key txt takes that as the class"
                    f"{instead}"
                )
    return ""


def _json_keys(data: bytes) -> list[str]:
    try:
        return sorted(json.loads(data))
    except (ValueError, TypeError):
        return []


def _short(member: Member) -> str:
    return member.name.rpartition("/")[2]


# --------------------------------------------------------------------------------------------------
# Labels
# --------------------------------------------------------------------------------------------------


def _bytes_of(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(min(member.size, _MAX_LABEL_BYTES))


def _label(path: Path, file: BinaryIO, member: Member, label_key: str | None) -> Label:
    """Returns the label of a sample: an integer or a class name."""
    data = _bytes_of(file, member)
    location = f"{path}: {member.name}"
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ShardError(
            f"{location} holds {data[:16]!r}; expected a whole number or the name of a class"
        ) from None
    if label_key is None or _ends_with(member, label_key):
        return _parsed(text, location)
    try:
        value = json.loads(text)[label_key]
    except ValueError:
        raise ShardError(
            f"{location} is not JSON; expected an object with the key {label_key!r}"
        ) from None
    except (KeyError, TypeError, IndexError):
        keys = ", ".join(_json_keys(data)[:8])
        found = f"has the keys {keys}" if keys else "has no keys"
        raise ShardError(
            f"{location} {found}, not {label_key!r}: name the right one with --label-key"
        ) from None
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return _parsed(str(value), f"{location}: {label_key!r}")
    kind = type(value).__name__
    raise ShardError(
        f"{location}: {label_key!r} is {json.dumps(value)[:40]} ({kind}); expected a whole number "
        "or the name of a class"
    )


def _parsed(text: str, location: str) -> Label:
    text = text.strip()
    if _NUMBER.fullmatch(text):
        return int(text)
    if not text or "\0" in text or "\n" in text or len(text) > 200 or _FRACTION.fullmatch(text):
        raise ShardError(
            f"{location} holds {text[:40]!r}; expected a whole number or the name of a class"
        )
    return text


# --------------------------------------------------------------------------------------------------
# The tars of a source
# --------------------------------------------------------------------------------------------------


def tars(root: Path) -> list[Path]:
    """Returns the tars in `root` and in its folders that are named like splits."""
    found = [path for folder in _folders(root) for path in plain_tars(folder)]
    return sorted(path for path in found if not is_class_tar(path))


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [root, *(path for path in root.iterdir() if words(path.name) and path.is_dir())]


def packed(root: Path) -> list[Path]:
    """Returns the compressed tars in `root` and in its folders that are named like splits."""
    return sorted(path for folder in _folders(root) for path in packed_tars(folder))


def check_packed(root: Path, scan: Scan) -> None:
    """Checks that no compressed tar holds a part of the data.

    Two kinds of compressed tars are left out and counted: those whose names give no split, and
    those with the unpacked tar beside them.

    Raises:
        ShardError: there is a compressed tar of another kind.
    """
    for path in packed(root):
        plain = path.name[: path.name.lower().rindex(".t")].lower() + ".tar"
        is_unpacked = plain in {other.name.lower() for other in plain_tars(path.parent)}
        if is_unpacked or not any(map(words, path.relative_to(root).parts)):
            scan.skip("compressed tars")
        else:
            raise ShardError(fault_of_packed(path))


def fault_of_packed(path: Path) -> str:
    """Says that a compressed tar cannot be read, and how to unpack it."""
    return (
        f"{path} is compressed and does not allow random access; unpack it and the others like it "
        f"to plain tars first: {unpack_command(path)}"
    )


def is_at(root: Path) -> bool:
    """Returns whether `root` holds tars that are not ImageNet's archives."""
    return bool(tars(root)) and not is_official(root)


def _by_split(root: Path, scan: Scan) -> dict[str, list[Path]]:
    """Returns the tars of the wanted splits."""
    check_packed(root, scan)
    by_word: dict[str | None, list[Path]] = {}
    for path in tars(root):
        if not path.exists():
            scan.add_dangling(path)
            continue
        by_word.setdefault(word_of(PurePosixPath(path.relative_to(root))), []).append(path)
    scan.check_links()
    nameless = by_word.pop(None, [])
    if nameless and (by_word or scan.wanted == SPLITS):
        raise ShardError(
            f"{nameless[0]}: expected train, val or test as a word in the name of the tar or of "
            f"its folder ({len(nameless):,} tars have none)\nrename it, or move it into train/ or "
            "val/"
        )
    named = {str(word): paths for word, paths in by_word.items()}
    one_word_each(named)
    found = {SPLIT_OF[word]: paths for word, paths in named.items()}
    if nameless:
        found[scan.wanted[0]] = nameless
    names = {s: [str(p.relative_to(root)) for p in paths] for s, paths in found.items()}
    source = settle_test(names, scan)
    found["val"] = found.get(source or "", [])
    _check_splits(root, found, scan)
    return {split: found[split] for split in scan.wanted}


def _check_splits(root: Path, found: dict[str, list[Path]], scan: Scan) -> None:
    if scan.options.val_fraction is not None and found["val"]:
        raise ShardError(
            f"--val-fraction: the source has a val split already ({found['val'][0]}); leave the "
            "option out"
        )
    for split in scan.wanted:
        if not found.get(split):
            raise ShardError(
                f"{root}: no tar has {split} as a word in its name or in its folder's name"
                + (
                    "; --val-fraction 0.1 draws val from train"
                    if split == "val"
                    else "; --val-only makes a data set to evaluate on"
                )
            )
    deeper = [path for split in scan.wanted for path in found[split] if path.parent != root]
    if scan.options.in_place and deeper:
        raise ShardError(
            f"--in-place: {deeper[0]} is in a folder below {root}, but the tars must be in {root} "
            "itself: name a folder OUT, or move them up under names with their split, such as "
            f"{'-'.join(deeper[0].relative_to(root).parts)}"
        )


def scan_webdataset(root: Path, scan: Scan) -> None:
    """Lists the samples of the tars. A key that begins with a WordNet id gives the class."""
    label_key = scan.options.label_key
    found: dict[str, list[tuple[Found, Label]]] = {}
    for split, paths in _by_split(root, scan).items():
        found[split] = []
        for path in paths:
            with path.open("rb") as file:
                for sample in wds_samples(path, scan):
                    label = _label(path, file, sample.label, label_key)
                    item = Found(path, sample.image.offset, sample.image.size, "", _name(sample))
                    found[split].append((item, label))
    _name_classes(root, scan, found)


def _name(sample: WdsSample) -> str:
    """Returns the name of an image in listings: its key and .JPEG, whatever its format."""
    return f"{_short(sample.image).rpartition('.')[0]}.JPEG"


def _name_classes(root: Path, scan: Scan, found: dict[str, list[tuple[Found, Label]]]) -> None:
    """Turns labels into class names."""
    everything = [pair for images in found.values() for pair in images]
    named = next(((item, label) for item, label in everything if isinstance(label, str)), None)
    number = next(((item, label) for item, label in everything if isinstance(label, int)), None)
    listed = classes.find_list(root, scan)
    if named is None:
        numbered = {s: [(i, int(n)) for i, n in images] for s, images in found.items()}
        wnids = classes.known_wnids(pair for images in numbered.values() for pair in images)
        classes.name_numbers(scan, numbered, wnids, listed)
        return
    if number is not None:
        raise ShardError(
            f"{named[0].container} has the label {named[1]!r}, but {number[0].container} has the "
            f"label {number[1]}: labels must be all numbers or all names of classes"
        )
    if scan.options.in_place:
        raise ShardError(
            f"--in-place: {named[0].container} has the label {named[1]!r}, but the labels of tars "
            "that are used in place must be numbers: name a folder OUT"
        )
    for split, images in found.items():
        scan.splits[split] += [item._replace(label=str(label)) for item, label in images]
    scan.classes = listed
