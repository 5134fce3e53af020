"""Turns labelled photographs, in any form that people have them in, into fasttrain's shards.

    python tools/make_shards.py SOURCE OUT [--workers 8]

SOURCE is a folder that holds one of
  - the official archives: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and
    ILSVRC2012_devkit_t12.tar.gz, read in place
  - an ImageFolder: train/<class>/ and val/<class>/ (or valid, validation, dev; or test); or val/
    flat, beside the devkit, Kaggle's LOC_val_solution.csv or Tiny ImageNet's val_annotations.txt;
    or train/ full of n01440764.tar; or <class>/ alone, with --val-fraction or --val-only
  - Kaggle's download: ILSVRC/Data/CLS-LOC/ and LOC_val_solution.csv
  - Hugging Face's parquet files, or its train_images_*.tar.gz and val_images.tar.gz
  - WebDataset tars with <key>.jpg and <key>.cls; train, val or test is a word in their names or in
    those of their folders

Every image is decoded in full before it is accepted; what cannot be decoded is left out and listed
in OUT/manifest.json. The same source gives the same bytes on every machine. Started again after a
stop or a kill, the same command finishes what is missing. The last line on standard output is one
JSON object.
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

from rich.console import Console
from rich.table import Table

from fasttrain import classes, display, imagenet, listing, sharding, shards, sources
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
        say("stopped; the same command goes on from here")
        raise SystemExit(130) from None
    except OSError as error:
        say(f"cannot go on: {error}; mend that, and the same command goes on from what is finished")
        raise SystemExit(2) from None
    seconds = round(time.monotonic() - start, 2)
    result: dict[str, Any] = {"out": str(arguments.out), "splits": {}, "seconds": seconds}
    if manifest is None:
        say("this part is done; the data set is finished once the other parts are")
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
    sys.stdout.write(json.dumps(result) + "\n")


def parse() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_folders(parser.add_argument)
    add_source(parser.add_argument)
    add_images(parser.add_argument)
    arguments = parser.parse_args()
    if fault := fault_in(arguments):
        parser.error(fault)
    arguments.out = arguments.out or arguments.source
    return arguments


def add_folders(add: Callable[..., object]) -> None:
    """What is read, where it is written, and by how many processes."""
    add("source", type=Path, metavar="SOURCE", help="the folder of photographs")
    add("out", type=Path, metavar="OUT", nargs="?", help="where to write the shards")
    add(
        "--in-place",
        action="store_true",
        help="index the WebDataset tars of SOURCE where they are (their .idx anew); no OUT then",
    )
    add(
        "--workers",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that decode (default: the CPUs of this machine, %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the shuffled order (default: 0)")
    add(
        "--part",
        type=part,
        default=(1, 1),
        metavar="I/N",
        help="write every N-th shard from the I-th on, for an array of jobs on the same OUT",
    )


def add_source(add: Callable[..., object]) -> None:
    """What SOURCE is: its form, classes and splits."""
    add("--form", choices=sources.FORMS, help="of SOURCE, if it is not recognised as what it is")
    add(
        "--val-fraction",
        type=fraction,
        metavar="F",
        help="SOURCE has no val: draw this share of every class, such as 0.1, by the seed",
    )
    add("--val-only", action="store_true", help="make a val split alone, to evaluate on")
    add(
        "--classes",
        type=Path,
        metavar="PATH",
        help="all classes in the order of their labels: a file with one a line, or a checkpoint, a "
        "run or a data set that has them (default: those of train, sorted by name)",
    )
    add(
        "--classes-by-number",
        action="store_true",
        help="names of classes are numbers: sort them as such, or, with --classes, take them as "
        "places in that list, from 0",
    )
    add(
        "--label-key",
        metavar="KEY",
        help="of WebDataset tars: labels are in the members .KEY (such as txt), or in the .json "
        "under KEY; numbers, or names of classes (default: the members .cls)",
    )
    for what in ("image", "label"):
        add(
            f"--{what}-column",
            metavar="NAME",
            help=f"of parquet files: the column of {what}s (default: the usual names)",
        )
    add(
        "--allow-partial",
        action="store_true",
        help="accept an ImageNet without all its 1,281,167 + 50,000 images of 1,000 classes, and "
        "leave out links that lead nowhere and images in train/ that have no class",
    )
    add("--check-md5", action="store_true", help="compare official archives with published sums")


def add_images(add: Callable[..., object]) -> None:
    """What becomes of the images."""
    add(
        "--short-side",
        type=positive,
        metavar="PX",
        help="shrink larger training images to this shorter side: 256 makes ImageNet 37 GB of 138",
    )
    add(
        "--quality",
        type=int,
        choices=range(50, 101),
        default=90,
        metavar="Q",
        help="of the JPEGs that were shrunk, 50 to 100 (default: %(default)s)",
    )
    add("--resize-val", action="store_true", help="shrink validation images as well")
    add(
        "--store",
        choices=("jpeg", "raw"),
        default="jpeg",
        help="raw: pixels as .ppm, nothing is left to decode; ImageNet at 256 px is 335 GB",
    )
    add("--skip-decoding", action="store_true", help="trust the images: look at headers only")
    add("--strict", action="store_true", help="an image that cannot be decoded is an error")


def fault_in(arguments: argparse.Namespace) -> str:
    """What is wrong with options together; empty if nothing is."""
    in_place = arguments.in_place
    if in_place == (arguments.out is not None):
        return "name the folder OUT" if arguments.out is None else "--in-place: without OUT"
    if in_place and (arguments.short_side or arguments.store == "raw"):
        return "--in-place: leaves images as they are; name an OUT to re-encode them"
    if in_place and (arguments.val_fraction or arguments.label_key):
        return "--in-place: tars stay as they are; name an OUT to split or label them anew"
    if arguments.val_only and arguments.val_fraction:
        return "--val-only: all of SOURCE is val; leave out --val-fraction"
    if arguments.seed < 0:
        return f"--seed {arguments.seed}: must not be negative"
    if arguments.store == "raw" and arguments.short_side is None:
        return "--store raw: needs --short-side, such as 256: else ImageNet is 1 TB"
    return ""


def part(text: str) -> tuple[int, int]:
    index, _, number = text.partition("/")
    try:
        found = int(index), int(number)
    except ValueError:
        found = 0, 0
    if not 1 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"{text}: expected I/N with I from 1 to N, such as 3/8")
    return found


def fraction(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0
    if not 0 < found < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a share between 0 and 1, such as 0.1")
    return found


def policy_of(arguments: argparse.Namespace) -> Policy:
    """How images are to be stored."""
    return Policy(
        short_side=arguments.short_side,
        quality=arguments.quality,
        resize_val=arguments.resize_val,
        store=arguments.store,
        decode=not arguments.skip_decoding,
    )


def options_of(arguments: argparse.Namespace) -> listing.Options:
    """How the source is to be read."""
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
    """Recognises, lists, checks and writes the source; returns the manifest once all is written."""
    root, out = arguments.source, arguments.out
    policy = policy_of(arguments)
    options = options_of(arguments)
    # A part may come after the others have finished it.
    if arguments.part == (1, 1) and not sharding.is_finished(out):
        sharding.check_out(out, arguments.in_place)
    form = arguments.form or sources.recognise(root)
    if arguments.in_place and form != "webdataset":
        raise shards.ShardError(f"--in-place: {root} holds {form}, not WebDataset tars")
    check_options(root, form, options)
    say(f"{root}: {sources.FORMS[form].description} ({form})")
    if arguments.check_md5:
        check_md5(root)
    if sharding.is_finished(out):
        return finished(arguments, form, policy, options)
    source = scan(root, form, arguments, options)
    faults = imagenet.faults(source)
    if faults and not arguments.allow_partial:
        raise shards.ShardError(
            "\n  ".join(["this is not the whole of ImageNet-1k:", *faults])
            + "\nfind what is missing, or go on with --allow-partial"
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


def check_options(root: Path, form: str, options: listing.Options) -> None:
    """Checks that what is asked for is of the form that SOURCE has."""
    if form != "parquet" and (options.image_column or options.label_column):
        raise shards.ShardError(
            f"--image-column, --label-column: {root} holds {form}, not parquet files; leave them "
            "out"
        )
    if form != "webdataset" and options.label_key:
        raise shards.ShardError(
            f"--label-key: {root} holds {form}, not WebDataset tars; leave it out"
        )


def finished(
    arguments: argparse.Namespace, form: str, policy: Policy, options: listing.Options
) -> dict[str, Any]:
    """The manifest of OUT, which is finished, once it was compared with what is asked for."""
    root, out = arguments.source, arguments.out
    asked = {"form": form, "seed": arguments.seed, "policy": asdict(policy)}
    sharding.check_same(out, asked)
    archives = sources.archives(root, form, options)
    if archives:  # not unpacked again, to be compared
        sharding.check_same(out, {"archives": archives})
    else:
        sharding.check_same(out, {}, scan(root, form, arguments, options))
    manifest = shards.read_manifest(out)
    rejected = sum(len(entry["rejected"]) for entry in manifest["splits"].values())
    if arguments.strict and rejected:
        raise shards.ShardError(
            f"--strict: {rejected} images were rejected when {out} was made, see its "
            f"{shards.MANIFEST}; mend the source and start in a new folder, or leave --strict out"
        )
    say(f"{out} is done, nothing to do")
    return manifest


def scan(root: Path, form: str, arguments: argparse.Namespace, options: listing.Options) -> Source:
    """Lists the source and says what is in it; leaves no empty OUT behind where that fails."""
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
    """Says what was left out, by kind, and warns of images of a kind that is not read."""
    if not source.skipped:
        return
    kinds = sorted(source.skipped.items(), key=lambda item: (-item[1], item[0]))
    texts = [f"{number:,} {kind}" for kind, number in kinds]
    more = f", and {len(texts) - 12:,} kinds more" if len(texts) > 12 else ""
    files = "file" if source.ignored == 1 else "files"
    say(f"left out {source.ignored:,} {files}: {', '.join(texts[:12])}{more}")
    unread = [text for text, (kind, _) in zip(texts, kinds, strict=True) if kind[1:] in UNREAD]
    if unread:
        say(f"WARNING: {', '.join(unread)} may be images, but are not read; make JPEGs of them")


def check_md5(root: Path) -> None:
    """Compares the official archives in `root` with their published sizes and sums."""
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
                f"{path}: MD5 {digest.hexdigest()}, published {published}: load it anew"
            )


def warn_of_space(source: Source, policy: Policy, out: Path) -> None:
    """Says how much will be written, and warns where the disk has less."""
    size = sum(
        sharding.estimated_bytes(split, listed, policy) for split, listed in source.splits.items()
    )
    free = shutil.disk_usage(out).free
    say(f"about {size / 1e9:,.1f} GB will be written; {free / 1e9:,.1f} GB are free there")
    if size > free:
        say("WARNING: the disk will most likely be full before the end")


def report(manifest: dict[str, Any]) -> None:
    """A table of what was written, and what was not."""
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


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()
