"""Evaluates a network on the validation images of a data set, each exactly once.

    python tools/evaluate.py CHECKPOINT --data ROOT

CHECKPOINT is a checkpoint, a run folder (its newest checkpoint), or a file of weights (.safetensors
or .pth, such as the published mobilenetv3-large-1cd25616.pth) together with --recipe, which then
says what network it is. The last line on standard output is one JSON object. Started by `accelerate
launch`, all its processes share the work.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from fasttrain import config, launch, shards


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="ROOT", help="folder of the shards"
    )
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights")
    parser.add_argument("--recipe", type=Path, help="of a file of weights: what network it is")
    parser.add_argument(
        "--batch-size", type=config.positive, default=128, help="(default: %(default)s)"
    )
    arguments = parser.parse_args()
    try:
        launch.settle(os.environ, "no")  # the precision is the checkpoint's
        launch.check_processes(os.environ)
        split = shards.open_split(arguments.data, "val")
        evaluate(arguments, split)
    except config.Fault as fault:
        config.stop(str(fault), everywhere=True)


def evaluate(arguments: argparse.Namespace, split: shards.Split) -> None:
    # Seconds of imports, so only once the arguments are known to be right.
    import torch

    from fasttrain import checkpoint, data, decoding, loop, runtime
    from fasttrain.execution import Evaluator
    from fasttrain.model import build_model

    weights, recipe = find_weights(arguments.checkpoint, arguments.ema, arguments.recipe)
    # Whatever the run decoded with: this may be another machine.
    settings = recipe.data.model_copy(update={"decode": "auto"})
    threads = runtime.data_threads(settings, os.environ)
    gpu = runtime.has_gpu(os.environ)
    half = gpu and recipe.train.precision != "no"
    job = decoding.Job(gpu, threads, arguments.batch_size, half)
    settings, _ = decoding.choose(split, settings, job, os.environ)
    accelerator = runtime.accelerator_for(recipe.train.precision)
    process = runtime.start(accelerator, recipe.train, recipe.data, os.environ)
    model = build_model(**recipe.model.model_dump(), num_classes=len(split.classes))
    checkpoint.load_weights(weights, model)
    model.to(process.device).to(memory_format=torch.channels_last)
    place = data.Placement(process.device, half, process.data_threads)
    batches = data.eval_loader(
        split, settings, arguments.batch_size, process.rank, process.world_size, place
    )
    (result,) = loop.evaluate(accelerator, [Evaluator(model)], batches, split.num_samples)
    if accelerator.is_main_process:
        sys.stdout.write(json.dumps(result) + "\n")
    accelerator.end_training()


def find_weights(path: Path, ema: bool, recipe: Path | None) -> tuple[Path, config.Recipe]:
    """The file of weights that `path` means, and the recipe of its network.

    Raises:
        Fault: there is nothing usable at `path`.
    """
    from fasttrain import checkpoint, run_folder

    if path.is_file():
        if recipe is None:
            raise config.ConfigError(
                f"{path} is a file of weights: say what network it is, such as "
                "--recipe recipes/large.toml"
            )
        return path, config.load(recipe)
    folder: Path | None = path
    if (path / run_folder.CHECKPOINTS).is_dir():
        folder = checkpoint.newest_good(path / run_folder.CHECKPOINTS, say)
    if folder is None:
        raise checkpoint.CheckpointError(f"{path} holds no checkpoint yet")
    saved = checkpoint.read_state(folder)
    faults = checkpoint.faults_of(folder)
    if faults:
        raise checkpoint.CheckpointError("\n  ".join([f"{folder} cannot be used:", *faults]))
    weights = folder / ("ema.safetensors" if ema else "model.safetensors")
    if not weights.exists():
        raise checkpoint.CheckpointError(f"{folder} has no moving average: [optim] ema_decay was 0")
    say(f"evaluating {weights}")
    return weights, saved.recipe


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()
