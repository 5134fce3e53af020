"""Predicts a run on many devices from figures measured on few, or given.

update = max(compute + exchange, input)
compute     of a device's share of the batch, between the measured ones in proportion
exchange    of all gradients, not overlapped with the backward pass: in a ring within a node and
            then between the nodes, with two latencies for each doubling
input       of a node's images at its rate
"""

import itertools
import math
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

EVAL_SPEED = 3  # images of an evaluation for one of training: it has no backward pass
RECIPE_BATCH, RECIPE_LR = 1024, 0.4
POOR = 0.8  # of a device's best rate: below, its share of the batch is called too small


class Figures(NamedTuple):
    """What a prediction rests on."""

    step_s: dict[int, float]  # of an update on one device, by its images
    gradient_bytes: int
    per_node: int  # devices
    inside: float  # bytes/s between the devices of a node
    between: float  # bytes/s between nodes
    latency_s: float  # of one message
    input_rate: float | None = None  # images/s of a node


def compute_s(images: float, step_s: dict[int, float]) -> float:
    """Seconds of an update on `images` images; no less than the smallest batch measured."""
    sizes = sorted(step_s)
    if images >= sizes[-1]:
        return step_s[sizes[-1]] * images / sizes[-1]
    for low, high in itertools.pairwise(sizes):
        if low <= images <= high:
            part = (images - low) / (high - low)
            return step_s[low] + part * (step_s[high] - step_s[low])
    return step_s[sizes[0]]


def exchange_s(devices: int, figures: Figures) -> float:
    """Seconds of adding up all gradients, and BatchNorm's small statistics."""
    inside = min(devices, figures.per_node)
    nodes = math.ceil(devices / figures.per_node)

    def ring(members: int, speed: float, num_bytes: float) -> float:
        if members == 1:
            return 0.0
        latency = 2 * math.ceil(math.log2(members)) * figures.latency_s
        return 2 * latency + 2 * (members - 1) / members * num_bytes / speed

    # Between nodes, each device of a node has its own share of the gradients to exchange.
    return ring(inside, figures.inside, figures.gradient_bytes) + ring(
        nodes, figures.between, figures.gradient_bytes
    )


def predict(
    devices: int, batch: int, images: int, val_images: int, epochs: int, figures: Figures
) -> dict[str, Any]:
    """What a run comes to on so many devices, and what limits it."""
    share = batch / devices
    compute, exchange = compute_s(share, figures.step_s), exchange_s(devices, figures)
    nodes = math.ceil(devices / figures.per_node)
    waiting = batch / (nodes * figures.input_rate) if figures.input_rate else 0.0
    step = max(compute + exchange, waiting)
    best = max(size / seconds for size, seconds in figures.step_s.items())
    if waiting > compute + exchange:
        limit = "input"
    elif exchange > compute:
        limit = "exchange of gradients"
    elif share / compute < POOR * best:
        limit = "too few images a device"
    else:
        limit = "compute"
    epoch = images // batch * step + val_images / (EVAL_SPEED * batch / step)
    return {
        "devices": devices,
        "batch": batch,
        "lr": round(RECIPE_LR * batch / RECIPE_BATCH, 4),
        "images_a_device": round(share, 2),
        "step_ms": round(1e3 * step, 3),
        "exchange_ms": round(1e3 * exchange, 3),
        "images_per_s": round(batch / step),
        "efficiency": round(batch / step / (devices * best), 3),
        "epoch_s": round(epoch, 1),
        "run_h": round(epochs * epoch / 3600, 3),
        "limit": limit,
    }


def measure_links(num_bytes: int, device: str) -> tuple[float, float]:
    """Bytes/s and seconds of latency between two devices of this machine."""
    import torch

    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times"
        torch.multiprocessing.spawn(_exchange, (port, num_bytes, device, out), nprocs=2)
        small, large = (float(word) for word in out.read_text().split())
    latency = small / 4  # as `exchange_s` counts it
    return num_bytes / max(large - small, 1e-9), latency


