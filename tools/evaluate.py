"""Evaluates a network on the validation images of data sets, each image exactly once.

    python tools/evaluate.py WEIGHTS --data ROOT [ROOT ...]

WEIGHTS is one of
  - a run folder, whose newest checkpoint is used
  - a checkpoint
  - a file of weights (.safetensors or .pth, such as the published
    mobilenetv3-large-1cd25616.pth); --recipe then describes the network
  - what tools/export.py wrote as .safetensors, .pth or a folder; it describes itself

A data set may have some of the network's classes, or all of them in another order, because classes
are found by name. If `accelerate launch` starts several processes, they share the work.

The last line on standard output is one JSON object: the result, or with several data sets the
result of each ROOT. With --out FOLDER, the predictions for each image, the accuracy of each class
and the confusions are written to FOLDER, or with several data sets to a folder for each in FOLDER.
For a run folder this is RUN/evaluation, if --out does not name another one.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fasttrain import config, display, launch, matching, run_folder, settled, shards
from fasttrain.arguments import add_precise_bn, fraction, positive
from fasttrain.faults import ConfigError, Fault, stop

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fasttrain.batch import Batch
    from fasttrain.decoder import Decoder
    from fasttrain.model import MobileNetV3
    from fasttrain.predictions import Predictions
    from fasttrain.runtime import Process
    from fasttrain.weights import Weights

PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
FOLDER = "evaluation"  # in a run folder
SMALLEST_PX = 32


def main() -> None:
    arguments = parse()
    joined = False
    try:
        launch.settle(os.environ, "no")  # the precision comes from the checkpoint
        launch.check_processes(os.environ)
        splits = open_splits(arguments.data)
        network = open_network(arguments, splits)
        folders = folders_of(arguments, splits)
        joined = True
        evaluate(arguments, network, folders)
    except Fault as fault:
        # Every rank raises the same faults before it has opened the network.
        stop(str(fault), everywhere=joined and not fault.raised_on_every_rank)


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        nargs="+",
        action="extend",
        metavar="ROOT",
        help="folders of shards; each is evaluated by itself",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write predictions, classes and confusions here"
    )
    network = parser.add_argument_group("the network")
    network.add_argument(
        "--ema", action="store_true", help="evaluate the moving average of the weights"
    )
    network.add_argument(
        "--recipe",
        type=Path,
        help="the recipe of the network and of the image size; needed for a file of weights",
    )
    add_precise_bn(network)
    network.add_argument(
        "--precision",
        choices=("no", "bf16", "fp16"),
        help="no is float32 (default: the recipe's, but float32 on a CPU that is slower in bf16)",
    )
    network.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="the network's class names: a file with one per line, a data set, or a checkpoint",
    )
    network.add_argument(
        "--classes-by-number",
        action="store_true",
        help="the data's class names are numbers: N means the network's class N, counted from 0; "
        "with several data sets, this holds for those whose names are numbers",
    )
    images = parser.add_argument_group("the images")
    images.add_argument(
        "--crop-px",
        type=positive,
        metavar="N",
        help="side of the centre crop (default: the recipe's); the size before the crop grows with "
        "it, unless one of the next two options sets it",
    )
    size = images.add_mutually_exclusive_group()
    size.add_argument(
        "--crop-fraction",
        type=fraction,
        metavar="F",
        help="resize the shorter side to crop / F (timm's crop_pct)",
    )
    size.add_argument(
        "--resize-px", type=positive, metavar="N", help="resize the shorter side to N"
    )
    images.add_argument(
        "--tta",
        choices=("flip",),
        help="flip: the mean of the logits of each image and its mirror image",
    )
    images.add_argument("--batch-size", type=positive, default=128, help="(default: %(default)s)")
    return parser.parse_args()


# --------------------------------------------------------------------------------------------------
# What is evaluated
# --------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A data set, and the network with one logit for each of its classes."""

    split: shards.Split
    model: "MobileNetV3"
    matched: str  # for the user: how classes were matched; may be empty


