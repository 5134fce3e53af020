"""A catalogue of wrong inputs, each with what is said: the fault, the place, the remedy.

Those of recipes are in test_config.py.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import REPO, run

from fasttrain import checkpoint, run_folder, shards, train

sys.path.insert(0, str(REPO / "tools"))
import benchmark
import evaluate
import make_shards

Manifest = dict[str, Any]


@pytest.fixture
def copied(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "shards"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Runs an entry point that must end with exit code 2 and these words on standard error."""

    def check(main: Callable[[list[str]], object], words: list[Any], *said: str) -> None:
        with pytest.raises(SystemExit) as status:
            main([str(word) for word in words])
        output = capsys.readouterr().err
        assert status.value.code == 2, output
        for text in said:
            assert text in output
        assert "Traceback" not in output

    return check


@pytest.fixture
def of(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], Callable[[list[str]], None]]:
    """A tool's entry point, as a function of its words."""

    def wrap(tool: ModuleType) -> Callable[[list[str]], None]:
        def main(words: list[str]) -> None:
            monkeypatch.setattr(sys, "argv", ["tool", *words])
            tool.main()

        return main

    return wrap


def train_split(manifest: Manifest) -> Any:
    return manifest["splits"]["train"]


MANIFESTS: list[tuple[Callable[[Manifest], object], str]] = [
    (lambda m: m.pop("version"), "manifest.json is damaged; make the data set again"),
    (lambda m: m.update(version=7), "has format version 7, this fasttrain reads 1"),
    (lambda m: m.pop("classes"), "is damaged: classes: Field required"),
    (lambda m: m.update(classes=[]), "is damaged: classes: List should have at least 1 item"),
    (lambda m: m.update(classes=["x"] * 70000), "classes: List should have at most 65536 items"),
    (lambda m: m.update(classes="abc"), "is damaged: classes: Input should be a valid list"),
    (lambda m: m.update(classes=[1, 2, 3]), "classes[0]: Input should be a valid string"),
    (lambda m: m.pop("policy"), "is damaged: policy: Field required"),
    (lambda m: m["policy"].pop("short_side"), "policy.short_side: Field required"),
    (lambda m: m["policy"].update(store="png"), "policy.store: Input should be 'jpeg' or 'raw'"),
    (lambda m: m.pop("splits"), "is damaged: splits: Field required"),
    (lambda m: m.update(splits=[]), "is damaged: splits: Input should be a valid dict"),
    (lambda m: m["splits"].pop("train"), "has no split train, only val"),
    (lambda m: train_split(m).pop("shards"), "splits.train.shards: Field required"),
    (lambda m: train_split(m).update(shards=[]), "splits.train.shards: List should have at least"),
    (lambda m: train_split(m).update(num_samples="45"), "splits.train.num_samples: Input should"),
    (lambda m: train_split(m).update(num_samples=44), "its shards have another number of samples"),
    (
        lambda m: train_split(m)["shards"][1].update(size=-1),
        "splits.train.shards[1].size: Input should be greater than or equal to 1",
    ),
    (
        lambda m: train_split(m)["shards"][1].update(size=1e4),
        "splits.train.shards[1].size: Input should be a valid integer",
    ),
    (
        lambda m: train_split(m)["shards"][1].update(name="../../etc/passwd"),
        "splits.train.shards[1].name: '../../etc/passwd' is no file in the data set's folder",
    ),
    (
        lambda m: train_split(m)["index"].update(name="/etc/passwd"),
        "splits.train.index.name: '/etc/passwd' is no file in the data set's folder",
    ),
    (
        lambda m: train_split(m)["shards"][1].update(name=train_split(m)["shards"][0]["name"]),
        "splits.train.shards[1].name: train-000000.tar is that of splits.train.shards[0] already",
    ),
    (
        lambda m: train_split(m)["shards"][0].update(size=1024),
        "manifest.json says 1,024: copy it anew or make the data set again",
    ),
]


@pytest.mark.parametrize("number", range(len(MANIFESTS)))
def test_manifests(
    copied: Path, tiny: Callable[..., Path], refused: Callable[..., None], number: int
) -> None:
    change, message = MANIFESTS[number]
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    refused(train.main, [tiny(data={"root": str(copied)})], message)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"\xff\xfe", b"{", b"[" * 100_000, b"null"])
def test_manifests_that_are_none(copied: Path, content: bytes) -> None:
    (copied / "manifest.json").write_bytes(content)
    with pytest.raises(shards.ShardError, match="is damaged; make the data set again"):
        shards.read_manifest(copied)


