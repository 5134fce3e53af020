"""Makes a data set from a source: decodes, shuffles and writes the images as shards.

    UNFINISHED                     the options; removed after the last file is written
    train-000003.fasttrain.part    beside a finished shard: its rows of the index, its rejections

A shard depends only on the source and the options. So any number of processes and machines can
write shards, in any order. A shard that was finished before a kill is not written again.
"""

import contextlib
import hashlib
import io
import json
import os
import signal
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeVar

import numpy as np

from fasttrain import files, rng, shards
from fasttrain.archives import MAX_IMAGE_BYTES
from fasttrain.listing import Listing, Source
from fasttrain.shards import (
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    UNFINISHED,
    ShardError,
    ShardWriter,
    read_manifest,
    write_index,
    write_manifest,
)
from fasttrain.spool import SPOOL
from fasttrain.wds import wds_samples

if TYPE_CHECKING:
    from PIL import Image as pil

SHARD_SIZE = 1000  # images; about 110 MB of original ImageNet photographs
MAX_OPEN = 32  # archives that a process keeps open
REPAIR_QUALITY = 95  # JPEG quality of images that are re-encoded because a decoder may refuse them
PART = ".fasttrain.part"
_SOURCE = {"source", "times"}  # the entries of UNFINISHED that describe the images
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Policy:
    """How images are stored. The manifest keeps it, so a recipe can require a short side."""

    short_side: int | None = None  # larger images are shrunk to this short side, in pixels
    quality: int = 90  # JPEG quality of the shrunk images
    resize_val: bool = False  # shrink validation images too
    store: Literal["jpeg", "raw"] = "jpeg"  # raw: uncompressed pixels, as .ppm
    decode: bool = True  # decode every image in full; False: read its header only


@dataclass(frozen=True, slots=True)
class Build:
    """How a data set is made, apart from its `Policy`."""

    seed: int = 0  # of the order of the images
    shard_size: int = SHARD_SIZE  # approximate number of images per shard
    part: tuple[int, int] = (1, 1)  # (i, n): write every n-th shard from the i-th on, i from 1
    in_place: bool = False  # index the WebDataset tars of the source, which are in `out`
    strict: bool = False  # raise an error for rejected images, after all shards are written
    workers: int = 1  # processes; their number does not change the result


@dataclass(frozen=True, slots=True)
class Progress:
    """The work done since the last report."""

    images: int
    num_bytes: int


class Image(NamedTuple):
    """An image as it is stored in a shard."""

    data: bytes
    suffix: str  # "jpg" or "ppm"
    width: int  # pixels
    height: int
    repaired: str | None  # its original format, if it was re-encoded because a decoder may refuse


_POINTERS = {b"version https://git-lfs": "git lfs pull", b"/annex/objects/": "git annex get ."}


def _what_it_is(data: bytes) -> str:
    for head, command in _POINTERS.items():
        if data.startswith(head):
            return f"a pointer to an image that was not downloaded: {command}"
    return "not an image, or of a format that PIL does not read"