class Network(NamedTuple):
    """A network that was read, for each data set."""

    weights: "Weights"
    average: bool  # True for the moving average of the weights
    recipe: config.Recipe  # with the image size of this evaluation
    subjects: list[Subject]
    training: shards.Split | None  # images to measure BatchNorm's statistics on; None keeps them

    def about(self) -> dict[str, Any]:
        """The entries of `evaluation.json` about the weights."""
        return {"weights": str(self.weights.path), "average": self.average}

    def describe(self, flip: bool) -> str:
        """Says which weights are evaluated on which data, and at which image size."""
        from fasttrain import checkpoint

        path, data = self.weights.path, self.recipe.data
        kind = "the moving average" if self.average else "not averaged"
        lines = [f"weights: {path} ({kind})"]
        beside = path.name == checkpoint.MODEL and path.with_name(checkpoint.EMA).exists()
        if not self.average and (self.weights.has_average or beside):
            lines.append("there is also a moving average of these weights: --ema evaluates that")
        mirrored = "; mean of the logits of each image and its mirror image" if flip else ""
        lines.append(
            f"images: shorter side resized to {data.eval_resize_px} px, centre crop of "
            f"{data.eval_crop_px} px{mirrored}"
        )
        for split, _, matched in self.subjects:
            lines.append(f"data: {split.root}, {split.num_samples:,} images")
            lines += [matched] if matched else []
            known, own = self.weights.known.number, len(split.classes)
            if own < known:
                lines.append(f"top-1 and top-5 are among the data's own {own:,} classes")
        return "\n".join(lines)


def open_splits(roots: Sequence[Path]) -> list[shards.Split]:
    """Opens the validation split of each data set.

    Raises:
        Fault: a data set is missing or damaged, or is named twice.
    """
    for number, root in enumerate(roots):
        if root in roots[:number]:
            raise ConfigError(f"--data: {root} is named twice; name each data set once")
        shards.check_unchanged(root)
    return [shards.open_split(root, "val") for root in roots]


def open_network(arguments: argparse.Namespace, splits: Sequence[shards.Split]) -> Network:
    """Reads the weights, and maps the classes of each data set to the network's.

    Raises:
        Fault: there are no usable weights, the network lacks classes of the data, the image size
            is impossible, or the data set of `--precise-bn` is missing or damaged.
    """
    training = None
    if arguments.precise_bn:
        shards.check_unchanged(arguments.precise_bn)
        training = shards.open_split(arguments.precise_bn, "train")
    # These imports take seconds, so they come after the arguments are checked.
    import torch

    from fasttrain import checkpoint, classes, weights
    from fasttrain.model import build_model

    found, recipe = find_weights(arguments.weights, arguments.ema, arguments.recipe)
    data = with_size(arguments, recipe.data)
    if arguments.classes:
        found = weights.with_names(found, classes.read_list(arguments.classes))
    subjects = []
    for split in splits:
        network = recipe.model.network() | {"dropout": 0.0, "drop_path": 0.0}
        model = build_model(**network, num_classes=len(split.classes))
        by_number = arguments.classes_by_number and (
            len(splits) == 1 or matching.are_numbers(split.classes)
        )
        rule = partial(matching.to_evaluate, data=split.classes, by_number=by_number)
        with naming(split.root if len(splits) > 1 else None):
            matched = weights.load(found, model, rule)
        model.to(memory_format=torch.channels_last).eval()
        subjects.append(Subject(split, model, matched))
    average = arguments.ema or found.path.name == checkpoint.EMA
    recipe = recipe.model_copy(update={"data": data})
    return Network(found, average, recipe, subjects, training)


@contextmanager
def naming(root: Path | None) -> Iterator[None]:
    """Puts the name of the data set before the message of a fault in its classes."""
    try:
        yield
    except matching.ClassError as error:
        raise matching.ClassError(f"{root}: {error}" if root else str(error)) from None


