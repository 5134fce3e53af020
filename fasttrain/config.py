"""TOML recipe -> `Recipe`: frozen, typed, validated, with every fault reported at once.

Every knob of a run is declared here, with its unit and one line on what it does. A recipe sets only
what differs from these defaults. `python -m fasttrain.config RECIPE` prints a recipe in full.
"""

import argparse
import difflib
import json
import os
import re
import sys
import tomllib
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from fasttrain.faults import ConfigError, stop

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Strength = Annotated[float, Field(ge=0.0)]
# Ways to carry out an update: see `execution`.
Mode = Literal["eager", "compile", "compile_fuse", "graph", "compile_graph", "compile_graph_fuse"]
# `~` and environment variables are for clusters: root = "$SLURM_TMPDIR/imagenet".
ExpandedPath = Annotated[
    Path, AfterValidator(lambda path: Path(os.path.expandvars(path.expanduser())))
]


@dataclass(frozen=True, slots=True)
class Varies:
    """Says at a field that its value may vary within a run; else another value is another run.

    What varies is where and how the work is done. Two fields come close to changing results:
    `micro_batch_size` follows the number of processes and regroups BatchNorm, and another decoder
    may change the last bit of a pixel.
    """

    per_machine: bool  # between the processes of one start; else only from one start to the next


ON_RESUME, PER_MACHINE = Varies(per_machine=False), Varies(per_machine=True)


def _crop_px(value: object) -> object:
    """Checks `data.crop_px`: a size, or pairs of an epoch and the size from there on."""
    pairs: Any = value if isinstance(value, (list, tuple)) else [[0, value]]
    for pair in pairs:
        if not (isinstance(pair, (list, tuple)) and [type(x) for x in pair] == [int, int]):
            raise ValueError(
                "expected a number of pixels, or pairs of epoch and pixels: [[0, 128], [60, 224]]"
            )
        if pair[1] < 32:
            raise ValueError("must be at least 32 pixels")
    epochs = [epoch for epoch, _ in pairs]
    if epochs[:1] != [0] or any(before >= after for before, after in pairwise(epochs)):
        raise ValueError("epochs must start at 0 and rise")
    # What leaves here counts as Python's, and of that strict types take no list for a tuple.
    return tuple(map(tuple, pairs)) if isinstance(value, (list, tuple)) else value