def prepare_image(data: bytes, split: str, policy: Policy) -> Image:
    """Checks an image, and re-encodes it if the policy or a decoder needs that.

    Greyscale and RGB JPEGs that need not shrink keep their bytes. All other images (CMYK, PNG and
    so on) become 8-bit RGB with the pixels that PIL gives. EXIF orientation is ignored, as
    torchvision does.

    Args:
        data: the bytes of the image file.
        split: "train" or "val".
    Raises:
        ValueError: the data is not an image, or it is damaged or too large for the index. Or its
            pixels have an unknown range, such as floats.
    """
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    short_side = policy.short_side if split == "train" or policy.resize_val else None
    try:
        with warnings.catch_warnings(action="ignore"), pil.open(io.BytesIO(data)) as image:
            width, height = image.size
            if max(width, height) > 65_535:
                raise ValueError(f"{width} x {height} pixels: more than the index can hold")
            shrinks = short_side is not None and min(width, height) > short_side
            common = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")
            repaired = None if common else _kind(image)
            if common and not shrinks and policy.store == "jpeg":
                if policy.decode:
                    image.load()
                return Image(data, "jpg", width, height, None)
            if shrinks:
                assert short_side
                short = min(width, height)
                size = round(width * short_side / short), round(height * short_side / short)
                # libjpeg decodes to a half or a quarter in less time. At least twice the final
                # size is kept, so that the bicubic filter still decides the result.
                image.draft(None, (2 * size[0], 2 * size[1]))
                rgb = _eight_bit_rgb(image).resize(size, pil.Resampling.BICUBIC)
            else:
                rgb = _eight_bit_rgb(image)
            if repaired:
                repaired += _lost(image, rgb)
            if policy.store == "raw":
                header = f"P6\n{rgb.width} {rgb.height}\n255\n".encode()
                return Image(header + rgb.tobytes(), "ppm", rgb.width, rgb.height, repaired)
            encoded = io.BytesIO()
            if shrinks:
                rgb.save(encoded, "JPEG", quality=policy.quality)
            else:
                rgb.save(encoded, "JPEG", quality=REPAIR_QUALITY, subsampling=0)
            return Image(encoded.getvalue(), "jpg", rgb.width, rgb.height, repaired)
    except UnidentifiedImageError:
        raise ValueError(_what_it_is(data)) from None
    except (OSError, SyntaxError, EOFError, pil.DecompressionBombError) as error:
        raise ValueError(str(error)) from None


_RGB_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262  # tags: bits per sample; photometric, 0 if white is zero


def _is_sixteen_bit(image: "pil.Image") -> bool:
    # Some versions of PIL return 16-bit greyscale PNG and PGM as 32-bit pixels.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _kind(image: "pil.Image") -> str:
    """Returns format and mode of an image that is re-encoded, for the manifest.

    Raises:
        ValueError: it cannot become 8-bit RGB, because the range of its pixels is not known.
    """
    kind = f"{image.format} {image.mode}"
    if _is_sixteen_bit(image):
        return f"{kind}, scaled from 16 bits to 8"
    if image.mode in ("I", "F"):
        numbers = "floating-point" if image.mode == "F" else "signed or 32-bit"
        raise ValueError(
            f"{kind}: its pixels are {numbers} numbers of unknown range; scale them to 0-255 and "
            "save the image with 8 bits"
        )
    if image.mode not in _RGB_MODES:
        raise ValueError(f"{kind}: has no RGB pixels; save it as an 8-bit RGB image")
    return kind


def _eight_bit_rgb(image: "pil.Image") -> "pil.Image":
    """Converts an image to 8-bit RGB. Keeps the high byte of 16-bit pixels, as PIL does for RGB."""
    from PIL import Image as pil

    if not _is_sixteen_bit(image):
        return image.convert("RGB")
    # Not convert("RGB"): it makes every value above 255 white.
    pixels = np.asarray(image).astype(np.uint16)
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        pixels <<= 16 - tags[_TIFF_BITS][0]  # PIL does not scale the values of 12-bit images
        if tags[_TIFF_PHOTOMETRIC] == 0:
            pixels = ~pixels
    return pil.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")


def _lost(image: "pil.Image", rgb: "pil.Image") -> str:
    """Returns a remark if 8-bit RGB lost most of an image; otherwise an empty text."""
    if _is_sixteen_bit(image) and np.asarray(rgb).max() < 16:
        return "; almost black now, as no value is above 4,095 of 65,535"
    if image.has_transparency_data and np.ptp(np.asarray(rgb), (0, 1)).max() == 0:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        if np.ptp(alpha):
            return (
                "; of one colour now, as its picture is in the transparency: put it on a background"
            )
    return ""


# --------------------------------------------------------------------------------------------------
# One shard
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Task:
    """A shard to write, or a tar to index in place."""

    path: Path  # the tar
    split: str
    number: int  # of the shard within its split
    first_key: int
    images: Listing  # in the order of the shard
    policy: Policy

    @property
    def part(self) -> Path:
        return self.path.with_suffix(PART)


