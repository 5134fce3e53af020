"""Reads a TOML recipe into a frozen, typed and validated `Recipe`. Reports all faults at once.

This module declares every setting of a run, with its unit and its effect. A recipe file sets only
what differs from these defaults.

    python -m fasttrain.config RECIPE [--set SECTION.KEY=VALUE ...]    prints a recipe in full
    python -m fasttrain.config --diff A B                              prints what differs
"""

import argparse
import difflib
import json
import os
import re
import sys
import textwrap
import tomllib
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from fasttrain import commands
from fasttrain.faults import ConfigError, stop

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Strength = Annotated[float, Field(ge=0.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
# Modes of execution: see `Train.execution`.
Mode = Literal["eager", "compile", "compile_fuse", "graph", "compile_graph", "compile_graph_fuse"]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
# What a checkpoint stores: the mode, and after it which fused kernels the run used.
RunMode = Annotated[
    str, StringConstraints(pattern=rf"^({'|'.join(get_args(Mode))})(\+depthwise|\+kernels)?$")
]
# Clusters need `~` and environment variables: root = "$SLURM_TMPDIR/imagenet".
ExpandedPath = Annotated[
    Path, AfterValidator(lambda path: Path(os.path.expandvars(path.expanduser())))
]


@dataclass(frozen=True, slots=True)
class Varies:
    """Marks a field whose value may vary within a run. A change of any other field is a new run.

    Fields that may vary say where and how the work is done. Two of them may change results
    slightly: `micro_batch_size` changes the groups of BatchNorm, and it follows the number of
    processes. Another decoder may change the last bit of a pixel.
    """

    per_machine: bool  # True: may differ between ranks. False: only from one start to the next.


ON_RESUME, PER_MACHINE = Varies(per_machine=False), Varies(per_machine=True)


def _scales_px(value: tuple[int, ...]) -> tuple[int, ...]:
    """Checks `data.scales_px`: none, or at least two different sizes."""
    if len(value) == 1:
        raise ValueError(f"one size is no choice; use crop_px = {value[0]}")
    if len(set(value)) < len(value):
        raise ValueError("names a size twice; all sizes are equally likely")
    return value


def _crop_px(value: object) -> object:
    """Checks `data.crop_px`: a size, or pairs of a first epoch and a size."""
    pairs: Any = value if isinstance(value, (list, tuple)) else [[0, value]]
    for pair in pairs:
        if not (isinstance(pair, (list, tuple)) and [type(x) for x in pair] == [int, int]):
            raise ValueError(
                "expected a number of pixels, or pairs of epoch and pixels: [[0, 128], [60, 224]]"
            )
        if pair[1] < 32:
            raise ValueError("must be at least 32 pixels")
    epochs = [epoch for epoch, _ in pairs]
    if epochs[:1] != [0] or any(first >= second for first, second in pairwise(epochs)):
        raise ValueError("epochs must start at 0 and rise")
    # pydantic's strict mode takes this for a Python value, and then refuses a list for a tuple.
    return tuple(map(tuple, pairs)) if isinstance(value, (list, tuple)) else value


class Section(BaseModel):
    """A table of the recipe. Unknown keys and wrong types are errors; values cannot change."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Data(Section):
    """Which images are used, and how they are read, decoded, cropped and augmented."""

    root: Annotated[ExpandedPath, PER_MACHINE] = Path("data/imagenet")
    """Folder of the shards that `tools/make_shards.py` wrote."""
    short_side: Positive | None = None
    """Refuse shards whose images were not shrunk to this shorter side, in pixels; unset: accept
    any."""
    crop_px: Annotated[int | tuple[tuple[int, int], ...], BeforeValidator(_crop_px)] = 224
    """Side of the training crop after resizing, in pixels; or a schedule of pairs (epoch, pixels),
    epochs from 0: `[[0, 128], [60, 176], [120, 224]]`."""
    scales_px: Annotated[tuple[Annotated[int, Field(ge=32)], ...], AfterValidator(_scales_px)] = ()
    """Sides of the training crops in pixels, from which each update draws one:
    `[128, 176, 224, 272, 320]`. All are equally likely, and they replace `crop_px`; empty: off."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest fraction of the image's area that a training crop covers."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width over height of a training crop."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Filter with which images are resized, always with antialiasing."""
    flip: bool = True
    """Mirror each training image with probability 0.5."""
    augment: Literal["none", "rand", "trivial"] = "none"
    """Augmentation of each image beside crop and flip. `rand`: RandAugment. `trivial`:
    TrivialAugment Wide, one operation of random strength per image."""
    augment_ops: Positive = 2
    """Number of RandAugment's operations per image."""
    augment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Strength of RandAugment's operations, from 0 to 30."""
    color_jitter: tuple[Strength, Strength, Strength, Strength] = (0.0, 0.0, 0.0, 0.0)
    """Largest changes of brightness, contrast and saturation (factors from 1 - s to 1 + s) and of
    hue (turns of the colour wheel, at most 0.5)."""
    erase: Fraction = 0.0
    """Fraction of the training images in which a random rectangle is erased."""
    eval_resize_px: Annotated[int, Field(ge=32)] = 256
    """Shorter side of a validation image after resizing, in pixels."""
    eval_crop_px: Annotated[int, Field(ge=32)] = 224
    """Side of the centre crop of a validation image, in pixels."""
    stage: Annotated[ExpandedPath | None, PER_MACHINE] = None
    """Folder on a local disk or in memory (`/dev/shm/...`) of each node. Before the run, one
    process per node copies the shards there and checks them. The run then reads the copy."""
    stage_part: Annotated[Fraction, ON_RESUME] = 1.0
    """Fraction of the training tars that is copied. The others are read from `root`."""
    stage_keep: Annotated[bool, ON_RESUME] = False
    """Keep the copy for the next run when this run ends or stops. A run that is killed always
    leaves its copy, and the same command uses it again."""
    shuffle: Literal["full", "blocks"] = "full"
    """`full` shuffles the whole data set in each epoch. `blocks` shuffles `shuffle_shards` tars at
    a time and reads ahead in large pieces, for storage that is slow at random reads."""
    shuffle_shards: Positive = 16
    """Number of tars that `shuffle = "blocks"` shuffles together."""
    read: Annotated[Literal["mmap", "pread"], ON_RESUME] = "mmap"
    """How tars are read. `mmap` copies nothing. `pread` copies, for file systems on which mapping
    is unsafe or slow."""
    read_ahead: Annotated[int, Field(ge=0), ON_RESUME] = 4
    """Number of batches whose bytes are read before the decoder needs them. `mmap` reads only the
    bytes that are not in memory yet."""
    read_threads: Annotated[Positive, ON_RESUME] = 8
    """Number of concurrent reads per process."""
    decode: Annotated[Literal["auto", "cpu", "gpu_full", "gpu_window"], ON_RESUME] = "auto"
    """Where JPEGs are decoded. `gpu_full` decodes whole images. `gpu_window` decodes only the crop,
    which is less work, but crashes are reported with nvImageCodec 0.9 on some GPUs. `auto` tries
    all on real images before the run, each in its own process, and takes the fastest one that
    works."""
    hw_decoder_load: Annotated[Fraction | Literal["auto"], ON_RESUME] = "auto"
    """Fraction of a batch that the GPU's hardware JPEG decoder gets, if there is one. CPU and GPU
    cores decode the rest. `auto` depends on the number of CPU threads; with `decode = "auto"`,
    other values are tried as well."""
    jpeg_fancy_upsampling: Annotated[bool, ON_RESUME] = False
    """On a GPU, interpolate the colours of JPEGs between pixels, as CPUs do. Without it, the GPU
    repeats the colours, which is faster."""
    verify: Annotated[Literal["off", "first_epoch", "always"], ON_RESUME] = "off"
    """When to compare the crc32 and the size of each image's bytes with the index before decoding:
    never; in the run's first epoch and each process's first evaluation; or always."""
    on_bad_sample: Annotated[Literal["stop", "replace"], ON_RESUME] = "stop"
    """What happens at a damaged training image. `stop` ends the run. `replace` takes another image:
    the same one on any number of processes and, with `verify = "always"`, after any restart. In an
    evaluation a damaged image always ends the run."""
    max_bad_samples: Annotated[Positive, ON_RESUME] = 100
    """Number of images that each process may replace before the run ends. It never replaces more
    than half of all images."""
    threads: Annotated[int, Field(ge=0), PER_MACHINE] = 0
    """CPU threads that decode, per process; 0 divides the available CPUs among the processes of a
    machine."""
    queue_depth: Annotated[Positive, ON_RESUME] = 2
    """Number of batches kept ready for the training thread."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_area = [{low}, {high}]: needs 0 < smallest <= largest <= 1")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio = [{low:.4g}, {high:.4g}]: needs 0 < smallest <= largest")
        if self.scales_px and not isinstance(self.crop_px, int):
            raise ValueError(
                f"scales_px = {list(self.scales_px)}: crop_px is a schedule of sizes already; "
                "set scales_px = [], or crop_px to one size"
            )
        for key in ("augment_ops", "augment_magnitude"):
            value = getattr(self, key)
            if self.augment != "rand" and value != type(self).model_fields[key].default:
                raise ValueError(f'{key} = {value}: only RandAugment uses it; set augment = "rand"')
        number, default = self.max_bad_samples, type(self).model_fields["max_bad_samples"].default
        if self.on_bad_sample == "stop" and number != default:
            raise ValueError(
                f'max_bad_samples = {number}: no sample is replaced; set on_bad_sample = "replace"'
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
                f"(eval_resize_px = {self.eval_resize_px}); lower the first or raise the second"
            )
        return self


class Model(Section):
    """The network. Its number of classes comes from the data."""

    arch: Literal["large", "small"] = "large"
    """MobileNetV3-Large or -Small."""
    width: Annotated[float, Field(ge=0.1, le=8.0)] = 1.0
    """Multiplies the channels of every layer."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    """Probability with which a unit of the last hidden layer is dropped in training."""
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Stochastic depth: probability with which the last block is left out for an image in training.
    It grows linearly from 0 at the first block; only blocks with a shortcut can be left out. Turns
    the fused kernels off."""
    weights: ExpandedPath | None = None
    """Start from these weights instead of random ones: a run folder, a checkpoint, or a file of
    weights. The last layer keeps its rows for classes that the data has too, matched by name. Its
    other rows start from random values. A run that resumes from its own checkpoint ignores this
    setting."""

    def network(self) -> dict[str, Any]:
        """The arguments of `model.build_model`, except for the number of classes."""
        fields = {"arch", "width", "dropout", "drop_path"}
        return self.model_dump(include=fields)


class Optim(Section):
    """SGD or AdamW; linear warm-up, then cosine."""

    name: Literal["sgd", "adamw"] = "sgd"
    """The optimizer. `adamw` needs a far lower `lr` and `warmup_lr` than `sgd`, and more
    `weight_decay`."""
    lr: Annotated[float, Field(gt=0.0)] = 0.4
    """Learning rate at the end of the warm-up, for the whole global batch."""
    warmup_lr: Annotated[float, Field(ge=0.0)] = 0.1
    """Learning rate of the first update."""
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 5
    """Length of the linear ramp from `warmup_lr` to `lr`, in epochs."""
    final_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """Learning rate at the end of the cosine."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Multiply `lr`, `warmup_lr` and `final_lr` by `train.global_batch_size` / `lr_batch`, or by
    the square root of this ratio. The start of the run prints the result."""
    lr_batch: Positive = 1024
    """Global batch size for which the recipe's learning rates are meant, if `lr_scaling` is on."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Use Nesterov momentum."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decays per update of AdamW's two averages: of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """What AdamW adds to the square root of the second average before it divides by it."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 4e-5
    """Decay of the weights of convolutions and linear layers; never of biases and BatchNorm. SGD
    adds it to the gradient. AdamW shrinks the weights by `weight_decay` times the learning rate."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Decay per update of the moving average of the weights, which is evaluated too; 0 keeps no
    average."""
    backbone_lr_factor: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor on the learning rate of all layers but the last. It is for runs that start from
    weights, where only the last layer is new."""
    frozen_stages: Annotated[int, Field(ge=0, le=5)] = 0
    """Number of the network's first stages, of five, whose weights and BatchNorm statistics do not
    change. A stage begins where the image is halved. With all five, only the classifier learns."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov = true: needs momentum above 0")
        used_by = {"sgd": ("momentum", "nesterov"), "adamw": ("betas", "eps")}
        for name, keys in used_by.items():
            for key in keys:
                value = getattr(self, key)
                if name != self.name and value != type(self).model_fields[key].default:
                    raise ValueError(
                        f'{key} = {_shown(value)}: only {name} uses it; set name = "{name}", or '
                        f"delete {key}"
                    )
        if (
            self.lr_scaling == "none"
            and self.lr_batch != type(self).model_fields["lr_batch"].default
        ):
            raise ValueError(
                f'lr_batch = {self.lr_batch}: only lr_scaling uses it; set lr_scaling = "linear" '
                'or "sqrt"'
            )
        if self.name == "adamw" and self.warmup_lr > self.lr:  # most likely left at SGD's default
            raise ValueError(
                f"warmup_lr = {self.warmup_lr:g}: larger than lr = {self.lr:g}; adamw needs a "
                "lower one, such as 0"
            )
        return self


class Train(Section):
    """Length, batch size, precision and execution of the training."""

    epochs: Positive = 150
    """Passes over the training images. The learning rate's schedule has this length."""
    max_steps: Annotated[Positive | None, ON_RESUME] = None
    """End the run after this many updates. The learning rate's schedule is still that of
    `epochs`."""
    global_batch_size: Positive = 1024
    """Images per update, over all processes."""
    micro_batch_size: Annotated[Positive | None, ON_RESUME] = None
    """Images per forward pass and process; unset: `global_batch_size` divided by the number of
    processes."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of all random numbers: initial weights, order, crops, flips, augmentation, dropout.
    `distill.draw_seed` can give crops, flips and augmentation a seed of their own."""
    precision: Literal["bf16", "fp16", "no"] = "bf16"
    """Mixed precision: bfloat16, float16 with loss scaling, or none (float32)."""
    label_smoothing: Fraction = 0.0
    """Fraction of the target that is spread over all classes."""
    mixup_alpha: Strength = 0.0
    """MixUp: blend images and labels with weights from Beta(alpha, alpha); 0 is off."""
    cutmix_alpha: Strength = 0.0
    """CutMix: paste a box of another image, whose area follows Beta(alpha, alpha); 0 is off. With
    MixUp too, each micro-batch uses one of the two with equal probability."""
    eval_every_epochs: Positive = 1
    """Number of epochs between evaluations. The end of the run is always evaluated."""
    execution: Annotated[Literal["auto"] | Mode, ON_RESUME] = "auto"
    """Mode in which updates are executed. All modes give the same result up to rounding. `compile`
    uses torch.compile, `graph` one CUDA graph, `compile_graph` both. With `_fuse` the compiler
    recomputes cheap results instead of storing them. `auto` tries the modes before the run, takes
    the fastest one whose loss agrees with that of `eager`, and remembers it for later runs."""
    kernels: Annotated[Literal["off", "auto", "force"], ON_RESUME] = "auto"
    """Train the blocks with fused kernels, which move fewer bytes; they give the same result up to
    rounding. They need a GPU and half precision. `auto` measures before the run which layers gain,
    and then updates with and without kernels in these layers. `force` measures nothing, and takes
    the kernels that gained on one H200."""
    gradient_exchange: Literal["fp32", "bf16"] = "fp32"
    """Precision of the gradients' all-reduce; bf16 halves the bytes that are sent."""
    max_skipped_steps: Annotated[int, Field(ge=0), ON_RESUME] = 0
    """Number of updates of a run that may be skipped because their loss or gradient is not finite.
    At the next such update the run stops, and that update changes nothing."""
    deterministic: Annotated[bool, ON_RESUME] = False
    """On a GPU, use kernels that repeat bit for bit and decode on the CPU, at a cost in speed. On a
    CPU, runs always repeat."""
    hang_timeout_s: Annotated[float, Field(gt=0.0), ON_RESUME] = 600.0
    """Seconds without a step after which a run of several processes ends and names the process that
    the others are waiting for. The first step has at least an hour."""
    cpu_threads: Annotated[int, Field(ge=0), PER_MACHINE] = 0
    """Torch's CPU threads per process; 0 divides the available CPUs among the processes of a
    machine."""

    @model_validator(mode="after")
    def _graphs_need_no_scaler(self) -> Self:
        if "graph" in self.execution and self.precision == "fp16":
            raise ValueError(
                f"execution = {self.execution}: a CUDA graph cannot skip updates, as float16's "
                'loss scaling must; use precision = "bf16", or execution = "compile"'
            )
        return self

    @model_validator(mode="after")
    def _kernels_need_half_precision(self) -> Self:
        if self.kernels == "force" and self.precision == "no":
            raise ValueError(
                "kernels = force: the fused kernels need half precision; use "
                'precision = "bf16", or kernels = "off"'
            )
        return self


class Distill(Section):
    """Learning from a teacher: its probabilities for each image are a second target."""

    labels: Annotated[ExpandedPath | None, PER_MACHINE] = None
    """Folder of the teacher's labels that `tools/label.py` stored. They must belong to the images
    of this run: to the data set, the crops, flips and augmentations, and `draw_seed`."""
    teacher: Annotated[ExpandedPath | None, PER_MACHINE] = None
    """Compute the teacher's labels in the run instead. This names a run folder, a checkpoint, one
    of its two files of weights, or a file that `tools/export.py` wrote. Each update is slower by
    the teacher's forward pass."""
    weight: Fraction = 0.9
    """Weight of the loss with the teacher's probabilities. The loss with the labels has the weight
    1 - `weight`. `train.label_smoothing` smooths only the labels."""
    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    """Divides the logits of student and teacher before the softmax of the teacher's loss, which is
    multiplied by the square of this number. Above 1, improbable classes count more."""
    views: Annotated[int, Field(ge=0)] = 0
    """Number of different views of each image: its crop, flip and augmentation in epoch e are those
    of epoch e modulo `views`. 0 draws new ones in each epoch. The order of the images always
    differs from epoch to epoch."""
    draw_seed: Annotated[int | None, Field(ge=0)] = None
    """Seed of crops, flips and augmentation; unset: `train.seed`. With a fixed seed here, runs with
    other values of `train.seed` share one folder of `labels`."""
    other_code: Annotated[bool, ON_RESUME] = False
    """Accept `labels` that a version of fasttrain made whose code for crops, flips and augmentation
    differs from this one. Set it only if you know that the images are the same."""

    @model_validator(mode="after")
    def _one_teacher(self) -> Self:
        if self.labels and self.teacher:
            raise ValueError(
                "labels and teacher are both set: the labels are the answers of a teacher already; "
                "remove one of the two"
            )
        for key in ("weight", "temperature"):
            value = getattr(self, key)
            if not self.on and value != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} = {value:g}: there is no teacher; set labels (python tools/label.py "
                    "makes them) or teacher"
                )
        if self.other_code and not self.labels:
            raise ValueError("other_code = true: no labels are read; set labels, or remove it")
        return self

    @property
    def on(self) -> bool:
        """True if the run learns from a teacher."""
        return bool(self.labels or self.teacher)


