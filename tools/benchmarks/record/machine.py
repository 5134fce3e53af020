"""The stage `machine`: what the machine has, and how fast its parts are."""

import os
import time
from pathlib import Path

import probes
from pydantic import BaseModel

from benchmarks import profiles
from benchmarks.own_process import Result
from benchmarks.record.journal import Run
from fasttrain import runtime, shards
from fasttrain.shards import Split


class MachineJob(BaseModel):
    """Which parts of the machine are measured."""

    device: str
    scratch: Path  # where a file is written
    data: Path | None  # shards that are read


def stage(run: Run, data: list[Split]) -> None:
    """Measures the machine, and reads the first data set."""
    root = data[0].root if data else None
    job = MachineJob(device=run.device, scratch=run.arguments.scratch, data=root)
    run.measure(job, "machine", needed=True)


SMI = {
    "driver_version": "driver",
    "clocks.max.sm": "clock_mhz_at_most",
    "clocks.sm": "clock_mhz",
    "clocks.max.mem": "memory_clock_mhz",
    "power.limit": "power_limit_w",
    "pcie.link.gen.max": "pcie_generation",
}


def measure(job: MachineJob) -> Result:
    """The parts of the machine, and the speed of its memory, arithmetic and storage."""
    import psutil
    import torch

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    found: Result = {
        "cpu": runtime.cpu_name(),
        "cpus": threads,
        "memory_gib": psutil.virtual_memory().total / 2**30,
        "copy_gb_per_s": profiles.copy_bandwidth(job.device) / 1e9,
    }
    if job.device == "cuda":
        found |= gpu()
    found["matrix_tflops"] = matrix_rate(job.device) / 1e12
    found["write_mb_per_s"] = write_bandwidth(job.scratch / "storage") / 1e6
    if job.data:
        split = shards.open_split(job.data, "train")
        found |= probes.read_in_order(split) | probes.read_at_random(split, 8)
    return found


def gpu() -> Result:
    """The GPU, its versions, its clocks, and the speed of uploads to it."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    query = probes.smi(f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits")
    answers = query.splitlines()[0].split(",") if query else []
    return {
        "gpu": properties.name,
        "gpu_memory_gib": properties.total_memory / 2**30,
        "gpu_processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "upload_gb_per_s": upload_bandwidth() / 1e9,
        **{name: text.strip() for name, text in zip(SMI.values(), answers, strict=False)},
    }


def write_bandwidth(file: Path) -> float:
    """Bytes/s of writing 256 MiB to a file, with the fsync at the end."""
    begun = time.perf_counter()
    with file.open("wb") as opened:
        for _ in range(64):
            opened.write(os.urandom(2**20) * 4)
        opened.flush()
        os.fsync(opened.fileno())
    num_bytes = file.stat().st_size
    seconds = time.perf_counter() - begun
    file.unlink()
    return num_bytes / seconds


def upload_bandwidth() -> float:
    """Bytes/s of copying 256 MiB from pinned memory to the device."""
    import torch

    source = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    return len(source) / profiles.seconds_of(lambda: target.copy_(source), "cuda")


def matrix_rate(device: str) -> float:
    """Multiplications and additions per second in the product of two square matrices."""
    import torch

    gpu = device == "cuda"
    size = 8192 if gpu else 1024
    # Random numbers: zeros and ones take less power, and a GPU then multiplies them faster.
    matrix = torch.randn(size, size, dtype=torch.bfloat16 if gpu else torch.float32, device=device)
    return float(2 * size**3 / profiles.seconds_of(lambda: matrix @ matrix, device))
