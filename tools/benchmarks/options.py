"""Types and checks of the command line that several benchmarks share."""

import argparse
import math
from collections.abc import Sequence
from typing import Literal, get_args

from fasttrain import config
from fasttrain.arguments import positive
from fasttrain.faults import ConfigError

NOT_INSTALLED = "not installed: pip install -e '.[bench]'"
# Modes of `train.execution`, and the one that is probably the fastest with the fused kernels.
WITH_KERNELS = ("compile_graph_fuse+depthwise", "compile_graph_fuse+kernels")
MODES: tuple[str, ...] = (*get_args(config.Mode), *WITH_KERNELS)


def words(known: Sequence[str], text: str) -> list[str]:
    """`eager,compile` as a list; each word must be one of `known`."""
    if unknown := set(text.split(",")) - set(known):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
    return text.split(",")


def amount(text: str) -> float:
    """A finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def counts(text: str) -> list[int]:
    """`64,256`: whole numbers from 1."""
    return [positive(word) for word in text.split(",")]


def choose_device(wanted: str | None) -> Literal["cpu", "gpu"]:
    """The device that --device names; without it, a GPU if there is one.

    Raises:
        ConfigError: --device gpu, and torch finds none.
    """
    if wanted == "cpu":
        return "cpu"
    import torch

    found = torch.cuda.is_available()
    if wanted == "gpu" and not found:
        raise ConfigError("--device gpu: torch finds no GPU here; leave the option out")
    return "gpu" if found else "cpu"


def check_modes(modes: Sequence[str], device: str) -> None:
    """Refuses CUDA graphs on a CPU.

    Raises:
        ConfigError: one of the modes needs a GPU, and `device` is "cpu".
    """
    if device == "cpu" and any("graph" in mode for mode in modes):
        raise ConfigError("--modes: a CUDA graph needs a GPU; use eager,compile")