INDEXES: dict[str, tuple[int, int, str]] = {  # column: sample, value, and what is said
    "offset": (3, 2**64 - 100, "its bytes lie outside of its tar, first of sample 3"),
    "size": (4, 2**32 - 1, "its bytes lie outside of its tar, first of sample 4"),
    "shard": (5, 60000, "there is no such shard, first of sample 5"),
    "label": (6, 3, "there is no such class, first of sample 6"),
    "width": (7, 0, "it has no bytes or no pixels, first of sample 7"),
    "height": (8, 0, "it has no bytes or no pixels, first of sample 8"),
}


def change_index(path: Path, column: str, sample: int, value: int, count: int) -> None:
    data = bytearray(path.read_bytes())
    start = len(shards._INDEX_MAGIC) + 8
    for name, dtype in shards._COLUMNS:
        if name == column:
            values = np.frombuffer(data, dtype, count, start)
            values.flags.writeable = True
            values[sample] = value
        start += count * np.dtype(dtype).itemsize
    path.write_bytes(data)


@pytest.mark.parametrize("column", INDEXES)
def test_indexes(
    copied: Path, tiny: Callable[..., Path], refused: Callable[..., None], column: str
) -> None:
    sample, value, message = INDEXES[column]
    change_index(copied / "train.index", column, sample, value, 45)
    message = f"train.index is damaged: {message}; make the data set again"
    refused(train.main, [tiny(data={"root": str(copied)})], message)


def test_indexes_whose_shards_are_mixed_up(copied: Path) -> None:
    for sample, message in ((0, "shards do not follow"), (10, "manifest.json gives its shard")):
        root = Path(shutil.copytree(copied, copied.with_name(f"{sample}")))
        shard = int(shards.open_split(root, "train").shard[sample])
        change_index(root / "train.index", "shard", sample, shard + 1, 45)
        with pytest.raises(shards.ShardError, match=f"train.index is damaged: {message}"):
            shards.open_split(root, "train")


def test_a_raw_index_with_more_pixels_than_bytes(folder: Path, tmp_path: Path) -> None:
    from conftest import shard

    from fasttrain.sharding import Policy

    shard(folder, tmp_path / "raw", Policy(store="raw"))
    width = int(shards.open_split(tmp_path / "raw", "train").width[9])
    change_index(tmp_path / "raw" / "train.index", "width", 9, width + 1, 45)
    with pytest.raises(shards.ShardError, match="fewer bytes than pixels, first of sample 9"):
        shards.open_split(tmp_path / "raw", "train")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train.index", "shorten", "train.index has 100 bytes, manifest.json says"),
        ("train.index", "remove", "train.index: No such file or directory, but manifest.json"),
        ("train.index", "flip", "train.index is damaged or of another version; make the data"),
        ("val-000000.tar", "shorten", "val-000000.tar has 100 bytes, manifest.json says"),
        ("train-000002.tar", "remove", "train-000002.tar: No such file or directory, but"),
        ("manifest.json", "remove", "make one with\n    python tools/make_shards.py"),
    ],
)
def test_files_of_a_data_set(
    copied: Path,
    tiny: Callable[..., Path],
    refused: Callable[..., None],
    name: str,
    damage: str,
    message: str,
) -> None:
    path = copied / name
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data[:100] if damage == "shorten" else data)
    if damage == "remove":
        path.unlink()
    refused(train.main, [tiny(data={"root": str(copied)})], message)


