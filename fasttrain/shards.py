"""The on-disk contract: tar names, members, index table, manifest; written and read here.

    ROOT/train-000000.tar    plain WebDataset: <key>.jpg and <key>.cls, USTAR, mtime 0; the key is
                             the image's place in the shuffled order, nine digits
    ROOT/train-000000.idx    DALI's index of that tar, version 1.2
    ROOT/train.index         where each image lies, its label, size and crc32: for np.memmap
    ROOT/manifest.json       written last: what is here, with the size and sha256 of every file

A data set without its manifest is unfinished and is not read.
"""

import hashlib
import io
import json
import os
import signal
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain import config, rng

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
UNFINISHED = "UNFINISHED"  # there from the first shard to the manifest
SPLITS = ("train", "val")
SHARD_SIZE = 1000  # images; about 110 MB of original ImageNet photographs
REPAIR_QUALITY = 95  # of images re-encoded because not every decoder takes them
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
_INDEX_MAGIC = b"fasttrain index 1\n"
_COLUMNS = (  # 24 bytes an image: 31 MB for ImageNet's training split
    ("offset", "<u8"),  # of the image's bytes in its tar
    ("size", "<u4"),  # bytes
    ("crc32", "<u4"),  # of the image's bytes
    ("shard", "<u2"),
    ("label", "<u2"),
    ("width", "<u2"),  # pixels, as stored: EXIF orientation is ignored, as torchvision does
    ("height", "<u2"),
)


