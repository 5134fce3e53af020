"""Sets up this process (threads, limits, seeds), and describes its environment."""

import contextlib
import ctypes
import faulthandler
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

import fasttrain
from fasttrain import caches, config, determinism, launch, reading, rng, stopping
from fasttrain.launch import LaunchError


@dataclass(frozen=True, slots=True)
class Process:
    """This process: its rank, its device and its threads."""

    rank: int
    world_size: int
    device: torch.device
    data_threads: int  # DALI's CPU threads
    cpu_threads: int  # torch's CPU threads


def accelerator_for(
    precision: str, timeout: timedelta | None = None, cpu: bool = False
) -> Accelerator:
    """Joins the process group, with only those features of Accelerate that the recipe asks for.

    Args:
        precision: `train.precision` of the recipe.
        timeout: how long ranks wait for each other; None: torch's default.
        cpu: use no GPU.
    Raises:
        LaunchError: Accelerate chose a device or a feature that fasttrain does not use.
    """
    joined = Accelerator(
        mixed_precision=precision,
        cpu=cpu,
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)] if timeout else [],
    )
    known = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    found = {
        f"the device {joined.device}": joined.device.type in ("cpu", "cuda"),
        f"{joined.distributed_type.value} training": joined.distributed_type in known,
        f"{joined.mixed_precision} precision": joined.mixed_precision == precision,
        "gradient accumulation": joined.gradient_accumulation_steps == 1,
        "dynamo": joined.state.dynamo_plugin.backend == DynamoBackend.NO,
    }
    if others := [what for what, fits in found.items() if not fits]:
        raise LaunchError(
            f"Accelerate chose {', '.join(others)}, which fasttrain does not use: unset "
            "ACCELERATE_... in the environment, or train on the CPU with ACCELERATE_USE_CPU=1"
        )
    return joined


def start(
    accelerator: Accelerator,
    recipe: config.Recipe,
    environ: Mapping[str, str],
    patience: stopping.Patience | None = None,
) -> Process:
    """Sets the threads, kernels, seeds and limits of this process.

    Args:
        patience: how long this process may continue after its launcher has ended.
    Raises:
        LaunchError: Accelerate sees other processes than the launcher started.
    """
    launched = launch.number_in(environ, "WORLD_SIZE", 1)
    if launched != accelerator.num_processes:
        raise LaunchError(
            f"{launched} processes were launched, but Accelerate joined "
            f"{accelerator.num_processes}: each would train alone. Without a GPU, launch as "
            f"ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes {launched} ..."
        )
    stopping.Follower(environ, patience)
    if accelerator.process_index:
        warnings.simplefilter("ignore")  # rank 0 gives each of them once
    faulthandler.enable(2)  # reading a mapped tar that was cut short raises SIGBUS
    reading.raise_file_limit()
    caches.keep_compiled()
    # `accelerate launch` sets OMP_NUM_THREADS=1, also for one process. Torch would use one core.
    cpu_threads = recipe.train.cpu_threads or cpu_share(environ)
    torch.set_num_threads(cpu_threads)
    determinism.choose_kernels(recipe.train.deterministic)
    determinism.seed_torch(recipe.train.seed, rng.Stream.INIT)
    device = accelerator.device
    if device.type == "cpu":
        keep_memory()
    if device.type == "cuda" and device.index is None:  # with one rank; but DALI needs an index
        device = torch.device("cuda", torch.cuda.current_device())
    # Before `bind_to_node`, because afterwards this process sees only the CPUs of its node.
    decoding_threads = data_threads(recipe.data, environ)
    if device.type == "cuda":
        bind_to_node(device.index, environ)
    return Process(
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=device,
        data_threads=decoding_threads,
        cpu_threads=cpu_threads,
    )


