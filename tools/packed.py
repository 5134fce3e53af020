"""The parts of the way of raw images to a GPU, each alone: gathering, the copy, the kernel.

For `benchmark.py record`. Without a GPU only gathering is measured.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rivals import Job, endless, settings

from fasttrain import shards
from fasttrain.feed import Feed
from fasttrain.gather import Packer
from fasttrain.lane import pinned
from fasttrain.order import TrainingOrder
from fasttrain.sampling import Draw

WARM_UPS = 3
REPEATS = 20  # of the copy and of the kernel
TILES = ((16, 128, 4), (4, 128, 2))  # rows, values and warps of others than the kernel's own
# As `resize_gpu.HEAD_BYTES`, which needs Triton; without a GPU nothing is written there.
HEAD_BYTES = 72


def measure(job: Job) -> dict[str, Any]:
    """Images/s and GB/s of gathering; ms a batch of the copy and of the kernel.

    `gather_us_per_image` is the time on a CPU of the thread that drives it, draws included, most
    of it under the interpreter's lock; `gather_cores` are the CPUs that all threads keep busy.
    """
    split, data = shards.open_split(job.shards, "train"), settings(job)
    plan = endless(job, split)
    num_batches = max(job.images // job.batch, 4) + WARM_UPS
    make = pinned if job.gpu else None
    make_reader = partial(Packer, head_bytes=HEAD_BYTES, make=make)
    order = TrainingOrder(split, data, plan, rank=0)
    feed = Feed(order, range(num_batches), windows_only=True, make_reader=make_reader)
    num_bytes, begun = 0, (0.0, 0.0, 0.0)
    for number in range(num_batches):
        if number == WARM_UPS:
            begun = time.perf_counter(), time.thread_time(), time.process_time()
        draw, packed = feed(number)
        num_bytes += len(packed.buffer) if number >= WARM_UPS else 0
        if number + 1 < num_batches:
            feed.done(number)
    wall_s, thread_s, cpu_s = (
        clock() - start
        for clock, start in zip(
            (time.perf_counter, time.thread_time, time.process_time), begun, strict=True
        )
    )
    images = (num_batches - WARM_UPS) * job.batch
    found = {
        "gather_images_per_s": images / wall_s,
        "gather_gb_per_s": num_bytes / wall_s / 1e9,
        "gather_us_per_image": 1e6 * thread_s / images,
        "gather_cores": cpu_s / wall_s,
        "kb_per_image": num_bytes / images / 1e3,
        "by_system": feed.reader.move.by_system if isinstance(feed.reader, Packer) else None,
    }
    if job.gpu:
        found |= on_device(job, draw, packed.buffer, packed.starts, split)
    feed.close()
    return found


def on_device(
    job: Job, draw: Draw, buffer: Any, starts: Any, split: shards.Split
) -> dict[str, float]:
    """The copy and the kernel for one batch, each alone on the device; medians."""
    from fasttrain import resize_gpu

    assert resize_gpu.HEAD_BYTES == HEAD_BYTES
    device = torch.device(job.device)
    fault = resize_gpu.fault(device, False, job.half)
    if fault:
        raise RuntimeError(f"the kernel does not run: {fault}")
    head = resize_gpu.head_of(buffer, len(draw.ids))
    sizes = split.width[draw.ids], split.height[draw.ids]
    resize_gpu.describe(head, draw, starts, sizes, split.label[draw.ids])
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
    """Median time of `work` on the device."""
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