class ShardError(config.Fault, ValueError):
    """A source cannot be sharded or a data set cannot be read; says where and what to do."""


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Split:
    """One split of a data set, opened: nothing but the manifest is read until it is used.

    `offset, size, crc32, shard, label, width, height` are columns of `num_samples` values, mapped
    from the index file and so shared by all processes of a node.
    """

    root: Path
    name: str
    digest: str  # sha256 of the index table, and so of every image, label and their order
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

    def describe(self, sample: int) -> str:
        """`train-000003.tar, key 000003017 at byte 1536`: where a person finds the sample."""
        path, offset = self.shard_paths[self.shard[sample]], int(self.offset[sample])
        try:
            with path.open("rb") as file:
                file.seek(offset - tarfile.BLOCKSIZE)
                member = tarfile.TarInfo.frombuf(file.read(512), "utf-8", "strict").name
        except (OSError, tarfile.HeaderError):
            member = "unreadable"
        return f"{path}, key {member.removesuffix('.jpg')} at byte {offset}"


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of the data set at `root`.

    Raises:
        ShardError: there is none, or it was written by another version.
    """
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["version"]
    except FileNotFoundError:
        raise ShardError(
            f"no data set at {root} (looked for {path.absolute()}); make one with\n"
            f"    python tools/make_shards.py /path/to/imagenet {root}\n"
            "or name the folder of existing shards with --set data.root=/path/to/shards"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ShardError(f"{path} is damaged; make the data set again") from None
    if version != FORMAT_VERSION:
        raise ShardError(
            f"{path} has format version {version}, this fasttrain reads {FORMAT_VERSION}; "
            "make the data set again or install the fasttrain that wrote it"
        )
    return manifest


def open_split(root: Path, name: str) -> Split:
    """Opens split `name` ("train" or "val") of the data set at `root`, in milliseconds.

    Raises:
        ShardError: the data set is missing, unfinished, or its files are not those of the manifest.
    """
    manifest = read_manifest(root)
    if name not in manifest["splits"]:
        raise ShardError(f"{root} has no split {name}, only {', '.join(manifest['splits'])}")
    entry = manifest["splits"][name]
    paths = [root / shard["name"] for shard in entry["shards"]]
    for path, size in [
        *((path, shard["size"]) for path, shard in zip(paths, entry["shards"], strict=True)),
        (root / entry["index"]["name"], entry["index"]["size"]),
    ]:
        try:
            found = path.stat().st_size
        except OSError as error:
            raise ShardError(f"{path}: {error.strerror}, but {MANIFEST} lists it") from None
        if found != size:
            raise ShardError(
                f"{path} has {found:,} bytes, {MANIFEST} says {size:,}: copy it anew or make the "
                "data set again"
            )
    columns = _read_index(root / entry["index"]["name"], entry["num_samples"])
    sizes = np.array([shard["size"] for shard in entry["shards"]], np.uint64)
    # DALI takes a lie in these for a crash of the process, so they are checked here.
    if not (
        (columns["shard"] < len(paths)).all()
        and (columns["label"] < len(manifest["classes"])).all()
        and (columns["offset"] + columns["size"] <= sizes[columns["shard"]]).all()
    ):
        raise ShardError(f"{root / entry['index']['name']} is damaged; make the data set again")
    return Split(
        root=root,
        name=name,
        digest=entry["index"]["sha256"],
        classes=tuple(manifest["classes"]),
        shard_paths=tuple(paths),
        shard_bytes=tuple(sizes.tolist()),
        **columns,
    )


def _read_index(path: Path, num_samples: int) -> dict[str, NDArray[Any]]:
    offset = len(_INDEX_MAGIC) + 8
    columns: dict[str, NDArray[Any]] = {}
    with path.open("rb") as file:
        header = file.read(offset)
    if header != _INDEX_MAGIC + num_samples.to_bytes(8, "little"):
        raise ShardError(f"{path} is damaged or of another version; make the data set again")
    for name, dtype in _COLUMNS:
        columns[name] = np.memmap(path, dtype, "r", offset, (num_samples,))
        offset += num_samples * np.dtype(dtype).itemsize
    return columns


# --------------------------------------------------------------------------------------------------
# Sources
# --------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """An image of a source before it is looked into; `name` is its path within the source."""

    name: str
    label: int


@dataclass(frozen=True, slots=True)
class Source:
    """Labelled images in the form a user has them."""

    root: Path
    form: str
    classes: tuple[str, ...]  # sorted; a label is a position in it
    splits: Mapping[str, Sequence[Candidate]]
    ignored: int  # files whose names are not those of images


def scan_image_folder(root: Path) -> Source:
    """Lists an ImageFolder: `train/<class>/*` and `val/<class>/*`, classes in sorted order.

    Raises:
        ShardError: a split, a class or all images of a class are missing.
    """
    for split in SPLITS:
        if not (root / split).is_dir():
            raise ShardError(
                f"{root} is not an ImageFolder: there is no folder {root / split}; expected "
                "train/<class>/ and val/<class>/ with images in them"
            )
    classes = tuple(sorted(path.name for path in _visible(root / "train") if path.is_dir()))
    labels = {name: label for label, name in enumerate(classes)}
    if not classes:
        raise ShardError(f"{root / 'train'} holds no class folders; expected train/<class>/")
    splits: dict[str, list[Candidate]] = {}
    ignored = 0
    for split in SPLITS:
        splits[split] = []
        for folder in _visible(root / split):
            if not folder.is_dir():
                if folder.suffix.lower() in IMAGE_SUFFIXES:
                    raise ShardError(
                        f"{folder} lies outside any class folder; sort the images of {split}/ into "
                        f"{split}/<class>/"
                    )
                ignored += 1
                continue
            if folder.name not in labels:
                raise ShardError(f"{folder}: there is no class of that name in {root / 'train'}")
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
            ignored += len(files) - len(images)
            if split == "train" and not images:
                raise ShardError(f"{folder} holds no images; remove the class or fill it")
            splits[split] += [
                Candidate(path.relative_to(root).as_posix(), labels[folder.name]) for path in images
            ]
        if not splits[split]:
            raise ShardError(f"{root / split} holds no images")
    return Source(root, "imagefolder", classes, splits, ignored)


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


class Image(NamedTuple):
    """An image that was decoded in full and is fit to be trained on."""

    data: bytes
    width: int
    height: int
    repaired: str | None  # why it was re-encoded


@dataclass(slots=True)
class _Shard:
    """What was written of one shard; rows are its part of the index table."""

    entry: dict[str, Any]
    rows: list[tuple[int, ...]]
    rejected: list[dict[str, str]]
    repaired: list[dict[str, str]]


def write_dataset(
    source: Source,
    out: Path,
    *,
    seed: int = 0,
    workers: int = 1,
    shard_size: int = SHARD_SIZE,
    on_progress: Callable[[int], None] = lambda images: None,
) -> dict[str, Any]:
    """Writes `source` as a data set into the folder `out` and returns its manifest.

    The result is the same to the byte on every machine and with every number of `workers`
    (processes). Images that cannot be decoded are rejected and listed. `on_progress` is told how
    many images were done since it was last called.

    Raises:
        ShardError: `out` holds other shards already, or a split has no usable image.
    """
    _claim(out)
    tasks = [
        partial(_write_shard, source.root, out, f"{split}-{number:06d}", first, candidates)
        for split, all_candidates in source.splits.items()
        for number, first, candidates in _deal(all_candidates, seed, shard_size)
    ]
    shards: dict[str, list[_Shard]] = {split: [] for split in source.splits}
    for shard in _run(tasks, workers, on_progress):
        shards[shard.entry["name"].partition("-")[0]].append(shard)
    manifest: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "form": source.form,
        "seed": seed,
        "policy": "pass-through",
        "ignored_files": source.ignored,
        "classes": list(source.classes),
        "splits": {},
    }
    for split, parts in shards.items():
        parts.sort(key=lambda shard: shard.entry["name"])
        manifest["splits"][split] = _finish_split(out, split, parts)
    _write_atomically(out / MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")
    (out / UNFINISHED).unlink()
    return manifest


def _claim(out: Path) -> None:
    """Makes `out` ready to be written to, and clears away what an unfinished attempt left there."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / MANIFEST).exists():
        raise ShardError(
            f"{out} already holds a finished data set; remove it or choose another folder"
        )
    patterns = ("-*.tar", "-*.idx", ".index", "*.tmp")
    found = [path for split in SPLITS for end in patterns for path in out.glob(f"{split}{end}")]
    if found and not (out / UNFINISHED).exists():
        raise ShardError(f"{out} holds shards of other origin ({found[0].name}); choose another")
    (out / UNFINISHED).touch()
    for path in found:
        path.unlink()


