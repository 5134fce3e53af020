"""Which layers of the blocks run a kernel of ours, and with which of its two tiles.

Each layer is timed on this GPU, forward and backward. The other contestant is PyTorch's code of the
layer, compiled as the run compiles it: cuDNN or cuBLAS convolves, Inductor's kernels do the rest.
"""

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain import compiling, fused_block, kernel_build, operators
from fasttrain.fused_block import Own, Spec
from fasttrain.model import InvertedResidual, use_kernels

GAIN = 1.05  # speed over PyTorch's code at which a kernel is used: less may be noise
LAUNCHES = 9  # that are timed of each contestant
CACHE_BYTES = 2**28  # more than a GPU's cache holds
TILES = (1, 2)  # of each kernel

Shape = tuple[int, int, int, int]


class Pass(NamedTuple):
    """One direction of a layer."""

    spec: Spec  # of its block
    layer: Literal["expand", "depthwise", "project"]
    x: Shape  # the layer's input
    weight: Shape
    gated: bool  # squeeze-excite changes the layer's sums or table
    backward: bool

    @property
    def key(self) -> tuple[Any, ...]:
        """What decides the duration."""
        spec = self.spec
        depends = {
            "expand": (spec.shortcut,),
            "depthwise": (spec.stride, spec.act, spec.expands, spec.gate_after),
            "project": (spec.act,),
        }
        return depends[self.layer], *self[1:]


def apply(network: nn.Module, chosen: Sequence[Sequence[int]] | None) -> None:
    """Sets what runs each pass, an `Own` for each block; None: a fixed rule decides."""
    for number, block in enumerate(_blocks(network)):
        block.spec = block.spec._replace(own=Own(*chosen[number]) if chosen else None)


def chosen_in(network: nn.Module) -> list[Own] | None:
    """What `apply` set."""
    found = [block.spec.own for block in _blocks(network)]
    return [own for own in found if own] or None


def candidates(network: nn.Module) -> list[nn.Module]:
    """Copies of a network in training mode, with kernels in all passes: one copy for each tile."""
    found = []
    for tile in TILES:
        copied = copy.deepcopy(network).train()
        use_kernels(copied, True, pointwise=True)
        apply(copied, with_kernels(copied, tile))
        found.append(copied)
    return found


def with_kernels(network: nn.Module, tile: int) -> list[Own]:
    """For each block, the tile in passes for which there is a kernel, and 0 in the others."""
    from fasttrain import pointwise_gpu  # imports Triton

    def of(layers: list[nn.Conv2d], backward: bool) -> int:
        return tile * all(pointwise_gpu.runs(layer.weight, backward) for layer in layers)

    found = []
    for block in _blocks(network):
        *expand, _, project = (m for m in block.modules() if isinstance(m, nn.Conv2d))
        expands = of(expand, False), of(expand, True)
        projects = of([project], False), of([project], True)
        found.append(Own(*(expands if expand else (0, 0)), *projects, tile, tile))
    return found


def fault(device: torch.device) -> str:
    """Launches a small kernel; returns why kernels do not run on a GPU, or "" if they do.

    Triton needs a C compiler, Python's headers, and a GPU that it supports.
    """
    try:
        from fasttrain.triton_parts import fold

        fold(torch.ones(1, 2, 8, device=device), 1)
        torch.cuda.synchronize(device)
    except Exception as error:  # the compiler, Triton and CUDA have no common exception
        return _said(error)
    return ""


def _said(error: Exception) -> str:
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {first}"


def choose(
    network: nn.Module,
    images: tuple[int, int],
    dtype: torch.dtype,
    options: dict[str, Any] | None,
) -> tuple[list[Own], str]:
    """Times the passes in which the blocks of a network use our kernels; equal ones once.

    Args:
        network: the first of `candidates`, on a GPU.
        images: their number and side.
        dtype: of images in blocks.
        options: the compiler's options; None: the run compiles nothing.
    Returns:
        For each block, the faster tile in passes where our kernel is faster than PyTorch's code,
        and 0 in the others. And a warning about trials that failed, or "".
    """
    device = next(network.parameters()).device
    known: dict[tuple[Any, ...], int] = {}
    faults: list[str] = []

    def best(each: Pass) -> int:
        if each.key not in known:
            ours, plain = _durations(each, device, dtype, options, faults)
            fastest = min(ours)
            wins = plain >= GAIN * fastest < math.inf
            known[each.key] = TILES[ours.index(fastest)] if wins else 0
            torch.compiler.reset()  # else further layers count as further sizes of this one
        return known[each.key]

    chosen = [Own(*[0] * len(Own._fields))] * len(_blocks(network))
    for number, block, side in kernel_build.blocks_of(network, images[1]):
        passes = _passes(block, images[0], side)
        assert block.spec.own
        chosen[number] = Own(
            *(best(each) if own else 0 for own, each in zip(block.spec.own, passes, strict=True))
        )
    warning = ""
    if faults:
        warning = (
            f"WARNING: {len(faults)} trials of {len(known)} passes through layers failed, the "
            f"first of them with {faults[0]}"
        )
    return chosen, warning


def _blocks(network: nn.Module) -> list[InvertedResidual]:
    return [layer for layer in network.modules() if isinstance(layer, InvertedResidual)]