class Checkpoint(Section):
    """When the run is saved, and from where it resumes."""

    every_steps: Annotated[Positive, ON_RESUME] = 1000
    """Number of updates between saves. The run is also saved at its end and when it is stopped."""
    keep: Annotated[int, Field(ge=2), ON_RESUME] = 3
    """Number of newest checkpoints that are kept. More are kept if these include fewer than two
    good ones."""
    keep_best: Annotated[bool, ON_RESUME] = True
    """Save after each evaluation that is the best so far, and keep that checkpoint beside the
    newest ones. `checkpoints/best` links to it."""
    max_failures: Annotated[Positive, ON_RESUME] = 3
    """The run stops when this many saves in a row have failed, for example on a full disk."""
    resume: Annotated[str, ON_RESUME] = "auto"
    """Where a start resumes. `auto`: from the run folder's newest good checkpoint. `force`: from
    the same one, although the recipe or the data changed. `anew`: from the beginning. Any other
    value names the folder of a checkpoint. `anew` and a named checkpoint move what is in the way
    into `before-...` in the run folder. When SLURM restarts a job, the value is `auto`."""


class Log(Section):
    """Where the run is written, and how often it reports."""

    run_dir: Annotated[ExpandedPath | None, PER_MACHINE] = None
    """The run folder; unset: `runs/` and the recipe's file name without its suffix."""
    every_steps: Annotated[Positive, ON_RESUME] = 50
    """Number of updates between train lines."""
    trackers: Annotated[tuple[Tracker, ...], ON_RESUME] = ()
    """Experiment trackers that get the records of `metrics.jsonl`, the recipe, and a picture of the
    first images: `tensorboard`, `wandb`, `trackio`, `mlflow`. They work offline."""
    samples: Annotated[bool, ON_RESUME] = False
    """Write the samples, windows and flips of each update, one file per process."""


