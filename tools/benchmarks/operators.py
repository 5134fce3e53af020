"""The operators of the fused kernels, layer by layer, beside the compiler and bare convolutions.

For the blocks of a network, in both directions:

    ours      the operator of fasttrain/operators.py: our kernel where there is one
    second    the same with its second tile, on a GPU
    compiled  the same PyTorch code, compiled: Inductor's kernels around those of cuDNN
    conv      the convolution alone, by cuDNN or cuBLAS: no BatchNorm, activation or sums

They take turns, launch by launch, on two sets of tensors, so that caches hold none of them. On a
GPU a launch replays a CUDA graph, as small kernels take less time than the host needs to launch
them. Times are medians. GB/s counts the images that the operator must read and write once; of_copy
is that over the speed of a copy. Layers of equal shape are measured once.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

from rich.table import Table

from benchmarks import own_process, plans
from benchmarks.layers import NUM_CLASSES, Layer, network_of
from benchmarks.options import amount, choose_device, words
from benchmarks.output import Line, for_people, machine, rounded, write
from benchmarks.own_process import Job, Result
from fasttrain.arguments import positive
from fasttrain.faults import ConfigError
from fasttrain.model import ARCHS, Arch

KINDS = ("depthwise", "project", "expand")
ACTS = {"none": 0, "relu": 1, "hardswish": 2}  # as in fasttrain/operators.py
SETS = 2  # of tensors, which launches use in turns
WARM_UP = 3  # launches that are not timed


class OperatorsJob(Job, frozen=True):
    """What one process measures."""

    arch: Arch
    width: float
    px: int
    batch: int
    precision: Literal["bf16", "fp16", "no"]
    kinds: list[str]  # among KINDS
    device: Literal["cuda", "cpu"]
    launches: int  # that are timed


class Case(NamedTuple):
    """One layer in one direction."""

    layer: Layer
    act: int  # applied as the layer's input is loaded
    per_image: bool  # scale and shift of the input differ from image to image
    normalised: bool  # a BatchNorm comes before the layer
    backward: bool


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


def add_arguments(part: argparse.ArgumentParser) -> None:
    """Declares the options of `benchmark.py operators`."""
    part.add_argument("--arch", choices=ARCHS, default="large", help="(default: %(default)s)")
    part.add_argument("--width", type=amount, default=1.0, metavar="W", help="(default: 1)")
    numbers = (("--crop-px", 224), ("--batch", 1024), ("--launches", 20))
    for name, number in numbers:
        part.add_argument(
            name, type=positive, default=number, metavar="N", help="(default: %(default)s)"
        )
    part.add_argument("--precision", choices=[*plans.SIZES], default="bf16")
    part.add_argument(
        "--kinds", type=lambda text: words(KINDS, text), default=[*KINDS], metavar="A,B",
        help="layers (default: depthwise,project,expand)",
    )  # fmt: skip
    part.add_argument("--device", choices=["cpu", "gpu"], help="(default: a GPU if there is one)")


def run(arguments: argparse.Namespace) -> None:
    """Measures in a process of its own, and prints a line for each layer and direction.

    Raises:
        ConfigError: the process failed.
    """
    gpu = choose_device(arguments.device) == "gpu"
    job = OperatorsJob(
        name="operators",
        arch=arguments.arch,
        width=arguments.width,
        px=arguments.crop_px,
        batch=arguments.batch,
        precision=arguments.precision,
        kinds=arguments.kinds,
        device="cuda" if gpu else "cpu",
        launches=arguments.launches,
    )
    found = own_process.measure(job, "operators")
    if "failed" in found:
        raise ConfigError(f"operators: {found['failed']}")
    rows, _ = found.pop("rows"), found.pop("peak_rss_gib", None)
    write(machine() | job.model_dump(exclude={"name", "kinds", "launches"}) | rounded(found))
    for row in rows:
        write(row)
    show(rows)


def show(rows: list[Line]) -> None:
    """Prints the layers as a table for people."""
    table = Table()
    heads = ("", "", "channels", "px", "ours, us", "second tile", "compiled", "conv", "GB/s")
    for head in (*heads, "of a copy", "ours over compiled", "over conv"):
        table.add_column(head)
    for row in rows:
        sizes = [" > ".join(map(str, row[key])) for key in ("channels", "px")]
        keys = ("ours_us", "second_us", "compiled_us", "conv_us", "gb_per_s", "of_copy")
        figures = [f"{row[key]:,.4g}" if row.get(key) else "" for key in keys]
        ratios = [
            f"{row[key] / row['ours_us']:.2f}" if row.get(key) and row.get("ours_us") else ""
            for key in ("compiled_us", "conv_us")
        ]
        what = f"{row['kind']} {row['kernel']}/{row['stride']}"
        table.add_row(what, row["direction"], *sizes, *figures, *ratios)
    console = for_people()
    console.print(table)
    for row in rows:
        if row.get("failed"):
            console.print(f"{row['kind']} {row['direction']} failed: {row['failed']}", markup=False)


# --------------------------------------------------------------------------------------------------
# In the process
# --------------------------------------------------------------------------------------------------


def measure(job: OperatorsJob) -> Result:
    """The speed of a copy, and the rows of all layers."""
    import torch

    from benchmarks import profiles

    torch.manual_seed(0)
    if job.device == "cuda":
        _compile_kernels(job)
    copied = profiles.copy_bandwidth(job.device)
    rows = [rounded(_row(case, job, copied)) for case in cases(job)]
    return {"copy_gb_per_s": copied / 1e9, "rows": rows}


def _compile_kernels(job: OperatorsJob) -> None:
    """Compiles our kernels side by side. One after the other they take minutes."""
    import torch

    from fasttrain import caches, kernel_build, layer_trials
    from fasttrain.model import build_model

    caches.keep_compiled()
    networks = layer_trials.candidates(build_model(job.arch, job.width, NUM_CLASSES, 0.2))
    dtype = _dtype(job)
    target = kernel_build.target_of(torch.device(job.device))
    kernel_build.build(networks, (job.batch, job.px), (dtype, dtype), target)


def _dtype(job: OperatorsJob) -> Any:
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[job.precision]


def cases(job: OperatorsJob) -> Iterator[Case]:
    """The layers of the blocks, forward and backward; those of equal shape once."""
    seen = set()
    before: Layer | None = None
    for layer in network_of(job.arch, job.width, job.px).layers:
        previous, before = before, layer
        if layer.kind not in job.kinds:
            continue
        # A block's first layer reads what the block before has already normalised.
        normalised = layer.kind == "project" or bool(previous and previous.kind == "expand")
        assert previous
        act = ACTS[previous.act] if normalised else 0
        per_image = layer.kind == "project" and previous.gate != "none"
        key = (layer.kind, layer.kernel, layer.stride, layer.inputs, layer.outputs, act, per_image)
        if key in seen:
            continue
        seen.add(key)
        for backward in (False, True):
            yield Case(layer, act, per_image, normalised, backward)


def _row(case: Case, job: OperatorsJob, copied: float) -> Line:
    layer = case.layer
    row: Line = {
        "layer": layer.name,
        "kind": layer.kind,
        "kernel": layer.kernel,
        "stride": layer.stride,
        "channels": [layer.inputs[0], layer.outputs[0]],
        "px": [layer.inputs[1], layer.outputs[1]],
        "direction": "backward" if case.backward else "forward",
    }
    try:
        row |= _times(case, job)
    except Exception as error:  # from a compiler or a kernel: the other layers are measured still
        text = (str(error).splitlines() or ["no message"])[0]
        return row | {"failed": f"{type(error).__name__}: {text}"}
    size = job.batch * (layer.read + layer.written) * plans.SIZES[job.precision]
    num_bytes = 2 * size if case.backward else size
    speed = num_bytes / (row["ours_us"] / 1e6)
    return row | {"gb_per_s": speed / 1e9, "of_copy": speed / copied}


def _times(case: Case, job: OperatorsJob) -> Line:
    """Median microseconds of each contestant."""
    sets = [_tensors(case, job) for _ in range(SETS)]
    contestants = {
        name: [_launch(job.device, call, tensors) for tensors in sets]
        for name, call in _contestants(case, compiled=job.device == "cuda").items()
    }
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(WARM_UP * SETS + job.launches):
        for name, launches in contestants.items():
            seconds = _seconds(job.device, launches[number % SETS])
            if number >= WARM_UP * SETS:
                taken[name].append(seconds)
    return {f"{name}_us": 1e6 * statistics.median(times) for name, times in taken.items()}


def _launch(
    device: str, call: Callable[..., object], tensors: dict[str, Any]
) -> Callable[[], object]:
    """A function that launches the call with these tensors. On a GPU it replays a graph."""
    from fasttrain import layer_trials

    run = partial(call, **tensors)
    return run if device == "cpu" else layer_trials.launch(run)


def _seconds(device: str, launch: Callable[[], object]) -> float:
    if device == "cuda":
        from fasttrain import layer_trials

        return layer_trials.duration(launch)
    begun = time.perf_counter()
    launch()
    return time.perf_counter() - begun


def _tensors(case: Case, job: OperatorsJob) -> dict[str, Any]:
    """The arguments of the layer's operator, random."""
    import torch
    from torch import Tensor

    dtype = _dtype(job)
    layer = case.layer
    rows = job.batch if case.per_image else 1

    def images(channels: int, side: int) -> Tensor:
        shape = (job.batch, channels, side, side)
        found = torch.empty(
            shape, device=job.device, dtype=dtype, memory_format=torch.channels_last
        )
        return found.normal_()

    channels, outputs = layer.inputs[0], layer.outputs[0]
    depthwise = layer.kind == "depthwise"
    inner = 1 if depthwise else channels
    weight = torch.randn(outputs, inner, layer.kernel, layer.kernel, device=job.device)
    found: dict[str, Any] = {
        "x": images(*layer.inputs),
        "table": torch.rand(rows, 4, channels, device=job.device) if case.normalised else None,
        "weight": weight.to(dtype),
        **({"stride": layer.stride} if depthwise else {}),
        "act": case.act,
    }
    if not case.backward:
        return found | ({"per_image": layer.gate != "none"} if depthwise else {})
    found["grad"], found["y"] = images(*layer.outputs), images(*layer.outputs)
    groups = job.batch if depthwise and layer.gate == "before" else 1
    found["affine"] = torch.rand(groups, 3, outputs, device=job.device)
    if not depthwise:
        found["skip"] = images(*layer.inputs) if layer.begins_shortcut else None
    return found


def _contestants(case: Case, compiled: bool) -> dict[str, Callable[..., object]]:
    import torch

    from fasttrain import operators

    name = "depthwise" if case.layer.kind == "depthwise" else "pointwise"
    name += "_backward" if case.backward else ""
    plain = getattr(operators, f"plain_{name}")
    ours = getattr(operators, name)
    found: dict[str, Callable[..., object]] = {"ours": ours}
    if compiled:
        found["second"] = partial(ours, tile=2)
        found["compiled"] = torch.compile(plain, dynamic=False)
    return found | {"conv": _conv_backward if case.backward else _conv}


def _conv(x: Any, weight: Any, stride: int = 1, **_: Any) -> object:
    from torch.nn import functional as F

    return F.conv2d(x, weight, None, stride, weight.shape[2] // 2, 1, _groups(weight, x))


def _conv_backward(x: Any, weight: Any, grad: Any, stride: int = 1, **_: Any) -> object:
    from fasttrain import operators

    return operators.conv_backward(grad, x, weight, stride, _groups(weight, x))


def _groups(weight: Any, x: Any) -> int:
    return int(x.shape[1]) if weight.shape[1] == 1 else 1
