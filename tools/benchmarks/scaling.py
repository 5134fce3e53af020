"""Predicts runs on 1 to 512 devices, and what limits them, from figures measured here or given.

The time of an update is max(compute + exchange, input):

compute     a device's share of the batch, interpolated between the measured sizes
exchange    all gradients in a ring within a node and then between the nodes, with two latencies for
            each doubling. It does not overlap with the backward pass
input       the images of a node at its input's rate

The learning rate of a larger batch follows the linear rule.
"""

import argparse
import itertools
import math
import os
import socket
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import probes

from benchmarks import own_process, step
from benchmarks.options import amount, counts
from benchmarks.output import machine, write
from fasttrain.arguments import positive

EVAL_SPEED = 3  # over training's, because an evaluation has no backward pass
RECIPE_BATCH, RECIPE_LR = 1024, 0.4
POOR = 0.8  # of a device's best speed; a slower device is said to have too few images


class Figures(NamedTuple):
    """The figures from which a prediction is computed."""

    step_s: dict[int, float]  # seconds of an update on one device, by its images
    gradient_bytes: int
    per_node: int  # devices
    inside: float  # bytes/s between the devices of a node
    between: float  # bytes/s between nodes
    latency_s: float  # of one message
    input_rate: float | None = None  # images/s of a node


class Training(NamedTuple):
    """The length of the run to predict."""

    images: int  # for training
    val_images: int
    epochs: int


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


