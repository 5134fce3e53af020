"""Evaluates a network on the validation images of a data set, each exactly once.

    python tools/evaluate.py CHECKPOINT --data ROOT

CHECKPOINT is one of
  - a checkpoint
  - a run folder, whose newest checkpoint is used
  - a file of weights (.safetensors or .pth, such as the published
    mobilenetv3-large-1cd25616.pth); --recipe then describes the network

The data may have some of the network's classes, or all of them in another order, because classes
are found by name. If `accelerate launch` starts several processes, they share the work. The last
line on standard output is one JSON object.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fasttrain import config, display, launch, settled, shards
from fasttrain.arguments import positive
from fasttrain.faults import ConfigError, Fault, stop

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fasttrain.batch import Batch
    from fasttrain.model import MobileNetV3
    from fasttrain.weights import Weights

PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="ROOT", help="folder of the shards"
    )
    parser.add_argument(
        "--ema", action="store_true", help="evaluate the moving average of the weights"
    )
    parser.add_argument(
        "--recipe",
        type=Path,
        help="the recipe of the network and of the image size; needed for a file of weights",
    )
    parser.add_argument(
        "--precision",
        choices=("no", "bf16", "fp16"),
        help="no is float32 (default: the recipe's, but float32 on a CPU that is slower in bf16)",
    )
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="the network's class names: a file with one per line, a data set, or a checkpoint",
    )
    parser.add_argument(
        "--classes-by-number",
        action="store_true",
        help="the data's class names are numbers: N means the network's class N, counted from 0",
    )
    parser.add_argument("--batch-size", type=positive, default=128, help="(default: %(default)s)")
    arguments = parser.parse_args()
    joined = False
    try:
        launch.settle(os.environ, "no")  # the precision comes from the checkpoint
        launch.check_processes(os.environ)
        shards.check_unchanged(arguments.data)
        split = shards.open_split(arguments.data, "val")
        network = open_network(arguments, split)
        joined = True
        evaluate(arguments, split, network)
    except Fault as fault:
        # Every rank raises the same faults before it has opened the network.
        stop(str(fault), everywhere=joined and not fault.raised_on_every_rank)


class Network(NamedTuple):
    """A network with its weights, which has one logit per class of the data."""

    model: "MobileNetV3"
    recipe: config.Recipe
    message: str  # for the user: the weights, the data, and how classes were matched


def evaluate(arguments: argparse.Namespace, split: shards.Split, network: Network) -> None:
    """Evaluates the network and prints the result as JSON. Every rank must call this.

    Raises:
        LaunchError: the precision needs a GPU.
    """
    import torch

    from fasttrain import decoding, gpus, loaders, loop, runtime
    from fasttrain.batch import Placement, half_images
    from fasttrain.evaluator import Evaluator

    model, recipe, message = network
    gpu = gpus.has_gpu(os.environ)
    if arguments.precision == "fp16" and not gpu:
        raise runtime.LaunchError("--precision fp16: needs a GPU; use bf16 or no")
    recipe, changes = settled.for_evaluation(recipe, arguments.precision, gpu)
    settings, precision = recipe.data, recipe.train.precision
    threads = runtime.data_threads(settings, os.environ)
    half = half_images(gpu, precision)
    job = decoding.Job(gpu, threads, arguments.batch_size, half)
    decoder, _ = decoding.choose_decoder(split, settings, job, os.environ)
    accelerator = runtime.accelerator_for(precision)
    process = runtime.start(accelerator, recipe, os.environ)
    model.to(process.device).to(memory_format=torch.channels_last).eval()
    why = ""
    if precision == "bf16" and not gpu and not arguments.precision:
        why = avoid_slow_bf16(accelerator, model, settings.eval_crop_px)
    placement = Placement(process.device, half, process.data_threads, decoder)
    batches: Iterable[Batch] = loaders.eval_loader(
        split, settings, arguments.batch_size, process.rank, process.world_size, placement
    )
    if accelerator.is_main_process:
        how = PRECISIONS["no" if why else precision] + why
        say("\n".join([message, *changes, f"{process.world_size} x {process.device.type}, {how}"]))
        batches = shown(batches, split.num_samples, process.world_size)
    (result,) = loop.evaluate(accelerator, [Evaluator(model)], batches, split.num_samples)
    if accelerator.is_main_process:
        sys.stdout.write(json.dumps(result) + "\n")
    accelerator.end_training()


def open_network(arguments: argparse.Namespace, split: shards.Split) -> Network:
    """Reads the weights and maps the data's classes to the network's.

    Raises:
        Fault: there are no usable weights, or the network lacks classes of the data.
    """
    # These imports take seconds, so they come after the arguments are checked.
    from fasttrain import classes, matching, weights
    from fasttrain.model import build_model

    found, recipe = find_weights(arguments.checkpoint, arguments.ema, arguments.recipe)
    if arguments.classes:
        found = weights.with_names(found, classes.read_list(arguments.classes))
    model = build_model(**recipe.model.network(), num_classes=len(split.classes))
    rule = partial(matching.to_evaluate, data=split.classes, by_number=arguments.classes_by_number)
    matched = weights.load(found, model, rule)
    message = f"evaluating {found.path} on {split.num_samples:,} images of {split.root}"
    if found.has_average:
        message += "\nthe file also holds a moving average of the weights: --ema evaluates that"
    return Network(model, recipe, f"{message}\n{matched}" if matched else message)


def find_weights(path: Path, ema: bool, recipe: Path | None) -> tuple["Weights", config.Recipe]:
    """Reads the weights at `path`, and the recipe of their network.

    Args:
        path: a checkpoint, a run folder or a file of weights.
        ema: read the moving average of the weights.
        recipe: a recipe to use instead of the checkpoint's.
    Raises:
        Fault: there are no usable weights at `path`, or their recipe is missing.
    """
    from fasttrain import checkpoint

    given = config.load(recipe) if recipe else None
    found, own = checkpoint.open_weights(path, ema, say)
    if (chosen := given or own) is None:
        raise ConfigError(
            f"{path} is a file of weights: give the recipe of its network, such as "
            "--recipe recipes/large.toml"
        )
    return found, chosen


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


def shown(batches: Iterable["Batch"], num_samples: int, world_size: int) -> Iterator["Batch"]:
    """Yields the batches and shows the progress of all ranks, which have equal shares."""
    left = num_samples
    with display.progress(num_samples, "evaluating") as advance:
        for batch in batches:
            yield batch
            done = min(len(batch.labels) * world_size, left)
            left -= done
            advance(done, 0)


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()