def _deal(
    candidates: Sequence[Candidate], seed: int, shard_size: int
) -> Iterator[tuple[int, int, list[Candidate]]]:
    """Shuffles a split and deals it into balanced shards: (number, first key, candidates).

    2,300 images make two shards of 1,150, not 1,000 + 1,000 + 300.
    """
    order = rng.permutation(seed, rng.Stream.SHARDS, 0, len(candidates))
    num_shards = max(1, round(len(candidates) / shard_size))
    bounds = [len(candidates) * i // num_shards for i in range(num_shards + 1)]
    for number in range(num_shards):
        first, end = bounds[number], bounds[number + 1]
        yield number, first, [candidates[i] for i in order[first:end]]


def _run(
    tasks: Sequence[Callable[[], _Shard]], workers: int, on_progress: Callable[[int], None]
) -> Iterator[_Shard]:
    """Runs the tasks, in this process or in `workers` new ones, in whatever order they end."""

    def counted(shard: _Shard) -> _Shard:
        on_progress(len(shard.rows) + len(shard.rejected))
        return shard

    if workers == 1 or len(tasks) == 1:
        yield from (counted(task()) for task in tasks)
        return
    # New interpreters, not forks: the caller's threads (a progress bar) must not be copied.
    # They leave Ctrl-C to the caller.
    ignore_interrupt = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    workers = min(workers, len(tasks))
    with ProcessPoolExecutor(workers, get_context("spawn"), ignore_interrupt) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield counted(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def inspect_image(data: bytes) -> Image:
    """Decodes an image in full, and re-encodes what is not a greyscale or RGB JPEG as one.

    Raises:
        ValueError: not an image, truncated, or too large for the index.
    """
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    try:
        with pil.open(io.BytesIO(data)) as image:
            width, height = image.size
            if max(width, height) > 65_535:
                raise ValueError(f"{width} x {height} pixels: too large")
            image.load()
            if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
                return Image(data, width, height, None)
            encoded = io.BytesIO()
            image.convert("RGB").save(encoded, "JPEG", quality=REPAIR_QUALITY, subsampling=0)
            return Image(encoded.getvalue(), width, height, f"{image.format} {image.mode}")
    except UnidentifiedImageError:
        raise ValueError("not an image") from None
    except (OSError, SyntaxError, pil.DecompressionBombError) as error:
        raise ValueError(str(error)) from None


def _write_shard(
    source: Path, out: Path, name: str, first_key: int, candidates: Sequence[Candidate]
) -> _Shard:
    """Writes `name`.tar and `name`.idx; a rejected image leaves its key unused."""
    rows: list[tuple[int, ...]] = []
    rejected: list[dict[str, str]] = []
    repaired: list[dict[str, str]] = []
    index: list[str] = []
    path = out / f"{name}.tar"
    number = int(name.partition("-")[2])
    with _atomic(path) as file:
        tar = _HashedFile(file)
        for key, candidate in enumerate(candidates, first_key):
            try:
                data = (source / candidate.name).read_bytes()
            except OSError as error:
                raise ShardError(f"{source / candidate.name}: {error.strerror}") from None
            try:
                image = inspect_image(data)
            except ValueError as error:
                rejected.append({"name": candidate.name, "reason": str(error)})
                continue
            if image.repaired:
                repaired.append({"name": candidate.name, "reason": image.repaired})
            label = b"%04d" % candidate.label  # of one width, which DALI pipelines can read
            offset = tar.add(f"{key:09d}.jpg", image.data)
            label_offset = tar.add(f"{key:09d}.cls", label)
            size, crc32 = len(image.data), zlib.crc32(image.data)
            rows.append((offset, size, crc32, number, candidate.label, image.width, image.height))
            index.append(
                f"jpg {offset} {size} {key:09d}.jpg cls {label_offset} {len(label)} {key:09d}.cls"
            )
        tar.finish()
    dali_index = "\n".join([f"v1.2 {len(index)}", *index]).encode() + b"\n"
    _write_atomically(path.with_suffix(".idx"), dali_index)
    entry = {
        "name": path.name,
        "num_samples": len(rows),
        "size": tar.size,
        "sha256": tar.sha256.hexdigest(),
        "idx_sha256": hashlib.sha256(dali_index).hexdigest(),
    }
    return _Shard(entry, rows, rejected, repaired)


def _finish_split(out: Path, split: str, parts: Sequence[_Shard]) -> dict[str, Any]:
    """Writes the index table of a split and returns its part of the manifest."""
    rows = [row for part in parts for row in part.rows]
    rejected = [item for part in parts for item in part.rejected]
    if not rows:
        first = f": {rejected[0]['name']}: {rejected[0]['reason']}" if rejected else ""
        raise ShardError(f"no image of {split} could be decoded{first}")
    table = _INDEX_MAGIC + len(rows).to_bytes(8, "little")
    for (_, dtype), column in zip(_COLUMNS, zip(*rows, strict=True), strict=True):
        table += np.array(column, dtype).tobytes()
    path = out / f"{split}.index"
    _write_atomically(path, table)
    digest = hashlib.sha256(table).hexdigest()
    return {
        "num_samples": len(rows),
        "index": {"name": path.name, "size": len(table), "sha256": digest},
        "shards": [part.entry for part in parts],
        "rejected": rejected,
        "repaired": [item for part in parts for item in part.repaired],
    }


class _HashedFile:
    """Appends tar members to a file and keeps the digest of all that was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self.sha256 = hashlib.sha256()

    def add(self, name: str, data: bytes) -> int:
        """Appends a member and returns the offset of its bytes."""
        # Not webdataset's TarWriter: it writes PAX headers and the time of day (1 KB a member, and
        # never twice the same bytes), where USTAR with mtime 0 is what every reader takes.
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(data), 0o444
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        offset = self.size
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> None:
        self._write(bytes(2 * tarfile.BLOCKSIZE))

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)


@contextmanager
def _atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name whole and on the disk, or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_atomically(path: Path, data: bytes) -> None:
    with _atomic(path) as file:
        file.write(data)