def _deal(
    split: str, listing: Listing, out: Path, policy: Policy, seed: int, shard_size: int
) -> Iterator[_Task]:
    """Shuffles a split and divides it into shards of equal size.

    2,300 images make two shards of 1,150, not 1,000 + 1,000 + 300.
    """
    order = rng.permutation(seed, rng.Stream.SHARDS, 0, len(listing))
    num_shards = max(1, round(len(listing) / shard_size))
    for number in range(num_shards):
        first, end = (len(listing) * n // num_shards for n in (number, number + 1))
        path = out / f"{split}-{number:06d}.tar"
        yield _Task(path, split, number, first, listing.take(order[first:end]), policy)


def _deal_in_place(split: str, listing: Listing, policy: Policy) -> Iterator[_Task]:
    """Yields one task per tar of the source, with its images in the order of their offsets."""
    for number, path in enumerate(sorted(listing.containers)):
        (own,) = np.nonzero(listing.container == listing.containers.index(path))
        own = own[np.argsort(listing.offset[own])]
        yield _Task(path, split, number, 0, listing.take(own), policy)


@dataclass(slots=True)
class _Part:
    """The results of writing a shard, which its .part file holds."""

    rows: list[list[int]] = field(default_factory=list)
    rejected: list[dict[str, str]] = field(default_factory=list)
    repaired: list[dict[str, str]] = field(default_factory=list)

    def write(self, task: _Task, size: int, sha256: str, index: bytes) -> None:
        """Writes DALI's index and the .part file beside a finished tar."""
        files.write_bytes(task.path.with_suffix(".idx"), index)
        entry = {
            "name": task.path.name,
            "num_samples": len(self.rows),
            "size": size,
            "sha256": sha256,
            "idx_sha256": hashlib.sha256(index).hexdigest(),
        }
        files.write_bytes(task.part, json.dumps({"entry": entry, **asdict(self)}).encode())


def _write_shard(task: _Task) -> Progress:
    """Writes a tar, its DALI index and its .part file. A rejected image leaves its key unused."""
    part = _Part()
    with files.atomic(task.path) as file:
        writer = ShardWriter(file)
        for key, (name, label, data) in enumerate(read_images(task.images), task.first_key):
            try:
                image = prepare_image(data, task.split, task.policy)
            except ValueError as error:
                part.rejected.append({"name": f"{task.split}/{name}", "reason": str(error)})
                continue
            if image.repaired:
                part.repaired.append({"name": f"{task.split}/{name}", "reason": image.repaired})
            offset = writer.add(f"{key:09d}", image.suffix, image.data, label)
            location = (offset, len(image.data), zlib.crc32(image.data))
            part.rows.append([*location, task.number, label, image.width, image.height])
        index = writer.finish()
    part.write(task, writer.size, writer.sha256.hexdigest(), index)
    return Progress(len(task.images), writer.size)


def _index_shard(task: _Task) -> Progress:
    """Indexes a tar of the source where it is. Rejects images that would need re-encoding."""
    part = _Part()
    path = task.path
    samples = {sample.image.offset: sample for sample in wds_samples(path)}
    index = []
    offsets = task.images.offset.tolist()
    for offset, (name, label, data) in zip(offsets, read_images(task.images), strict=True):
        try:
            image = prepare_image(data, task.split, task.policy)
            if image.repaired:
                raise ValueError(f"{image.repaired} must be re-encoded: leave out --in-place")
        except ValueError as error:
            part.rejected.append({"name": f"{task.split}/{name}", "reason": str(error)})
            continue
        location = (offset, len(data), zlib.crc32(data))
        part.rows.append([*location, task.number, label, image.width, image.height])
        members = [(m, m.name.rpartition("/")[2].partition(".")[2]) for m in samples[offset]]
        index.append(" ".join(f"{end} {m.offset} {m.size} {m.name}" for m, end in members) + "\n")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        _check_mtime(file.fileno(), path, int(task.images.mtime[0]))
    text = "".join([f"v1.2 {len(index)}\n", *index]).encode()
    part.write(task, path.stat().st_size, digest, text)
    return Progress(len(task.images), path.stat().st_size)


# --------------------------------------------------------------------------------------------------
# The data set
# --------------------------------------------------------------------------------------------------


def write_dataset(
    source: Source,
    out: Path,
    policy: Policy = Policy(),
    build: Build = Build(),
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any] | None:
    """Writes `source` as a data set into the folder `out`, or finishes what an earlier call began.

    Every machine writes the same bytes. Images that cannot be decoded are rejected, and the
    manifest lists them. If several processes write parts, the one that writes the last shard
    finishes the data set.

    Args:
        policy: how images are stored.
        build: order, shards, parts and processes.
        on_progress: is called once at the start for the shards that are done already, and after
            each shard.
    Returns:
        The manifest, or None while shards of other parts are missing.
    Raises:
        ShardError: `out` holds other shards, or was begun with other options. Or images were
            rejected and `build.strict` is set, or a split has no usable image.
    """
    try:
        claim(out, source, policy, build.seed, build.shard_size, build.in_place)
    except ShardError:
        if build.part != (1, 1) and _is_finished(source, out, policy, build.seed):
            return read_manifest(out)  # the other parts finished it before this one began
        raise
    if (out / MANIFEST).exists():  # an earlier call was killed before it removed its files
        _clear_away(out)
        return read_manifest(out)
    tasks = _tasks(source, out, policy, build)
    index, parts = build.part
    own = [task for number, task in enumerate(tasks) if number % parts == index - 1]
    todo = [task for task in own if not task.part.exists()]
    on_progress(Progress(sum(len(t.images) for t in own) - sum(len(t.images) for t in todo), 0))
    write = _index_shard if build.in_place else _write_shard
    for done in run_tasks([partial(write, task) for task in todo], build.workers):
        on_progress(done)
    if not all(task.part.exists() for task in tasks) and not (out / MANIFEST).exists():
        return None
    with _finishing(out) as unfinished:  # several parts may end at once, and one must finish
        if unfinished:
            _finish(source, out, policy, tasks, build)
    return read_manifest(out)


def _tasks(source: Source, out: Path, policy: Policy, build: Build) -> list[_Task]:
    """Returns all shards of a data set, in order."""
    tasks: list[_Task] = []
    for split, listing in source.splits.items():
        if build.in_place:
            tasks += _deal_in_place(split, listing, policy)
        else:
            tasks += _deal(split, listing, out, policy, build.seed, build.shard_size)
    return tasks


@contextlib.contextmanager
def _finishing(out: Path) -> Iterator[bool]:
    """Holds the lock of the data set's last phase. Yields True if the data set is unfinished."""
    try:
        file = (out / UNFINISHED).open("rb")
    except FileNotFoundError:
        yield False
        return
    with file:
        files.lock(file.fileno())
        yield (out / UNFINISHED).exists()


def _finish(
    source: Source, out: Path, policy: Policy, tasks: Sequence[_Task], build: Build
) -> None:
    """Writes the index tables, then the manifest, and removes the temporary files."""
    splits = {
        split: _finish_split(out, split, [task.part for task in tasks if task.split == split])
        for split in source.splits
    }
    rejected = [item for entry in splits.values() for item in entry["rejected"]]
    if build.strict and rejected:
        listed = "\n  ".join(f"{item['name']}: {item['reason']}" for item in rejected)
        raise ShardError(
            f"--strict: {len(rejected)} images were rejected:\n  {listed}\n"
            "repair the source and start in a new folder, or leave --strict out to do without them"
        )
    manifest = {
        "version": FORMAT_VERSION,
        "form": source.form,
        "source": _digest(source),
        **({"archives": source.archives} if source.archives else {}),
        "seed": build.seed,
        "policy": asdict(policy),
        **({"in_place": _tar_times(source)} if build.in_place else {}),
        "ignored_files": source.ignored,
        "classes": list(source.classes),
        "splits": splits,
    }
    write_manifest(out, manifest)
    _clear_away(out)


def check_out(out: Path, in_place: bool = False) -> None:
    """Checks that a data set may be begun or finished in the folder `out`.

    Raises:
        ShardError: it holds a finished data set, or other files with the names of shards.
    """
    # Before UNFINISHED is checked: another part that begins now writes UNFINISHED before any shard.
    found = [path for split in SPLITS for path in out.glob(f"{split}*")]
    if (out / UNFINISHED).exists():
        return
    if (out / MANIFEST).exists():
        raise ShardError(
            f"{out} already holds a finished data set; {_how_to_start_again(out, in_place)}"
        )
    if found and not in_place:
        raise ShardError(
            f"{out} holds files that fasttrain did not write ({found[0].name}); choose another "
            "folder"
        )


def is_finished(out: Path) -> bool:
    """Returns whether the folder `out` holds a finished data set."""
    return (out / MANIFEST).exists() and not (out / UNFINISHED).exists()


def _is_finished(source: Source, out: Path, policy: Policy, seed: int) -> bool:
    """Returns whether `out` holds the finished data set of this source and these options."""
    if not is_finished(out):
        return False
    manifest = read_manifest(out)
    kept = [manifest.get(key) for key in ("form", "source", "seed", "policy")]
    return kept == [source.form, _digest(source), seed, asdict(policy)]


def check_same(out: Path, expected: Mapping[str, Any], source: Source | None = None) -> None:
    """Checks that the finished data set in `out` is the one that the user asks for.

    Args:
        expected: entries that the manifest must have, such as the seed and the policy.
        source: the source as it is now; None if its files were compared already.
    Raises:
        ShardError: it is another data set, or the source changed since it was made.
    """
    manifest = read_manifest(out)
    changed = [
        "source: other files, or other contents of them"
        if key == "archives"
        else f"{key}: {manifest.get(key)} -> {value}"
        for key, value in expected.items()
        if manifest.get(key) != value
    ]
    if source and not changed:
        if manifest.get("source") != _digest(source):
            changed.append("source: other images, sizes or classes")
        elif _newest_time(source) > (out / MANIFEST).stat().st_mtime_ns:
            changed.append(f"source: changed since then ({_newest(source)})")
    if changed:
        raise ShardError(
            "\n  ".join([f"{out} already holds another finished data set:", *changed])
            + f"\n{_how_to_start_again(out, 'in_place' in manifest)}"
        )


def _how_to_start_again(out: Path, in_place: bool) -> str:
    """Says what to remove. The tars of a data set that was made in place are the user's own."""
    if not in_place:
        return f"remove {out} and start again, or choose another folder"
    found = [name for name in (MANIFEST, UNFINISHED) if (out / name).exists()]
    found += [f"*{PART}"] if any(out.glob(f"*{PART}")) else []
    return f"keep the tars, remove {', '.join(found)} in {out} and start again"


def claim(
    out: Path,
    source: Source,
    policy: Policy,
    seed: int,
    shard_size: int,
    in_place: bool = False,
) -> None:
    """Reserves the folder `out` for a data set with these options, by writing UNFINISHED.

    Raises:
        ShardError: the folder cannot be used, or was begun with other options or another source.
    """
    options = {
        "version": FORMAT_VERSION,
        "reading_rules": shards.READING_RULES,
        "form": source.form,
        "source": _digest(source),
        "times": _times(source),
        "seed": seed,
        "shard_size": shard_size,
        "in_place": in_place,
        **asdict(policy),
    }
    check_out(out, in_place)
    out.mkdir(parents=True, exist_ok=True)
    if (out / UNFINISHED).exists():
        try:
            begun = json.loads((out / UNFINISHED).read_bytes())
        except ValueError:
            begun = {}
        changed = {k: f"{begun.get(k)} -> {v}" for k, v in options.items() if begun.get(k) != v}
        if changed.keys() - _SOURCE:
            if "reading_rules" in changed:
                raise ShardError(
                    f"{out} was begun by a fasttrain that reads sources in another way (reading "
                    f"rules {changed['reading_rules']}): finish it with that version; or "
                    f"{_how_to_start_again(out, in_place)}"
                )
            lines = [f"{key}: {change}" for key, change in changed.items() if key not in _SOURCE]
            raise ShardError(
                "\n  ".join([f"{out} was begun with other options:", *lines])
                + f"\nuse the old options to finish it; or {_how_to_start_again(out, in_place)}"
            )
        if changed:
            what = "files or sizes" if "source" in changed else "modification times"
            raise ShardError(
                f"{out} was begun when the source had other {what} (newest now: "
                f"{_newest(source)}):\nold and new images would be mixed; "
                f"{_how_to_start_again(out, in_place)}. If parts read copies of the source, these "
                "must keep the times (cp -p, rsync -t)"
            )
        return
    files.write_bytes(out / UNFINISHED, json.dumps(options, indent=1).encode())


def estimated_bytes(split: str, listing: Listing, policy: Policy) -> int:
    """Estimates the size of a split on disk, in bytes."""
    if policy.short_side and (split == "train" or policy.resize_val):
        pixels = policy.short_side**2 * 4 // 3 * len(listing)
        # 0.33 bytes per pixel, measured on 1,000 ImageNet photographs at 256 px and quality 90.
        return 3 * pixels if policy.store == "raw" else pixels // 3
    return int(listing.size.sum())


def _digest(source: Source) -> str:
    """Returns a digest of the classes and of the names, labels and sizes of all images."""
    digest = hashlib.sha256("\0".join(source.classes).encode())
    for split, listing in source.splits.items():
        digest.update(f"\1{split}\1".encode())
        # File names of other systems may hold bytes that are not UTF-8.
        digest.update("\0".join(listing.names).encode("utf-8", "surrogateescape"))
        digest.update(listing.labels.tobytes())
        digest.update(listing.size.tobytes())
    return digest.hexdigest()


def _times(source: Source) -> str:
    """Returns a digest of the modification times of all files of a source."""
    digest = hashlib.sha256()
    for listing in source.splits.values():
        digest.update(listing.mtime.tobytes())
    return digest.hexdigest()


def _tar_times(source: Source) -> dict[str, int]:
    """Returns the modification time of every tar of a source, in ns, by name."""
    return {
        listing.containers[container].name: mtime
        for listing in source.splits.values()
        for container, mtime in zip(listing.container.tolist(), listing.mtime.tolist(), strict=True)
    }


def _newest_time(source: Source) -> int:
    """Returns the newest modification time, in ns. Leaves out times in the future.

    A clock that was set back, or a camera, gives such times. They do not tell when a file changed.
    """
    now = time.time_ns()
    times = [listing.mtime[listing.mtime <= now] for listing in source.splits.values()]
    return max((int(found.max()) for found in times if len(found)), default=0)


def _newest(source: Source) -> str:
    """Names the image whose file was changed last, and says when."""
    split, listing = max(source.splits.items(), key=lambda item: int(item[1].mtime.max()))
    newest = int(listing.mtime.argmax())
    when = datetime.fromtimestamp(int(listing.mtime[newest]) / 1e9)
    return f"{split}/{listing.names[newest]}, {when:%Y-%m-%d %H:%M:%S}"


def _finish_split(out: Path, split: str, parts: Sequence[Path]) -> dict[str, Any]:
    """Writes the index table of a split from its .part files. Returns its manifest entry."""
    entries, tables = [], []
    lists: dict[str, list[dict[str, str]]] = {"rejected": [], "repaired": []}
    for path in parts:
        part = json.loads(path.read_bytes())
        entries.append(part["entry"])
        tables.append(np.array(part["rows"], np.int64).reshape(-1, 7))
        for kind, items in lists.items():
            items += part[kind]
    num_samples = sum(map(len, tables))
    if not num_samples:
        first = lists["rejected"][0]
        raise ShardError(
            f"no image of {split} could be decoded, the first: {first['name']}: {first['reason']}"
        )
    index = write_index(out / f"{split}.index", tables)
    num_classes = len({row[4] for table in tables for row in table.tolist()})
    return {
        "num_samples": num_samples,
        "num_classes": num_classes,
        "index": index,
        "shards": entries,
        **lists,
    }


def _clear_away(out: Path) -> None:
    """Removes the files that only an unfinished data set needs, UNFINISHED last."""
    for pattern in (f"*{PART}", f"*{files.TEMPORARY}", f"{SPOOL}*"):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)
    (out / UNFINISHED).unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# Reading and working in parallel
