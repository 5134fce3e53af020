"""Measures fasttrain beside what else there is, on one machine, in one run.

    python tools/benchmark.py shards SOURCE [--repeats 5]

shards: making shards of an ImageFolder, without and with decoding every image, beside copying the
files (cp -r --reflink=never), webdataset.ShardWriter, and decoding alone with libjpeg-turbo by way
of Pillow. SOURCE is read once beforehand, so that all find it in the page cache.

The contestants take turns; each prints one JSON line with the median and spread of its repeats, and
its ratio to the reference it is held against.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from fasttrain import sharding, sources
from fasttrain.sharding import Policy
from fasttrain.sources import Source


class Contestant(NamedTuple):
    """What is measured, and against whom its speed is held."""

    name: str
    run: Callable[[], object]
    reference: str | None = None


def measure(
    contestants: Sequence[Contestant], repeats: int, clean_up: Callable[[], object]
) -> dict[str, list[float]]:
    """Seconds of every repeat of every contestant, taken in turns, without the cleaning up."""
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for repeat in range(repeats):
        for contestant in contestants:
            start = time.perf_counter()
            contestant.run()
            seconds[contestant.name].append(time.perf_counter() - start)
            clean_up()
            sys.stderr.write(f"{repeat + 1}/{repeats} {contestant.name}\n")
    return seconds


def report(
    contestants: Sequence[Contestant], seconds: dict[str, list[float]], images: int, num_bytes: int
) -> None:
    """Prints a JSON line for each contestant.

    The ratio is the median of the paired ratios of each turn, so that a machine that slows down in
    between slows both.
    """
    for name, _, reference in contestants:
        own = seconds[name]
        middle = statistics.median(own)
        line: dict[str, Any] = {
            "name": name,
            "images_per_s": round(images / middle),
            "mb_per_s": round(num_bytes / 1e6 / middle, 1),
            "seconds": [round(value, 2) for value in (min(own), middle, max(own))],
        }
        if reference:
            pairs = [theirs / ours for ours, theirs in zip(own, seconds[reference], strict=True)]
            line["speed_over"] = {reference: round(statistics.median(pairs), 3)}
        sys.stdout.write(json.dumps(line) + "\n")


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    packages = ("pillow", "webdataset", "numpy")
    return {
        "cpu": platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


# --------------------------------------------------------------------------------------------------
# shards
# --------------------------------------------------------------------------------------------------


def benchmark_shards(root: Path, repeats: int, scratch: Path | None) -> None:
    files = [path for path in root.rglob("*") if path.is_file()]
    num_bytes = sum(len(path.read_bytes()) for path in files)  # and so into the page cache
    cpus = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        out = Path(folder) / "out"

        def listed() -> Source:
            return sources.scan(root, "imagefolder", out, list, lambda text: None)

        def ours(decode: bool) -> None:
            out.mkdir()
            sharding.write_dataset(listed(), out, Policy(decode=decode), workers=cpus)

        def copy() -> None:
            subprocess.run(["cp", "-r", "--reflink=never", root, out], check=True)

        contestants = [
            Contestant("cp -r", copy),
            Contestant("decode alone", lambda: decode_all(files, cpus)),
            Contestant("webdataset.ShardWriter", lambda: shard_writer(listed(), out), "cp -r"),
            Contestant("fasttrain --skip-decoding", lambda: ours(False), "cp -r"),
            Contestant("fasttrain", lambda: ours(True), "decode alone"),
        ]
        clean_up = partial(shutil.rmtree, out, ignore_errors=True)
        seconds = measure(contestants, repeats, clean_up)
    report(contestants, seconds, len(files), num_bytes)


def shard_writer(source: Source, out: Path) -> None:
    """The same images by webdataset's own writer, in one process, in the order of their names."""
    from webdataset import ShardWriter

    out.mkdir()
    for split, listing in source.splits.items():
        with ShardWriter(f"{out}/{split}-%06d.tar", maxcount=1000, verbose=0) as writer:
            for number, (_, label, data) in enumerate(sharding.read_images(listing)):
                writer.write({"__key__": f"{number:09d}", "jpg": data, "cls": label})


def decode_all(files: Sequence[Path], workers: int) -> None:
    """Decodes every file with libjpeg-turbo, in as many processes as there are CPUs."""
    parts = [files[start::workers] for start in range(workers)]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(decode_some, parts))


def decode_some(files: Sequence[Path]) -> None:
    from PIL import Image

    for path in files:
        with Image.open(path) as image:
            image.load()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("shards", help="making shards")
    part.add_argument("source", type=Path, metavar="SOURCE", help="an ImageFolder")
    part.add_argument("--repeats", type=int, default=5, metavar="N", help="(default: %(default)s)")
    part.add_argument("--scratch", type=Path, metavar="DIR", help="where results are written")
    arguments = parser.parse_args()
    sys.stdout.write(json.dumps(machine()) + "\n")
    benchmark_shards(arguments.source, arguments.repeats, arguments.scratch)


if __name__ == "__main__":
    main()
