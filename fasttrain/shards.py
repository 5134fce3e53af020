"""The format of a data set on disk. The writer and the reader share it.

    ROOT/train-000000.tar    a shard, as plain WebDataset: <key>.jpg (or .ppm) and <key>.cls, USTAR,
                             mtime 0; the key is the image's position in the shuffled order, with
                             nine digits
    ROOT/train-000000.idx    DALI's index of that tar, version 1.2
    ROOT/train.index         the offset, label, size and crc32 of each image, for np.memmap
    ROOT/manifest.sha256     digest of the manifest, as `sha256sum` prints it
    ROOT/manifest.json       written last: all files, each with its size and sha256

A data set without a manifest is unfinished and is not read. If the manifest's policy says
`"store": "raw"`, the images are not compressed. Then the last 3 * width * height bytes of an image
are its pixels, row by row, as RGB.
"""

import hashlib
import json
import stat
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fasttrain import commands, files
from fasttrain.faults import Fault

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
UNFINISHED = "UNFINISHED"  # a file with the options; removed after the last file is written
# Raise this number when a change makes the same source give other images, names, labels or bytes.
# This version then does not continue what an earlier version left unfinished.
READING_RULES = 1
MANIFEST_DIGEST = "manifest.sha256"
SPLITS = ("train", "val")
DIGITS = Path("data/digits")  # the demo's data set, which tools/make_digits.py makes
_INDEX_MAGIC = b"fasttrain index 1\n"
PPM_HEADER = 32  # the most bytes before the pixels of a raw image
_COLUMNS = (  # 24 bytes per image: 31 MB for ImageNet's training split
    ("offset", "<u8"),  # of the image's bytes in its tar
    ("size", "<u4"),  # bytes
    ("crc32", "<u4"),  # of the image's bytes
    ("shard", "<u2"),
    ("label", "<u2"),
    ("width", "<u2"),  # pixels, as stored: EXIF orientation is ignored, as torchvision does
    ("height", "<u2"),
)


class ShardError(Fault, ValueError):
    """A source cannot be sharded, or a data set cannot be read. The message names the remedy."""


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def _file_name(name: str) -> str:
    # Tars that were indexed in place keep their own names, so any file name is allowed.
    text = name.encode(errors="replace").decode()  # a lone surrogate becomes a question mark
    if "/" in name or "\0" in name or name in ("", ".", "..") or text != name or len(name) > 255:
        raise ValueError(f"{name[:80]!r} is not the name of a file in the data set's folder")
    return name


_FileName = Annotated[str, AfterValidator(_file_name)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=1, lt=2**40)]
_INDEX_LIMIT = 2**16  # the most shards and the most classes: the index has 16 bits for each


class _Entry(BaseModel):
    """The fields of a manifest that are read here. A manifest may have more fields."""

    model_config = ConfigDict(strict=True)


class _File(_Entry):
    name: _FileName
    size: _Count
    sha256: _Digest


class _Shard(_File):
    num_samples: Annotated[int, Field(ge=0, lt=2**40)]  # 0 if all its images were rejected
    idx_sha256: _Digest


class _Split(_Entry):
    num_samples: _Count
    index: _File
    shards: Annotated[list[_Shard], Field(min_length=1, max_length=_INDEX_LIMIT)]

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if sum(shard.num_samples for shard in self.shards) != self.num_samples:
            raise ValueError("num_samples is not the sum of its shards' num_samples")
        return self


class _Policy(_Entry):
    store: Literal["jpeg", "raw"]
    short_side: Annotated[int, Field(ge=1)] | None


