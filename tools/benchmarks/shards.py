"""Making shards of an ImageFolder, without and with decoding every image.

It is compared with copying the files (cp -r --reflink=never), with webdataset.ShardWriter, and with
decoding alone (libjpeg-turbo, by way of Pillow). The source is read once beforehand, so that every
contestant finds it in the page cache.
"""

import argparse
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.options import NOT_INSTALLED
from benchmarks.output import machine, paired_ratio, write
from fasttrain import sharding, sources
from fasttrain.arguments import positive
from fasttrain.faults import ConfigError
from fasttrain.listing import Source
from fasttrain.sharding import Policy


class Contestant(NamedTuple):
    """A way to copy, decode or shard the source."""

    name: str
    run: Callable[[], object]
    reference: str | None = None  # the contestant that its speed is compared with


def add_arguments(part: argparse.ArgumentParser) -> None:
    """Declares the options of `benchmark.py shards`."""
    part.add_argument("source", type=Path, metavar="SOURCE", help="an ImageFolder")
    part.add_argument(
        "--repeats", type=positive, default=5, metavar="N", help="turns (default: %(default)s)"
    )
    part.add_argument(
        "--scratch",
        type=Path,
        metavar="DIR",
        help="folder for the results, which are removed (default: that of the system)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Measures all contestants in turns, and prints a line for each.

    Raises:
        ConfigError: the source is not a folder.
    """
    root = arguments.source
    if not root.is_dir():
        raise ConfigError(f"{root} is not a folder; name an ImageFolder")
    write(machine())
    files = [path for path in root.rglob("*") if path.is_file()]
    num_bytes = sum(len(path.read_bytes()) for path in files)  # loads them into the page cache
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        out = Path(folder) / "out"
        contestants = contestants_of(root, files, out)
        clean_up = partial(shutil.rmtree, out, ignore_errors=True)
        seconds = measure(contestants, arguments.repeats, clean_up)
    report(contestants, seconds, len(files), num_bytes)


def contestants_of(root: Path, files: Sequence[Path], out: Path) -> list[Contestant]:
    """All contestants; those that write use the folder `out`."""
    cpus = len(os.sched_getaffinity(0))

    def listed() -> Source:
        return sources.scan(root, "imagefolder", out, list, lambda text: None)

    def ours(decode: bool) -> None:
        out.mkdir()
        sharding.write_dataset(listed(), out, Policy(decode=decode), sharding.Build(workers=cpus))

    def copy() -> None:
        subprocess.run(["cp", "-r", "--reflink=never", root, out], check=True)

    def webdataset() -> None:
        shard_writer(listed(), out)

    known = importlib.util.find_spec("webdataset")
    if not known:
        write({"name": "webdataset.ShardWriter", "skipped": NOT_INSTALLED})
    return [
        Contestant("cp -r", copy),
        Contestant("decode alone", lambda: decode_all(files, cpus)),
        *([Contestant("webdataset.ShardWriter", webdataset, "cp -r")] if known else []),
        Contestant("fasttrain --skip-decoding", lambda: ours(False), "cp -r"),
        Contestant("fasttrain", lambda: ours(True), "decode alone"),
    ]


def measure(
    contestants: Sequence[Contestant], repeats: int, clean_up: Callable[[], object]
) -> dict[str, list[float]]:
    """Seconds of every repeat by contestant, taken in turns; cleaning up is not counted."""
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
    """Prints a JSON line for each contestant, with its speed over its reference's."""
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
            line["speed_over"] = {reference: paired_ratio(seconds[reference], own)}
        write(line)


def shard_writer(source: Source, out: Path) -> None:
    """Writes the same images with webdataset's writer, in one process, in the order of names."""
    from webdataset import ShardWriter

    out.mkdir()
    for split, listing in source.splits.items():
        with ShardWriter(f"{out}/{split}-%06d.tar", maxcount=1000, verbose=0) as writer:
            for number, (_, label, data) in enumerate(sharding.read_images(listing)):
                writer.write({"__key__": f"{number:09d}", "jpg": data, "cls": label})


def decode_all(files: Sequence[Path], workers: int) -> None:
    """Decodes every file, in `workers` processes."""
    parts = [files[start::workers] for start in range(workers)]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(decode_some, parts))


def decode_some(files: Sequence[Path]) -> None:
    """Decodes files in this process, and drops the pixels."""
    from PIL import Image

    for path in files:
        with Image.open(path) as image:
            image.load()