class Section(BaseModel):
    """A table of the recipe: unknown keys and wrong types are errors, values cannot change."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Data(Section):
    """What the images are and how they are cut."""

    root: Annotated[ExpandedPath, PER_MACHINE] = Path("data/imagenet")
    """Folder of the shards, as `tools/make_shards.py` writes it."""
    short_side: Positive | None = None
    """Refuse shards whose images were not shrunk to this shorter side; unset: take any."""
    crop_px: Annotated[int | tuple[tuple[int, int], ...], BeforeValidator(_crop_px)] = 224
    """Side of the training crop after resizing, in pixels; or a schedule of pairs (epoch, pixels),
    epochs from 0: `[[0, 128], [60, 176], [120, 224]]`."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest part of the image's area that a training crop covers."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width over height of a training crop."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How images are resized, always with antialiasing."""
    flip: bool = True
    """Mirror a random half of the training images."""
    augment: Literal["none", "rand", "trivial"] = "none"
    """RandAugment, or TrivialAugment Wide: one operation of any strength per image."""
    augment_ops: Positive = 2
    """Operations of RandAugment per image, one after the other."""
    augment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Strength of RandAugment's operations, from 0 to 30."""
    color_jitter: tuple[Strength, Strength, Strength, Strength] = (0.0, 0.0, 0.0, 0.0)
    """Largest changes of brightness, contrast and saturation (factors of 1 - s to 1 + s) and of hue
    (turns of the colour wheel, at most 0.5)."""
    erase: Fraction = 0.0
    """Part of the training images in which a random rectangle is erased."""
    eval_resize_px: Annotated[int, Field(ge=32)] = 256
    """Shorter side of a validation image after resizing, in pixels."""
    eval_crop_px: Annotated[int, Field(ge=32)] = 224
    """Side of the centre crop of a validation image, in pixels."""
    stage: Annotated[ExpandedPath | None, PER_MACHINE] = None
    """Folder on each node, of a local disk or of memory (`/dev/shm/...`), into which the shards are
    copied and checked before the run, once a node, and from which they are then read."""
    stage_part: Annotated[Fraction, ON_RESUME] = 1.0
    """Part of the training tars that is copied; the others are read from `root`."""
    stage_keep: Annotated[bool, ON_RESUME] = False
    """Leave the copy when the run ends or stops, for the next one. It is left in any case by a run
    that is killed, and the same command goes on with it."""
    shuffle: Literal["full", "blocks"] = "full"
    """Order of an epoch: `full` over the whole data set; `blocks` for storage that is slow at
    random reads: over `shuffle_shards` tars at a time, read ahead in large pieces."""
    shuffle_shards: Positive = 16
    """Tars that are shuffled together under `shuffle = "blocks"`."""
    read: Annotated[Literal["mmap", "pread"], ON_RESUME] = "mmap"
    """How tars are read: `mmap` copies nothing; `pread` copies, for file systems where mapping is
    unwise."""
    read_ahead: Annotated[int, Field(ge=0), ON_RESUME] = 4
    """Batches whose bytes are fetched from storage before the decoder needs them; `mmap` does so
    only while they are not in memory already."""
    read_threads: Annotated[Positive, ON_RESUME] = 8
    """Reads in flight at a time, per process."""
    decode: Annotated[Literal["auto", "cpu", "gpu_full", "gpu_window"], ON_RESUME] = "auto"
    """Where JPEGs are decoded: `gpu_full` the whole image; `gpu_window` only the crop, less work
    but reported to crash with nvImageCodec 0.9 on some GPUs; `auto` tries all on real images
    before the run, each in a process of its own, and takes the fastest that works."""
    hw_decoder_load: Annotated[Fraction | Literal["auto"], ON_RESUME] = "auto"
    """Part of a batch given to the GPU's JPEG decoder, where it has one; CPU and GPU cores do the
    rest. `auto` goes by the number of CPU threads, and with `decode = "auto"` tries others too."""
    jpeg_fancy_upsampling: Annotated[bool, ON_RESUME] = False
    """On a GPU, interpolate the colours of JPEGs between pixels as CPUs do, where the GPU's own way
    is to repeat them, which is faster."""
    verify: Annotated[Literal["off", "first_epoch", "always"], ON_RESUME] = "off"
    """Compare the crc32 of each image's bytes, and its size, with the index before it is decoded:
    never, in the run's first epoch and each process's first evaluation, or always."""
    on_bad_sample: Annotated[Literal["stop", "replace"], ON_RESUME] = "stop"
    """What a damaged training image does: end the run, or be replaced by another one: the same on
    any number of processes and, with `verify = "always"`, after any restart. In an evaluation it
    ends the run."""
    max_bad_samples: Annotated[Positive, ON_RESUME] = 100
    """Images that each process may replace, and no more than half of all, before the run ends."""
    threads: Annotated[int, Field(ge=0), PER_MACHINE] = 0
    """CPU threads that decode, per process; 0 shares out the CPUs this process may use."""
    queue_depth: Annotated[Positive, ON_RESUME] = 2
    """Batches kept ready for the training thread."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_area = [{low}, {high}]: must rise within (0, 1]")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio = [{low:.4g}, {high:.4g}]: must rise from above 0")
        for key in ("augment_ops", "augment_magnitude"):
            value = getattr(self, key)
            if self.augment != "rand" and value != type(self).model_fields[key].default:
                raise ValueError(f'{key} = {value}: only RandAugment has it; set augment = "rand"')
        number, default = self.max_bad_samples, type(self).model_fields["max_bad_samples"].default
        if self.on_bad_sample == "stop" and number != default:
            raise ValueError(
                f'max_bad_samples = {number}: none is replaced; set on_bad_sample = "replace"'
            )
        for key in ("stage_part", "stage_keep"):
            value = getattr(self, key)
            if self.stage is None and value != type(self).model_fields[key].default:
                raise ValueError(f"{key} = {value}: nothing is copied; set stage to a folder")
        if self.color_jitter[3] > 0.5:
            raise ValueError(
                f"color_jitter[3] = {self.color_jitter[3]:g}: the hue turns by at most 0.5"
            )
        if self.eval_crop_px > self.eval_resize_px:
            raise ValueError(
                f"eval_crop_px = {self.eval_crop_px}: larger than the resized image "
                f"(eval_resize_px = {self.eval_resize_px}); raise the one or lower the other"
            )
        return self


class Model(Section):
    """Which network; its number of classes comes from the data."""

    arch: Literal["large", "small"] = "large"
    """MobileNetV3-Large or -Small."""
    width: Annotated[float, Field(ge=0.1, le=8.0)] = 1.0
    """Multiplies the channels of every layer."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    """Part of the last hidden layer dropped in training."""
    weights: ExpandedPath | None = None
    """Start from these weights, not from random ones: a run folder, a checkpoint, or a file of
    weights. The last layer keeps the classes that the data has too, by name, and is new for the
    others. A run that goes on from its own checkpoint does not read them."""

    def network(self) -> dict[str, Any]:
        """The arguments of `model.build_model`, but for the number of classes."""
        return {"arch": self.arch, "width": self.width, "dropout": self.dropout}


class Optim(Section):
    """SGD with momentum, linear warm-up, then cosine."""

    lr: Annotated[float, Field(gt=0.0)] = 0.4
    """Learning rate at the end of the warm-up, for the whole global batch."""
    warmup_lr: Annotated[float, Field(ge=0.0)] = 0.1
    """Learning rate of the first update."""
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 5
    """Length of the linear ramp from `warmup_lr` to `lr`, in epochs."""
    final_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """Where the cosine ends."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Of SGD."""
    nesterov: bool = False
    """Nesterov's form of the momentum."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 4e-5
    """On the weights of convolutions and linear layers; never on biases and BatchNorm."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Moving average of the weights, per update, evaluated beside them; 0 keeps none."""
    backbone_lr_factor: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """All layers but the last learn at the learning rate times this: for a run that starts from
    weights, whose last layer alone is new."""
    frozen_stages: Annotated[int, Field(ge=0, le=5)] = 0
    """The first so many of the network's five stages keep the weights and BatchNorm's statistics
    they started from. A stage begins wherever the image is halved; with all five, the classifier
    alone learns."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov = true: needs momentum above 0")
        return self


class Train(Section):
    """How long, how many images at once, in which precision."""

    epochs: Positive = 150
    """Passes over the training images; the learning rate is scheduled over them."""
    max_steps: Annotated[Positive | None, ON_RESUME] = None
    """End the run after this many updates; the schedule stays that of `epochs`."""
    global_batch_size: Positive = 1024
    """Images per update, over all processes."""
    micro_batch_size: Annotated[Positive | None, ON_RESUME] = None
    """Images per forward pass and process; unset: `global_batch_size` over the processes."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of everything drawn: initial weights, order, crops, flips, augmentation, dropout."""
    precision: Literal["bf16", "fp16", "no"] = "bf16"
    """Mixed precision: bfloat16, float16 with loss scaling, or none (float32)."""
    label_smoothing: Fraction = 0.0
    """Part of the target spread over all classes."""
    mixup_alpha: Strength = 0.0
    """MixUp: blend images and labels with weights from Beta(alpha, alpha); 0 is off."""
    cutmix_alpha: Strength = 0.0
    """CutMix: paste a box of another image, likewise; with both, an even chance decides."""
    eval_every_epochs: Positive = 1
    """Evaluate after every so many epochs, and always at the end."""
    execution: Annotated[Literal["auto"] | Mode, ON_RESUME] = "auto"
    """How an update is carried out, with the same result but for rounding: `compile` by
    torch.compile, `graph` as one CUDA graph, `compile_graph` both; with `_fuse` the compiler
    computes cheap results again rather than store them. `auto` tries them before the run, takes
    the fastest whose loss agrees with `eager`'s, and remembers it for later runs."""
    gradient_exchange: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are summed over processes; bf16 halves what is sent."""
    max_skipped_steps: Annotated[int, Field(ge=0), ON_RESUME] = 0
    """Updates of a run that may be left out as their loss or gradient is not finite; with one more
    the run stops, as it was before that one."""
    deterministic: Annotated[bool, ON_RESUME] = False
    """On a GPU, take the kernels and the decoder (the CPU's) that repeat bit for bit, at a cost in
    speed; on a CPU a run repeats anyway."""
    hang_timeout_s: Annotated[float, Field(gt=0.0), ON_RESUME] = 600.0
    """Seconds without a step after which a run of several processes ends, and names the process
    that all others wait for; of the first step, an hour at the least."""
    cpu_threads: Annotated[int, Field(ge=0), PER_MACHINE] = 0
    """Threads of torch on the CPU, per process; 0 shares out the CPUs this process may use."""

    @model_validator(mode="after")
    def _graphs_need_no_scaler(self) -> Self:
        if "graph" in self.execution and self.precision == "fp16":
            raise ValueError(
                f"execution = {self.execution}: a CUDA graph cannot skip updates, as float16's "
                'loss scaling must; use precision = "bf16", or execution = "compile"'
            )
        return self


class Checkpoint(Section):
    """When the run is saved."""

    every_steps: Annotated[Positive, ON_RESUME] = 1000
    """Save after every so many updates, and always at the end and when asked to stop."""
    keep: Annotated[int, Field(ge=2), ON_RESUME] = 3
    """Checkpoints kept, newest first; more where two good ones would not be left."""
    max_failures: Annotated[Positive, ON_RESUME] = 3
    """Saves in a row that may fail, for want of space say, before the run stops."""
    resume: Annotated[str, ON_RESUME] = "auto"
    """Where a start goes on: `auto` at the run folder's newest good checkpoint; `force` there, even
    though the recipe or the data are others; `anew` at the beginning; or at the checkpoint whose
    folder is named. What is in the way is moved into `before-...` in the run folder. When SLURM
    starts a job again, it is `auto`."""


class Log(Section):
    """Where the run is written and how often it reports."""

    run_dir: Annotated[ExpandedPath | None, PER_MACHINE] = None
    """The run folder; unset: `runs/` and the recipe's file name."""
    every_steps: Annotated[Positive, ON_RESUME] = 50
    """A train line after every so many updates."""
    samples: Annotated[bool, ON_RESUME] = False
    """Write which samples, windows and flips each update saw, one file per process."""


class Recipe(Section):
    """A whole run. The launcher says where it runs, the recipe says what."""

    data: Data = Data()
    model: Model = Model()
    optim: Optim = Optim()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()


# Keys that earlier versions had, and what a recipe file that holds one is told. The run folders and
# checkpoints of those versions hold every key, and still open.
FORMER_KEYS = {
    ("data", "prepare"): (
        "delete this line; the demo's data set is now made by `python tools/make_digits.py`"
    )
}


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


# More than syntax: numbers of thousands of digits, and brackets nested as deep.
_NO_TOML = (ValueError, RecursionError)
_TOO_MUCH = "..."  # is shown in their place


def load(path: Path, overrides: Sequence[str] = (), written_by_run: bool = False) -> Recipe:
    """The recipe at `path` with `section.key=value` overrides on top.

    Args:
        written_by_run: the file is the `recipe.toml` of a run folder, perhaps of an earlier
            version: FORMER_KEYS are ignored there, and refused in all other files.
    Raises:
        ConfigError: naming every fault at once.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a mark
    except OSError as error:
        there = _recipes_near(path) if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"{path}: cannot read this recipe ({error.strerror}){there}") from None
    except _NO_TOML as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    if written_by_run:
        raw = without_former_keys(raw)
    faults = [fault for text in overrides if (fault := _override(raw, text))]
    log = raw.setdefault("log", {})
    if isinstance(log, dict):
        log.setdefault("run_dir", str(Path("runs") / path.stem))
    recipe, faults = _validate(raw, faults)
    if recipe is None:
        count = f"{len(faults)} problem{'s' if len(faults) > 1 else ''}"
        raise ConfigError("\n  ".join([f"{path}: {count}", *faults]))
    return recipe


def without_former_keys(tables: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a recipe's tables (by section, then key) without the keys of FORMER_KEYS."""
    return {
        section: {key: value for key, value in table.items() if (section, key) not in FORMER_KEYS}
        if isinstance(table, dict)
        else table
        for section, table in tables.items()
    }


def _recipes_near(path: Path) -> str:
    """The recipes beside one that is not there, or else the project's own."""
    for folder in (path.parent, Path(__file__).parent.parent / "recipes", Path("recipes")):
        if found := sorted(other.name for other in folder.glob("*.toml") if other.is_file()):
            shown = [*found[:12], *(["..."] if len(found) > 12 else [])]
            close = difflib.get_close_matches(path.name, found, n=1, cutoff=0.8)
            meant = f"; did you mean {folder / close[0]}?" if close else ""
            return f"{meant}\nin {folder} there are {', '.join(shown)}"
    return ""


def _override(raw: dict[str, Any], text: str) -> str | None:
    """Applies one `section.key=value` to `raw`; returns the fault, if any."""
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key and value.strip()):  # as of an unset variable
        return f"--set {text}: expected section.key=value, for example train.epochs=90"
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except _NO_TOML:
        parsed = value.strip()  # a bare word or path: --set log.run_dir=/tmp/run
    table = raw.setdefault(section, {})
    if isinstance(table, dict):
        table[key] = parsed
    return None