class _Manifest(_Entry):
    policy: _Policy
    classes: Annotated[list[str], Field(min_length=1, max_length=_INDEX_LIMIT)]
    splits: Annotated[dict[str, _Split], Field(min_length=1)]
    in_place: dict[_FileName, int] = {}  # modification time of each tar in ns, if made in place

    @model_validator(mode="after")
    def _each_file_once(self) -> Self:
        # Otherwise a tar of val could also be used for training.
        fields: dict[str, str] = {}  # file name -> the field that named it first
        for split, entry in self.splits.items():
            for number, file in enumerate([entry.index, *entry.shards]):
                field = f"splits.{split}." + (f"shards[{number - 1}]" if number else "index")
                if field != (first := fields.setdefault(file.name, field)):
                    raise ValueError(f"{field}.name: {first} has the name {file.name} already")
        return self


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a data set, opened. No image is read before it is used.

    `offset`, `size`, `crc32`, `shard`, `label`, `width` and `height` are columns of shape
    (num_samples,). They are mapped from the index file, so all processes of a node share them.
    """

    root: Path
    name: str
    digest: str  # sha256 of the index table; it changes with any image, any label and the order
    store: str  # "jpeg", or "raw" for uncompressed pixels
    classes: tuple[str, ...]
    shard_paths: tuple[Path, ...]
    shard_bytes: tuple[int, ...]
    offset: NDArray[np.uint64]
    size: NDArray[np.uint32]
    crc32: NDArray[np.uint32]
    shard: NDArray[np.uint16]
    label: NDArray[np.uint16]
    width: NDArray[np.uint16]
    height: NDArray[np.uint16]

    @property
    def num_samples(self) -> int:
        return len(self.offset)

    @cached_property
    def shard_samples(self) -> tuple[int, ...]:
        """The number of samples in each shard. Sample ids are consecutive, shard by shard."""
        return tuple(np.bincount(self.shard, minlength=len(self.shard_paths)).tolist())

    def describe(self, sample: int) -> str:
        """Names the location of a sample: `train-000003.tar, key 000003017 at byte 1536`."""
        path, offset = self.shard_paths[self.shard[sample]], int(self.offset[sample])
        try:
            with path.open("rb") as file:
                file.seek(offset - tarfile.BLOCKSIZE)
                member = tarfile.TarInfo.frombuf(file.read(512), "utf-8", "strict").name
        except (OSError, UnicodeDecodeError, tarfile.HeaderError):
            member = "unreadable"
        return f"{path}, key {member.partition('.')[0]} at byte {offset}"


class DataSet(NamedTuple):
    """The splits of a data set."""

    train: Split
    val: Split


def read_manifest(root: Path) -> dict[str, Any]:
    """Reads and checks the manifest of the data set at `root`.

    Raises:
        ShardError: there is no manifest, it is damaged, or another version wrote it.
    """
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["version"]
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(_missing(root)) from None
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ShardError(f"{path} is damaged; make the data set again") from None
    if version != FORMAT_VERSION:
        raise ShardError(
            f"{path} has format version {version}, but this fasttrain reads {FORMAT_VERSION}; "
            "make the data set again or install the fasttrain that wrote it"
        )
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        detail = error.errors(include_input=False)[0]
        steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in detail["loc"])
        field = "".join(steps).removeprefix(".")
        fault = ": ".join(filter(None, [field, detail["msg"].removeprefix("Value error, ")]))
        raise ShardError(f"{path} is damaged: {fault}; make the data set again") from None
    checked: dict[str, Any] = manifest
    return checked


def _missing(root: Path) -> str:
    """Says why there is no manifest at `root`, and what to do. `root` may hold photographs."""
    if (root / UNFINISHED).exists():
        return (
            f"the data set at {root} is not finished: run the command that began it again "
            f"({'make_digits.py' if root == DIGITS else 'make_shards.py'})"
        )
    try:
        held = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    except OSError:
        held = []
    if any(path.suffix == ".index" for path in held):
        return (
            f"no data set at {root}: it holds shards, but {MANIFEST} is missing; copy that file "
            "too, or make the data set again"
        )
    inside = [path for path in held if (path / MANIFEST).exists()]
    if inside:
        return f"no data set at {root}, but there is one at {inside[0]}; give that folder instead"
    command = f"    {commands.command('make_shards')}"
    if held:
        names = ", ".join(f"{path.name}/" if path.is_dir() else path.name for path in held[:3])
        more = ", ..." if len(held) > 3 else ""
        return (
            f"{root} holds no shards of fasttrain, but {names}{more}; if those are photographs, "
            f"make shards of them in another folder with\n{command} {root} data/NAME\n"
            "and give that folder instead (for train.py: --set data.root=data/NAME)"
        )
    if root == DIGITS:
        return (
            f"no data set at {root} (looked for {(root / MANIFEST).absolute()}); make the demo's "
            f"with\n    {commands.command('make_digits')}"
        )
    return (
        f"no data set at {root} (looked for {(root / MANIFEST).absolute()}); make one with\n"
        f"{command} /path/to/imagenet {root}\n"
        "or give the folder of existing shards (for train.py: --set data.root=/path/to/shards)"
    )


def open_split(
    root: Path, name: str, short_side: int | None = None, check_tars: bool = True
) -> Split:
    """Opens a split of the data set at `root`. This takes milliseconds.

    Args:
        name: "train" or "val".
        short_side: the short side in pixels to which the images must have been shrunk; None
            accepts any.
        check_tars: check that every tar is there and has the right size. One process per node
            should do this, to spare a shared file system. Readers check each tar on opening it.
    Raises:
        ShardError: the data set is missing or unfinished, its files are not those of the manifest,
            or its images were not shrunk to `short_side`.
    """
    manifest = read_manifest(root)
    if short_side is not None and short_side != manifest["policy"]["short_side"]:
        raise ShardError(
            f"the recipe asks for images of short side {short_side}, but those at {root} have "
            f"{manifest['policy']['short_side'] or 'their original size'}; make them again with "
            f"make_shards.py --short-side {short_side}, or change data.short_side"
        )
    if name not in manifest["splits"]:
        raise ShardError(
            f"{root} has no split {name}, only {', '.join(manifest['splits'])}; make it again from "
            "a source with both"
        )
    entry = manifest["splits"][name]
    paths = [root / shard["name"] for shard in entry["shards"]]
    tars = [(path, shard["size"]) for path, shard in zip(paths, entry["shards"], strict=True)]
    index = root / entry["index"]["name"]
    for path, size in [*(tars if check_tars else ()), (index, entry["index"]["size"])]:
        _check_file(path, size)
    columns, mapped = _read_index(index, entry["num_samples"])
    sizes = np.array([shard["size"] for shard in entry["shards"]], np.uint64)
    for what, wrong in _index_faults(columns, manifest, entry, sizes):
        if wrong.any():
            raise ShardError(
                f"{index} is damaged: {what}, first at sample {int(wrong.argmax())}; make the data "
                "set again"
            )
    digest = hashlib.sha256(mapped.data).hexdigest()  # takes 24 ms for ImageNet, without a copy
    if digest != entry["index"]["sha256"]:
        raise ShardError(
            f"{index} is damaged: its sha256 is not the one in {MANIFEST}; copy it again or make "
            "the data set again"
        )
    return Split(
        root=root,
        name=name,
        digest=entry["index"]["sha256"],
        store=manifest["policy"]["store"],
        classes=tuple(manifest["classes"]),
        shard_paths=tuple(paths),
        shard_bytes=tuple(sizes.tolist()),
        **columns,
    )


def check_unchanged(root: Path) -> None:
    """Checks that the tars of a data set that was made in place are those that were indexed.

    A tar with other labels often has the same size, because tars are padded. So times are compared.

    Raises:
        ShardError: there is no data set, or a tar has another modification time.
    """
    for name, mtime in read_manifest(root).get("in_place", {}).items():
        found = (root / name).stat().st_mtime_ns if (root / name).exists() else mtime
        if found != mtime:
            times = [
                f"{datetime.fromtimestamp(ns / 1e9):%Y-%m-%d %H:%M:%S}" for ns in (found, mtime)
            ]
            raise ShardError(
                f"{root / name} is of {times[0]}, but make_shards.py --in-place indexed it when it "
                f"was of {times[1]}: its labels may have changed\nremove {root / MANIFEST} and run "
                "make_shards.py --in-place again; or, if it is a copy, copy it with its time (cp "
                "-p, rsync -t)"
            )


def _check_file(path: Path, size: int) -> None:
    """Checks that a file exists and has `size` bytes, as the manifest says."""
    try:
        found = path.stat()
    except OSError as error:
        raise ShardError(
            f"{path}: {error.strerror}, but {MANIFEST} lists it: copy it again or make the data "
            "set again"
        ) from None
    if not stat.S_ISREG(found.st_mode):
        raise ShardError(f"{path} is not a file: copy it again or make the data set again")
    if found.st_size != size:
        raise ShardError(
            f"{path} has {found.st_size:,} bytes, but {MANIFEST} says {size:,}: copy it again or "
            "make the data set again"
        )


def _index_faults(
    columns: dict[str, NDArray[Any]],
    manifest: dict[str, Any],
    entry: dict[str, Any],
    sizes: NDArray[np.uint64],
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yields each possible fault of an index, with a mask (samples,) of the samples that have it.

    An index with such a fault would crash DALI and its process, or mix up the order of an epoch.
    """
    offset, size, shard = (columns[name] for name in ("offset", "size", "shard"))
    yield "there is no such shard", shard >= len(sizes)
    yield "there is no such class", columns["label"] >= len(manifest["classes"])
    ends = sizes[shard]
    # Not offset + size > ends: the sum may overflow.
    yield "its bytes are outside of its tar", (offset > ends) | (size > ends - offset)
    yield (
        "it has no bytes or no pixels",
        ~((size > 0) & (columns["width"] > 0) & (columns["height"] > 0)),
    )
    expected = np.repeat(
        np.arange(len(sizes)), [part["num_samples"] for part in entry["shards"]]
    ).astype(np.uint16)
    yield f"it is not in the shard that {MANIFEST} gives it", shard != expected
    if manifest["policy"]["store"] == "raw":
        pixels = columns["width"].astype(np.int64) * columns["height"]
        yield "it has fewer bytes than pixels", size < 3 * pixels
        yield "it has more bytes than pixels", size > 3 * pixels + PPM_HEADER


