"""The memory of a GPU: what it has, and what a process needs at the most."""

import subprocess
import sys
from functools import cache

from benchmarks import plans, steps
from benchmarks.layers import network_of

MIB_OF_A_PROCESS = 1500  # CUDA, its libraries and some fragmentation
HELD = 1.4  # at most: an update's memory over the inputs and outputs of all convolutions


def bytes_held(job: steps.StepJob) -> int:
    """The most bytes of memory that a process may need for a compiled update."""
    layers = network_of(job.arch, job.width, job.px).convolutions
    numbers = job.batch * sum(layer.read + layer.written for layer in layers)
    return round(HELD * plans.SIZES[job.precision] * numbers) + MIB_OF_A_PROCESS * 2**20


@cache
def gpu_bytes() -> int:
    """Bytes of memory of the GPU. Another process asks, so that this one takes none of it."""
    script = "import torch; print(torch.cuda.mem_get_info()[0])"
    return int(subprocess.check_output([sys.executable, "-c", script], text=True))