def find_weights(path: Path, ema: bool, recipe: Path | None) -> tuple["Weights", config.Recipe]:
    """Reads the weights at `path`, and the recipe of their network.

    Args:
        path: a checkpoint, a run folder or a file of weights.
        ema: read the moving average of the weights.
        recipe: a recipe to use instead of the checkpoint's.
    Raises:
        Fault: there are no usable weights at `path`, or their recipe is missing.
    """
    from fasttrain import trained

    given = config.load(recipe) if recipe else None
    found, chosen = trained.weights_and_recipe(path, ema, given, say)
    if chosen is None:
        raise ConfigError(
            f"{path} is a file of weights: give the recipe of its network, such as "
            "--recipe recipes/large.toml"
        )
    return found, chosen


def with_size(arguments: argparse.Namespace, data: config.Data) -> config.Data:
    """Returns the settings with the image size of the command line.

    Without a size before the crop, that size keeps the recipe's ratio to the crop.

    Raises:
        ConfigError: the crop is too small, or larger than the resized image.
    """
    crop, resize = arguments.crop_px or data.eval_crop_px, data.eval_resize_px
    if arguments.resize_px:
        resize = arguments.resize_px
    elif arguments.crop_fraction or arguments.crop_px:
        resize = round(crop / (arguments.crop_fraction or data.eval_crop_px / resize))
    if crop < SMALLEST_PX:
        raise ConfigError(f"--crop-px {crop}: must be at least {SMALLEST_PX} pixels")
    if crop > resize:
        origin = "" if arguments.crop_px else " of the recipe"
        raise ConfigError(
            f"--resize-px {resize}: smaller than the crop of {crop} px{origin}; raise it, or set "
            "a smaller --crop-px"
        )
    return data.model_copy(update={"eval_crop_px": crop, "eval_resize_px": resize})


# --------------------------------------------------------------------------------------------------
# The folders of the files
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Folders:
    """Where the files of each data set are written. Empty: nothing is collected or written."""

    paths: tuple[Path, ...] = ()
    remark: str = ""  # for the user
    writable: bool = True  # False: rank 0 cannot write there


def folders_of(arguments: argparse.Namespace, splits: Sequence[shards.Split]) -> Folders:
    """Chooses the folders, alike on all ranks. Rank 0 makes them.

    Raises:
        ConfigError: the folder that `--out` names cannot be used. If it cannot be written, only
            rank 0 finds this.
    """
    out = arguments.out
    if out is None and (arguments.weights / run_folder.CHECKPOINTS).is_dir():
        out = arguments.weights / FOLDER
    if out is None:
        return Folders()
    paths = [out]
    if len(splits) > 1:
        paths = [out / Path(os.path.abspath(split.root)).name for split in splits]
    if twice := [path for path in paths if paths.count(path) > 1]:
        fault = f"{twice[0]} would be the folder of two data sets, which have the same last name"
        if arguments.out:
            raise ConfigError(f"--out {out}: {fault}; evaluate them in two calls")
        return Folders(remark=f"no files: {fault}; evaluate them in two calls, each with its --out")
    fault = make_folders(paths) if os.environ.get("RANK", "0") == "0" else ""
    if fault and arguments.out:
        raise ConfigError(f"--out {out}: cannot be written ({fault}); choose another folder")
    remark = f"files: {out}"
    if fault:
        remark = f"no files: {out} cannot be written ({fault}); --out FOLDER writes them elsewhere"
    return Folders(tuple(paths), remark, not fault)


def make_folders(paths: Sequence[Path]) -> str:
    """Makes the folders. Returns the fault if one of them cannot be written; else an empty text."""
    for path in paths:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return error.strerror or str(error)
        if not os.access(path, os.W_OK | os.X_OK):
            return "Permission denied"
    return ""