def add_arguments(part: argparse.ArgumentParser) -> None:
    """Declares the options of `benchmark.py scaling`."""
    step.add_arguments(part)
    part.set_defaults(batch=[1024, 4096], repeats=1)
    part.add_argument(
        "--step-ms",
        type=step_times,
        metavar="IMAGES:MS,...",
        help="milliseconds of an update on one device (default: measured here)",
    )
    numbers = (
        ("--per-node", positive, 8, "devices in a node"),
        ("--inside", amount, 0.0, "GB/s between them (default: measured here, with --latency)"),
        ("--between", amount, 12.5, "GB/s between nodes"),
        ("--latency", amount, 20.0, "microseconds of a message"),
        ("--input-rate", amount, None, "images/s of a node's input, from `benchmark.py input`"),
        ("--images", positive, 1_281_167, "training images"),
        ("--val-images", positive, 50_000, "validation images"),
        ("--epochs", positive, 150, "of the run"),
    )
    for name, kind, default, text in numbers:
        text += "" if default is None or name == "--inside" else " (default: %(default)s)"
        part.add_argument(name, type=kind, default=default, metavar="N", help=text)
    part.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw images/s over devices")
    part.add_argument(
        "--gradients",
        choices=["fp32", "bf16"],
        default="fp32",
        help="precision of the all-reduce (default: fp32)",
    )
    part.add_argument(
        "--devices",
        type=counts,
        default=powers(512),
        metavar="N,...",
        help="(default: powers of 2 to 512)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints the figures, then a line for each number of devices and batch; draws them.

    Raises:
        ConfigError: wrong options, or matplotlib is missing.
    """
    if arguments.plot:
        from benchmarks import plot

        plot.check(arguments.plot)
    step.settle(arguments)
    figures = figures_of(arguments)
    write({**machine(), **figures._asdict()})
    training = Training(arguments.images, arguments.val_images, arguments.epochs)
    rows = [
        predict(devices, batch, training, figures)
        for batch, devices in itertools.product(arguments.batch, arguments.devices)
        if devices <= batch
    ]
    for row in rows:
        write(row)
    if arguments.plot:
        name = f"MobileNetV3-{arguments.arch.capitalize()} {arguments.width:g}"
        plot.draw(rows, f"{name}, {arguments.crop_px} px, predicted", arguments.plot)


def figures_of(arguments: argparse.Namespace) -> Figures:
    """The figures that the command line gives, and measurements for the others."""
    from fasttrain.model import build_model

    network = build_model(arguments.arch, arguments.width, 1000, 0.0)
    size = 2 if arguments.gradients == "bf16" else 4
    num_bytes = size * sum(p.numel() for p in network.parameters())
    step_s = arguments.step_ms or measured_steps(arguments)
    inside, latency = arguments.inside * 1e9, arguments.latency / 1e6
    if not inside:
        device = "cuda" if arguments.device == "gpu" else "cpu"
        inside, latency = measure_links(num_bytes, device)
    return Figures(
        step_s=step_s,
        gradient_bytes=num_bytes,
        per_node=arguments.per_node,
        inside=inside,
        between=arguments.between * 1e9,
        latency_s=latency,
        input_rate=arguments.input_rate,
    )


def measured_steps(arguments: argparse.Namespace) -> dict[int, float]:
    """Seconds of an update on one device by its images: medians of the fastest mode."""
    largest = 1024 if arguments.device == "gpu" else 64
    sizes = [size for size in powers(largest) if size >= (8 if largest > 64 else 4)]
    options = argparse.Namespace(**vars(arguments) | {"batch": sizes, "part": "scaling"})
    found: dict[int, float] = {}
    for job in step.jobs_of(options):
        turns = [own_process.measure(job, "step") for _ in range(arguments.repeats)]
        if not any("failed" in turn for turn in turns):
            seconds = statistics.median(turn["step_ms"] for turn in turns) / 1e3
            found[job.batch] = min(seconds, found.get(job.batch, seconds))
    return found


def step_times(text: str) -> dict[int, float]:
    """`1024:60,128:9`, images and milliseconds of an update, as seconds by images."""
    pairs = [part.split(":") for part in text.split(",")]
    return {int(images): float(ms) / 1e3 for images, ms in pairs}


def powers(largest: int) -> Sequence[int]:
    """The powers of two from 1 to `largest`."""
    return [2**n for n in range(largest.bit_length())]


# --------------------------------------------------------------------------------------------------
# The prediction
# --------------------------------------------------------------------------------------------------


def compute_s(images: float, step_s: dict[int, float]) -> float:
    """Seconds of an update on `images` images, at least those of the smallest measured batch."""
    sizes = sorted(step_s)
    if images >= sizes[-1]:
        return step_s[sizes[-1]] * images / sizes[-1]
    for low, high in itertools.pairwise(sizes):
        if low <= images <= high:
            part = (images - low) / (high - low)
            return step_s[low] + part * (step_s[high] - step_s[low])
    return step_s[sizes[0]]


def exchange_s(devices: int, figures: Figures) -> float:
    """Seconds of the all-reduce of all gradients and of BatchNorm's small statistics."""
    inside = min(devices, figures.per_node)
    nodes = math.ceil(devices / figures.per_node)

    def ring(members: int, speed: float, num_bytes: float) -> float:
        if members == 1:
            return 0.0
        latency = 2 * math.ceil(math.log2(members)) * figures.latency_s
        return 2 * latency + 2 * (members - 1) / members * num_bytes / speed

    # Between nodes, each device of a node exchanges its own share of the gradients.
    return ring(inside, figures.inside, figures.gradient_bytes) + ring(
        nodes, figures.between, figures.gradient_bytes
    )


def predict(devices: int, batch: int, training: Training, figures: Figures) -> dict[str, Any]:
    """The speed and duration of a run on this number of devices, and what limits it."""
    share = batch / devices
    compute, exchange = compute_s(share, figures.step_s), exchange_s(devices, figures)
    nodes = math.ceil(devices / figures.per_node)
    waiting = batch / (nodes * figures.input_rate) if figures.input_rate else 0.0
    step_s = max(compute + exchange, waiting)
    best = max(size / seconds for size, seconds in figures.step_s.items())
    if waiting > compute + exchange:
        limit = "input"
    elif exchange > compute:
        limit = "exchange of gradients"
    elif share / compute < POOR * best:
        limit = "too few images a device"
    else:
        limit = "compute"
    evaluation = training.val_images / (EVAL_SPEED * batch / step_s)
    epoch = training.images // batch * step_s + evaluation
    return {
        "devices": devices,
        "batch": batch,
        "lr": round(RECIPE_LR * batch / RECIPE_BATCH, 4),
        "images_a_device": round(share, 2),
        "step_ms": round(1e3 * step_s, 3),
        "exchange_ms": round(1e3 * exchange, 3),
        "images_per_s": round(batch / step_s),
        "efficiency": round(batch / step_s / (devices * best), 3),
        "epoch_s": round(epoch, 1),
        "run_h": round(training.epochs * epoch / 3600, 3),
        "limit": limit,
    }


# --------------------------------------------------------------------------------------------------
# Links
# --------------------------------------------------------------------------------------------------


def measure_links(num_bytes: int, device: str) -> tuple[float, float]:
    """Bytes/s of an all-reduce between two devices of this machine, and its latency in seconds."""
    import torch

    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times"
        torch.multiprocessing.spawn(_exchange, (port, num_bytes, device, out), nprocs=2)
        small, large = (float(word) for word in out.read_text().split())
    latency = small / 4  # `exchange_s` counts four latencies for two devices
    return num_bytes / max(large - small, 1e-9), latency


def _exchange(rank: int, port: int, num_bytes: int, device: str, out: Path) -> None:
    """Times all-reduces as one of two processes; rank 0 writes the seconds of both sizes."""
    import torch

    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    kind = "nccl" if device == "cuda" else "gloo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(kind, rank=rank, world_size=2)
    own = torch.device("cuda", rank) if device == "cuda" else torch.device("cpu")
    found = [probes.all_reduce_s(size // 4, own, times=25) for size in (1024, num_bytes)]
    if rank == 0:
        out.write_text(" ".join(map(str, found)))
    torch.distributed.destroy_process_group()
