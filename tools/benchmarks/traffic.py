"""Bytes that an update moves and holds at the least or at the most, counted from the network."""

import subprocess
import sys
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks import steps
from fasttrain.model import build_model

MIB_OF_A_PROCESS = 1500  # CUDA, its libraries and some fragmentation
HELD = 1.4  # at most: an update's memory over the inputs and outputs of all convolutions


def values_of(arch: Literal["large", "small"], width: float, px: int) -> tuple[int, int]:
    """How many numbers all convolutions read and write for one image, without weights."""
    read = written = 0

    def add(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal read, written
        read, written = read + given[0].numel(), written + output.numel()

    with torch.device("meta"):
        network = build_model(arch, width, steps.NUM_CLASSES, 0.0)
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(add)
        network(torch.zeros(2, 3, px, px))
    return read // 2, written // 2


def bytes_moved(job: steps.StepJob) -> int:
    """The fewest bytes that an update can move, where each convolution is a kernel of its own.

    Counted from the network, where a convolution reads I numbers and writes O. Forward: I + 4 O.
    The convolution reads I and writes O; BatchNorm reads O for its statistics, reads O again to
    normalise, and writes O. Backward: 2 I + 7 O. BatchNorm reads 2 O for its sums, then reads 2 O
    and writes O for the gradient of the convolution's output; the gradient of the input takes
    O + I, and that of the weights O + I. Squeeze-excitation, additions, weights, optimizer and loss
    are not counted.
    """
    read, written = values_of(job.arch, job.width, job.px)
    size = torch.finfo(steps.DTYPES[job.precision]).bits // 8
    return job.batch * size * (3 * read + 11 * written)


def bytes_held(job: steps.StepJob) -> int:
    """The most bytes of memory that a process may need for a compiled update."""
    read, written = values_of(job.arch, job.width, job.px)
    size = torch.finfo(steps.DTYPES[job.precision]).bits // 8
    return round(HELD * job.batch * size * (read + written)) + MIB_OF_A_PROCESS * 2**20


@cache
def gpu_bytes() -> int:
    """Bytes of memory of the GPU. Another process asks, so that this one takes none of it."""
    script = "import torch; print(torch.cuda.mem_get_info()[0])"
    return int(subprocess.check_output([sys.executable, "-c", script], text=True))
