"""Checkpoints appear whole or not at all, and a damaged one is never loaded."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from crashes import count_calls, in_a_child
from safetensors.torch import load_file
from updates import recipe_for

from fasttrain import checkpoint, config, execution
from fasttrain.checkpoint import CheckpointError
from fasttrain.config import Optim
from fasttrain.flat import flatten
from fasttrain.learner import Learner, TrainState
from fasttrain.model import mobilenetv3_small
from fasttrain.optim import WeightAverage, build_optimizer

SGD, ADAMW = Optim(), Optim(name="adamw", lr=0.01, warmup_lr=0.01)
ABOUT: dict[str, Any] = {
    "data": {"train": "1", "val": "2"},
    "cpu_threads": 1,
    "recipe": {"data": {"root": "shards"}},
    "classes": ["a", "b"],
    "world_size": 1,
}


def learner(seed: int = 0, step: int = 0, optim: Optim = SGD) -> Learner:
    torch.manual_seed(seed)
    model = mobilenetv3_small(0.35, num_classes=4).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, optim)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    average = WeightAverage(model, 0.9)
    return Learner(model, model, flatten(model), optimizer, average, None, TrainState(step=step))


def same(a: Learner, b: Learner) -> bool:
    def tensors(it: Learner) -> list[torch.Tensor]:
        assert it.ema
        states = it.optimizer.state_dict()["state"].values()
        found = [value for state in states for value in state.values()]
        return [*it.module.state_dict().values(), *it.ema.module.state_dict().values(), *found]

    pairs = zip(tensors(a), tensors(b), strict=True)
    return a.state == b.state and all(torch.equal(x, y) for x, y in pairs)


def quiet(text: str) -> None:
    raise AssertionError(f"unexpected warning: {text}")


@pytest.mark.parametrize("optim", [SGD, ADAMW], ids=lambda optim: optim.name)
def test_restore_brings_everything_back(optim: Optim, tmp_path: Path) -> None:
    saved, other = learner(0, 12, optim), learner(1, optim=optim)
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


@pytest.mark.parametrize(("saved", "now"), [(SGD, ADAMW), (ADAMW, SGD)])
def test_the_state_of_another_optimizer_is_refused(
    saved: Optim, now: Optim, tmp_path: Path
) -> None:
    folder = checkpoint.save(tmp_path, learner(0, 12, saved), ABOUT, keep=3)
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.restore(folder, learner(1, optim=now), ABOUT, quiet)
    assert "does not fit this run: it holds the state of another optimizer ([optim] name)" in str(
        error.value
    )


def test_how_updates_were_carried_out_is_read_back(tmp_path: Path) -> None:
    layers = [[True, False, True, True]]
    for number, mode in enumerate(get_args(config.Mode)):
        ways = {str(end): mode + end for end in ("", execution.DEPTHWISE, execution.KERNELS)}
        about = ABOUT | {"recipe": recipe_for().model_dump(mode="json")}
        about |= {"execution": ways, "layers": {"": layers}}
        saved = checkpoint.read_state(checkpoint.save(tmp_path, learner(0, number), about, keep=3))
        assert saved.execution == ways and saved.layers == {"": [tuple(layers[0])]}


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (4, 100_000_000, 8, 12):
        checkpoint.save(tmp_path, learner(step=step), ABOUT, keep=2)
    assert [p.name for p in checkpoint.find(tmp_path)] == ["step_100000000", "step_00000012"]


def test_leftovers_that_cannot_be_removed_do_not_prevent_a_save(tmp_path: Path) -> None:
    left = [tmp_path / f"step_00000008.{number}.tmp" for number in range(2)]
    for path in left:  # each stands in for a folder with a file in use, over NFS
        path.touch()
    checkpoint.save(tmp_path, learner(step=8), ABOUT, keep=2)
    for path in left:
        path.unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000008"]


def test_saving_the_same_step_again_replaces_a_damaged_one(tmp_path: Path) -> None:
    saved = learner(0, 4)
    folder = checkpoint.save(tmp_path, saved, ABOUT, keep=2)
    before = (folder / "SHA256SUMS").stat().st_mtime_ns
    checkpoint.save(tmp_path, saved, ABOUT, keep=2)
    assert (folder / "SHA256SUMS").stat().st_mtime_ns == before
    (folder / "training.pt").write_bytes(b"")
    checkpoint.save(tmp_path, saved, ABOUT, keep=2)
    assert not checkpoint.faults_of(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000004"]


def test_a_save_killed_at_any_file_system_call_leaves_two_good_checkpoints(tmp_path: Path) -> None:
    """The kills cover everything that a save does: clearing up, writing, renaming, pruning."""
    steps = (4, 8, 12, 16)
    learners = {step: learner(seed, step) for seed, step in enumerate(steps)}
    before = tmp_path / "before"
    before.mkdir()
    for step in steps[:3]:
        checkpoint.save(before, learners[step], ABOUT, keep=3)
    shutil.copytree(before / "step_00000004", before / "step_00000014.tmp")  # of an earlier kill
    root, told = tmp_path / "checkpoints", tmp_path / "calls"

    def save(at: int) -> int:
        calls = count_calls(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        checkpoint.save(root, learners[16], ABOUT, keep=2)
        told.write_text(" ".join(calls))
        return 0

    deaths = 0
    for at in itertools.count():
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(before, root)
        status = in_a_child(partial(save, at))
        good = [path for path in checkpoint.find(root) if not checkpoint.faults_of(path)]
        assert len(good) >= 2 and good == checkpoint.find(root), f"after {at} calls"
        assert good[0].name in ("step_00000012", "step_00000016")
        if deaths % 7 == 0 or not status:  # the next save works, whatever files were left
            found = learner(9)
            checkpoint.restore(good[0], found, ABOUT, quiet)
            assert same(found, learners[int(good[0].name[5:])])
            checkpoint.save(root, learners[16], ABOUT, keep=2)
            names = ["step_00000012", "step_00000016"]
            assert sorted(path.name for path in root.iterdir()) == names
        if not status:
            break
        assert status == -signal.SIGKILL
        deaths += 1
    calls = told.read_text().split()
    assert deaths == len(calls) > 60 and {"write", "fsync", "rename", "rmdir"} <= set(calls)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_save_that_fails_at_any_call_leaves_the_old_checkpoints(
    tmp_path: Path, code: int
) -> None:
    saved, root = learner(0, 8), tmp_path / "checkpoints"
    root.mkdir()
    checkpoint.save(root, learner(1, 4), ABOUT, keep=2)

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    def save(at: int) -> int:
        calls = count_calls(at, fail)
        try:
            checkpoint.save(root, saved, ABOUT, keep=2)
        except OSError as error:
            return 1 if error.errno == code else 99
        return 2 if len(calls) > at else 0

    for at in itertools.count(step=3):
        status = in_a_child(partial(save, at))
        assert status in (0, 1, 2)
        good = [path for path in checkpoint.find(root) if not checkpoint.faults_of(path)]
        assert good == checkpoint.find(root) and (root / "step_00000004") in good
        assert status != 2 or good[0].name == "step_00000008"
        if not status:
            break
        shutil.rmtree(root / "step_00000008", ignore_errors=True)


def test_pruning_leaves_two_good_checkpoints(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        checkpoint.save(tmp_path, learner(step=step), ABOUT, keep=3)
    (tmp_path / "step_00000012" / "model.safetensors").unlink()
    checkpoint.save(tmp_path, learner(step=16), ABOUT, keep=2)
    names = [path.name for path in checkpoint.find(tmp_path)]
    assert names == ["step_00000016", "step_00000012", "step_00000008"]
    checkpoint.save(tmp_path, learner(step=20), ABOUT, keep=2)
    names = [path.name for path in checkpoint.find(tmp_path)]
    assert names == ["step_00000020", "step_00000016"]


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, name: str, damage: str
) -> None:
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


def test_without_a_good_checkpoint_the_run_stops_and_names_each_fault(tmp_path: Path) -> None:
    for step in (4, 8):
        folder = checkpoint.save(tmp_path, learner(step=step), ABOUT, keep=2)
        (folder / "training.pt").unlink()
    with pytest.raises(CheckpointError) as error:
        checkpoint.newest_good(tmp_path, lambda text: None)
    assert "step_00000004/training.pt" in str(error.value)
    assert "step_00000008/training.pt" in str(error.value)
    assert "start in another folder: --set log.run_dir=" in str(error.value)


def test_without_any_checkpoint_a_run_starts_from_step_0(tmp_path: Path) -> None:
    (tmp_path / "step_00000004.tmp").mkdir()
    assert checkpoint.newest_good(tmp_path, quiet) is None
    assert checkpoint.newest_good(tmp_path / "nowhere", quiet) is None


def test_other_data_is_refused_and_another_number_of_threads_gives_a_warning(
    tmp_path: Path,
) -> None:
    folder = checkpoint.save(tmp_path, learner(step=4), ABOUT, keep=2)
    other = ABOUT | {"data": {"train": "1", "val": "3"}}
    with pytest.raises(
        CheckpointError, match="the val index at shards is not the one it was trained on"
    ):
        checkpoint.choose_checkpoint(tmp_path, "auto", other, quiet)
    changed = ABOUT | {"recipe": {"train": {"seed": 1, "global_batch_size": 512}}}
    with pytest.raises(CheckpointError) as error:
        checkpoint.choose_checkpoint(tmp_path, str(folder), changed, quiet)
    assert "train.global_batch_size: 1024 -> 512\n  train.seed: 0 -> 1" in str(error.value)
    assert "--set checkpoint.resume=force" in str(error.value)
    warnings: list[str] = []
    assert (
        checkpoint.choose_checkpoint(tmp_path, "force", other | changed, warnings.append) == folder
    )
    assert "was trained with other data" in warnings.pop() and not warnings
    checkpoint.restore(folder, learner(), ABOUT | {"cpu_threads": 4}, warnings.append)
    assert "saved with 1 CPU threads, resuming with 4" in warnings[0]


def test_other_classes_are_named_and_lead_to_a_run_that_starts_from_the_weights(
    tmp_path: Path,
) -> None:
    folder = checkpoint.save(tmp_path, learner(step=4), ABOUT, keep=2)
    for names, resume in ((["a", "b", "c"], "force"), (["a", "c"], "auto")):
        with pytest.raises(CheckpointError) as error:
            checkpoint.choose_checkpoint(tmp_path, resume, ABOUT | {"classes": names}, quiet)
        assert f"its classes differ: 2 classes there, {len(names)} here" in str(error.value)
        assert f"checkpoint.resume=auto --set model.weights={folder}" in str(error.value)
        # A forced resume may have other class names, but not another number of classes.
        assert ("checkpoint.resume=force" in str(error.value)) == (len(names) == 2)
    assert "class 1 is b there and c here" in str(error.value)
    warned: list[str] = []
    assert checkpoint.choose_checkpoint(
        tmp_path, "force", ABOUT | {"classes": ["a", "c"]}, warned.append
    )
    assert "its classes differ" in warned[0]


def test_another_version_is_refused(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, learner(step=4), ABOUT, keep=2)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"version": 9}))
    with pytest.raises(CheckpointError, match="format version 9, this fasttrain reads 1"):
        checkpoint.restore(folder, learner(), ABOUT, quiet)
    with pytest.raises(CheckpointError, match="is not a checkpoint of fasttrain"):
        checkpoint.read_state(tmp_path)


@pytest.mark.parametrize("value", ["none", "digits"])
def test_a_checkpoint_with_a_key_that_was_removed_since_opens(value: str, tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, learner(step=4), ABOUT, keep=2)
    now = checkpoint.read_state(folder)
    state = json.loads((folder / "state.json").read_text())
    state["recipe"]["data"]["prepare"] = value
    (folder / "state.json").write_text(json.dumps(state))
    assert checkpoint.read_state(folder) == now