class Recipe(Section):
    """All settings of a run. The launcher decides where it runs."""

    data: Data = Data()
    model: Model = Model()
    optim: Optim = Optim()
    train: Train = Train()
    distill: Distill = Distill()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()


class FormerKey(NamedTuple):
    """A recipe key of an earlier version, which is refused unless its value had no effect.

    Run folders and checkpoints of earlier versions contain it too, and can still be opened.
    """

    no_effect: Any
    remedy: str


FORMER_KEYS = {
    ("data", "prepare"): FormerKey(
        no_effect="none",
        remedy="delete it; the demo's data set is now made by `python tools/make_digits.py`",
    )
}


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


# Not only syntax errors: also numbers of thousands of digits, and thousands of nested brackets.
_NO_TOML = (ValueError, RecursionError)
_TOO_LONG = "..."  # is shown instead of such a value


def load(path: Path, overrides: Sequence[str] = (), written_by_run: bool = False) -> Recipe:
    """Reads the recipe at `path`, or the shipped one of that name: see `commands.recipe`.

    Args:
        overrides: `section.key=value` texts that replace values of the file.
        written_by_run: the file is the `recipe.toml` of a run folder, perhaps of an earlier
            version. There FORMER_KEYS are ignored, whatever their values are.
    Raises:
        ConfigError: the file cannot be read, or values are wrong. Names all faults at once.
    """
    path = commands.recipe(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a BOM
    except OSError as error:
        hint = _recipes_near(path) if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"{path}: cannot read this recipe ({error.strerror}){hint}") from None
    except _NO_TOML as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    faults = [fault for text in overrides if (fault := _override(raw, text))]
    raw = without_former_keys(raw, any_value=written_by_run)
    log = raw.setdefault("log", {})
    if isinstance(log, dict):
        log.setdefault("run_dir", str(Path("runs") / path.stem))
    recipe, faults = _validate(raw, faults)
    if recipe is None:
        count = f"{len(faults)} problem{'s' if len(faults) > 1 else ''}"
        raise ConfigError("\n  ".join([f"{path}: {count}", *faults]))
    return recipe