def _validate(raw: Mapping[str, Any], faults: list[str]) -> tuple[Recipe | None, list[str]]:
    """Adds to `faults`; validates by sections, so that one fault does not hide the others."""
    sections: dict[str, Any] = {}
    known = {name: type(field.default) for name, field in Recipe.model_fields.items()}
    for name, table in raw.items():
        if name not in known:
            faults.append(f"[{name}]: unknown section{_did_you_mean(name, known)}")
        elif not isinstance(table, dict):
            faults.append(f"{name} = {_shown(table)}: [{name}] must be a section")
    for name, kind in known.items():
        table = raw.get(name, {})
        if not isinstance(table, dict):
            continue
        unfit = {key: why for key, value in table.items() if (why := _unfit(value))}
        faults += [f"[{name}] {key} = {_shown(table[key])}: {why}" for key, why in unfit.items()]
        fit = {key: value for key, value in table.items() if key not in unfit}
        try:
            # Through JSON, strict types still take a list for a tuple and a string for a path.
            sections[name] = kind.model_validate_json(json.dumps(fit, default=str))
        except ValidationError as error:
            faults += [_fault(name, kind, detail) for detail in error.errors()]
    optim, train = sections.get("optim"), sections.get("train")
    if optim and train and optim.warmup_epochs > train.epochs:
        faults.append(
            f"[optim] warmup_epochs = {optim.warmup_epochs:g}: longer than the run "
            f"([train] epochs = {train.epochs}); lower it or train longer"
        )
    model = sections.get("model")
    if optim and model and optim.frozen_stages and model.weights is None:
        faults.append(
            f"[optim] frozen_stages = {optim.frozen_stages}: random weights would never learn; set "
            "[model] weights to start from others, or frozen_stages = 0"
        )
    return (None if faults else Recipe(**sections)), faults


