"""Makes fasttrain's shards from labelled photographs.

    python tools/make_shards.py SOURCE OUT [--workers 8]

SOURCE is a folder that holds one of
  - the official archives: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and
    ILSVRC2012_devkit_t12.tar.gz, read in place
  - an ImageFolder: train/<class>/ and val/<class>/. Val may be named valid, validation, dev or
    test. It may be flat, with the devkit, Kaggle's LOC_val_solution.csv or Tiny ImageNet's
    val_annotations.txt beside it. Train may hold tars such as n01440764.tar
  - <class>/ alone, with --val-fraction or --val-only
  - Kaggle's download: ILSVRC/Data/CLS-LOC/ and LOC_val_solution.csv
  - Hugging Face's parquet files, or its train_images_*.tar.gz and val_images.tar.gz
  - WebDataset tars with <key>.jpg and <key>.cls. Their names or those of their folders contain the
    word train, val or test

Every image is decoded in full before it is accepted. Images that cannot be decoded are left out and
listed in OUT/manifest.json. The same source gives the same bytes on every machine. After a stop or
a kill, the same command writes what is missing. The last line on standard output is one JSON
object.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fasttrain import classes, display, folders, imagenet, listing, sharding, shards, sources
from fasttrain.arguments import positive
from fasttrain.listing import UNREAD_SUFFIXES as UNREAD
from fasttrain.listing import Source
from fasttrain.sharding import Policy


def main() -> None:
    arguments = parse()
    start = time.monotonic()
    try:
        manifest = make(arguments)
    except shards.ShardError as error:
        say(str(error))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        say("stopped; run the same command to continue")
        raise SystemExit(130) from None
    except OSError as error:
        say(f"cannot continue: {error}; solve that, and run the same command to continue")
        raise SystemExit(2) from None
    seconds = round(time.monotonic() - start, 2)
    result: dict[str, Any] = {"out": str(arguments.out), "splits": {}, "seconds": seconds}
    if manifest is None:
        say("this part is done; the data set is finished when all other parts are done too")
        result["part"] = f"{arguments.part[0]}/{arguments.part[1]}"
    else:
        result["splits"] = {
            split: {
                "samples": entry["num_samples"],
                "shards": len(entry["shards"]),
                "rejected": len(entry["rejected"]),
                "repaired": len(entry["repaired"]),
            }
            for split, entry in manifest["splits"].items()
        }
        report(manifest)
        say_shared(arguments.out, manifest)
    sys.stdout.write(json.dumps(result) + "\n")


def parse() -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_folders(parser.add_argument)
    add_source(parser.add_argument)
    add_images(parser.add_argument)
    arguments = parser.parse_intermixed_args()  # options may stand between SOURCE and OUT
    if fault := fault_in(arguments):
        parser.error(fault)
    arguments.out = arguments.out or arguments.source
    return arguments


def add_folders(add: Callable[..., object]) -> None:
    """Adds the options for folders, processes, seed and parts."""
    add("source", type=Path, metavar="SOURCE", help="the folder of photographs")
    add("out", type=Path, metavar="OUT", nargs="?", help="where to write the shards")
    add(
        "--in-place",
        action="store_true",
        help="index the WebDataset tars of SOURCE where they are, and overwrite their .idx; give "
        "no OUT",
    )
    add(
        "--workers",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="number of decoding processes (default: the CPUs of this machine, %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of the shuffle (default: 0)")
    add(
        "--part",
        type=part,
        default=(1, 1),
        metavar="I/N",
        help="write every N-th shard from the I-th on, for a job array that shares OUT",
    )


def add_source(add: Callable[..., object]) -> None:
    """Adds the options for the form, the classes and the splits of SOURCE."""
    add("--form", choices=sources.FORMS, help="form of SOURCE (default: recognised by its files)")
    add(
        "--val-fraction",
        type=fraction,
        metavar="F",
        help="draw val from train: this share of every class, such as 0.1, by the seed; for a "
        "SOURCE without val",
    )
    add("--val-only", action="store_true", help="make only a val split, to evaluate on")
    add(
        "--classes",
        type=Path,
        metavar="PATH",
        help="all classes in the order of their labels: a file with one per line, a checkpoint, a "
        "run, or a data set (default: those of train, sorted by name)",
    )
    add(
        "--classes-by-number",
        action="store_true",
        help="class names are numbers: sort them as numbers; with --classes, take number N as "
        "class N of that list, counted from 0",
    )
    add(
        "--label-key",
        metavar="KEY",
        help="for WebDataset tars: read labels from the members .KEY (such as txt), or from KEY in "
        "the .json; they are numbers or class names (default: the members .cls)",
    )
    for what in ("image", "label"):
        add(
            f"--{what}-column",
            metavar="NAME",
            help=f"for parquet files: the column of {what}s (default: the usual names)",
        )
    add(
        "--allow-partial",
        action="store_true",
        help="accept an ImageNet without all its 1,281,167 + 50,000 images of 1,000 classes, and "
        "leave out broken links and images in train/ that have no class",
    )
    add(
        "--check-md5",
        action="store_true",
        help="compare the official archives with their published MD5 sums",
    )


def add_images(add: Callable[..., object]) -> None:
    """Adds the options for how images are stored and checked."""
    add(
        "--short-side",
        type=positive,
        metavar="PX",
        help="shrink larger training images to this short side in pixels; 256 shrinks ImageNet "
        "from 138 to 37 GB",
    )
    add(
        "--quality",
        type=int,
        choices=range(50, 101),
        default=90,
        metavar="Q",
        help="JPEG quality of shrunk images, 50 to 100 (default: %(default)s)",
    )
    add("--resize-val", action="store_true", help="shrink validation images too")
    add(
        "--store",
        choices=("jpeg", "raw"),
        default="jpeg",
        help="raw stores uncompressed pixels as .ppm; ImageNet at 256 px is some 336 GB "
        "(default: %(default)s)",
    )
    add("--skip-decoding", action="store_true", help="read only the headers of images")
    add("--strict", action="store_true", help="fail if an image cannot be decoded")


def fault_in(arguments: argparse.Namespace) -> str:
    """Says which options contradict each other, and what to do; empty if none do."""
    in_place = arguments.in_place
    if in_place == (arguments.out is not None):
        return "name the folder OUT" if arguments.out is None else "--in-place: leave out OUT"
    if in_place and (arguments.short_side or arguments.store == "raw"):
        return "--in-place: leaves images as they are; name an OUT to re-encode them"
    if in_place and (arguments.val_fraction or arguments.label_key):
        return (
            "--in-place: leaves tars as they are; name an OUT instead, for other splits or labels"
        )
    if arguments.val_only and arguments.val_fraction:
        return "--val-only: all of SOURCE becomes val; leave out --val-fraction"
    if arguments.seed < 0:
        return f"--seed {arguments.seed}: must not be negative"
    if arguments.store == "raw" and arguments.short_side is None:
        return "--store raw: needs --short-side, such as 256; without it ImageNet takes 1 TB"
    return ""


def part(text: str) -> tuple[int, int]:
    """Parses I/N for argparse."""
    index, _, number = text.partition("/")
    try:
        found = int(index), int(number)
    except ValueError:
        found = 0, 0
    if not 1 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"{text}: expected I/N with I from 1 to N, such as 3/8")
    return found


def fraction(text: str) -> float:
    """Parses a number between 0 and 1, both excluded, for argparse."""
    try:
        found = float(text)
    except ValueError:
        found = 0
    if not 0 < found < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a share between 0 and 1, such as 0.1")
    return found


def policy_of(arguments: argparse.Namespace) -> Policy:
    """Returns how images are stored."""
    return Policy(
        short_side=arguments.short_side,
        quality=arguments.quality,
        resize_val=arguments.resize_val,
        store=arguments.store,
        decode=not arguments.skip_decoding,
    )


def options_of(arguments: argparse.Namespace) -> listing.Options:
    """Returns how the source is read.

    Raises:
        ShardError: the list of classes cannot be read.
    """
    return listing.Options(
        allow_partial=arguments.allow_partial,
        in_place=arguments.in_place,
        val_only=arguments.val_only,
        val_fraction=arguments.val_fraction,
        seed=arguments.seed,
        classes=classes.read_list(arguments.classes) if arguments.classes else None,
        by_number=arguments.classes_by_number,
        label_key=arguments.label_key,
        image_column=arguments.image_column,
        label_column=arguments.label_column,
    )


def make(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Recognises, lists, checks and writes the source.

    Returns:
        The manifest, or None while shards of other parts are missing.
    Raises:
        ShardError: the source or the folder OUT cannot be used.
    """
    root, out = arguments.source, arguments.out
    policy = policy_of(arguments)
    options = options_of(arguments)
    # The other parts may have finished the data set before this part started.
    if arguments.part == (1, 1) and not sharding.is_finished(out):
        sharding.check_out(out, arguments.in_place)
    form = arguments.form or sources.recognise(root)
    if arguments.in_place and form != "webdataset":
        raise shards.ShardError(f"--in-place: {root} holds {form}, not WebDataset tars")
    check_options(root, form, options)
    say(f"{root}: {sources.FORMS[form].description} ({form})")
    if form == "imagefolder":
        check_outside(root, out)
    if arguments.check_md5:
        check_md5(root)
    if sharding.is_finished(out):
        return finished(arguments, form, policy, options)
    source = scan(root, form, arguments, options)
    faults = imagenet.faults(source)
    if faults and not arguments.allow_partial:
        raise shards.ShardError(
            "\n  ".join(["this is not the whole of ImageNet-1k:", *faults])
            + "\nadd what is missing, or do without it with --allow-partial"
        )
    warn_of_space(source, policy, out)
    images = sum(map(len, source.splits.values()))
    with display.progress(round(images / arguments.part[1]), "sharding") as advance:
        return sharding.write_dataset(
            source,
            out,
            policy,
            sharding.Build(
                seed=arguments.seed,
                part=arguments.part,
                in_place=arguments.in_place,
                strict=arguments.strict,
                workers=arguments.workers,
            ),
            on_progress=lambda done: advance(done.images, done.num_bytes),
        )


