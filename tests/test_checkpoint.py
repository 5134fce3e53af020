"""Checkpoints appear whole or not at all, and a damaged one is never loaded."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fasttrain import checkpoint
from fasttrain.checkpoint import CheckpointError
from fasttrain.config import Optim
from fasttrain.model import mobilenetv3_small
from fasttrain.optim import Learner, TrainState, WeightAverage, build_optimizer

ABOUT: dict[str, Any] = {
    "data": {"train": "1", "val": "2"},
    "cpu_threads": 1,
    "recipe": {"data": {"root": "shards"}},
}


def learner(seed: int = 0, step: int = 0) -> Learner:
    torch.manual_seed(seed)
    model = mobilenetv3_small(0.35, num_classes=4).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, Optim())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    return Learner(model, model, optimizer, WeightAverage(model, 0.9), None, TrainState(step=step))


def same(a: Learner, b: Learner) -> bool:
    def tensors(it: Learner) -> list[torch.Tensor]:
        assert it.ema
        momentum = [s["momentum_buffer"] for s in it.optimizer.state_dict()["state"].values()]
        return [*it.module.state_dict().values(), *it.ema.module.state_dict().values(), *momentum]

    pairs = zip(tensors(a), tensors(b), strict=True)
    return a.state == b.state and all(torch.equal(x, y) for x, y in pairs)


def quiet(text: str) -> None:
    raise AssertionError(f"unexpected warning: {text}")


def test_restore_brings_everything_back(tmp_path: Path) -> None:
    saved, other = learner(0, 12), learner(1)
    saved.state.last_eval = {"step": 11, "top1": 50.0}
    folder = checkpoint.save(tmp_path, saved, ABOUT, keep=3)
    assert folder == tmp_path / "step_00000012" and not same(saved, other)
    checkpoint.restore(folder, other, ABOUT, quiet)
    assert same(saved, other)
    weight = next(p for p in other.module.parameters() if p.ndim == 4 and p.shape[1] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert load_file(folder / "model.safetensors").keys() == saved.module.state_dict().keys()
    torch.load(folder / "training.pt", weights_only=True)
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=folder, check=True)


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (4, 100_000_000, 8, 12):
        checkpoint.save(tmp_path, learner(step=step), ABOUT, keep=2)
    assert [p.name for p in checkpoint.find(tmp_path)] == ["step_100000000", "step_00000012"]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, learner(0, 4), ABOUT, keep=2)
    second = learner(1, 4)
    checkpoint.save(tmp_path, second, ABOUT, keep=2)
    found = learner(2)
    checkpoint.restore(tmp_path / "step_00000004", found, ABOUT, quiet)
    assert same(second, found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000004"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_save_that_dies_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    first = learner(0, 4)
    checkpoint.save(tmp_path, first, ABOUT, keep=2)

    def die(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if call == "fsync" else (Path, "rename")), die)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(tmp_path, learner(1, 8), ABOUT, keep=2)
    assert checkpoint.newest_good(tmp_path, quiet) == tmp_path / "step_00000004"
    checkpoint.save(tmp_path, learner(1, 8), ABOUT, keep=2)  # and what was left is cleared away
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000004", "step_00000008"]


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_one_is_passed_over_loudly(tmp_path: Path, name: str, damage: str) -> None:
    for step in (4, 8):
        checkpoint.save(tmp_path, learner(step=step), ABOUT, keep=2)
    path = tmp_path / "step_00000008" / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
    path.write_bytes(data[: len(data) // 2] if damage == "truncate" else data)
    if damage == "remove":
        path.unlink()
    warnings: list[str] = []
    assert checkpoint.newest_good(tmp_path, warnings.append) == tmp_path / "step_00000004"
    assert len(warnings) == 1 and "SKIPPING a damaged checkpoint" in warnings[0]
    assert "step_00000008" in warnings[0]


def test_none_good_stops_and_names_each_fault(tmp_path: Path) -> None:
    for step in (4, 8):
        folder = checkpoint.save(tmp_path, learner(step=step), ABOUT, keep=2)
        (folder / "training.pt").unlink()
    with pytest.raises(CheckpointError) as error:
        checkpoint.newest_good(tmp_path, lambda text: None)
    assert "step_00000004/training.pt" in str(error.value)
    assert "step_00000008/training.pt" in str(error.value)
    assert "start anew in another folder: --set log.run_dir=" in str(error.value)


def test_none_at_all_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "step_00000004.tmp").mkdir()
    assert checkpoint.newest_good(tmp_path, quiet) is None
    assert checkpoint.newest_good(tmp_path / "nowhere", quiet) is None


def test_other_data_and_threads(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, learner(step=4), ABOUT, keep=2)
    with pytest.raises(CheckpointError, match="was trained on other data: the val index at shards"):
        other = ABOUT | {"data": {"train": "1", "val": "3"}}
        checkpoint.restore(folder, learner(), other, quiet)
    warnings: list[str] = []
    checkpoint.restore(folder, learner(), ABOUT | {"cpu_threads": 4}, warnings.append)
    assert "saved with 1 CPU threads, going on with 4" in warnings[0]


def test_another_version_is_refused(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, learner(step=4), ABOUT, keep=2)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"version": 9}))
    with pytest.raises(CheckpointError, match="format version 9, this fasttrain reads 1"):
        checkpoint.restore(folder, learner(), ABOUT, quiet)
    with pytest.raises(CheckpointError, match="is not a checkpoint of fasttrain"):
        checkpoint.read_state(tmp_path)
