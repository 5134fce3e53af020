"""Save, prune, find and restore; a checkpoint is a folder that appears whole or not at all.

checkpoints/step_00012512/
    model.safetensors     the network, under the names of the published weights
    ema.safetensors       its moving average, if there is one
    training.pt           optimizer and loss scaler; loadable with weights_only=True
    state.json            counters, recipe, classes, what it was trained on and with
    SHA256SUMS            of the other files; `sha256sum -c` reads it
"""

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from fasttrain import config, files, matching, run_folder, weights
from fasttrain.faults import Fault
from fasttrain.learner import Learner, TrainState
from fasttrain.weights import Weights

FORMAT_VERSION = 1
SUMS = "SHA256SUMS"
MODEL, EMA = "model.safetensors", "ema.safetensors"


class CheckpointError(Fault, ValueError):
    """A checkpoint cannot be used; says which, why, and what to do."""


class Saved(BaseModel):
    """What `state.json` says of a run, and what it was trained on and with."""

    version: int
    state: TrainState
    recipe: config.Recipe
    classes: list[str]
    data: dict[str, str]  # digests of the index, by split
    world_size: int
    cpu_threads: int
    execution: dict[str, config.Mode] = {}  # by device


def save(root: Path, learner: Learner, about: dict[str, Any], keep: int) -> Path:
    """Writes `root/step_N` for the learner's step and keeps the newest `keep`. For one process.

    `about` is stored beside the counters. Older checkpoints go only after the new one is safe, and
    never so many that fewer than two good ones are left.

    Raises:
        OSError: the file system refused; what was there is still there.
    """
    folder = root / f"step_{learner.state.step:08d}"
    for leftover in root.glob("*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)  # one may be in use, over NFS for example
    if folder.exists() and faults_of(folder):
        files.remove_folder(folder)
    if not folder.exists():  # else it is the same step again, and equal
        written = contents(learner, about)
        sums = "".join(f"{_sha256(data)}  {name}\n" for name, data in sorted(written.items()))
        files.write_folder(folder, written | {SUMS: sums.encode()})
    with contextlib.suppress(OSError):  # it is saved; the next save tries again
        _prune(root, keep, folder)
    return folder


def contents(learner: Learner, about: dict[str, Any]) -> dict[str, bytes]:
    """The files of a checkpoint but for `SHA256SUMS`."""
    # In memory first: writing them can then fail with an OSError alone.
    found = {MODEL: safetensors.torch.save(_on_cpu(learner.module))}
    if learner.ema:
        found[EMA] = safetensors.torch.save(_on_cpu(learner.ema.module))
    training = {"optimizer": learner.optimizer.state_dict()}
    if learner.scaler:
        training["scaler"] = learner.scaler.state_dict()
    buffer = io.BytesIO()
    torch.save(training, buffer)
    found["training.pt"] = buffer.getvalue()
    state = {"version": FORMAT_VERSION, "state": asdict(learner.state), **about}
    found["state.json"] = json.dumps(state, indent=1).encode() + b"\n"
    return found


def _prune(root: Path, keep: int, written: Path) -> None:
    """Removes all but the newest `keep` checkpoints, as long as two good ones are left.

    Reads no more than it takes to know that: one, where none is damaged. `written` is good.
    """
    found, good = find(root), 0
    for place, folder in enumerate(found if len(found) > keep else ()):
        if good < 2:
            good += folder == written or not faults_of(folder)
        elif place >= keep:
            files.remove_folder(folder)


def _on_cpu(module: nn.Module) -> dict[str, Tensor]:
    # Clones: safetensors refuses views of one storage, which averaged statistics are.
    return {name: t.detach().cpu().contiguous().clone() for name, t in module.state_dict().items()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def find(root: Path) -> list[Path]:
    """The finished checkpoints under `root`, newest first."""
    if not root.is_dir():
        return []
    found = [
        (int(m[1]), path) for path in root.iterdir() if (m := run_folder.STEP.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def faults_of(folder: Path) -> list[str]:
    """What is wrong with the files of a checkpoint: nothing, if it may be loaded."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
        listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError):
        return [f"{folder / SUMS} is missing or damaged"]
    faults = []
    for name in listed.keys() | {MODEL, "training.pt", "state.json"}:
        try:
            if _sha256((folder / name).read_bytes()) != listed.get(name):
                faults.append(f"{folder / name} is damaged")
        except OSError as error:
            faults.append(f"{folder / name}: {error.strerror}")
    return sorted(faults)


def choose_checkpoint(
    root: Path, resume: str, about: dict[str, Any], warn: Callable[[str], None]
) -> Path | None:
    """The checkpoint to resume from; None if the run begins.

    Args:
        root: the folder of the run's checkpoints.
        resume: `checkpoint.resume` of the recipe.
        about: what this start trains on and with, as `save` stores it.
        warn: is told of damaged checkpoints that are passed over, and of differences if forced.
    Raises:
        CheckpointError: it is damaged; or, unless it is forced, it was trained on other data or
            with another recipe than `about` says.
    """
    asked = run_folder.ResumeRule(resume)
    if asked.anew:
        return None
    found = asked.named or newest_good(root, warn)
    if asked.named and (faults := faults_of(asked.named)):
        raise CheckpointError(f"[checkpoint] resume = {resume}: {'; '.join(faults)}")
    if found:
        _check_fits(found, about, warn, asked.forced)
    return found


def _check_fits(
    folder: Path, about: dict[str, Any], warn: Callable[[str], None], force: bool
) -> None:
    saved = read_state(folder)
    others = [
        f"the {split} index at {about['recipe']['data']['root']} is not the one it saw"
        for split, digest in about["data"].items()
        if saved.data.get(split) != digest
    ]
    recipe = config.Recipe.model_validate_json(json.dumps(about["recipe"]))
    others += config.differences(saved.recipe, recipe)
    apart = matching.differences(saved.classes, about["classes"])
    if apart:
        others.insert(0, f"its classes are others: {apart}")
    another_layer = len(saved.classes) != len(about["classes"])
    if another_layer or (others and not force):
        remedy = "use those, or another folder with --set log.run_dir=..."
        if apart:
            remedy = (
                "to start a new run from its weights: --set log.run_dir=NEW --set "
                f"checkpoint.resume=auto --set model.weights={folder}"
            )
        if not another_layer:
            remedy += ", or go on regardless with --set checkpoint.resume=force"
        raise CheckpointError(
            "\n  ".join([f"{folder} was trained with other data or another recipe:", *others])
            + f"\n{remedy}"
        )
    if others:
        warn("\n  ".join([f"WARNING: {folder} was made otherwise:", *others]))


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


def read_state(folder: Path) -> Saved:
    """The `state.json` of a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or of another version.
    """
    try:
        text = (folder / "state.json").read_bytes()
        state = dict(json.loads(text))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a checkpoint of fasttrain: {error}") from None
    version = state.get("version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}, this fasttrain reads {FORMAT_VERSION}; "
            "install the fasttrain that wrote it"
        )
    if isinstance(state.get("recipe"), dict):  # an earlier version wrote every key that it had
        state["recipe"] = config.without_former_keys(state["recipe"])
    try:
        return Saved.model_validate_json(json.dumps(state))
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(str(part) for part in detail["loc"])
        raise CheckpointError(
            f"{folder} is not what this fasttrain writes (state.json, {place}: {detail['msg']}); "
            "restore it from a copy, or install the fasttrain that wrote it"
        ) from None


def load_weights(path: Path, module: nn.Module) -> None:
    """Loads a file of weights of a network into that same network, every tensor of it.

    Raises:
        WeightsError: the file is not one of weights, or of another network.
    """
    weights.load(weights.read(path), module)


def open_weights(
    path: Path, average: bool, say: Callable[[str], None]
) -> tuple[Weights, config.Recipe | None]:
    """The weights at `path`, and the recipe that made them where a checkpoint of ours tells it.

    Args:
        path: a run folder (its newest good checkpoint), a checkpoint, one of its files, or any
            other file of weights.
        average: take the moving average of the weights.
        say: is told of damaged checkpoints that are passed over.
    Raises:
        CheckpointError, WeightsError: there is nothing usable at `path`.
    """
    if path.is_file() and not (path.name in (MODEL, EMA) and (path.parent / SUMS).exists()):
        return weights.read(path, average), None
    folder: Path | None = path
    if path.is_file():
        folder, average = path.parent, average or path.name == EMA
    elif (path / run_folder.CHECKPOINTS).is_dir():
        folder = newest_good(path / run_folder.CHECKPOINTS, say)
    if folder is None:
        raise CheckpointError(f"{path} holds no checkpoint yet")
    saved = read_state(folder)
    if faults := faults_of(folder):
        raise CheckpointError("\n  ".join([f"{folder} cannot be used:", *faults]))
    file = folder / (EMA if average else MODEL)
    if not file.exists():
        raise CheckpointError(f"{folder} has no moving average: [optim] ema_decay was 0")
    return replace(weights.read(file), names=tuple(saved.classes)), saved.recipe


def restore(
    folder: Path,
    learner: Learner,
    about: dict[str, Any],
    warn: Callable[[str], None],
) -> None:
    """Loads a checkpoint that was chosen into `learner`, in place and whatever the device.

    Raises:
        CheckpointError: it is of another format or network.
    """
    saved = read_state(folder)
    if saved.cpu_threads != about["cpu_threads"]:
        warn(
            f"saved with {saved.cpu_threads} CPU threads, going on with {about['cpu_threads']}: "
            "results on a CPU then agree to rounding, not bit for bit"
        )
    load_weights(folder / MODEL, learner.module)
    if learner.ema:  # which a forced run may have newly
        average = folder / EMA
        load_weights(average if average.exists() else folder / MODEL, learner.ema.module)
    try:
        training = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
        learner.optimizer.load_state_dict(training["optimizer"])
        if learner.scaler and "scaler" in training:
            learner.scaler.load_state_dict(training["scaler"])
    except Exception as error:  # torch raises of every kind
        raise CheckpointError(
            f"{folder}/training.pt does not fit this run: {error}; restore it from a copy, or "
            "install the fasttrain that wrote it"
        ) from None
    learner.state = saved.state
