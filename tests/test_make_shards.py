"""make_shards.py checks its options, and does not change a finished data set."""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forms
import make_shards
import pytest
from shard_files import files_of
from small_sources import image, pair, put, samples

from fasttrain import shards

Make = Callable[..., tuple[int, str, dict[str, Any]]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Make:
    """Runs the command here. Returns its exit code, its messages and its closing record."""

    def run(*words: object) -> tuple[int, str, dict[str, Any]]:
        command = ["make_shards.py", *map(str, words), "--workers", "1"]
        monkeypatch.setattr(sys, "argv", command)
        try:
            make_shards.main()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capsys.readouterr()
        return code, err, json.loads(out.splitlines()[-1]) if out else {}

    return run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    names = [f"{s}/{c}/{n}.png" for s in ("train", "val") for c in ("cat", "dog") for n in range(3)]
    return put(tmp_path / "in", *names)


def test_a_rerun_has_nothing_to_do(root: Path, tmp_path: Path, make: Make) -> None:
    out = tmp_path / "out"
    code, _, first = make(root, out)
    before = files_of(out)
    assert code == 0
    for part in ((), ("--part", "7/8")):
        code, said, again = make(root, out, *part)
        assert code == 0 and said.count(f"{out} is done, nothing to do\n") == 1
        assert again["splits"] == first["splits"] and files_of(out) == before


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (["--seed", "1"], "seed: 0 -> 1"),
        (["--short-side", "4"], "policy: {.*} -> {'short_side': 4"),
        (["--classes-by-number"], "--classes-by-number: the class cat is not a number"),
        (["--val-only"], "source: other images, sizes or classes"),
    ],
)
def test_a_rerun_with_other_options_is_refused(
    root: Path, tmp_path: Path, make: Make, options: list[str], difference: str
) -> None:
    out = tmp_path / "out"
    make(root, out)
    before = files_of(out)
    code, said, _ = make(root, out, *options)
    assert code == 2 and files_of(out) == before
    assert re.search(difference, said)


def added(root: Path) -> None:
    put(root, "train/cat/new.png")


def resized(root: Path) -> None:
    (root / "train/cat/0.png").write_bytes(image() + b"x")


def rewritten(root: Path) -> None:
    time.sleep(0.02)
    (root / "train/cat/0.png").write_bytes(image(9))


@pytest.mark.parametrize("change", [added, resized, rewritten])
def test_a_rerun_with_a_changed_source_is_refused(
    root: Path, tmp_path: Path, make: Make, change: Callable[[Path], None]
) -> None:
    make(root, tmp_path / "out")
    change(root)
    code, said, _ = make(root, tmp_path / "out")
    assert code == 2 and "already holds another finished data set:\n  source: " in said
    assert f"\nremove {tmp_path / 'out'} and start again, or choose another folder\n" in said