# --------------------------------------------------------------------------------------------------
# The evaluation
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Session:
    """Where and how all data sets are evaluated."""

    accelerator: "Accelerator"
    process: "Process"
    data: config.Data
    half: bool  # images as fp16
    batch_size: int
    flip: bool  # average the logits with those of the mirror image

    def about(self) -> dict[str, Any]:
        """The entries of `evaluation.json` about the images."""
        crop_px, resize_px = self.data.eval_crop_px, self.data.eval_resize_px
        return {"crop_px": crop_px, "resize_px": resize_px, "flip": self.flip}


def evaluate(arguments: argparse.Namespace, network: Network, folders: Folders) -> None:
    """Evaluates each data set and prints the results. Every rank must call this.

    Raises:
        LaunchError: the precision needs a GPU.
        ConfigError: files could not be written. The results are printed before.
    """
    from fasttrain import predictions

    session, decoders, how = join(arguments, network)
    is_main = session.accelerator.is_main_process
    if is_main:
        lines = [network.describe(session.flip), *how, folders.remark]
        say("\n".join(filter(None, lines)))
    about = network.about()
    if network.training:
        used = measure_statistics(
            session, network, network.training, decoders.pop(), arguments.precise_bn_images
        )
        about |= {"precise_bn_images": used}
    results: dict[str, dict[str, Any]] = {}
    faults = []
    for number, (subject, decoder) in enumerate(zip(network.subjects, decoders, strict=True)):
        result, found = run(session, subject, decoder, bool(folders.paths))
        root = str(subject.split.root)
        results[root] = result
        if found and is_main and folders.writable:
            whole = about | {"data": root, "split": "val"} | session.about() | result
            try:
                predictions.write(folders.paths[number], whole, found, subject.split.classes)
            except OSError as error:
                faults.append(f"{folders.paths[number]}: not written ({error.strerror or error})")
    if is_main:
        show(network, results)
        printed = results if len(results) > 1 else next(iter(results.values()))
        sys.stdout.write(json.dumps(printed) + "\n")
    session.accelerator.end_training()
    if faults:
        raise ConfigError("\n".join([*faults, "free some space, or choose another --out"]))


def join(
    arguments: argparse.Namespace, network: Network
) -> tuple[Session, list["Decoder"], list[str]]:
    """Chooses a decoder for each data set, and joins the process group. Every rank must call this.

    Returns:
        The session; the decoders, the last one for `network.training` if that is set; and lines
        for the user about precision and devices.
    Raises:
        LaunchError: the precision needs a GPU.
    """
    from fasttrain import decoding, gpus, runtime
    from fasttrain.batch import half_images

    gpu = gpus.has_gpu(os.environ)
    if arguments.precision == "fp16" and not gpu:
        raise runtime.LaunchError("--precision fp16: needs a GPU; use bf16 or no")
    recipe, changes = settled.for_evaluation(network.recipe, arguments.precision, gpu)
    data, precision = recipe.data, recipe.train.precision
    half = half_images(gpu, precision)
    threads = runtime.data_threads(data, os.environ)
    job = decoding.Job(gpu, threads, arguments.batch_size, half)
    splits = [subject.split for subject in network.subjects]
    splits += [network.training] if network.training else []
    decoders = [  # before this process uses the GPU
        decoding.choose_decoder(split, data, job, os.environ)[0] for split in splits
    ]
    accelerator = runtime.accelerator_for(precision)
    process = runtime.start(accelerator, recipe, os.environ)
    why = ""
    if precision == "bf16" and not gpu and not arguments.precision:
        why = avoid_slow_bf16(accelerator, network.subjects[0].model, data.eval_crop_px)
    how = PRECISIONS["no" if why else precision] + why
    lines = [*changes, f"{process.world_size} x {process.device.type}, {how}"]
    flip = arguments.tta == "flip"
    return Session(accelerator, process, data, half, arguments.batch_size, flip), decoders, lines