def without_former_keys(tables: Mapping[str, Any], any_value: bool) -> dict[str, Any]:
    """Returns a copy of a recipe's tables (by section, then key) without FORMER_KEYS.

    Args:
        any_value: removes the keys whatever their values are, not only those without effect.
    """
    left = {
        name: dict(table) if isinstance(table, dict) else table for name, table in tables.items()
    }
    for (section, key), former in FORMER_KEYS.items():
        table = left.get(section)
        if isinstance(table, dict) and (any_value or table.get(key) == former.no_effect):
            table.pop(key, None)
    return left


def _recipes_near(path: Path) -> str:
    """Names the recipes in the folder of a missing one; if there are none, the project's own."""
    for folder in (path.parent, commands.folder("recipes"), Path("recipes")):
        if found := sorted(other.name for other in folder.glob("*.toml") if other.is_file()):
            shown = [*found[:12], *(["..."] if len(found) > 12 else [])]
            close = difflib.get_close_matches(path.name, found, n=1, cutoff=0.8)
            meant = f"; did you mean {folder / close[0]}?" if close else ""
            return f"{meant}\nin {folder} there are {', '.join(shown)}"
    return ""


def _override(raw: dict[str, Any], text: str) -> str | None:
    """Applies one `section.key=value` to `raw`. Returns the fault, if any."""
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key and value.strip()):
        return f"--set {text}: expected section.key=value, for example train.epochs=90"
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except _NO_TOML:
        parsed = value.strip()  # a word or path without quotes: --set log.run_dir=/tmp/run
    table = raw.setdefault(section, {})
    if isinstance(table, dict):
        table[key] = parsed
    return None