def _read_index(path: Path, num_samples: int) -> tuple[dict[str, NDArray[Any]], NDArray[np.uint8]]:
    """Returns the columns and the bytes of the whole file, as views of one memory map."""
    header = _INDEX_MAGIC + num_samples.to_bytes(8, "little")
    size = len(header) + num_samples * sum(np.dtype(dtype).itemsize for _, dtype in _COLUMNS)
    try:
        mapped = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ShardError(f"{path}: cannot be read ({reason})") from None
    if mapped[: len(header)].tobytes() != header or len(mapped) != size:
        raise ShardError(f"{path} is damaged or of another version; make the data set again")
    columns: dict[str, NDArray[Any]] = {}
    offset = len(header)
    for name, dtype in _COLUMNS:
        end = offset + num_samples * np.dtype(dtype).itemsize
        columns[name] = mapped[offset:end].view(dtype)
        offset = end
    return columns, mapped


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


class ShardWriter:
    """Appends samples to a tar. Collects its DALI index, its size in bytes and its sha256."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self.sha256 = hashlib.sha256()
        self.index: list[str] = []

    def add(self, key: str, suffix: str, data: bytes, label: int) -> int:
        """Appends `key.suffix` and `key.cls`. Returns the offset of the image's bytes."""
        text = b"%04d" % label  # a fixed width, which a DALI pipeline can parse
        offset = self._member(f"{key}.{suffix}", data)
        label_offset = self._member(f"{key}.cls", text)
        self.index.append(
            f"{suffix} {offset} {len(data)} {key}.{suffix} "
            f"cls {label_offset} {len(text)} {key}.cls\n"
        )
        return offset

    def _member(self, name: str, data: bytes) -> int:
        # Not webdataset's TarWriter: it writes PAX headers and the time of day. They cost 1 KB per
        # member and make every tar differ. Every reader takes USTAR with mtime 0.
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(data), 0o444
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        offset = self.size
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> bytes:
        """Ends the tar. Returns the contents of its DALI index."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        return "".join([f"v1.2 {len(self.index)}\n", *self.index]).encode()

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)


def write_index(path: Path, tables: Sequence[NDArray[np.int64]]) -> dict[str, Any]:
    """Writes a split's index table.

    Args:
        tables: one int64 array (samples, 7) per shard. The columns are offset, size, crc32, shard,
            label, width and height.
    Returns:
        The index's entry for the manifest.
    """
    rows = np.concatenate(tables)
    data = _INDEX_MAGIC + len(rows).to_bytes(8, "little")
    for (_, dtype), column in zip(_COLUMNS, rows.T, strict=True):
        assert column.min() >= 0 and column.max() <= np.iinfo(dtype).max
        data += column.astype(dtype).tobytes()
    files.write_bytes(path, data)
    return {"name": path.name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_manifest(root: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, which marks a data set as finished. Write every other file before."""
    data = json.dumps(manifest, indent=1).encode() + b"\n"
    files.write_bytes(root / MANIFEST_DIGEST, manifest_digest(data))
    files.write_bytes(root / MANIFEST, data)


def manifest_digest(manifest: bytes) -> bytes:
    """Returns the contents of `manifest.sha256`, given those of `manifest.json`."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()