def measure_statistics(
    session: Session, network: Network, training: shards.Split, decoder: "Decoder", number: int
) -> int:
    """Measures BatchNorm's statistics anew, alike on every rank.

    Args:
        number: how many training images to use at least.
    Returns:
        The number of images that were used.
    """
    from fasttrain import precise_bn
    from fasttrain.batch import Placement

    process = session.process
    placement = Placement(process.device, session.half, process.data_threads, decoder)
    model = network.subjects[0].model.to(process.device)
    is_main = session.accelerator.is_main_process
    with session.accelerator.autocast():
        used = precise_bn.measure(model, training, session.data, placement, number, is_main)
    for subject in network.subjects[1:]:  # they differ in the last layer alone
        subject.model.to(process.device).load_state_dict(dict(model.named_buffers()), strict=False)
    if is_main:
        say(f"BatchNorm's statistics: measured on {used:,} training images of {training.root}")
    return used


def run(
    session: Session, subject: Subject, decoder: "Decoder", collect: bool
) -> tuple[dict[str, Any], "Predictions | None"]:
    """Evaluates one data set. Every rank must call this.

    Returns:
        The result; and the predictions for all images, None if `collect` is False.
    """
    from fasttrain import loaders, loop
    from fasttrain.batch import Placement
    from fasttrain.evaluator import Evaluator, Mirrored
    from fasttrain.predictions import Collector

    split, process = subject.split, session.process
    model = subject.model.to(process.device)
    placement = Placement(process.device, session.half, process.data_threads, decoder)
    batches: Iterable[Batch] = loaders.eval_loader(
        split, session.data, session.batch_size, process.rank, process.world_size, placement
    )
    if session.accelerator.is_main_process:
        batches = shown(batches, split, process.world_size)
    collector = Collector() if collect else None
    evaluator = Evaluator(
        Mirrored(model) if session.flip else model, record=collector.add if collector else None
    )
    (result,) = loop.evaluate(session.accelerator, [evaluator], batches, split.num_samples)
    return result, collector.gather(split.num_samples) if collector else None


def avoid_slow_bf16(accelerator: "Accelerator", model: "MobileNetV3", px: int) -> str:
    """Switches to float32 if the CPU of any rank is slower in bfloat16. Every rank must call this.

    Args:
        px: the image size in pixels.
    Returns:
        The reason for the user, the same on all ranks; empty if bfloat16 is kept.
    """
    from accelerate.utils import AutocastKwargs, gather_object

    from fasttrain import modes

    ratio = min(gather_object([modes.bf16_ratio(model, px, backward=False)]))
    if ratio >= 1:
        return ""
    accelerator.autocast_handler = AutocastKwargs(enabled=False)
    return (
        f": the recipe's bfloat16 takes {1 / ratio:.1f} times as long on this CPU "
        "(--precision bf16 uses it anyway)"
    )


def shown(batches: Iterable["Batch"], split: shards.Split, world_size: int) -> Iterator["Batch"]:
    """Yields the batches and shows the progress of all ranks, which have equal shares."""
    left = split.num_samples
    with display.progress(left, "evaluating") as advance:
        for batch in batches:
            yield batch
            done = min(len(batch.labels) * world_size, left)
            left -= done
            advance(done, 0)


def show(network: Network, results: dict[str, dict[str, Any]]) -> None:
    """Prints a table with a row for each data set on standard error."""
    table = Table("data", *("images", "classes", "top-1 %", "top-5 %", "loss"))
    for column in table.columns[1:]:
        column.justify = "right"
    for (root, result), subject in zip(results.items(), network.subjects, strict=True):
        own, known = len(subject.split.classes), network.weights.known.number
        classes = f"{own:,}" if own == known else f"{own:,} of {known:,}"
        loss = "not finite" if result["loss"] is None else f"{result['loss']:.4f}"
        table.add_row(
            root, f"{result['seen']:,}", classes,
            f"{result['top1']:.2f}", f"{result['top5']:.2f}", loss,
        )  # fmt: skip
    Console(stderr=True).print(table)


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()
