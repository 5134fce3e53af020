"""Saves, prunes, finds and restores checkpoints. A checkpoint folder appears whole or not at all.

checkpoints/step_00012512/
    model.safetensors     the network, under the names of the published weights
    ema.safetensors       its moving average, if there is one
    training.pt           optimizer and loss scaler; loadable with weights_only=True
    state.json            counters, recipe, classes, digests of the data, settings of the start
    SHA256SUMS            digests of the other files; `sha256sum -c` reads them
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

from fasttrain import config, files, matching, run_folder, shards, weights
from fasttrain.faults import Fault
from fasttrain.learner import Learner, TrainState
from fasttrain.weights import Weights

FORMAT_VERSION = 1
SUMS = "SHA256SUMS"
MODEL, EMA = "model.safetensors", "ema.safetensors"
BEST = "best"  # beside the checkpoints: a link to that of the best evaluation


class CheckpointError(Fault, ValueError):
    """A checkpoint cannot be used. The message says which one, why, and what to do."""


class Saved(BaseModel):
    """The contents of `state.json`."""

    version: int
    state: TrainState
    recipe: config.Recipe
    classes: list[str]
    data: dict[str, str]  # digests of the index, by split; of a teacher's labels or weights
    world_size: int
    cpu_threads: int
    # By the device's name:
    execution: dict[str, config.RunMode] = {}  # mode of execution
    layers: dict[str, list[tuple[int, ...]]] = {}  # fused_block.Own of each block


def save(
    root: Path, learner: Learner, about: dict[str, Any], keep: int, keep_best: bool = True
) -> Path:
    """Writes `root/step_N` for the learner's step N, and removes old checkpoints.

    Only rank 0 calls this. Old checkpoints are removed after the new one is safe, and at least two
    good ones always remain. `root/best` links to the checkpoint of the best evaluation.

    Args:
        about: is stored in `state.json` beside the counters.
        keep: the number of newest checkpoints to keep.
        keep_best: keep that of the best evaluation too.
    Returns:
        The folder of the new checkpoint.
    Raises:
        OSError: the file system refused. The older checkpoints are still there.
    """
    folder = root / f"step_{learner.state.step:08d}"
    for leftover in root.glob("*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)  # a file may be in use, for example over NFS
    if folder.exists() and faults_of(folder):
        files.remove_folder(folder)
    if not folder.exists():  # else the step was saved before, with equal contents
        written = contents(learner, about)
        sums = "".join(f"{_sha256(data)}  {name}\n" for name, data in sorted(written.items()))
        files.write_folder(folder, written | {SUMS: sums.encode()})
    with contextlib.suppress(OSError):  # the checkpoint is safe; the next save prunes again
        best = best_of(root, learner.state) if keep_best else None
        _prune(root, keep, folder, best)
        if best:
            files.link(root / BEST, best.name)
    return folder


def best_of(root: Path, state: TrainState) -> Path | None:
    """The checkpoint of the best evaluation so far; None if it was not saved."""
    folder = root / Path(state.best.get("checkpoint", "none")).name
    return folder if folder.is_dir() else None


def contents(learner: Learner, about: dict[str, Any]) -> dict[str, bytes]:
    """Returns the bytes of each file of a checkpoint by name, except for `SHA256SUMS`."""
    # Everything is built in memory first, so that writing can fail only with an OSError.
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


def _prune(root: Path, keep: int, written: Path, best: Path | None) -> None:
    """Removes all but the newest `keep` checkpoints and `best`, as long as two good ones remain.

    Reads checkpoints only until it knows two good ones. `written` counts as good without being
    read, so usually one checkpoint is read.
    """
    found, good = find(root), 0
    for number, folder in enumerate(found if len(found) > keep else ()):
        if good < 2:
            good += folder == written or not faults_of(folder)
        elif number >= keep and folder != best:
            files.remove_folder(folder)


def _on_cpu(module: nn.Module) -> dict[str, Tensor]:
    # The moving average keeps its tensors as views of one storage, which safetensors refuses.
    return {name: t.detach().cpu().contiguous().clone() for name, t in module.state_dict().items()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def find(root: Path) -> list[Path]:
    """Lists the folders of complete checkpoints in `root`, newest first."""
    if not root.is_dir():
        return []
    found = [
        (int(m[1]), path) for path in root.iterdir() if (m := run_folder.STEP.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def faults_of(folder: Path) -> list[str]:
    """Verifies the files of a checkpoint. Returns their faults; none if it may be loaded."""
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
    """Chooses the checkpoint to resume from. Returns None if the run starts from step 0.

    Args:
        root: the folder of the run's checkpoints.
        resume: `checkpoint.resume` of the recipe.
        about: the recipe, classes and data of this start, as `save` stores them.
        warn: receives a line for each damaged checkpoint that is skipped. If the resume is forced,
            it also receives the differences in recipe and data.
    Raises:
        CheckpointError: the checkpoint is damaged. Or its recipe or data differ from `about`, and
            the resume is not forced.
    """
    rule = run_folder.ResumeRule(resume)
    if rule.anew:
        return None
    found = rule.named or newest_good(root, warn)
    if rule.named and (faults := faults_of(rule.named)):
        raise CheckpointError(f"[checkpoint] resume = {resume}: {'; '.join(faults)}")
    if found:
        _check_fits(found, about, warn, rule.forced)
    return found


def _check_fits(
    folder: Path, about: dict[str, Any], warn: Callable[[str], None], force: bool
) -> None:
    """Compares the recipe, classes and data of a checkpoint with those of this start."""
    saved = read_state(folder)
    changes = [
        _data_change(name, saved.data.get(name), about)
        for name in {**about["data"], **saved.data}
        if saved.data.get(name) != about["data"].get(name)
    ]
    recipe = config.Recipe.model_validate_json(json.dumps(about["recipe"]))
    changes += config.differences(saved.recipe, recipe)
    class_changes = matching.differences(saved.classes, about["classes"])
    if class_changes:
        changes.insert(0, f"its classes differ: {class_changes}")
    another_layer = len(saved.classes) != len(about["classes"])
    if another_layer or (changes and not force):
        remedy = "use the old values, or another folder with --set log.run_dir=..."
        if class_changes:
            remedy = (
                "to start a new run from its weights: --set log.run_dir=NEW --set "
                f"checkpoint.resume=auto --set model.weights={folder}"
            )
        if not another_layer:
            remedy += ", or resume in spite of this with --set checkpoint.resume=force"
        raise CheckpointError(
            "\n  ".join([f"{folder} was trained with other data or another recipe:", *changes])
            + f"\n{remedy}"
        )
    if changes:
        warn(
            "\n  ".join(
                [f"WARNING: {folder} was trained with other data or another recipe:", *changes]
            )
        )


def _data_change(name: str, digest: str | None, about: dict[str, Any]) -> str:
    """Says that something in `about["data"]` differs from that of a checkpoint.

    Args:
        digest: the checkpoint's; None if it had no such data.
    """
    if name in shards.SPLITS:
        root = about["recipe"]["data"]["root"]
        return f"the {name} index at {root} is not the one it was trained on"
    old, new = (text[:12] if text else "none" for text in (digest, about["data"].get(name)))
    what = {"labels": "the teacher's labels", "teacher": "the teacher's weights"}[name]
    return f"distill.{name}: {what} have another digest: {old} -> {new}"


def newest_good(root: Path, warn: Callable[[str], None]) -> Path | None:
    """Finds the newest checkpoint that is not damaged. Returns None if there is no checkpoint.

    Args:
        warn: receives a line for each damaged checkpoint that is skipped.
    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
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
            + "\nrestore one from a copy, or start in another folder: --set log.run_dir=..."
        )
    return None


