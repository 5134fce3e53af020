"""Save, prune, find and restore; a checkpoint is a folder that appears whole or not at all.

checkpoints/step_00012512/
    model.safetensors     the network, under the names of the published weights
    ema.safetensors       its moving average, if there is one
    training.pt           optimizer and loss scaler; loadable with weights_only=True
    state.json            counters, recipe, classes, what it was trained on and with
    SHA256SUMS            of the other files; `sha256sum -c` reads it
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fasttrain import config
from fasttrain.optim import Learner, TrainState

FORMAT_VERSION = 1
SUMS = "SHA256SUMS"
_NAME = re.compile(r"step_(\d{8,})")


class CheckpointError(config.Fault, ValueError):
    """A checkpoint cannot be used; says which, why, and what to do."""


def save(root: Path, learner: Learner, about: dict[str, Any], keep: int) -> Path:
    """Writes `root/step_N` for the learner's step and keeps the newest `keep`. For one process.

    `about` is stored beside the counters. Older checkpoints go only after the new one is safe.
    """
    folder = root / f"step_{learner.state.step:08d}"
    temporary = root / f"{folder.name}.tmp"
    for leftover in [*root.glob("*.tmp"), *root.glob("*.old")]:
        shutil.rmtree(leftover)
    temporary.mkdir()
    save_file(_on_cpu(learner.module), temporary / "model.safetensors")
    if learner.ema:
        save_file(_on_cpu(learner.ema.module), temporary / "ema.safetensors")
    training = {"optimizer": learner.optimizer.state_dict()}
    if learner.scaler:
        training["scaler"] = learner.scaler.state_dict()
    torch.save(training, temporary / "training.pt")
    state = {"version": FORMAT_VERSION, "state": asdict(learner.state), **about}
    (temporary / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    sums = "".join(f"{_sha256(path)}  {path.name}\n" for path in sorted(temporary.iterdir()))
    (temporary / SUMS).write_text(sums)
    for path in [*temporary.iterdir(), temporary]:
        _sync(path)
    if folder.exists():  # the same step again, after a restart there
        folder.rename(root / f"{folder.name}.old")
    temporary.rename(folder)
    _sync(root)
    for leftover in [*root.glob("*.old"), *find(root)[keep:]]:
        shutil.rmtree(leftover)
    return folder


def _on_cpu(module: nn.Module) -> dict[str, Tensor]:
    # Clones: safetensors refuses views of one storage, which averaged statistics are.
    return {name: t.detach().cpu().contiguous().clone() for name, t in module.state_dict().items()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find(root: Path) -> list[Path]:
    """The finished checkpoints under `root`, newest first."""
    if not root.is_dir():
        return []
    found = [(int(m[1]), path) for path in root.iterdir() if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def faults_of(folder: Path) -> list[str]:
    """What is wrong with the files of a checkpoint: nothing, if it may be loaded."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
        listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError):
        return [f"{folder / SUMS} is missing or damaged"]
    faults = []
    for name in listed.keys() | {"model.safetensors", "training.pt", "state.json"}:
        try:
            if _sha256(folder / name) != listed.get(name):
                faults.append(f"{folder / name} is damaged")
        except OSError as error:
            faults.append(f"{folder / name}: {error.strerror}")
    return sorted(faults)


def newest_good(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, or None where there is none at all.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    faults: list[str] = []
    for folder in find(root):
        found = faults_of(folder)
        if not found:
            return folder
        faults += found
        warn(f"SKIPPING a damaged checkpoint: {'; '.join(found)}")
    if faults:
        raise CheckpointError(
            "\n  ".join([f"no checkpoint under {root} can be used:", *faults])
            + "\nrestore one from a copy, or start anew in another folder: --set log.run_dir=..."
        )
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint.

    Raises:
        CheckpointError: it is missing, or of another version.
    """
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not a checkpoint of fasttrain: {error}") from None
    if state["version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {state['version']}, this fasttrain reads "
            f"{FORMAT_VERSION}; install the fasttrain that wrote it"
        )
    return state


def load_weights(path: Path, module: nn.Module) -> None:
    """Loads a file of weights, `.safetensors` or a state dict saved by torch, into a network.

    Raises:
        CheckpointError: the file is not one of weights, or of another network.
    """
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(weights)
    except Exception as error:
        raise CheckpointError(f"{path}: these weights do not fit: {error}") from None


def restore(
    folder: Path, learner: Learner, about: dict[str, Any], warn: Callable[[str], None]
) -> None:
    """Loads a verified checkpoint into `learner`, in place and whatever the device.

    Raises:
        CheckpointError: it is of another format, or was trained on other data than `about` says.
    """
    state = read_state(folder)
    for split, digest in about["data"].items():
        if state["data"][split] != digest:
            raise CheckpointError(
                f"{folder} was trained on other data: the {split} index at "
                f"{about['recipe']['data']['root']} is not the one it saw; point data.root to that "
                "data set, or start anew in another folder with --set log.run_dir=..."
            )
    if state["cpu_threads"] != about["cpu_threads"]:
        warn(
            f"saved with {state['cpu_threads']} CPU threads, going on with {about['cpu_threads']}: "
            "results on a CPU then agree to rounding, not bit for bit"
        )
    learner.module.load_state_dict(load_file(folder / "model.safetensors"))
    if learner.ema:
        learner.ema.module.load_state_dict(load_file(folder / "ema.safetensors"))
    training = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
    learner.optimizer.load_state_dict(training["optimizer"])
    if learner.scaler and "scaler" in training:
        learner.scaler.load_state_dict(training["scaler"])
    learner.state = TrainState(**state["state"])
