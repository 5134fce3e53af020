"""Checks a data set to the last byte, and names what is damaged.

    python tools/verify_shards.py OUT [--quick]

Checks the manifest, every file's size and sha256, the index tables against the headers, labels and
crc32 in the tars, and decodes every image (--quick leaves that out). Ends with exit code 0, or 1
and a table of findings. The last line on standard output is one JSON object.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from fasttrain import display, sharding, shards
from fasttrain.arguments import positive
from fasttrain.shards import ShardError, Split


class Finding(NamedTuple):
    """Something that is not as it was written."""

    place: str
    fault: str


class Checked(NamedTuple):
    """What became of a shard."""

    samples: int
    num_bytes: int
    findings: list[Finding]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder of the shards")
    parser.add_argument("--quick", action="store_true", help="do not decode the images")
    parser.add_argument(
        "--workers",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: the CPUs of this machine, %(default)s)",
    )
    arguments = parser.parse_args()
    start = time.monotonic()
    findings, samples = verify(arguments.out, not arguments.quick, arguments.workers)
    if findings:
        table = Table("place", "fault")
        for finding in findings:
            table.add_row(*finding)
        Console(stderr=True).print(table)
    result = {
        "out": str(arguments.out),
        "samples": samples,
        "findings": [finding._asdict() for finding in findings],
        "seconds": round(time.monotonic() - start, 2),
    }
    sys.stdout.write(json.dumps(result) + "\n")
    raise SystemExit(1 if findings else 0)


def verify(root: Path, decode: bool, workers: int) -> tuple[list[Finding], int]:
    """All findings in the data set at `root`, and the number of samples that were looked at."""
    try:
        manifest = shards.read_manifest(root)
        written = (root / shards.MANIFEST).read_bytes()
        digest = (root / shards.MANIFEST_DIGEST).read_bytes()
    except ShardError as error:
        return [Finding(shards.MANIFEST, str(error))], 0
    except OSError as error:
        return [Finding(shards.MANIFEST_DIGEST, str(error.strerror))], 0
    if digest != shards.manifest_digest(written):  # then nothing in it can be relied on
        fault = f"is not what {shards.MANIFEST_DIGEST} says: nothing else was checked"
        return [Finding(shards.MANIFEST, fault)], 0
    findings: list[Finding] = []
    tasks = []
    total = 0
    for name, entry in manifest["splits"].items():
        index = entry["index"]
        findings += check_file(root / index["name"], index["size"], index["sha256"])
        for number, shard in enumerate(entry["shards"]):
            tasks.append(partial(check_shard, root, name, number, shard, decode))
            total += shard["num_samples"]
    samples = 0
    with display.progress(total, "verifying") as advance:
        for checked in sharding.run_tasks(tasks, workers):
            advance(checked.samples, checked.num_bytes)
            samples += checked.samples
            findings += checked.findings
    return sorted(set(findings)), samples


def check_file(path: Path, size: int, sha256: str) -> Iterator[Finding]:
    """Whether a file has the size and digest that the manifest gives."""
    try:
        found = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        yield Finding(path.name, str(error.strerror))
        return
    if found != size:
        yield Finding(path.name, f"{found:,} bytes instead of {size:,}")
    elif digest != sha256:
        yield Finding(path.name, "sha256 is not the manifest's: its bytes have changed")


def check_shard(root: Path, name: str, number: int, entry: dict[str, Any], decode: bool) -> Checked:
    """Checks a tar, its DALI index and its rows of the index table."""
    path = root / entry["name"]
    findings = list(check_file(path, entry["size"], entry["sha256"]))
    idx = path.with_suffix(".idx")
    size = idx.stat().st_size if idx.exists() else 0
    findings += check_file(idx, size, entry["idx_sha256"])
    try:
        split = shards.open_split(root, name)
    except ShardError as error:  # then rows and bytes cannot be compared
        return Checked(entry["num_samples"], 0, [*findings, Finding(name, str(error))])
    (rows,) = np.nonzero(split.shard == number)
    if len(rows) != entry["num_samples"]:
        fault = f"{len(rows):,} rows of the index instead of {entry['num_samples']:,}"
        findings.append(Finding(path.name, fault))
    data = np.memmap(path, np.uint8, "r")
    labels = read_labels(idx, data)
    for sample in rows.tolist():
        for fault in check_sample(split, sample, data, labels, decode):
            findings.append(Finding(path.name, f"byte {int(split.offset[sample])}: {fault}"))
    return Checked(len(rows), len(data), findings)


def read_labels(idx: Path, tar: np.ndarray) -> dict[int, str]:
    """The text of every sample's .cls member, by the offset of its image, as DALI would find it."""
    labels = {}
    with contextlib.suppress(
        OSError, ValueError, LookupError
    ):  # a damaged one was found by its digest
        for line in idx.read_text().splitlines()[1:]:
            words = line.split()
            found = {words[i]: (int(words[i + 1]), int(words[i + 2])) for i in (0, 4)}
            offset, size = found.pop("cls")
            ((image, _),) = found.values()
            labels[image] = tar[offset : offset + size].tobytes().decode("ascii")
    return labels


def check_sample(
    split: Split, sample: int, tar: np.ndarray, labels: dict[int, str], decode: bool
) -> Iterator[str]:
    """Faults of one sample: its headers, label, checksum and pixels."""
    offset, size = int(split.offset[sample]), int(split.size[sample])
    image = tar[offset : offset + size].tobytes()
    block = tarfile.BLOCKSIZE
    try:
        header = tarfile.TarInfo.frombuf(tar[offset - block : offset].tobytes(), "utf-8", "strict")
        if header.size != size:
            yield f"{header.name} has {header.size:,} bytes in its header, {size:,} in the index"
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        yield f"no header of a member: {error}"
    label, text = int(split.label[sample]), labels.get(offset, "none")
    # In tars of others, labels may be numbers that are not counted through.
    if not text.strip().isdigit() or (
        int(text) != label and split.classes[label] != f"{int(text):06d}"
    ):
        yield f"label {text!r} in the tar, {label} in the index"
    if zlib.crc32(image) != split.crc32[sample]:
        yield "crc32 is not the index's: the image's bytes have changed"
        return
    if decode:
        try:
            with Image.open(io.BytesIO(image)) as opened:
                opened.load()
                if opened.size != (split.width[sample], split.height[sample]):
                    yield f"is {opened.size} pixels, not what the index says"
        except Exception as error:
            yield f"cannot be decoded: {error}"


if __name__ == "__main__":
    main()
