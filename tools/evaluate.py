"""Evaluates a network on the validation images of a data set, each exactly once.

    python tools/evaluate.py CHECKPOINT --data ROOT

CHECKPOINT is a checkpoint, a run folder (its newest checkpoint), or a file of weights (.safetensors
or .pth, such as the published mobilenetv3-large-1cd25616.pth) together with --recipe, which then
says what network it is. The class names of the data are compared with the network's: some of its
classes, or all in another order, are found by name. The last line on standard output is one JSON
object. Started by `accelerate launch`, all its processes share the work.
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
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights")
    parser.add_argument(
        "--recipe",
        type=Path,
        help="what network it is, and how images are cut; for a file of weights",
    )
    parser.add_argument(
        "--precision",
        choices=("no", "bf16", "fp16"),
        help="no is float32 (default: the recipe's; float32 on a CPU that is slower with bf16)",
    )
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="the network's class names: a list, one a line, or a data set or checkpoint with them",
    )
    parser.add_argument(
        "--classes-by-number",
        action="store_true",
        help="the data's classes are numbers, and N means the network's class N, from 0",
    )
    parser.add_argument("--batch-size", type=positive, default=128, help="(default: %(default)s)")
    arguments = parser.parse_args()
    joined = False
    try:
        launch.settle(os.environ, "no")  # the precision is the checkpoint's
        launch.check_processes(os.environ)
        split = shards.open_split(arguments.data, "val")
        network = open_network(arguments, split)
        joined = True
        evaluate(arguments, split, network)
    except Fault as fault:
        # Up to there all processes say the same.
        stop(str(fault), everywhere=joined and not fault.raised_on_every_rank)


class Network(NamedTuple):
    """A network with its weights and the logits of the data's classes."""

    model: "MobileNetV3"
    recipe: config.Recipe
    told: str  # what a person should know of it


def evaluate(arguments: argparse.Namespace, split: shards.Split, network: Network) -> None:
    import torch

    from fasttrain import decoding, gpus, loaders, loop, runtime
    from fasttrain.batch import Placement, half_images
    from fasttrain.evaluator import Evaluator

    model, recipe, told = network
    gpu = gpus.has_gpu(os.environ)
    if arguments.precision == "fp16" and not gpu:
        raise runtime.LaunchError("--precision fp16: needs a GPU; use bf16 or no")
    recipe, changes = settled.for_evaluation(recipe, arguments.precision, gpu)
    settings, precision = recipe.data, recipe.train.precision
    threads = runtime.data_threads(settings, os.environ)
    half = half_images(gpu, precision)
    job = decoding.Job(gpu, threads, arguments.batch_size, half)
    settings, _ = decoding.choose_decoder(split, settings, job, os.environ)
    accelerator = runtime.accelerator_for(precision)
    process = runtime.start(accelerator, recipe, os.environ)
    model.to(process.device).to(memory_format=torch.channels_last).eval()
    why = ""
    if precision == "bf16" and not gpu and not arguments.precision:
        why = avoid_slow_bf16(accelerator, model, settings.eval_crop_px)
    place = Placement(process.device, half, process.data_threads)
    batches: Iterable[Batch] = loaders.eval_loader(
        split, settings, arguments.batch_size, process.rank, process.world_size, place
    )
    if accelerator.is_main_process:
        how = PRECISIONS["no" if why else precision] + why
        say("\n".join([told, *changes, f"{process.world_size} x {process.device.type}, {how}"]))
        batches = shown(batches, split.num_samples, process.world_size)
    (result,) = loop.evaluate(accelerator, [Evaluator(model)], batches, split.num_samples)
    if accelerator.is_main_process:
        sys.stdout.write(json.dumps(result) + "\n")
    accelerator.end_training()


def open_network(arguments: argparse.Namespace, split: shards.Split) -> Network:
    """Reads the weights, and maps the data's classes to the network's.

    Raises:
        Fault: there are no usable weights, or they have other classes than the data.
    """
    # Seconds of imports, so only once the arguments are known to be right.
    from fasttrain import classes, matching, weights
    from fasttrain.model import build_model

    found, recipe = find_weights(arguments.checkpoint, arguments.ema, arguments.recipe)
    if arguments.classes:
        found = weights.with_names(found, classes.read_list(arguments.classes))
    model = build_model(**recipe.model.network(), num_classes=len(split.classes))
    rule = partial(matching.to_evaluate, data=split.classes, by_number=arguments.classes_by_number)
    said = weights.load(found, model, rule)
    told = f"evaluating {found.path} on {split.num_samples:,} images of {split.root}"
    if found.has_average:
        told += "\nthe file holds a moving average of the weights as well: --ema evaluates that"
    return Network(model, recipe, f"{told}\n{said}" if said else told)


def find_weights(path: Path, ema: bool, recipe: Path | None) -> tuple["Weights", config.Recipe]:
    """The weights that `path` means, and the recipe of their network: `recipe` if it is given.

    Raises:
        Fault: there is nothing usable at `path`.
    """
    from fasttrain import checkpoint

    given = config.load(recipe) if recipe else None
    found, own = checkpoint.open_weights(path, ema, say)
    if (chosen := given or own) is None:
        raise ConfigError(
            f"{path} is a file of weights: say what network it is, such as "
            "--recipe recipes/large.toml"
        )
    return found, chosen


def avoid_slow_bf16(accelerator: "Accelerator", model: "MobileNetV3", px: int) -> str:
    """Has the network evaluate in float32 where this CPU is slower with bfloat16; says why.

    The same in all processes, and empty where bfloat16 is as fast.
    """
    from accelerate.utils import AutocastKwargs, gather_object

    from fasttrain import modes

    ratio = min(gather_object([modes.bf16_ratio(model, px, backward=False)]))
    if ratio >= 1:
        return ""
    accelerator.autocast_handler = AutocastKwargs(enabled=False)
    return (
        f": bfloat16, the recipe's, takes {1 / ratio:.1f} times as long on this CPU "
        "(--precision bf16 evaluates in it all the same)"
    )


def shown(batches: Iterable["Batch"], num_samples: int, world_size: int) -> Iterator["Batch"]:
    """Passes batches on, and shows how far all processes are, which have equal shares."""
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