def check_outside(root: Path, out: Path) -> None:
    """Raises ShardError if OUT is where a class or a split is expected."""
    parents = out.resolve().parents
    has_splits = bool(folders.split_folders(root))
    if root.resolve() in parents and not (has_splits and out.resolve().parent == root.resolve()):
        raise shards.ShardError(
            f"OUT ({out}) is inside SOURCE ({root}), where it would count as a class; choose a "
            "folder outside"
        )


def check_options(root: Path, form: str, options: listing.Options) -> None:
    """Raises ShardError if an option does not apply to the form of SOURCE."""
    if form != "parquet" and (options.image_column or options.label_column):
        raise shards.ShardError(
            f"--image-column, --label-column: {root} holds {form}, not parquet files; leave these "
            "options out"
        )
    if form != "webdataset" and options.label_key:
        raise shards.ShardError(
            f"--label-key: {root} holds {form}, not WebDataset tars; leave the option out"
        )


def finished(
    arguments: argparse.Namespace, form: str, policy: Policy, options: listing.Options
) -> dict[str, Any]:
    """Checks that the finished data set in OUT is the requested one. Returns its manifest.

    Raises:
        ShardError: it is another data set, or images were rejected although --strict is given.
    """
    root, out = arguments.source, arguments.out
    expected = {"form": form, "seed": arguments.seed, "policy": asdict(policy)}
    sharding.check_same(out, expected)
    archives = sources.archives(root, form, options)
    if archives:  # compares the archives themselves, to avoid unpacking them again
        sharding.check_same(out, {"archives": archives})
    else:
        sharding.check_same(out, {}, scan(root, form, arguments, options))
    manifest = shards.read_manifest(out)
    rejected = sum(len(entry["rejected"]) for entry in manifest["splits"].values())
    if arguments.strict and rejected:
        raise shards.ShardError(
            f"--strict: {rejected} images were rejected when {out} was made, see its "
            f"{shards.MANIFEST}; repair the source and start in a new folder, or leave --strict out"
        )
    say(f"{out} is done, nothing to do")
    return manifest


