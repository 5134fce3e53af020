"""The parts of the path of raw images to a GPU, each alone: gathering, the copy, the kernel.

Without a GPU only gathering is measured.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.own_process import Result
from benchmarks.pipelines import InputJob, endless, settings
from fasttrain import config, shards
from fasttrain.feed import Feed
from fasttrain.gather import Packer
from fasttrain.lane import pinned
from fasttrain.order import TrainingOrder
from fasttrain.sampling import Draw

WARM_UPS = 3
REPEATS = 20  # of the copy and of the kernel
TILES = ((16, 128, 4), (4, 128, 2))  # rows, values and warps to try instead of the kernel's own
# Equal to `resize_gpu.HEAD_BYTES`, whose import needs Triton. Without a GPU it stays unwritten.
HEAD_BYTES = 72


def measure(job: InputJob) -> Result:
    """Images/s and GB/s of gathering; milliseconds per batch of the copy and of the kernel.

    `gather_us_per_image` is the CPU time of the thread that drives the gathering, with its draws,
    most of it under the interpreter's lock. `gather_cores` is how many CPUs all threads keep busy.
    """
    split, data = shards.open_split(job.shards, "train"), settings(job)
    num_batches = max(job.images // job.batch, 4) + WARM_UPS
    feed = feed_of(job, split, data, num_batches)
    num_bytes, begun = 0, (0.0, 0.0, 0.0)
    for number in range(num_batches):
        if number == WARM_UPS:
            begun = clocks()
        draw, packed = feed(number)
        num_bytes += len(packed.buffer) if number >= WARM_UPS else 0
        if number + 1 < num_batches:
            feed.done(number)
    wall_s, thread_s, cpu_s = (end - start for end, start in zip(clocks(), begun, strict=True))
    images = (num_batches - WARM_UPS) * job.batch
    found = {
        "gather_images_per_s": images / wall_s,
        "gather_gb_per_s": num_bytes / wall_s / 1e9,
        "gather_us_per_image": 1e6 * thread_s / images,
        "gather_cores": cpu_s / wall_s,
        "kb_per_image": num_bytes / images / 1e3,
        "by_system": feed.reader.copy_ranges.by_system if isinstance(feed.reader, Packer) else None,
    }
    if job.gpu:
        found |= on_device(job, draw, packed.buffer, packed.starts, split)
    feed.close()
    return found


def clocks() -> tuple[float, float, float]:
    """Seconds of the clock, and CPU time of this thread and of this process."""
    return time.perf_counter(), time.thread_time(), time.process_time()


def feed_of(job: InputJob, split: shards.Split, data: config.Data, num_batches: int) -> Feed:
    """The reading of a run that gathers batches of raw images."""
    order = TrainingOrder(split, data, endless(job, split), rank=0)
    make_reader = partial(Packer, head_bytes=HEAD_BYTES, make=pinned if job.gpu else None)
    return Feed(order, range(num_batches), windows_only=True, make_reader=make_reader)


def on_device(
    job: InputJob, draw: Draw, buffer: Any, starts: Any, split: shards.Split
) -> dict[str, float]:
    """Median milliseconds of the copy and of the kernel for one batch, each alone on the device.

    Raises:
        RuntimeError: the kernel does not run here.
    """
    from fasttrain import resize_gpu

    assert resize_gpu.HEAD_BYTES == HEAD_BYTES
    device = torch.device(job.device)
    fault = resize_gpu.fault(device, False, job.half)
    if fault:
        raise RuntimeError(f"the kernel does not run: {fault}")
    head = resize_gpu.head_of(buffer, len(draw.ids))
    sizes = split.width[draw.ids], split.height[draw.ids]
    resize_gpu.write_head(head, draw, starts, sizes, split.label[draw.ids])
    here = torch.from_numpy(buffer)
    there = here.to(device)

    def copy() -> None:
        there.copy_(here, non_blocking=True)

    def resize() -> None:
        resize_gpu.resize(there, len(draw.ids), draw.out_px, False, job.half)

    found = {"copy_ms": device_ms(copy), "kernel_ms": device_ms(resize)}
    found["copy_gb_per_s"] = len(buffer) / max(found["copy_ms"], 1e-6) / 1e6
    for tile in TILES:
        resize_gpu.TILE_ROWS, resize_gpu.TILE_VALUES, resize_gpu.WARPS = tile
        found["kernel_{}x{}x{}_ms".format(*tile)] = device_ms(resize)
    return found


def device_ms(work: Callable[[], None]) -> float:
    """Median milliseconds of `work` on the device."""
    times = []
    for number in range(WARM_UPS + REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        if number >= WARM_UPS:
            times.append(start.elapsed_time(end))
    return statistics.median(times)