def read_state(folder: Path) -> Saved:
    """Reads the `state.json` of a checkpoint.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format version.
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
    if isinstance(state.get("recipe"), dict):  # an earlier version may have written FORMER_KEYS
        state["recipe"] = config.without_former_keys(state["recipe"], any_value=True)
    try:
        return Saved.model_validate_json(json.dumps(state))
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(str(part) for part in detail["loc"])
        raise CheckpointError(
            f"{folder} is not what this fasttrain writes (state.json, {key}: {detail['msg']}); "
            "restore it from a copy, or install the fasttrain that wrote it"
        ) from None


def load_weights(path: Path, module: nn.Module) -> None:
    """Loads all tensors of a file into the network that they belong to.

    Raises:
        WeightsError: the file holds no weights, or those of another network.
    """
    weights.load(weights.read(path), module)


def open_weights(
    path: Path, average: bool | None, say: Callable[[str], None]
) -> tuple[Weights, config.Recipe | None]:
    """Reads weights from a run folder, a checkpoint or a file.

    Args:
        path: a run folder, of which the newest good checkpoint is read; a checkpoint; one of its
            two files of weights; or any other file of weights.
        average: read the moving average instead of the weights; None: if there is one.
        say: receives a line for each damaged checkpoint that is skipped.
    Returns:
        The weights, and the recipe that trained them; None if they are not from a checkpoint.
    Raises:
        CheckpointError, WeightsError: `path` holds no usable weights.
    """
    if path.is_file() and not (path.name in (MODEL, EMA) and (path.parent / SUMS).exists()):
        return weights.read(path, average), None
    folder: Path | None = path
    if path.is_file():
        folder = path.parent
        average = path.name == EMA or bool(average)  # None: the file that is named
    elif (path / run_folder.CHECKPOINTS).is_dir():
        folder = newest_good(path / run_folder.CHECKPOINTS, say)
    if folder is None:
        raise CheckpointError(f"{path} holds no checkpoint yet")
    saved = read_state(folder)
    if faults := faults_of(folder):
        raise CheckpointError("\n  ".join([f"{folder} cannot be used:", *faults]))
    average = (folder / EMA).exists() if average is None else average
    file = folder / (EMA if average else MODEL)
    if not file.exists():
        raise CheckpointError(f"{folder} has no moving average: [optim] ema_decay was 0")
    found = replace(weights.read(file), names=tuple(saved.classes), average=average)
    return found, saved.recipe


def last_evaluation(found: Weights) -> dict[str, Any]:
    """The record of the evaluation of a checkpoint's weights; empty if they were not evaluated.

    Args:
        found: what `open_weights` read from a checkpoint.
    """
    state = read_state(found.path.parent).state
    return state.last_eval if state.last_eval.get("step", -1) + 1 == state.step else {}


def _has_averages(optimizer: dict[str, Any]) -> bool:
    """True if an optimizer's `state_dict` is that of AdamW, not of SGD."""
    return any("exp_avg" in state for state in optimizer["state"].values())