@pytest.mark.parametrize("form", ["parquet", "hf-tar"])
def test_a_rerun_unpacks_nothing(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    forms.write(form, root, forms.photographs())
    assert make(root, out, "--allow-partial")[0] == 0
    monkeypatch.setattr("fasttrain.spool.unpack", lambda *arguments: pytest.fail("unpacked"))
    code, said, _ = make(root, out, "--allow-partial")
    assert code == 0 and f"{out} is done, nothing to do" in said
    path = max((root / "data").glob("train*"))
    path.unlink()
    code, said, _ = make(root, out, "--allow-partial")
    assert code == 2 and "source: other files, or other contents of them" in said


def test_a_rerun_in_place_has_nothing_to_do(tmp_path: Path, make: Make) -> None:
    pair(tmp_path, [])
    for name in ("train", "val"):
        forms.put(tmp_path / f"{name}-0.tar", forms.tar([("1.cls", b"0"), ("1.jpg", photo())]))
    assert make(tmp_path, "--in-place")[0] == 0
    code, said, _ = make(tmp_path, "--in-place")
    assert code == 0 and "is done, nothing to do" in said


def labelled(path: Path, *labels: int) -> Path:
    """Writes a tar of JPEGs with these labels."""
    members = [
        (f"{n}.{end}", (str(label).encode() if end == "cls" else photo()))
        for n, label in enumerate(labels)
        for end in ("cls", "jpg")
    ]
    forms.put(path, forms.tar(members))
    return path


def test_tars_that_change_after_they_were_indexed_in_place_are_refused(
    tmp_path: Path, make: Make
) -> None:
    """The new tar has the size of the old one. The remedy keeps the tars."""
    train, _ = (labelled(tmp_path / f"{name}-0.TAR", 0, 1) for name in ("train", "val"))
    assert make(tmp_path, "--in-place")[0] == 0
    shards.check_unchanged(tmp_path)
    size, mtime = train.stat().st_size, train.stat().st_mtime_ns
    labelled(train, 1, 0)
    os.utime(train, ns=(mtime, mtime + 10**9))
    assert train.stat().st_size == size
    with pytest.raises(
        shards.ShardError,
        match=r"train-0.TAR is of .* its labels may have changed\nremove .*json and",
    ):
        shards.check_unchanged(tmp_path)
    code, said, _ = make(tmp_path, "--in-place")
    assert code == 2 and f"\nkeep the tars, remove manifest.json in {tmp_path} and start" in said
    (tmp_path / "manifest.json").unlink()
    assert make(tmp_path, "--in-place")[0] == 0
    assert shards.open_split(tmp_path, "train").label.tolist() == [1, 0]
    shards.check_unchanged(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "UNFINISHED").write_text("{}")
    code, said, _ = make(tmp_path, "--in-place")
    assert code == 2 and f"keep the tars, remove UNFINISHED in {tmp_path} and start again" in said


def test_class_names_must_be_utf8_and_file_names_may_be_anything(
    root: Path, tmp_path: Path, make: Make
) -> None:
    """File names may be any bytes. Names of classes must be text, because they are kept."""
    name = os.fsdecode(b"caf\xe9")
    for file in (name, "new\nline"):
        (root / f"train/cat/{file}.png").write_bytes(image(3))
    code, _, result = make(root, tmp_path / "out")
    assert code == 0 and result["splits"]["train"]["samples"] == 8
    for bad, fault in ((name, "a name that is not UTF-8"), ("a\nb", "a line break in its name")):
        for split in shards.SPLITS:
            (root / split / "dog").rename(root / split / bad)
        code, said, _ = make(root, tmp_path / "other")
        assert code == 2 and f"the class {bad!a} has {fault}: rename its folder" in said
        for split in shards.SPLITS:
            (root / split / bad).rename(root / split / "dog")


def test_images_of_val_that_are_also_in_train_are_named(
    root: Path, tmp_path: Path, make: Make
) -> None:
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        path.write_bytes(image(10 * number))
    assert "WARNING" not in make(root, tmp_path / "one")[1]
    (root / "val/dog/1.png").write_bytes((root / "train/cat/2.png").read_bytes())
    said = make(root, tmp_path / "two")[1]
    assert "WARNING: 1 of the 6 images of val are also in train, the first: " in said


def test_out_may_not_be_among_the_classes(root: Path, make: Make) -> None:
    code, said, _ = make(root, root / "train/shards")
    assert code == 2 and f"OUT ({root}/train/shards) is inside SOURCE ({root}), where it" in said
    assert not (root / "train/shards").exists() and make(root, root / "shards")[0] == 0


def test_times_in_the_future_do_not_count_as_a_change(
    root: Path, tmp_path: Path, make: Make
) -> None:
    """This happens after a clock was set back."""
    later = time.time() + 10_000
    os.utime(root / "train/cat/0.png", (later, later))
    for _ in range(2):
        code, said, _ = make(root, tmp_path / "out")
        assert code == 0
    assert "is done, nothing to do" in said


def test_options_may_stand_between_the_folders(root: Path, tmp_path: Path, make: Make) -> None:
    assert make(root, "--seed", 1, tmp_path / "out")[0] == 0


def photo() -> bytes:
    return next(item.data for item in forms.photographs() if item.name not in forms.ODD.values())


def test_val_only_takes_the_order_of_a_data_set(root: Path, tmp_path: Path, make: Make) -> None:
    (tmp_path / "order.txt").write_text("dog\nbird\ncat\n")
    code, said, result = make(
        root, tmp_path / "val", "--val-only", "--classes", tmp_path / "order.txt"
    )
    assert code == 0 and "1 of the 3 classes have no image in val" in said
    assert result["splits"].keys() == {"val"}
    split = shards.open_split(tmp_path / "val", "val")
    assert split.classes == ("dog", "bird", "cat") and set(split.label.tolist()) == {0, 2}
    code, _, _ = make(root, tmp_path / "again", "--val-only", "--classes", tmp_path / "val")
    assert shards.read_manifest(tmp_path / "again")["classes"] == ["dog", "bird", "cat"]


def test_what_was_left_out_is_printed_by_kind(root: Path, tmp_path: Path, make: Make) -> None:
    put(root, "train/cat/a.txt", "train/cat/b.txt", "train/dog/c.heic", "val/cat/.d.png")
    code, said, _ = make(root, tmp_path / "out")
    assert code == 0 and "left out 4 files: 2 *.txt, 1 *.heic, 1 hidden\n" in said
    assert "WARNING: 1 *.heic may be images, but are not read; convert them to JPEG" in said
    assert shards.read_manifest(tmp_path / "out")["ignored_files"] == 4


def test_pointers_in_place_of_images_are_rejected(root: Path, tmp_path: Path, make: Make) -> None:
    (root / "train/cat/0.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256")
    (root / "train/cat/1.png").write_text("/annex/objects/SHA256E-s9--0.png\n")
    said = make(root, tmp_path / "out")[1]
    for number, command in enumerate(("git lfs pull", "git annex get .")):
        pointer = "a pointer to an image that was not downloaded"
        assert f"rejected train/cat/{number}.png: {pointer}: {command}\n" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--val-fraction", "1"], "--val-fraction: 1: expected a share between 0 and 1"),
        (["--val-fraction", "x"], "--val-fraction: x: expected a share between 0 and 1"),
        (
            ["--val-only", "--val-fraction", "0.1"],
            "--val-only: all of SOURCE becomes val; leave out",
        ),
        (["--label-key", "y"], "--label-key: .* holds imagefolder, not WebDataset tars"),
        (["--classes", "/nowhere"], "--classes /nowhere: cannot be read (No such file"),
    ],
)
def test_wrong_options_are_refused(
    root: Path, tmp_path: Path, make: Make, options: list[str], message: str
) -> None:
    code, said, _ = make(root, tmp_path / "out", *options)
    first, _, last = message.partition(" .* ")
    assert code == 2 and first in said and last in said
    assert not (tmp_path / "out").exists()


def test_in_place_labels_must_be_numbers(tmp_path: Path, make: Make) -> None:
    pair(tmp_path, samples("cat"))
    code, said, _ = make(tmp_path, "--in-place")
    assert code == 2 and "used in place must be numbers: name a folder OUT" in said
