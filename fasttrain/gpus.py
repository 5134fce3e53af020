"""Checks that this machine's GPUs fit the launch and the recipe, without using a GPU."""

from collections.abc import Mapping

import torch

from fasttrain import config, launch
from fasttrain.launch import LaunchError


def has_gpu(environ: Mapping[str, str]) -> bool:
    """True if Accelerate will find a GPU."""
    return not launch.on_cpu(environ) and torch.cuda.device_count() > 0


def check_launch(recipe: config.Recipe, environ: Mapping[str, str]) -> None:
    """Checks that this machine can train the recipe in the launched processes.

    Raises:
        LaunchError: there are too few GPUs, or a setting of the recipe does not fit this machine.
    """
    train, decode = recipe.train, recipe.data.decode
    if has_gpu(environ):
        processes, gpus = (
            launch.number_in(environ, "LOCAL_WORLD_SIZE", 1),
            torch.cuda.device_count(),
        )
        if processes > gpus:
            raise LaunchError(
                f"{processes} processes were launched here, but there are {gpus} GPUs: launch one "
                "process per GPU with --num_processes, or check CUDA_VISIBLE_DEVICES"
            )
        if train.deterministic and decode.startswith("gpu"):
            raise LaunchError(
                "[train] deterministic = true: decoding on a GPU is not known to repeat; use "
                f"[data] decode = cpu or auto instead of {decode}"
            )
        return
    if train.precision == "fp16":
        raise LaunchError("[train] precision = fp16: needs a GPU; use bf16 or no")
    if "graph" in train.execution:
        raise LaunchError(f"[train] execution = {train.execution}: needs a GPU; use auto")


def idle_gpus(environ: Mapping[str, str]) -> list[str]:
    """Returns a remark if only one process was started on a machine with several GPUs."""
    gpus = torch.cuda.device_count()
    if not has_gpu(environ) or gpus < 2 or launch.number_in(environ, "WORLD_SIZE", 1) > 1:
        return []
    return [
        f"1 of {gpus} GPUs is used; accelerate launch --multi_gpu --num_processes {gpus} "
        "fasttrain/train.py uses all of them"
    ]
