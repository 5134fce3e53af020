"""Unpacked images are used again after a kill, and never for a source that was changed."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import forms
import numpy as np
import pytest
from conftest import listed, shard
from forms import Photo
from PIL import Image
from shard_files import expected_samples

from fasttrain import sharding, shards, spool
from fasttrain.shards import ShardError
from fasttrain.spool import Item, Job

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def photos(colour: str, number: int = 3, splits: tuple[str, ...] = shards.SPLITS) -> list[Photo]:
    """Images of one colour, `number` of each class and split, under the same names every time."""
    data = io.BytesIO()
    Image.new("RGB", (32, 32), COLOURS[colour]).save(data, "JPEG")
    return [
        Photo(split, wnid, f"{wnid}_{count}.JPEG", data.getvalue())
        for split in splits
        for wnid in forms.WNIDS
        for count in range(number)
    ]


def colours(out: Path) -> list[str]:
    """The colour of every training image of a data set."""
    found = []
    for _, data in expected_samples(out, "train"):
        red, _, blue = np.asarray(Image.open(io.BytesIO(data))).mean((0, 1))
        found.append("red" if red > blue else "blue")
    return found


def put(form: str, root: Path, content: list[Photo]) -> None:
    for path in root.rglob("*.*"):
        path.unlink()
    (root / "data").mkdir(parents=True, exist_ok=True)
    writer = {"hf-tar": forms.write_hf_tar, "parquet": forms.write_parquet}[form]
    if form == "parquet":
        (root / "data").rmdir()
    writer(root, content)


@pytest.mark.parametrize("form", ["parquet", "hf-tar"])
def test_images_unpacked_before_a_change_are_not_used(form: str, tmp_path: Path) -> None:
    """A first try leaves its spool. Then the data are exported again under the same names."""
    root, out = tmp_path / "in", tmp_path / "out"
    out.mkdir()
    put(form, root, photos("red", 2))
    listed(root, out)  # unpacks, and ends before a shard is written
    kept = {path.name for path in out.iterdir()}
    assert len(kept) == 6 and all(name.startswith(spool.SPOOL) for name in kept)
    put(form, root, photos("blue", 3))
    manifest = shard(root, out)
    assert manifest and manifest["splits"]["train"]["num_samples"] == 9
    assert colours(out) == ["blue"] * 9
    assert not [*out.glob(f"{spool.SPOOL}*")]


@pytest.mark.parametrize("form", ["parquet", "hf-tar"])
def test_both_splits_are_looked_for_before_anything_is_unpacked(form: str, tmp_path: Path) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    out.mkdir()
    put(form, root, photos("red"))
    for pattern in ("val*", "test*"):
        for path in (root / "data").glob(pattern):
            path.unlink()
    with pytest.raises(ShardError, match=r"no (parquet file has|files of) val"):
        listed(root, out)
    assert not [*out.iterdir()]


def reader(data: bytes, calls: list[str]) -> spool.Read:
    def read(job: Job) -> Iterator[Item]:
        calls.append(job.name)
        yield "a.jpg", 0, data

    return read


def unpack(job: Job, read: spool.Read, folder: Path) -> bytes:
    """Unpacks a file of one image; returns the bytes of that."""
    spool.unpack([job], read, folder, lambda tasks: [task() for task in tasks])
    (found,) = spool.unpacked(job, folder)
    assert found.path.stat().st_mtime_ns == job.path.stat().st_mtime_ns
    return found.path.read_bytes()[found.offset : found.offset + found.size]


def test_an_unpacked_archive_is_reused_only_if_the_file_is_unchanged(tmp_path: Path) -> None:
    path, calls = tmp_path / "x.gz", list[str]()
    path.write_bytes(b"1" * 100)
    job, out = Job(tmp_path, "x.gz", "train"), tmp_path / "out"
    out.mkdir()
    assert unpack(job, reader(b"old", calls), out) == b"old"
    assert unpack(job, reader(b"new", calls), out) == b"old" and len(calls) == 1
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(b"2" * 100)  # same size and time
    os.utime(path, ns=times)
    assert unpack(job, reader(b"new", calls), out) == b"new"
    os.utime(path, ns=(times[0], times[1] + 1_000_000_000))
    assert unpack(job, reader(b"newer", calls), out) == b"newer"
    other = job._replace(columns=("image", "fine_label"))
    assert unpack(other, reader(b"fine", calls), out) == b"fine"
    next(out.glob("*.bin")).write_bytes(b"half")  # another file under the name
    assert unpack(other, reader(b"fine!", calls), out) == b"fine!" and len(calls) == 5


def test_images_read_by_other_rules_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer fasttrain that reads sources in another way finds the files of an older one."""
    (tmp_path / "x.gz").write_bytes(b"1")
    job, calls = Job(tmp_path, "x.gz", "train"), list[str]()
    assert unpack(job, reader(b"old", calls), tmp_path) == b"old"
    root = tmp_path / "in"
    root.mkdir()
    put("hf-tar", root, photos("red"))
    source = listed(root, tmp_path)
    sharding.claim(tmp_path / "out", source, sharding.Policy(), 0, 1000)
    monkeypatch.setattr(shards, "READING_RULES", shards.READING_RULES + 1)
    assert unpack(job, reader(b"new", calls), tmp_path) == b"new"
    with pytest.raises(ShardError, match=r"out was begun by .* \(reading rules \d+ -> "):
        sharding.claim(tmp_path / "out", source, sharding.Policy(), 0, 1000)


def test_files_of_one_name_in_two_folders_are_unpacked_apart(tmp_path: Path) -> None:
    found = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.gz").write_bytes(b"")
        job = Job(tmp_path, f"{folder}/train.gz", "train")
        found.append(unpack(job, reader(folder.encode(), []), tmp_path))
    assert found == [b"a", b"b"]


def test_a_file_that_changes_while_it_is_unpacked_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(b"half of it")

    def read(job: Job) -> Iterator[Item]:
        yield "a.jpg", 0, b"image"
        path.write_bytes(b"half of it and the rest")

    with pytest.raises(ShardError, match=r"x\.gz was changed while it was unpacked; start again"):
        unpack(Job(tmp_path, "x.gz", "train"), read, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.gz"]
