"""A damaged checkpoint or run folder is refused with the fault, the file and the remedy."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STEP, Refused

from fasttrain import caches, config, files, run_folder, train
from fasttrain.faults import ConfigError


@pytest.fixture
def going_on(trained: Path, tiny: Callable[..., Path], tmp_path: Path) -> list[Any]:
    """The arguments that resume a copy of the run `trained` for one more update."""
    shutil.copytree(trained, tmp_path / "run")
    return [tiny(), "--set", "train.max_steps=3"]


@pytest.mark.parametrize("damage", ["remove", "empty", "flip"])
@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "state.json", "SHA256SUMS"])
def test_each_damaged_file_of_a_checkpoint_is_named(
    name: str, damage: str, going_on: list[Any], refused: Refused, tmp_path: Path
) -> None:
    path = tmp_path / "run" / STEP / name
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(b"" if damage == "empty" else data)
    if damage == "remove":
        path.unlink()
    said = f"{path}: No such file or directory" if damage == "remove" else f"{path} is damaged"
    if name == "SHA256SUMS":
        said = f"{path} is missing" if damage == "remove" else "model.safetensors is damaged"
    remedy = "restore one from a copy, or start in another folder: --set log.run_dir="
    refused(train.main, going_on, "no checkpoint under", said, remedy)


def change_state(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes state.json and writes fitting checksums, as another fasttrain would."""
    state = json.loads((folder / "state.json").read_text())
    change(state)
    (folder / "state.json").write_text(json.dumps(state))
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(sums))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda state: state.update(version=9),
            ["format version 9, this fasttrain reads 1; install the fasttrain that wrote it"],
        ),
        (
            lambda state: state["data"].update(train="0" * 64),
            [
                "the train index at",
                "is not the one it was trained on",
                "--set checkpoint.resume=force",
            ],
        ),
        (
            lambda state: state["recipe"]["train"].update(seed=5),
            ["train.seed: 5 -> 0", "another folder with --set log.run_dir=..."],
        ),
        *(
            (change, [f"is not what this fasttrain writes (state.json, {place}", "from a copy"])
            for change, place in (
                (lambda state: state.clear(), "version: Field required"),
                (lambda state: state.pop("state"), "state: Field required"),
                (lambda state: state["state"].update(step="x"), "state.step: Input should be a"),
                (lambda state: state["recipe"]["train"].update(x=1), "recipe.train.x: Extra"),
                (lambda state: state.update(data=3), "data: Input should be an object"),
                (
                    lambda state: state.update(execution={"": "fast"}),
                    "execution.: String should match",
                ),
            )
        ),
    ],
)
def test_a_checkpoint_of_another_version_or_run_is_refused(
    change: Callable[[dict[str, Any]], object],
    said: list[str],
    going_on: list[Any],
    refused: Refused,
    tmp_path: Path,
) -> None:
    change_state(tmp_path / "run" / STEP, change)
    refused(train.main, going_on, f"{STEP.name} ", *said)


def test_a_training_state_of_another_form_is_refused(
    going_on: list[Any], refused: Refused, tmp_path: Path
) -> None:
    folder = tmp_path / "run" / STEP
    no_state: dict[str, Any] = {"optimizer": {"state": {}, "param_groups": []}}
    contents: list[Any] = [{}, {"optimizer": {}}, no_state, [1]]
    for content in contents:
        torch.save(content, folder / "training.pt")
        change_state(folder, lambda state: None)
        refused(train.main, going_on, "training.pt does not fit this run", "restore it from a copy")
    (folder / "training.pt").write_bytes(b"no archive")
    change_state(folder, lambda state: None)
    refused(train.main, going_on, "training.pt does not fit this run", "restore it from a copy")


def test_a_run_resumes_past_damaged_logs_but_not_past_a_damaged_done_file(
    going_on: list[Any], refused: Refused, tmp_path: Path
) -> None:
    """The run resumes without files that it does not need, and drops only unfinished lines."""
    folder = tmp_path / "run"
    for content in (b"", b"\xff\xfe", b"{", b"[]", b"{}", b'{"schedule_steps": 5}', b"null"):
        (folder / "DONE").write_bytes(content)
        refused(train.main, going_on, f"{folder}/DONE is damaged; remove it, and the same command")
    (folder / "DONE").unlink()
    (folder / "environment.json").write_bytes(b"\xff{")
    foreign = b'"\xff"', b'{"note": 3}', b"[]", b'{"event": 1, "step": "x"}'
    metrics = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(b"\n".join(foreign) + b"\n" + metrics + b"\0\0{")
    train.main([str(word) for word in going_on])
    assert (folder / "environment.json.damaged").read_bytes() == b"\xff{"
    assert len(json.loads((folder / "environment.json").read_text())) == 1
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    assert tuple(lines[:4]) == foreign
    assert [json.loads(line)["event"] for line in lines[4:]][-2:] == ["eval", "done"]


def test_each_unusable_run_folder_is_refused(
    going_on: list[Any], refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as closed:  # as tests may be run by root, to whom all is open
        closed.setattr(os, "access", lambda path, mode: path != folder / "checkpoints")
        said = f"cannot be written (no permission for {folder}/checkpoints); choose another"
        refused(train.main, going_on, said)
    wider = [*going_on, "--set", "model.width=0.5"]
    refused(train.main, wider, f"{folder} holds a run of another recipe", "width: 0.35 -> 0.5")
    forced = [*wider, "--set", "checkpoint.resume=force"]
    refused(train.main, forced, "model.safetensors: these weights do not fit", "have another shape")
    (folder / "recipe.toml").write_text("[train\n")
    refused(train.main, going_on, f"{folder}/recipe.toml: not valid TOML")
    (folder / "recipe.toml").unlink()
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").write_text("")
    refused(train.main, going_on, f'run_dir = "{folder}": cannot be written (File exists)')


def test_a_folder_in_which_nothing_was_saved_takes_another_recipe(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """A refused start leaves such a folder. The user may then change a setting."""
    recipe = config.load(tiny())
    other = config.load(tiny(), ["model.width=0.5"])
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    files.write_text(tmp_path / "run" / "recipe.toml", config.dumps(recipe))
    assert run_folder.check(other) is None
    (tmp_path / "run" / STEP).mkdir()
    with pytest.raises(ConfigError, match="holds a run of another recipe"):
        run_folder.check(other)


@pytest.mark.parametrize("cache", ["", "file"])
def test_a_run_without_a_usable_cache_is_trained(
    cache: str,
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", cache and str(tmp_path / cache))
    monkeypatch.setattr(caches, "_temporary", lambda: tmp_path / "elsewhere")
    train.main([str(tiny(train={"max_steps": 1}))])
    assert (tmp_path / "run" / "DONE").exists()
    warning = f"WARNING: {tmp_path}/file/fasttrain cannot be written (Not a directory); measurem"
    assert capsys.readouterr().out.count(warning) == bool(cache)
