"""Turns labelled photographs, in any form that people have them in, into fasttrain's shards.

    python tools/make_shards.py SOURCE OUT [--workers 8]

SOURCE is a folder that holds one of
  - the official archives: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and
    ILSVRC2012_devkit_t12.tar.gz, read in place
  - an ImageFolder: train/<class>/ and val/<class>/; or val/ flat, beside the devkit or Kaggle's
    LOC_val_solution.csv
  - Kaggle's download: ILSVRC/Data/CLS-LOC/ and LOC_val_solution.csv
  - Hugging Face's parquet files, or its train_images_*.tar.gz and val_images.tar.gz
  - WebDataset tars with <key>.jpg and <key>.cls, train or val in their names

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
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fasttrain import config, display, sharding, shards, sources
from fasttrain.sharding import Policy
from fasttrain.sources import Source


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="the folder of photographs")
    add("out", type=Path, metavar="OUT", nargs="?", help="where to write the shards")
    add(
        "--in-place",
        action="store_true",
        help="index the WebDataset tars of SOURCE where they are (their .idx anew); no OUT then",
    )
    add(
        "--workers",
        type=config.positive,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that decode (default: the CPUs of this machine, %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the shuffled order (default: 0)")
    add("--form", choices=sources.FORMS, help="of SOURCE, if it is not recognised as what it is")
    add(
        "--short-side",
        type=config.positive,
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
    add(
        "--allow-partial",
        action="store_true",
        help="accept an ImageNet without all its 1,281,167 + 50,000 images of 1,000 classes",
    )
    add("--check-md5", action="store_true", help="compare official archives with published sums")
    add(
        "--part",
        type=part,
        default=(1, 1),
        metavar="I/N",
        help="write every N-th shard from the I-th on, for an array of jobs on the same OUT",
    )
    arguments = parser.parse_args()
    if arguments.in_place == (arguments.out is not None):
        parser.error("name the folder OUT" if arguments.out is None else "--in-place: without OUT")
    if arguments.in_place and (arguments.short_side or arguments.store == "raw"):
        parser.error("--in-place: leaves images as they are; name an OUT to re-encode them")
    arguments.out = arguments.out or arguments.source
    if arguments.seed < 0:
        parser.error(f"--seed {arguments.seed}: must not be negative")
    if arguments.store == "raw" and arguments.short_side is None:
        parser.error("--store raw: needs --short-side, such as 256: else ImageNet is 1 TB")
    return arguments


def part(text: str) -> tuple[int, int]:
    index, _, number = text.partition("/")
    try:
        found = int(index), int(number)
    except ValueError:
        found = 0, 0
    if not 1 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"{text}: expected I/N with I from 1 to N, such as 3/8")
    return found


def make(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Recognises, lists, checks and writes the source; returns the manifest once all is written."""
    root, out = arguments.source, arguments.out
    policy = Policy(
        short_side=arguments.short_side,
        quality=arguments.quality,
        resize_val=arguments.resize_val,
        store=arguments.store,
        decode=not arguments.skip_decoding,
    )
    if arguments.part == (1, 1):  # a part may come after the others have finished it
        sharding.check_out(out, arguments.in_place)
    form = arguments.form or sources.recognise(root)
    if arguments.in_place and form != "webdataset":
        raise shards.ShardError(f"--in-place: {root} holds {form}, not WebDataset tars")
    say(f"{root}: {sources.FORMS[form].description} ({form})")
    if arguments.check_md5:
        check_md5(root)
    spool_made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        source = sources.scan(
            root, form, out, lambda tasks: sharding.run_tasks(tasks, arguments.workers), say
        )
    except BaseException:
        if spool_made and not any(out.iterdir()):
            out.rmdir()
        raise
    counts = {split: len(listing) for split, listing in source.splits.items()}
    say(
        f"{len(source.classes):,} classes, "
        + ", ".join(f"{number:,} images in {split}" for split, number in counts.items())
        + (f"; ignored {source.ignored:,} that are no images by name" if source.ignored else "")
    )
    faults = sources.imagenet_faults(source)
    if faults and not arguments.allow_partial:
        raise shards.ShardError(
            "\n  ".join(["this is not the whole of ImageNet-1k:", *faults])
            + "\nfind what is missing, or go on with --allow-partial"
        )
    warn_of_space(source, policy, out)
    mine = sum(counts.values()) * (1 if arguments.part == (1, 1) else 1 / arguments.part[1])
    with display.progress(round(mine), "sharding") as advance:
        return sharding.write_dataset(
            source,
            out,
            policy,
            seed=arguments.seed,
            part=arguments.part,
            in_place=arguments.in_place,
            strict=arguments.strict,
            workers=arguments.workers,
            on_progress=lambda done: advance(done.images, done.num_bytes),
        )


def check_md5(root: Path) -> None:
    """Compares the official archives in `root` with their published sizes and sums."""
    import hashlib

    for name, published in sources.MD5.items():
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
        sharding.estimated_bytes(split, listing, policy) for split, listing in source.splits.items()
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