def _exchange(rank: int, port: int, num_bytes: int, device: str, out: Path) -> None:
    import torch

    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    kind = "nccl" if device == "cuda" else "gloo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(kind, rank=rank, world_size=2)
    place = torch.device("cuda", rank) if device == "cuda" else torch.device("cpu")
    found = []
    for size in (1024, num_bytes):
        values = torch.zeros(size // 4, device=place)
        seconds = []
        for _ in range(30):
            start = time.perf_counter()
            torch.distributed.all_reduce(values)
            float(values[0])  # waits for the device
            seconds.append(time.perf_counter() - start)
        found.append(statistics.median(seconds[5:]))
    if rank == 0:
        out.write_text(" ".join(map(str, found)))
    torch.distributed.destroy_process_group()


def step_times(text: str) -> dict[int, float]:
    """`1024:60,128:9`: images and milliseconds of an update."""
    pairs = [part.split(":") for part in text.split(",")]
    return {int(images): float(ms) / 1e3 for images, ms in pairs}


def powers(largest: int) -> Sequence[int]:
    return [2**n for n in range(largest.bit_length())]


# --------------------------------------------------------------------------------------------------
# The picture
# --------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 420, 90, 60, 50, 30
COLOURS = ("#1f5fa8", "#c4572a", "#3a7d44", "#7a4f9a")
MARKS = {"compute": "full", "too few images a device": "open"}  # else a square: waits for others


def plot(rows: Sequence[dict[str, Any]], title: str) -> str:
    """An SVG of images/s over devices, a line for each global batch, both axes logarithmic."""
    devices = sorted({row["devices"] for row in rows})
    one = max(row["images_per_s"] / row["devices"] / row["efficiency"] for row in rows)
    ideal = [(n, n * one) for n in devices]
    rates = [rate for _, rate in ideal] + [row["images_per_s"] for row in rows]
    low, high = math.floor(math.log10(min(rates))), math.ceil(math.log10(max(rates)))

    def place(count: float, rate: float) -> tuple[float, float]:
        along = math.log2(count / devices[0]) / max(1e-9, math.log2(devices[-1] / devices[0]))
        up = (math.log10(rate) - low) / (high - low)
        return (
            round(LEFT + along * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP), 1),
        )

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{x}" y="{y}" {more}>{words}</text>'

    def line(points: Sequence[tuple[float, float]], style: str) -> str:
        joined = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
        return f'<polyline points="{joined}" fill="none" {style}/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        text(LEFT, 24, title, 'font-size="14"'),
        text((LEFT + WIDTH) / 2, HEIGHT - 14, "devices", 'text-anchor="middle"'),
        text(0, 0, "images/s", f'transform="translate(20 {HEIGHT / 2 + 20}) rotate(-90)"'),
    ]
    for power in range(low, high + 1):
        x, y = place(devices[0], 10**power)
        parts.append(f'<path d="M{x} {y}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(text(x - 8, y + 4, f"{10**power:,}", 'text-anchor="end"'))
    for count in devices:
        x, y = place(count, 10**low)
        parts.append(text(x, y + 20, f"{count}", 'text-anchor="middle"'))
    parts.append(line(ideal, 'stroke="#888" stroke-dasharray="5 4"'))
    parts.append(
        text(*place(*ideal[-1]), "ideal ", 'text-anchor="end" dy="-6" dx="-8" fill="#666"')
    )
    for number, batch in enumerate(sorted({row["batch"] for row in rows})):
        colour, own = COLOURS[number % len(COLOURS)], [r for r in rows if r["batch"] == batch]
        parts.append(line([(r["devices"], r["images_per_s"]) for r in own], f'stroke="{colour}"'))
        for row in own:
            x, y = place(row["devices"], row["images_per_s"])
            kind = MARKS.get(row["limit"])
            fill = colour if kind == "full" else "#fff"
            shape = f'<circle cx="{x}" cy="{y}" r="4"'
            if kind is None:
                shape = f'<rect x="{x - 4}" y="{y - 4}" width="8" height="8"'
            parts.append(f'{shape} fill="{fill}" stroke="{colour}"/>')
        parts.append(
            text(LEFT + 14, TOP + 18 + 18 * number, f"global batch {batch}", f'fill="{colour}"')
        )
    legend = "dot: compute limits; ring: too few images a device; square: links or input"
    parts.append(text(WIDTH - RIGHT, HEIGHT - BOTTOM - 12, legend, 'text-anchor="end"'))
    return "\n".join([*parts, "</svg>\n"])