def _validate(raw: Mapping[str, Any], faults: list[str]) -> tuple[Recipe | None, list[str]]:
    """Validates each section by itself, so that one fault does not hide the others.

    Returns:
        The recipe, None if there is a fault; and `faults` with those found here.
    """
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
        bad = {key: why for key, value in table.items() if (why := _value_fault(value))}
        faults += [f"[{name}] {key} = {_shown(table[key])}: {why}" for key, why in bad.items()]
        good = {key: value for key, value in table.items() if key not in bad}
        try:
            # In JSON, strict mode accepts a list for a tuple and a string for a path.
            sections[name] = kind.model_validate_json(json.dumps(good, default=str))
        except ValidationError as error:
            faults += [_fault(name, kind, detail) for detail in error.errors()]
    optim, train = sections.get("optim"), sections.get("train")
    if optim and train and optim.warmup_epochs > train.epochs:
        faults.append(
            f"[optim] warmup_epochs = {optim.warmup_epochs:g}: longer than the run "
            f"([train] epochs = {train.epochs}); lower warmup_epochs or raise epochs"
        )
    model = sections.get("model")
    if model and train and model.drop_path and train.kernels == "force":
        faults.append(
            "[train] kernels = force: the fused kernels have no stochastic depth; use kernels = "
            '"auto", or [model] drop_path = 0'
        )
    if optim and model and optim.frozen_stages and model.weights is None:
        faults.append(
            f"[optim] frozen_stages = {optim.frozen_stages}: these stages would keep their random "
            "weights; set [model] weights to start from trained ones, or frozen_stages = 0"
        )
    distill, data = sections.get("distill"), sections.get("data")
    if distill and data and distill.views and len({*_sizes(data.crop_px)}) > 1:
        faults.append(
            f"[distill] views = {distill.views}: a view has one size, but [data] crop_px changes "
            "it from epoch to epoch; use one crop_px, or views = 0"
        )
    if distill and data and distill.labels and data.scales_px:
        faults.append(
            f"[data] scales_px = {_shown(data.scales_px)}: stored labels are of images of one size "
            "in an epoch; use crop_px, or a teacher in the run: [distill] teacher"
        )
    return (None if faults else Recipe(**sections)), faults


