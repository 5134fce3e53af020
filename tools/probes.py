"""The probes of `doctor.py`: the hardware of a machine, the speed of its storage and of training.

A probe returns "unknown" if it cannot find something out. The stage `machine` of
`benchmark.py record` also uses the probes of the GPU and of storage.
"""

import contextlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain import config, forecast, launch
from fasttrain.schedule import Plan
from fasttrain.shards import Split

Facts = dict[str, Any]  # by name; the name of a quantity ends with its unit

SMI_S = 30  # time limit of nvidia-smi
STEP_S = 120  # time limit of a trial of training steps
READ_S = 1.5  # time limit of reading in order, and of reading at random
IN_ORDER_BYTES, AT_RANDOM_BYTES = 128 << 20, 64 << 20  # the most bytes to read
TARS = 32  # the most tars to read from
PIECE_BYTES = 4 << 20
FOLIO_BYTES = 256 << 10  # the page cache drops only whole folios; few are larger than this
NETWORK = (
    "nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse.", "cifs", "smb", "9p", "afs", "panfs",
    "wekafs", "glusterfs", "pvfs", "orangefs", "virtiofs",
)  # fmt: skip

# --------------------------------------------------------------------------------------------------
# The node
# --------------------------------------------------------------------------------------------------


def text_of(path: Path) -> str:
    """Returns the content of a small file; "unknown" if it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return "unknown"


def smi(*arguments: str) -> str:
    """Returns the output of nvidia-smi; empty if it is missing or fails."""
    command = ["nvidia-smi", *arguments]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SMI_S)
        return done.stdout
    return ""


def torch_gpus() -> int:
    """Returns the number of GPUs that torch finds."""
    import torch

    return torch.cuda.device_count()


def major(version: str) -> int:
    """Returns the first number of a version: 13 for `13.0`, and 0 for a text without a number."""
    found = re.match(r"\d+", version)
    return int(found[0]) if found else 0


def all_reduce_s(numbers: int, device: Any, times: int) -> float:
    """Times an all-reduce.

    Args:
        numbers: number of float32 values per rank.
        times: number of timed calls, after 5 calls to warm up.
    Returns:
        The median in seconds.
    """
    import torch

    values, seconds = torch.zeros(numbers, device=device), []
    for _ in range(5 + times):
        begun = time.perf_counter()
        torch.distributed.all_reduce(values)
        float(values[0])  # waits for the device
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[5:])


def same_cuda(torch_cuda: str, dali_cuda: str = "") -> bool | str:
    """Returns whether torch and DALI are built for the same major version of CUDA."""
    if not major(torch_cuda) or not major(dali_cuda):
        return "unknown (one of them is built without CUDA)"
    return major(torch_cuda) == major(dali_cuda)


def cuda_faults(built: Mapping[str, str], driver: str) -> list[str]:
    """Returns a message for each package that is built for a newer CUDA than the driver has."""
    return [
        f"{name} is built for CUDA {version}, but the driver has CUDA {driver}: update the driver, "
        'or install packages for its CUDA (README.md, "CUDA 12")'
        for name, version in built.items()
        if major(version) > major(driver)
    ]


def link_counts(text: str) -> list[str]:
    """Counts the links between pairs of GPUs by kind, such as `["28 x NV18, NVLink"]`.

    Args:
        text: the output of `nvidia-smi topo -m`.
    """
    lines = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()  # the heading is underlined
    table = [line.split() for line in lines if re.match(r"GPU\d+\s", line)]
    kinds = Counter(row[1 + column] for n, row in enumerate(table) for column in range(n))
    return [
        f"{count} x {kind}, {'NVLink' if kind.startswith('NV') else 'PCIe'}"
        for kind, count in kinds.most_common()
    ]


def interfaces(root: Path = Path("/sys/class/net")) -> dict[str, str]:
    """Returns state and speed of the network interfaces, such as `{"eth0": "up, 25,000 Mbit/s"}`.

    Leaves out the loopback interface.
    """
    found = {}
    for path in sorted(root.glob("*/operstate")):
        if (name := path.parent.name) != "lo":
            speed = text_of(path.with_name("speed"))  # -1 if the kernel does not know it
            text = f"{int(speed):,} Mbit/s" if speed.isdecimal() else "speed unknown"
            found[name] = f"{text_of(path)}, {text}"
    return found


def infiniband(root: Path = Path("/sys/class/infiniband")) -> list[str]:
    """Returns the InfiniBand ports, such as `["mlx5_0 port 1: ACTIVE, 400 Gb/sec (4X NDR)"]`."""
    return [
        f"{port.parent.parent.name} port {port.name}: "
        f"{text_of(port / 'state').rpartition(': ')[2]}, {text_of(port / 'rate')}"
        for port in sorted(root.glob("*/ports/*"))
    ]


def quota_in(text: str) -> float | None:
    """Returns the number of CPUs that a container's quota allows; None without a quota.

    Args:
        text: the content of `cpu.max`.
    """
    quota, _, period = text.partition(" ")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


# --------------------------------------------------------------------------------------------------
# Storage
# --------------------------------------------------------------------------------------------------


def num_bytes(splits: Sequence[Split]) -> int:
    """Returns the size of all tars of these splits, in bytes."""
    return sum(sum(split.shard_bytes) for split in splits)


def existing(path: Path) -> Path:
    """Returns the path if it exists, otherwise the nearest folder above it that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def cannot_write(folder: Path) -> str:
    """Returns why a folder cannot be created or written to; empty if it can."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)):
            return ""
    except OSError as error:
        return str(error.strerror)


def advice(kind: str, data: config.Data, size: int) -> list[str]:
    """Suggests settings that make reading over a network faster or safer. None for a local disk.

    Args:
        kind: the type of the file system, such as "nfs4".
        size: size of all shards in bytes.
    """
    if not kind.startswith(NETWORK) or data.stage:
        return []
    fits = size < min(shutil.disk_usage("/dev/shm").free, forecast.available_bytes()) / 2
    folder = "/dev/shm/fasttrain" if fits else "/a/local/disk"
    found = [
        f"--set data.stage={folder} copies the {size / 1e9:,.1f} GB to each node before the run"
    ]
    if data.shuffle == "full":
        found.append("without a copy, --set data.shuffle=blocks reads in large pieces")
    if data.read == "mmap":
        found.append("without a copy, --set data.read=pread does not crash if a file changes")
    return found


def forget(file: int, offset: int, size: int) -> None:
    """Drops a range of a file from the page cache, unless something keeps it there."""
    first = offset - offset % FOLIO_BYTES
    end = -(-(offset + size) // FOLIO_BYTES) * FOLIO_BYTES
    os.posix_fadvise(file, first, end - first, os.POSIX_FADV_DONTNEED)


def read_in_order(split: Split) -> Facts:
    """Measures the time to open a tar in ms, and the speed of reading tars in order in MB/s."""
    done, reading_s, opening_s = 0, 0.0, []
    for path in random.sample(split.shard_paths, min(TARS, len(split.shard_paths))):
        begun = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            size = min(os.fstat(file.fileno()).st_size, IN_ORDER_BYTES - done)
            opening_s.append(time.perf_counter() - begun)
            forget(file.fileno(), 0, size)
            begun = time.perf_counter()
            while size > 0 and reading_s + time.perf_counter() - begun < READ_S:
                piece = len(file.read(min(PIECE_BYTES, size)))
                done, size = done + piece, size - piece if piece else 0
            reading_s += time.perf_counter() - begun
        if reading_s >= READ_S or done >= IN_ORDER_BYTES:
            break
    return {
        "opening_a_tar_ms": 1e3 * statistics.median(opening_s),
        "in_order_mb_per_s": done / 1e6 / reading_s,
    }


def read_at_random(split: Split, threads: int) -> Facts:
    """Measures the speed of reading single images.

    Args:
        threads: as many as the loader uses.
    Returns:
        The rate in images/s, the median time of one read in ms, and the share of reads that were in
        the page cache.
    """
    tars = random.sample(range(len(split.shard_paths)), min(TARS, len(split.shard_paths)))
    candidates = np.flatnonzero(np.isin(split.shard, tars)).tolist()
    samples = random.sample(candidates, min(1024, len(candidates)))
    most_samples = max(1, AT_RANDOM_BYTES // int(split.size[samples].mean()))
    cached: list[bool] = []
    taken: list[float] = []
    with contextlib.ExitStack() as stack:
        files: dict[int, int] = {}
        ranges = []
        for sample in samples[:most_samples]:
            shard = int(split.shard[sample])
            if shard not in files:
                opened = stack.enter_context(split.shard_paths[shard].open("rb", buffering=0))
                files[shard] = opened.fileno()
                os.posix_fadvise(files[shard], 0, 0, os.POSIX_FADV_RANDOM)  # turns off read-ahead
            ranges.append((files[shard], int(split.offset[sample]), int(split.size[sample])))
            forget(*ranges[-1])

        def read(piece: tuple[int, int, int]) -> None:
            file, offset, size = piece
            start = time.perf_counter()
            if start - begun < READ_S:
                if (at_once := is_cached(file, offset)) is not None:
                    cached.append(at_once)
                os.pread(file, size, offset)
                taken.append(time.perf_counter() - start)

        begun = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, ranges))
        seconds = time.perf_counter() - begun
    return {
        "at_random_images_per_s": len(taken) / seconds,
        "one_at_random_ms": 1e3 * statistics.median(taken),
        "at_random_by_threads": threads,
        "of_that_in_page_cache": f"{statistics.mean(cached):.0%}" if cached else "unknown",
    }


def is_cached(file: int, offset: int) -> bool | None:
    """Returns whether a byte of a file is in the page cache; None if that cannot be found out."""
    try:
        return os.preadv(file, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError:
        return None


# --------------------------------------------------------------------------------------------------
# Training steps
# --------------------------------------------------------------------------------------------------


def on_own_gpu(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a process outside the launch that uses this process's GPU."""
    here = int(environ.get("LOCAL_RANK", "0"))
    visible = (environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(here + 1)))).split(
        ","
    )
    return launch.without_launcher(environ) | {
        "CUDA_VISIBLE_DEVICES": visible[min(here, len(visible) - 1)]
    }


def run_step(job: str, environ: Mapping[str, str]) -> Facts:
    """Measures speed and memory of updates with `benchmark.py`, in a process of its own.

    Args:
        job: a `StepJob` as JSON.
    Returns:
        The rate in images/s, the time of a step in ms and the peak of memory in GB; or `failed`
        with the reason; or `step` if the process did not end in time.
    """
    script = str(Path(__file__).with_name("benchmark.py"))
    command = [sys.executable, script, "measure", "step", job]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=STEP_S, env=dict(environ)
        )
    except subprocess.TimeoutExpired:
        return {"step": f"unknown (no answer in {STEP_S} s)"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": lines[-1][:300]}
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "step_images_per_s": found["images_per_s"],
        "step_ms": found["step_ms"],
        "step_peak_memory_gb": found["peak_gib"] * 2**30 / 1e9,
    }


def smaller_batch(plan: Plan) -> int:
    """Returns the largest micro-batch of at most half the size that divides a rank's batch.

    Returns 0 if there is none.
    """
    images = plan.micro_batch_size * plan.accumulation
    return max((n for n in range(1, plan.micro_batch_size // 2 + 1) if images % n == 0), default=0)