def bind_to_node(gpu: int, environ: Mapping[str, str], sysfs: Path = Path("/sys")) -> None:
    """Binds this process to the CPUs of its GPU's NUMA node, if its share of the CPUs fits there.

    It does nothing if the launcher has bound the processes, or if one process has all nodes of a
    machine for itself. Accelerate's own binding (ACCELERATE_CPU_AFFINITY) needs another package and
    does not check whether the share fits.
    """
    here, processes = os.sched_getaffinity(0), launch.number_in(environ, "LOCAL_WORLD_SIZE", 1)
    nodes = len(list((sysfs / "devices/system/node").glob("node[0-9]*")))
    if nodes < 2 or len(here) != os.cpu_count() or torch.cuda.device_count() < processes:
        return
    # Containers may hide these files.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        used = [_node_of(number, sysfs) for number in range(processes)]
        node = _node_of(gpu, sysfs)
        text = (sysfs / f"devices/system/node/node{node}/cpulist").read_text()
        cpus = here & cpus_in(text)
        if node >= 0 and cpu_share(environ) * used.count(node) <= len(cpus):
            os.sched_setaffinity(0, cpus)  # for this thread and those that it starts


def _node_of(gpu: int, sysfs: Path) -> int:
    """Returns the NUMA node of a GPU; -1 if the kernel knows none."""
    about: Any = torch.cuda.get_device_properties(gpu)
    address = f"{about.pci_domain_id:04x}:{about.pci_bus_id:02x}:{about.pci_device_id:02x}.0"
    return int((sysfs / "bus/pci/devices" / address / "numa_node").read_text())


def cpus_in(text: str) -> set[int]:
    """Parses a list of CPUs such as `0-3,8-11`."""
    ranges = (part.partition("-") for part in text.strip().split(",") if part)
    return {cpu for a, _, b in ranges for cpu in range(int(a), int(b or a) + 1)}


def cpu_share(environ: Mapping[str, str]) -> int:
    """Returns the number of CPUs for this process, at least 1.

    Three numbers count: the CPUs to which the process is bound, the CPUs that SLURM allocated, and
    the container's quota. The smallest is divided by the number of processes on this machine.
    """
    cpus = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # "max 100000" without a quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, int(quota) // int(period))
    if "SLURM_CPUS_PER_TASK" in environ:  # where SLURM does not bind tasks
        cpus = min(cpus, launch.number_in(environ, "SLURM_CPUS_PER_TASK", 1))
    return max(1, cpus // launch.number_in(environ, "LOCAL_WORLD_SIZE", 1))


def data_threads(data: config.Data, environ: Mapping[str, str]) -> int:
    """Returns the number of CPU threads of this process that decode."""
    return data.threads or cpu_share(environ)


def keep_memory() -> None:
    """Makes the C library keep freed memory for the next step.

    By default it returns the memory to the kernel, and each step must fault in its activations
    again. For Small 0.75 at batch 64 and 128 px on two cores, that takes 37,000 page faults and a
    fifth of the time (torch 2.14.1, glibc, 2026-11-24).
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def environment(process: Process) -> dict[str, Any]:
    """Returns versions, hardware, commit and command of this start, as JSON values."""
    packages = {"accelerate", "numpy", "safetensors", "torch", "torchvision"}
    installed = {d.name: d.version for d in metadata.distributions()}
    versions = {
        name: version
        for name, version in sorted(installed.items())
        if name in packages or name.startswith("nvidia-dali-cuda")
    }
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": commit(),
        "versions": {"fasttrain": fasttrain.__version__, **versions},
        "python": platform.python_version(),
        "host": platform.node(),
        "world_size": process.world_size,
        "device": device_name(process.device),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_threads": process.cpu_threads,
        "data_threads": process.data_threads,
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }


def commit() -> str | None:
    """Returns the commit of this checkout, with `+` if files were changed; None outside of git."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12"]
    try:
        return subprocess.run(
            [*git, "--dirty=+"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device: torch.device) -> str:
    """Returns the model name of a GPU, or of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """Returns the model name of the CPU; what Python knows of it if the kernel gives no name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