def _sizes(crop_px: int | tuple[tuple[int, int], ...]) -> list[int]:
    """The image sizes that `data.crop_px` names."""
    return [crop_px] if isinstance(crop_px, int) else [size for _, size in crop_px]


def _value_fault(value: object) -> str:
    """Checks what holds for the value of any key. Returns the fault; "" if there is none."""
    if (isinstance(value, int) and abs(value) >= 2**63) or _shown(value) == _TOO_LONG:
        return "must be smaller; numbers have at most 64 bits"
    if not isinstance(value, str):
        return ""
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value):
        return "must be plain text, without control characters"
    if not os.path.expandvars(value.strip()):
        return "must not be empty"
    if unset := re.search(r"\$(\w+|\{[^}]*\})", os.path.expandvars(value)):
        return f"{unset[0]} is not set in the environment; set it or write the value in full"
    path = str(Path(value))  # a Path shortens ./~name to ~name
    if path.startswith("~") and os.path.expanduser(path) == path:
        return "there is no such user; write the path in full"
    return ""


_EXAMPLES = {"int": "8", "float": "0.5", "bool": "true", "string": '"text"', "path": '"folder"'}


def _fault(section: str, kind: type[Section], detail: ErrorDetails) -> str:
    """Words one pydantic error for the user: `[section] key = value: what is expected`."""
    if not detail["loc"]:  # from a `model_validator` above, whose message is complete
        return f"[{section}] {detail['msg'].removeprefix('Value error, ')}"
    key = str(detail["loc"][0])
    if former := FORMER_KEYS.get((section, key)):
        return f"[{section}] {key}: fasttrain no longer has this key; {former.remedy}"
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
    position = "".join(f"[{index}]" for index in detail["loc"][1:] if isinstance(index, int))
    return f"[{section}] {key}{position} = {_shown(value)}: {message}"