def test_paths_and_launches(
    tiny: Callable[..., Path],
    refused: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, file = tiny(), tmp_path / "file"
    file.write_text("")

    def refuse(setting: str, *said: str) -> None:
        refused(train.main, [recipe, "--set", setting], *said)

    refuse(f"data.root={file}", f"no data set at {file}", "python tools/make_shards.py")
    refuse("data.root=/nowhere", "no data set at /nowhere", "--set data.root=/path/to/shards")
    refuse("data.short_side=256", "asks for images of short side 256, those at", "--short-side 256")
    refuse(f"log.run_dir={file}", f'[log] run_dir = "{file}": cannot be written', "choose another")
    refuse(f"log.run_dir={file}/run", "cannot be written (Not a directory)", "choose another")
    refuse("train.global_batch_size=99", "= 99: more than the 45 training images")
    refuse("train.micro_batch_size=3", "does not divide the 8 images", "2 or 4 would")
    refuse("checkpoint.resume=none", '[checkpoint] resume = "none": there is no such checkpoint')
    refuse("train.precision=fp16", "[train] precision = fp16: needs a GPU; use bf16 or no")
    refuse("train.execution=graph", "[train] execution = graph: needs a GPU; use auto")
    refuse("data.decode=gpu_full", "decode = gpu_full: this process has no GPU; use cpu or auto")
    refused(train.main, [tmp_path], "cannot read this recipe (Is a directory)")
    refused(train.main, [], "the following arguments are required: recipe")
    refused(train.main, [recipe, "--epochs", "3"], "unrecognized arguments: --epochs 3")
    file.write_bytes(b"\xff\xfe")
    refused(train.main, [file], "not valid TOML")
    monkeypatch.setenv("WORLD_SIZE", "3")
    refuse("train.epochs=3", "does not divide over 3 processes; 6 or 9 would, or launch 2 or 4")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse("train.epochs=3", "WORLD_SIZE = 2 in the environment, but no MASTER_ADDR: start")


def test_a_damaged_run_folder(
    tiny: Callable[..., Path],
    refused: Callable[..., None],
    of: Callable[..., Any],
    tmp_path: Path,
    dataset: Path,
) -> None:
    recipe, folder = tiny(train={"max_steps": 5}), tmp_path / "run"
    train.main([str(recipe)])
    (folder / "DONE").unlink()
    kept = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text("[train\n")
    refused(train.main, [recipe], "recipe.toml: not valid TOML")
    (folder / "recipe.toml").write_text(kept)
    for path in checkpoint.find(folder / "checkpoints"):
        (path / "training.pt").write_bytes(b"")
    refused(
        train.main, [recipe], "training.pt is damaged", "restore one from a copy, or start anew"
    )
    (folder / "checkpoints" / "step_00000005" / "state.json").unlink()
    words = [folder / "checkpoints" / "step_00000005", "--data", dataset]
    refused(of(evaluate), words, "is not a checkpoint of fasttrain: ", "state.json")


def test_other_networks_and_classes(
    tiny: Callable[..., Path], refused: Callable[..., None], tmp_path: Path
) -> None:
    recipe = tiny(train={"max_steps": 2})
    train.main([str(recipe)])
    words = [recipe, "--set", "model.width=0.5", "--set", "train.max_steps=3"]
    refused(train.main, words, "model.width: 0.35 -> 0.5", "--set checkpoint.resume=force")
    refused(
        train.main,
        [*words, "--set", "checkpoint.resume=force"],
        "model.safetensors: these weights do not fit",
    )


def test_demo_without_its_library(
    tiny: Callable[..., Path], refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    recipe = tiny(data={"prepare": "digits", "root": "/tmp/never/made"})
    refused(train.main, [recipe], "pip install -e '.[demo]'")


def test_tools(
    refused: Callable[..., None], of: Callable[..., Any], tmp_path: Path, dataset: Path
) -> None:
    refused(of(evaluate), ["/nowhere", "--data", dataset], "/nowhere")
    refused(of(make_shards), ["/nowhere", tmp_path / "out"], "/nowhere")
    refused(of(make_shards), [tmp_path, tmp_path / "out", "--part", "9/8"], "--part")
    refused(of(make_shards), [tmp_path, tmp_path / "out", "--quality", "0"], "--quality")
    refused(of(benchmark), ["input", "/nowhere"], "/nowhere")
    refused(of(benchmark), ["step", "--batch", "none"], "--batch")


def test_nothing_is_written_where_something_is_wrong(tmp_path: Path) -> None:
    words = ["python", "-m", "fasttrain.train", REPO / "recipes/large.toml"]
    settings = ["--set", f"log.run_dir={tmp_path / 'run'}", "--set", "data.root=/nowhere"]
    assert "Traceback" not in run([*words, *settings], code=2).stderr
    assert not (tmp_path / "run").exists() and run_folder.LOCK and os.path.isdir(tmp_path)