def restore(
    folder: Path,
    learner: Learner,
    about: dict[str, Any],
    warn: Callable[[str], None],
) -> None:
    """Loads a checkpoint into `learner`, in place and on any device.

    Args:
        folder: the checkpoint that `choose_checkpoint` returned.
        about: describes this start, as for `save`.
        warn: receives a line if the number of CPU threads changed.
    Raises:
        CheckpointError: the checkpoint has another format, or its optimizer state does not fit.
        WeightsError: its weights are of another network.
    """
    saved = read_state(folder)
    if saved.cpu_threads != about["cpu_threads"]:
        warn(
            f"saved with {saved.cpu_threads} CPU threads, resuming with {about['cpu_threads']}: "
            "results on a CPU then agree up to rounding, not bit for bit"
        )
    load_weights(folder / MODEL, learner.module)
    if learner.ema:  # a forced resume may have switched it on; then it starts from the network
        average = folder / EMA
        load_weights(average if average.exists() else folder / MODEL, learner.ema.module)
    try:
        training = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
        if _has_averages(training["optimizer"]) != _has_averages(learner.optimizer.state_dict()):
            raise ValueError("it holds the state of another optimizer ([optim] name)")
        learner.optimizer.load_state_dict(training["optimizer"])
        if learner.scaler and "scaler" in training:
            learner.scaler.load_state_dict(training["scaler"])
    except Exception as error:  # torch raises exceptions of many types
        raise CheckpointError(
            f"{folder}/training.pt does not fit this run: {error}; restore it from a copy, or "
            "install the fasttrain that wrote it"
        ) from None
    learner.state = saved.state