def scan(root: Path, form: str, arguments: argparse.Namespace, options: listing.Options) -> Source:
    """Lists the source and prints what it holds. Removes an empty OUT if that fails."""
    out = arguments.out
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    workers = arguments.workers
    try:
        source = sources.scan(
            root, form, out, lambda tasks: sharding.run_tasks(tasks, workers), say, options
        )
    except BaseException:
        if is_new and not any(out.iterdir()):
            out.rmdir()
        raise
    say(
        f"{len(source.classes):,} classes, "
        + ", ".join(f"{len(found):,} images in {split}" for split, found in source.splits.items())
    )
    say_skipped(source)
    return source


def say_skipped(source: Source) -> None:
    """Prints what was left out, by kind. Warns if images are in a format that is not read."""
    if not source.skipped:
        return
    kinds = sorted(source.skipped.items(), key=lambda item: (-item[1], item[0]))
    texts = [f"{number:,} {kind}" for kind, number in kinds]
    more = f", and {len(texts) - 12:,} more kinds" if len(texts) > 12 else ""
    files = "file" if source.ignored == 1 else "files"
    say(f"left out {source.ignored:,} {files}: {', '.join(texts[:12])}{more}")
    unread = [text for text, (kind, _) in zip(texts, kinds, strict=True) if kind[1:] in UNREAD]
    if unread:
        say(f"WARNING: {', '.join(unread)} may be images, but are not read; convert them to JPEG")


