"""A damaged data set is refused with the fault, the file and the remedy.

test_sharding.py and test_sources.py test faults of sources.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Refused, shard

from fasttrain import shards, train
from fasttrain.sharding import Policy

Manifest = dict[str, Any]

AGAIN = "make the data set again"


def of(manifest: Manifest, *place: Any) -> Any:
    """Follows keys and list positions, beginning at `splits.train`."""
    node = manifest["splits"]["train"]
    for step in place:
        node = node[step]
    return node


MANIFESTS: list[tuple[Callable[[Manifest], object], str]] = [
    (lambda m: m.pop("version"), "manifest.json is damaged; make"),
    (lambda m: m.update(version=7), "has format version 7, but this fasttrain reads 1; make"),
    (lambda m: m.update(version="1"), "has format version 1, but this fasttrain reads 1; make"),
    (lambda m: m.pop("classes"), "is damaged: classes: Field required"),
    (lambda m: m.update(classes=[]), "is damaged: classes: List should have at least 1 item"),
    (lambda m: m.update(classes=["x"] * 70000), "classes: List should have at most 65536 items"),
    (lambda m: m.update(classes="abc"), "is damaged: classes: Input should be a valid list"),
    (lambda m: m.update(classes=[1, 2, 3]), "classes[0]: Input should be a valid string"),
    (lambda m: m.pop("policy"), "is damaged: policy: Field required"),
    (lambda m: m["policy"].pop("short_side"), "policy.short_side: Field required"),
    (lambda m: m["policy"].update(short_side=-1), "policy.short_side: Input should be greater"),
    (lambda m: m["policy"].update(store="png"), "policy.store: Input should be 'jpeg' or 'raw'"),
    (lambda m: m.pop("splits"), "is damaged: splits: Field required"),
    (lambda m: m.update(splits=[]), "is damaged: splits: Input should be a valid dict"),
    (lambda m: m.update(splits={}), "is damaged: splits: Dictionary should have at least 1 item"),
    (lambda m: m["splits"].update(train=None), "splits.train: Input should be a valid dict"),
    (lambda m: of(m).pop("index"), "splits.train.index: Field required"),
    (lambda m: of(m, "index").update(sha256=""), "splits.train.index.sha256: String should match"),
    (lambda m: of(m).pop("shards"), "splits.train.shards: Field required"),
    (lambda m: of(m).update(shards=[]), "splits.train.shards: List should have at least 1 item"),
    (
        lambda m: of(m).update(shards=of(m, "shards")[:1] * 70000),
        "splits.train.shards: List should have at most 65536 items",
    ),
    (lambda m: of(m).update(num_samples="45"), "splits.train.num_samples: Input should be a valid"),
    (lambda m: of(m).update(num_samples=44), "splits.train: num_samples is not the sum of its sh"),
    (lambda m: of(m).update(num_samples=0), "num_samples: Input should be greater than or equal"),
    (
        lambda m: of(m, "shards", 3).update(size=-1),
        "splits.train.shards[3].size: Input should be greater than or equal to 1",
    ),
    (
        lambda m: of(m, "shards", 3).update(size=1e4),
        "splits.train.shards[3].size: Input should be a valid integer",
    ),
    (
        lambda m: of(m, "shards", 3).update(size=2**64),
        "splits.train.shards[3].size: Input should be less than 1099511627776",
    ),
    (
        lambda m: of(m, "shards", 3).update(num_samples=-1),
        "splits.train.shards[3].num_samples: Input should be greater than or equal to 0",
    ),
    (lambda m: of(m, "shards", 3).pop("sha256"), "splits.train.shards[3].sha256: Field required"),
    (lambda m: of(m, "shards", 3).pop("idx_sha256"), "shards[3].idx_sha256: Field required"),
    *[
        (
            lambda m, name=name: of(m, "shards", 1).update(name=name),
            f"splits.train.shards[1].name: {name!r} is not the name of a file in the data",
        )
        for name in ("../../etc/passwd", "/etc/passwd", "sub/train-000001.tar", "..", "", "a\0b")
    ],
    (
        lambda m: of(m, "shards", 1).update(name="\ud800"),
        "shards[1].name: '\\ud800' is not the name of a file in the data set's folder",
    ),
    (
        lambda m: of(m, "shards", 1).update(name="x" * 999),
        "xxx' is not the name of a file in the data",
    ),
    (lambda m: of(m, "shards", 1).update(name=3), "shards[1].name: Input should be a valid string"),
    (
        lambda m: of(m, "index").update(name="/etc/passwd"),
        "splits.train.index.name: '/etc/passwd' is not the name of a file in the data set's folder",
    ),
    (
        lambda m: of(m, "shards", 1).update(name=of(m, "shards", 0, "name")),
        "shards[1].name: splits.train.shards[0] has the name train-000000.tar already",
    ),
    (
        lambda m: m["splits"].update(val=of(m)),
        "splits.val.index.name: splits.train.index has the name train.index already",
    ),
    (
        lambda m: of(m, "shards", 0).update(size=1024),
        "manifest.json says 1,024: copy it again or make",
    ),
]


@pytest.mark.parametrize("number", range(len(MANIFESTS)))
def test_each_damaged_manifest_is_refused(
    number: int, copied: Path, tiny: Callable[..., Path], refused: Refused
) -> None:
    change, message = MANIFESTS[number]
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    refused(train.main, [tiny(data={"root": str(copied)})], str(copied), message, AGAIN)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"\xff\xfe", b"{", b"[" * 100_000, b"null"])
def test_a_file_that_is_not_a_manifest_is_refused(content: bytes, copied: Path) -> None:
    (copied / "manifest.json").write_bytes(content)
    with pytest.raises(shards.ShardError, match=f"manifest.json is damaged; {AGAIN}"):
        shards.read_manifest(copied)


def test_a_missing_split_is_refused(copied: Path) -> None:
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["splits"]["train"]
    path.write_text(json.dumps(manifest | {"of a newer": "minor version"}))
    with pytest.raises(shards.ShardError, match="no split train, only val; make it again from a"):
        shards.open_split(copied, "train")


INDEXES = [  # column, sample, value, what is said and of which sample
    ("offset", 3, 2**64 - 100, "its bytes are outside of its tar", 3),
    ("offset", 3, 2**63, "its bytes are outside of its tar", 3),
    ("size", 4, 2**32 - 1, "its bytes are outside of its tar", 4),
    ("size", 4, 0, "it has no bytes or no pixels", 4),
    ("width", 7, 0, "it has no bytes or no pixels", 7),
    ("height", 8, 0, "it has no bytes or no pixels", 8),
    ("label", 6, 3, "there is no such class", 6),
    ("shard", 5, 60000, "there is no such shard", 5),
    ("shard", 0, 1, "it is not in the shard that manifest.json gives it", 0),
    ("shard", 10, 1, "it is not in the shard that manifest.json gives it", 10),
]


def change_index(path: Path, column: str, sample: int, value: int, count: int) -> None:
    data = bytearray(path.read_bytes())
    start = len(shards._INDEX_MAGIC) + 8
    for name, dtype in shards._COLUMNS:
        if name == column:
            np.frombuffer(data, dtype, count, start)[sample] = value
        start += count * np.dtype(dtype).itemsize
    path.write_bytes(data)


@pytest.mark.parametrize(("column", "sample", "value", "message", "first"), INDEXES)
def test_each_damaged_index_is_refused(
    column: str,
    sample: int,
    value: int,
    message: str,
    first: int,
    copied: Path,
    tiny: Callable[..., Path],
    refused: Refused,
) -> None:
    change_index(copied / "train.index", column, sample, value, 45)
    said = f"{copied}/train.index is damaged: {message}, first at sample {first}; {AGAIN}"
    refused(train.main, [tiny(data={"root": str(copied)})], said)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-24],  # a sample less than it says
        lambda data: data + bytes(24),
        lambda data: data[:18] + bytes(8) + data[26:],  # says that it has none
        lambda data: data[:18] + b"\xff" * 8 + data[26:],
        lambda data: b"fasttrain index 2\n" + data[18:],
        lambda data: data[:3],
    ],
)
def test_an_index_of_another_form_is_refused(
    change: Callable[[bytes], bytes], copied: Path
) -> None:
    path = copied / "train.index"
    path.write_bytes(change(path.read_bytes()))
    manifest = json.loads((copied / "manifest.json").read_text())
    of(manifest, "index")["size"] = path.stat().st_size
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(shards.ShardError, match=r"train.index is damaged or of another version; "):
        shards.open_split(copied, "train")


def test_a_raw_index_with_more_pixels_than_bytes_is_refused(folder: Path, tmp_path: Path) -> None:
    shard(folder, tmp_path / "raw", Policy(store="raw"))
    width = int(shards.open_split(tmp_path / "raw", "train").width[9])
    change_index(tmp_path / "raw" / "train.index", "width", 9, width + 1, 45)
    with pytest.raises(shards.ShardError, match="fewer bytes than pixels, first at sample 9"):
        shards.open_split(tmp_path / "raw", "train")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train.index", "shorten", "train.index has 100 bytes, but manifest.json says"),
        ("train.index", "remove", "train.index: No such file or directory, but manifest.json"),
        ("train.index", "folder", "train.index is not a file: copy it again"),
        ("train.index", "flip", "train.index is damaged or of another version"),
        ("val-000000.tar", "shorten", "val-000000.tar has 100 bytes, but manifest.json says"),
        ("train-000002.tar", "remove", "train-000002.tar: No such file or directory, but"),
        ("train-000002.tar", "folder", "train-000002.tar is not a file: copy it again"),
        ("manifest.json", "folder", "manifest.json: cannot be read (Is a directory)"),
        ("manifest.json", "remove", "manifest.json is missing; copy that file"),
    ],
)
def test_each_damaged_file_of_a_data_set_is_named(
    name: str,
    damage: str,
    message: str,
    copied: Path,
    tiny: Callable[..., Path],
    refused: Refused,
) -> None:
    path = copied / name
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data[:100] if damage == "shorten" else data)
    if damage in ("remove", "folder"):
        path.unlink()
    if damage == "folder":
        path.mkdir()
    said = [message] if name == "manifest.json" else [message, AGAIN]
    refused(train.main, [tiny(data={"root": str(copied)})], str(copied), *said)