def _did_you_mean(word: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, default=str)
    except _NO_TOML:
        return _TOO_LONG
    return text if len(text) < 300 else f"{text[:300]}..."


# --------------------------------------------------------------------------------------------------
# Writing and comparing
# --------------------------------------------------------------------------------------------------


def dumps(recipe: Recipe, leave_out: Collection[str] = (), comments: bool = False) -> str:
    """Returns the recipe as TOML with all values. `load` of this text gives an equal recipe.

    Args:
        leave_out: fields (`section.key`) that are not written. `load` gives them their defaults.
        comments: writes above each field what it does, and its default if the value is another.
    """
    lines = []
    for name, table in recipe.model_dump(mode="json").items():
        kind = type(getattr(recipe, name))
        lines += (
            [*_comment(_first_sentence(kind.__doc__)), f"[{name}]"] if comments else [f"[{name}]"]
        )
        for key, value in table.items():
            if f"{name}.{key}" in leave_out:
                continue
            if comments:
                lines += ["", *_comment(_about(kind, key, value))]
            if value is not None:
                # JSON's strings, numbers, booleans and lists are valid TOML.
                lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
            elif comments:
                lines.append(f"# {key} is unset")
        lines.append("")
    return "\n".join(lines)


def _about(kind: type[Section], key: str, value: object) -> str:
    """What a field does, in one sentence, and its default if `value` (in JSON) is another."""
    field = kind.model_fields[key]
    default = json.loads(json.dumps(field.default, default=str))
    changed = f" Default: {_shown_or_unset(default)}." if value != default else ""
    return _first_sentence(field.description) + changed