# --------------------------------------------------------------------------------------------------


def read_images(listing: Listing) -> Iterator[tuple[str, int, bytes]]:
    """Yields name, label and bytes of every image of a listing.

    Raises:
        ShardError: a file cannot be read, or was changed since it was listed.
    """
    columns = (listing.labels, listing.container, listing.offset, listing.size, listing.mtime)
    with _Archives() as archives:
        for name, label, container, offset, size, mtime in zip(
            listing.names, *(column.tolist() for column in columns), strict=True
        ):
            path = listing.containers[container]
            try:
                if offset < 0:
                    path /= name.partition("/")[2]
                    with path.open("rb") as file:
                        _check_mtime(file.fileno(), path, mtime)
                        data = file.read(MAX_IMAGE_BYTES)
                else:
                    data = os.pread(archives.opened(path, mtime), size, offset)
            except OSError as error:
                raise ShardError(f"{path}: {error.strerror}") from None
            if len(data) >= MAX_IMAGE_BYTES:
                raise ShardError(
                    f"{path}: {name} has a gigabyte or more, so it is not a photograph: remove it"
                )
            if size != len(data):
                raise ShardError(_CHANGED.format(path))
            yield name, label, data


class _Archives:
    """Keeps the last archives open. A source may have more archives than a process may open."""

    def __init__(self) -> None:
        self.descriptors: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self.descriptors:
            self._close_first()

    def opened(self, path: Path, mtime: int) -> int:
        """Returns the descriptor of an archive, opened if needed.

        Raises:
            ShardError: the archive's modification time is not `mtime`, in ns.
        """
        if path not in self.descriptors:
            if len(self.descriptors) == MAX_OPEN:
                self._close_first()
            self.descriptors[path] = os.open(path, os.O_RDONLY)
            _check_mtime(self.descriptors[path], path, mtime)
        return self.descriptors[path]

    def _close_first(self) -> None:
        os.close(self.descriptors.pop(next(iter(self.descriptors))))


_CHANGED = (
    "{} was changed since it was listed: old and new images would be mixed;\n"
    "remove the folder of the new shards and start again (after --in-place, only its *.part files "
    "and UNFINISHED)"
)


def _check_mtime(descriptor: int, path: Path, mtime: int) -> None:
    if os.fstat(descriptor).st_mtime_ns != mtime:
        raise ShardError(_CHANGED.format(path))


def run_tasks(tasks: Sequence[Callable[[], T]], workers: int) -> Iterator[T]:
    """Runs the tasks in this process or in `workers` new ones. Yields results as tasks end."""
    if workers == 1 or len(tasks) <= 1:
        yield from (task() for task in tasks)
        return
    # Spawned, not forked, because a fork would copy the state of the caller's threads (a progress
    # bar). The caller handles Ctrl-C.
    ignore_interrupt = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    workers = min(workers, len(tasks))
    with ProcessPoolExecutor(workers, get_context("spawn"), ignore_interrupt) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
