"""Checks every byte of a data set, and names what is damaged.

    python tools/verify_shards.py OUT [--quick]

Checks the manifest, and the size and sha256 of every file. Compares the index tables with the
headers, labels and crc32 in the tars. Decodes every image, unless --quick is given. The exit code
is 0 if nothing is damaged; otherwise it is 1, and a table lists the findings. The last line on
standard output is one JSON object.
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
    """A fault of the data set."""

    place: str  # the file or split; a key of the JSON object
    fault: str


class Checked(NamedTuple):
    """The result of checking a shard."""

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
        help="number of processes (default: the CPUs of this machine, %(default)s)",
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
    """Returns all findings in the data set at `root`, and the number of checked samples."""
    try:
        manifest = shards.read_manifest(root)
        written = (root / shards.MANIFEST).read_bytes()
        digest = (root / shards.MANIFEST_DIGEST).read_bytes()
    except ShardError as error:
        return [Finding(shards.MANIFEST, str(error))], 0
    except OSError as error:
        return [Finding(shards.MANIFEST_DIGEST, str(error.strerror))], 0
    if digest != shards.manifest_digest(written):  # nothing in the manifest can be trusted
        fault = f"its digest is not the one in {shards.MANIFEST_DIGEST}: nothing else was checked"
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
    """Yields a finding if a file does not have the size and the sha256 of the manifest."""
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
        yield Finding(path.name, "its sha256 is not the manifest's: its bytes have changed")


def check_shard(root: Path, name: str, number: int, entry: dict[str, Any], decode: bool) -> Checked:
    """Checks a tar, its DALI index and its rows of the index table."""
    path = root / entry["name"]
    findings = list(check_file(path, entry["size"], entry["sha256"]))
    idx = path.with_suffix(".idx")
    size = idx.stat().st_size if idx.exists() else 0
    findings += check_file(idx, size, entry["idx_sha256"])
    try:
        split = shards.open_split(root, name)
    except ShardError as error:  # the rows cannot be compared with the tar
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
    """Reads the text of every sample's .cls member through DALI's index.

    Returns:
        The texts by the offset of the sample's image.
    """
    labels = {}
    # If DALI's index is damaged, its sha256 has shown that already.
    with contextlib.suppress(OSError, ValueError, LookupError):
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
    """Yields the faults of a sample's header, label, checksum and pixels."""
    offset, size = int(split.offset[sample]), int(split.size[sample])
    image = tar[offset : offset + size].tobytes()
    block = tarfile.BLOCKSIZE
    try:
        header = tarfile.TarInfo.frombuf(tar[offset - block : offset].tobytes(), "utf-8", "strict")
        if header.size != size:
            yield f"{header.name} has {header.size:,} bytes in its header, {size:,} in the index"
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        yield f"the header of the image cannot be read: {error}"
    label, text = int(split.label[sample]), labels.get(offset, "none")
    # Tars indexed in place may have labels with gaps. Their classes are the padded numbers.
    if not text.strip().isdigit() or (
        int(text) != label and split.classes[label] != f"{int(text):06d}"
    ):
        yield f"label {text!r} in the tar, {label} in the index"
    if zlib.crc32(image) != split.crc32[sample]:
        yield "the image's crc32 is not the one in the index: its bytes have changed"
        return
    if decode:
        try:
            with Image.open(io.BytesIO(image)) as opened:
                opened.load()
                if opened.size != (split.width[sample], split.height[sample]):
                    indexed = f"{split.width[sample]} x {split.height[sample]}"
                    yield f"has {opened.width} x {opened.height} pixels, {indexed} in the index"
        except Exception as error:
            yield f"the image cannot be decoded: {error}"


if __name__ == "__main__":
    main()