def _first_sentence(text: str | None) -> str:
    """The first sentence of a docstring, on one line."""
    words = " ".join((text or "").split())
    return re.split(r"(?<=[.]) (?=[A-Z`])", words, maxsplit=1)[0]


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        100,
        initial_indent="# ",
        subsequent_indent="# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def may_vary(per_machine: bool = False) -> frozenset[str]:
    """Names the fields that may change when a run resumes, such as `data.root`.

    Args:
        per_machine: name only those that may differ between the processes of one start.
    """
    return frozenset(
        f"{section}.{key}"
        for section, table in Recipe.model_fields.items()
        for key, field in type(table.default).model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Varies) and (mark.per_machine or not per_machine)
    )


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Lists the settings whose change makes `new` a different run: `train.seed: 0 -> 1`."""
    varying = may_vary()
    return [text for name, text in _changes(old, new) if name not in varying]


def comparison(old: Recipe, new: Recipe) -> str:
    """Lists all settings in which two recipes differ, and says what that means for a run."""
    varying, per_machine = may_vary(), may_vary(per_machine=True)
    lines, same_run = [], True
    for name, text in _changes(old, new):
        if name in per_machine:
            text += "    # may differ between the machines of a run"
        elif name in varying:
            text += "    # may change when a run resumes"
        else:
            same_run = False
        lines.append(text)
    if not lines:
        return "The recipes have the same settings.\n"
    meaning = (
        "All of these may change within a run: a run of the first recipe can resume with the "
        "second one."
        if same_run
        else "A setting without a comment makes another run: a run of the first recipe cannot "
        "resume with the second one."
    )
    return "\n".join([*lines, "", meaning, ""])


def _changes(old: Recipe, new: Recipe) -> Iterator[tuple[str, str]]:
    """Yields each setting that differs (`train.seed`), and a text: `train.seed: 0 -> 1`."""
    old_values = old.model_dump(mode="json")
    for section, table in new.model_dump(mode="json").items():
        for key, value in table.items():
            if (was := old_values[section][key]) != value:
                name = f"{section}.{key}"
                yield name, f"{name}: {_shown_or_unset(was)} -> {_shown_or_unset(value)}"


def _shown_or_unset(value: Any) -> str:
    return "unset" if value is None else _shown(value)


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


TRAINS = "Trains the network of a recipe, or resumes a run that was stopped."
PRINTS = (
    "Prints a recipe in full as TOML: every setting with what it does. Or prints what two recipes "
    "differ in. Nothing is trained."
)


def add_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds the arguments `recipe` and `--set` of a command that takes a recipe."""
    parser.add_argument(
        "recipe",
        type=Path,
        nargs=None if required else "?",
        help="a TOML file, such as recipes/large.toml",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change one setting, such as train.epochs=90 (repeatable)",
    )


def load_or_exit(argv: Sequence[str] | None = None) -> Recipe:
    """Loads the recipe that the command line names. A fault ends the process with exit code 2."""
    parser = argparse.ArgumentParser(
        description=TRAINS,
        epilog="Every setting: recipes/SETTINGS.md, or python -m fasttrain.config RECIPE",
    )
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    return _load_or_exit(arguments.recipe, arguments.set)


def _load_or_exit(path: Path, overrides: Sequence[str]) -> Recipe:
    try:
        return load(path, overrides)
    except ConfigError as error:
        stop(str(error))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a recipe in full, or what two recipes differ in."""
    parser = argparse.ArgumentParser(prog="python -m fasttrain.config", description=PRINTS)
    add_arguments(parser, required=False)
    parser.add_argument(
        "--diff",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="print what recipe B changes in recipe A; --set changes a setting of B",
    )
    arguments = parser.parse_args(argv)
    if bool(arguments.recipe) == bool(arguments.diff):
        parser.error("name one recipe, or two after --diff")
    if arguments.diff:
        old, new = arguments.diff
        text = comparison(_load_or_exit(old, ()), _load_or_exit(new, arguments.set))
    else:
        text = dumps(_load_or_exit(arguments.recipe, arguments.set), comments=True)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