def _unfit(value: object) -> str:
    """What is wrong with a value of any key; empty if nothing is."""
    if (isinstance(value, int) and abs(value) >= 2**63) or _shown(value) == _TOO_MUCH:
        return "must be less: 64 bits for a number"
    if not isinstance(value, str):
        return ""
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value):
        return "must be plain text, without control characters"
    if not os.path.expandvars(value.strip()):
        return "must not be empty"
    if unset := re.search(r"\$(\w+|\{[^}]*\})", os.path.expandvars(value)):
        return f"{unset[0]} is not set in the environment; set it or write the value in full"
    path = str(Path(value))  # of ./~name as well, which a Path shortens
    if path.startswith("~") and os.path.expanduser(path) == path:
        return "there is no such user; write the path in full"
    return ""


_EXAMPLES = {"int": "8", "float": "0.5", "bool": "true", "string": '"text"', "path": '"folder"'}


def _fault(section: str, kind: type[Section], detail: ErrorDetails) -> str:
    """One pydantic error in the words of a user: `[section] key = value: what is expected`."""
    if not detail["loc"]:  # a check of ours over several keys, already in full
        return f"[{section}] {detail['msg'].removeprefix('Value error, ')}"
    key = str(detail["loc"][0])
    if remedy := FORMER_KEYS.get((section, key)):
        return f"[{section}] {key}: fasttrain no longer has this key; {remedy}"
    if detail["type"] == "extra_forbidden":
        return f"[{section}] {key}: unknown key{_did_you_mean(key, kind.model_fields)}"
    value, message = detail["input"], detail["msg"].removeprefix("Value error, ")
    if detail["type"].endswith(("_type", "_parsing")) or detail["type"] == "int_from_float":
        expected = detail["type"].split("_")[0]
        message = f"expected {expected}, got {type(value).__name__}"
        default = kind.model_fields[key].default
        example = _EXAMPLES.get(expected) if default is None else _shown(default)
        message += f"; for example {key} = {example}" if example else ""
    elif detail["type"] == "missing":
        message = "expected one more value"
    elif message.startswith("Input should be"):
        message = "must be" + message.removeprefix("Input should be")
    place = "".join(f"[{index}]" for index in detail["loc"][1:] if isinstance(index, int))
    return f"[{section}] {key}{place} = {_shown(value)}: {message}"