def _passes(block: InvertedResidual, batch: int, side: int) -> Iterator[Pass]:
    """The passes of a block, in the order of `Own`.

    Args:
        side: of the block's input.
    """
    *expand, depthwise, project = (m for m in block.modules() if isinstance(m, nn.Conv2d))
    after = -(-side // block.spec.stride)
    gated = any(isinstance(layer, nn.Linear) for layer in block.modules())
    layers: tuple[tuple[Any, nn.Conv2d, int, bool], ...] = (
        ("expand", expand[0] if expand else depthwise, side, False),  # without expand: not used
        ("project", project, after, gated),
        ("depthwise", depthwise, side, gated),
    )
    for name, layer, px, changed in layers:
        filters, inner, height, width = layer.weight.shape
        x = batch, layer.in_channels, px, px
        for backward in (False, True):
            yield Pass(block.spec, name, x, (filters, inner, height, width), changed, backward)


def _durations(
    each: Pass,
    device: torch.device,
    dtype: torch.dtype,
    options: dict[str, Any] | None,
    faults: list[str],
) -> tuple[list[float], float]:
    """Seconds of a pass with each tile of our kernel, and with PyTorch's code."""
    function, arguments = _call(each, device, dtype)

    def contestant(own: int) -> Callable[[], object]:
        spec = each.spec._replace(pointwise_kernel=True, own=Own(*[own] * len(Own._fields)))
        call = partial(function, spec)
        # A kernel of ours has nothing beside it to compile. Only project's backward first makes the
        # gradient of its output.
        if options is not None and (own == 0 or (each.layer == "project" and each.backward)):
            call = compiling.compiled(call, options)
        return partial(call, *arguments)

    ours = list(map(contestant, TILES))
    if each.layer == "depthwise":
        # Compiling PyTorch's code takes seconds. It cannot win if its convolution alone is slower.
        *taken, bare = _seconds([*ours, _convolution(each, arguments)], device, faults)
        if bare >= GAIN * min(taken):
            return taken, bare
    *taken, plain = _seconds([*ours, contestant(0)], device, faults)
    return taken, plain


def _seconds(
    calls: Sequence[Callable[[], object]], device: torch.device, faults: list[str]
) -> list[float]:
    """The median durations of calls that take turns.

    Those of calls that fail are infinite, and their faults are added to `faults`.
    """
    launches: dict[int, Callable[[], object]] = {}
    for number, call in enumerate(calls):
        try:
            launches[number] = launch(call)
        except Exception as error:  # such as too little shared memory on this GPU
            faults.append(_said(error))
    rest = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)
    taken: dict[int, list[float]] = {number: [] for number in launches}
    for _ in range(LAUNCHES):
        for number, launched in launches.items():
            rest.zero_()  # the caches hold none of the arguments
            taken[number].append(duration(launched))
    return [
        statistics.median(taken[number]) if number in taken else math.inf
        for number in range(len(calls))
    ]


def _call(
    each: Pass, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[..., object], tuple[Any, ...]]:
    """The function of a pass, and its arguments after the first one, which is the spec."""
    batch, channels, height, width = each.x
    filters = each.weight[0]
    stride = each.spec.stride if each.layer == "depthwise" else 1

    def images(number: int, stride: int = 1) -> Tensor:
        shape = batch, number, -(-height // stride), -(-width // stride)
        found = torch.empty(shape, device=device, dtype=dtype)
        return found.to(memory_format=torch.channels_last).normal_()

    x = images(channels)
    weight = torch.randn(each.weight, device=device, dtype=dtype)
    table = None
    if each.layer == "project" or (each.layer == "depthwise" and each.spec.expands):
        rows = batch if each.layer == "project" and each.gated else 1
        table = torch.rand(rows, 4, channels, device=device)
    given = x, table, weight
    if each.layer == "depthwise" and not each.backward:
        return fused_block.depthwise, (*given, each.gated)
    if not each.backward:
        return fused_block.pointwise, given
    rows = batch if each.layer == "depthwise" and each.gated and not each.spec.gate_after else 1
    affine = torch.rand(rows, 3, filters, device=device)
    of_y = images(filters, stride), images(filters, stride), affine
    if each.layer == "depthwise":
        return fused_block.depthwise_backward, (of_y, given)
    skip = images(channels) if each.spec.shortcut and each.layer == "expand" else None
    return fused_block.pointwise_backward, (of_y, given, skip)


def _convolution(each: Pass, arguments: tuple[Any, ...]) -> Callable[[], object]:
    """The depthwise convolution of a pass alone, without BatchNorm, activation and sums."""
    x, _, weight = arguments[1] if each.backward else arguments[:3]
    stride, groups = each.spec.stride, len(weight)
    if each.backward:
        return partial(operators.conv_backward, arguments[0][0], x, weight, stride, groups)
    return partial(F.conv2d, x, weight, None, stride, weight.shape[2] // 2, 1, groups)


def launch(call: Callable[[], object]) -> Callable[[], object]:
    """A function that launches a call on a GPU. It replays a CUDA graph.

    The host needs more time to launch a small kernel than the kernel takes.
    """
    for _ in range(2):  # compiles and chooses kernels
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def duration(launched: Callable[[], object]) -> float:
    """Seconds that a GPU needs for what `launch` returned."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    launched()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