def check_md5(root: Path) -> None:
    """Compares the official archives in `root` with their published MD5 sums.

    Raises:
        ShardError: a sum differs.
    """
    import hashlib

    for name, published in imagenet.MD5.items():
        path = root / name
        if not path.exists():
            continue
        digest = hashlib.md5(usedforsecurity=False)
        megabytes = max(1, path.stat().st_size >> 20)
        with path.open("rb") as file, display.progress(megabytes, f"MD5 of {name}, MiB") as advance:
            while block := file.read(1 << 20):
                digest.update(block)
                advance(1, 0)
        if digest.hexdigest() != published:
            raise shards.ShardError(
                f"{path}: its MD5 is {digest.hexdigest()}, but {published} was published: download "
                "it again"
            )


def warn_of_space(source: Source, policy: Policy, out: Path) -> None:
    """Prints how much will be written. Warns if the disk has less free space."""
    size = sum(
        sharding.estimated_bytes(split, listed, policy) for split, listed in source.splits.items()
    )
    free = shutil.disk_usage(out).free
    say(f"about {size / 1e9:,.1f} GB will be written; {free / 1e9:,.1f} GB are free there")
    if size > free:
        say("WARNING: the disk will probably be full before the data set is finished")


def report(manifest: dict[str, Any]) -> None:
    """Prints the rejected and re-encoded images, and a table of what was written."""
    table = Table("split", *("images", "classes", "GB", "repaired", "rejected"))
    for split, entry in manifest["splits"].items():
        for item in entry["rejected"][:20]:
            say(f"rejected {item['name']}: {item['reason']}")
        for item in entry["repaired"][:30]:
            say(f"re-encoded {item['name']}: was {item['reason']}")
        size = sum(shard["size"] for shard in entry["shards"])
        numbers = (entry["num_samples"], entry["num_classes"], round(size / 1e9, 2))
        lists = (len(entry["repaired"]), len(entry["rejected"]))
        table.add_row(split, *(f"{number:,}" for number in (*numbers, *lists)))
    Console(stderr=True).print(table)


def say_shared(out: Path, manifest: dict[str, Any]) -> None:
    """Warns if images of val are also in train, byte for byte: accuracy would be too high."""
    if len(manifest["splits"]) < 2:
        return
    train, val = (shards.open_split(out, name, check_tars=False) for name in shards.SPLITS)
    # Sizes and checksums agree by chance once in 5,000 data sets as large as ImageNet.
    keys = [split.crc32.astype(np.uint64) << 32 | split.size for split in (train, val)]
    (shared,) = np.nonzero(np.isin(keys[1], keys[0]))
    if len(shared):
        twin = int(np.argmax(keys[0] == keys[1][shared[0]]))
        say(
            f"WARNING: {len(shared):,} of the {val.num_samples:,} images of val are also in train, "
            f"the first: {val.describe(int(shared[0]))} = {train.describe(twin)}: remove them from "
            "one split, or accuracy will be too high"
        )


def say(text: str) -> None:
    """Prints a line. File names in it may hold bytes that are not UTF-8."""
    sys.stderr.write(text.encode(errors="backslashreplace").decode() + "\n")


if __name__ == "__main__":
    main()