def _did_you_mean(word: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, default=str)
    except _NO_TOML:
        return _TOO_MUCH
    return text if len(text) < 300 else f"{text[:300]}..."


# --------------------------------------------------------------------------------------------------
# Writing and comparing
# --------------------------------------------------------------------------------------------------


def dumps(recipe: Recipe, leave_out: Collection[str] = ()) -> str:
    """The recipe as TOML with every value filled in; `load` of it gives an equal recipe.

    Args:
        leave_out: fields (`section.key`) that are not written, and so have their defaults later.
    """
    lines = []
    for name, table in recipe.model_dump(mode="json").items():
        lines.append(f"[{name}]")
        # JSON's strings, numbers, booleans and flat lists are TOML's as well.
        lines += [
            f"{key} = {json.dumps(value, ensure_ascii=False)}"
            for key, value in table.items()
            if value is not None and f"{name}.{key}" not in leave_out
        ]
        lines.append("")
    return "\n".join(lines)


def may_vary(per_machine: bool = False) -> frozenset[str]:
    """Names of the fields that may change when a run resumes: `data.root` and so on.

    Args:
        per_machine: only those that may differ between the processes of one start.
    """
    return frozenset(
        f"{section}.{key}"
        for section, table in Recipe.model_fields.items()
        for key, field in type(table.default).model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Varies) and (mark.per_machine or not per_machine)
    )


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Settings that make `new` another run than `old`: `train.seed: 0 -> 1`."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    varying = may_vary()
    return [
        f"{section}.{key}: {_shown(before[section][key])} -> {_shown(value)}"
        for section, table in after.items()
        for key, value in table.items()
        if before[section][key] != value and f"{section}.{key}" not in varying
    ]


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


TRAINS = "Trains the network of a recipe, or goes on where an earlier run stopped."
PRINTS = "Prints a recipe in full as TOML: every setting, with the defaults. Nothing is trained."


def load_or_exit(argv: Sequence[str] | None = None, description: str = TRAINS) -> Recipe:
    """The recipe that the command line names; a wrong one ends the process with exit code 2."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Every setting: fasttrain/config.py, or python -m fasttrain.config RECIPE",
    )
    parser.add_argument("recipe", type=Path, help="a TOML file, such as recipes/large.toml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change one setting, such as train.epochs=90 (repeatable)",
    )
    arguments = parser.parse_args(argv)
    try:
        return load(arguments.recipe, arguments.set)
    except ConfigError as error:
        stop(str(error))


if __name__ == "__main__":
    sys.stdout.write(dumps(load_or_exit(description=PRINTS)))
