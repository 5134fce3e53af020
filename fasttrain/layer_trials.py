"""Which 1 x 1 layers run a kernel of ours: each is timed on this GPU, forward and backward.

The other contestant is PyTorch's code of the layer, compiled as the run compiles it: cuBLAS makes
the product, Inductor's kernels make the rest.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttrain import compiling, fused_block, kernel_build
from fasttrain.fused_block import Own, Spec
from fasttrain.model import InvertedResidual

GAIN = 1.05  # speed over PyTorch's code at which a kernel is used: less may be noise
LAUNCHES = 9  # that are timed of each contestant
CACHE_BYTES = 2**28  # more than a GPU's cache holds

Images = tuple[int, int, int, int]  # a shape


class Pass(NamedTuple):
    """One direction of a layer."""

    spec: Spec  # of its block
    x: Images  # the layer's input
    filters: int
    project: bool  # else expand
    gated: bool  # each image has its own row of the table
    backward: bool

    @property
    def key(self) -> tuple[Any, ...]:
        """What decides the duration."""
        depends = self.spec.act if self.project else self.spec.shortcut
        return depends, *self[1:]


def apply(network: nn.Module, chosen: Sequence[Sequence[bool]] | None) -> None:
    """Sets the passes that use our kernels, an entry for each block; None: a fixed rule decides."""
    for number, block in enumerate(_blocks(network)):
        block.spec = block.spec._replace(own=Own(*chosen[number]) if chosen else None)


def chosen_in(network: nn.Module) -> list[Own] | None:
    """What `apply` set."""
    found = [block.spec.own for block in _blocks(network)]
    return [own for own in found if own] or None


def with_kernels(network: nn.Module) -> list[Own]:
    """The passes for which there is a kernel."""
    from fasttrain import pointwise_gpu  # imports Triton

    def both(weight: Tensor) -> list[bool]:
        return [pointwise_gpu.runs(weight, backward) for backward in (False, True)]

    found = []
    for block in _blocks(network):
        *expand, _, project = (m.weight for m in block.modules() if isinstance(m, nn.Conv2d))
        found.append(Own(*(both(expand[0]) if expand else [False] * 2), *both(project)))
    return found


def choose(
    network: nn.Module,
    images: tuple[int, int],
    dtype: torch.dtype,
    options: dict[str, Any] | None,
    say: Callable[[str], object],
) -> list[Own]:
    """Times the passes in which the blocks of a network use our kernels; equal ones once.

    Args:
        network: on a GPU, in training mode, after `model.use_kernels` and `apply`.
        images: their number and side.
        dtype: of images in blocks.
        options: the compiler's options; None: the run compiles nothing.
        say: prints a line about passes that failed. They use PyTorch's code.
    Returns:
        For each block, the passes in which our kernel is faster.
    """
    device = next(network.parameters()).device
    known: dict[tuple[Any, ...], bool] = {}
    faults: Counter[str] = Counter()

    def wins(each: Pass) -> bool:
        if each.key not in known:
            known[each.key] = False
            try:
                ours, plain = _seconds(each, device, dtype, options)
                known[each.key] = plain >= GAIN * ours
            except Exception as error:  # such as too little shared memory on this GPU
                first = (str(error).splitlines() or ["no message"])[0]
                faults[f"{type(error).__name__}: {first}"] += 1
            torch.compiler.reset()  # else further layers count as further sizes of this one
        return known[each.key]

    chosen = [Own(False, False, False, False)] * len(_blocks(network))
    for number, block, side in kernel_build.blocks_of(network, images[1]):
        passes = _passes(block, images[0], side)
        assert block.spec.own
        chosen[number] = Own(
            *(own and wins(each) for own, each in zip(block.spec.own, passes, strict=True))
        )
    for fault, number in faults.items():
        say(f"WARNING: {number} of {len(known)} passes of 1 x 1 layers could not be timed: {fault}")
    return chosen


def _blocks(network: nn.Module) -> list[InvertedResidual]:
    return [layer for layer in network.modules() if isinstance(layer, InvertedResidual)]


def _passes(block: InvertedResidual, batch: int, side: int) -> Iterator[Pass]:
    """The passes of a block, in the order of `Own`.

    Args:
        side: of the block's input.
    """
    convolutions = [layer for layer in block.modules() if isinstance(layer, nn.Conv2d)]
    after = -(-side // block.spec.stride)
    gated = any(isinstance(layer, nn.Linear) for layer in block.modules())
    for layer, px in ((convolutions[0], side), (convolutions[-1], after)):
        x = (batch, layer.in_channels, px, px)
        project = layer is convolutions[-1]
        for backward in (False, True):
            yield Pass(block.spec, x, layer.out_channels, project, project and gated, backward)


def _seconds(
    each: Pass, device: torch.device, dtype: torch.dtype, options: dict[str, Any] | None
) -> tuple[float, float]:
    """The median durations of a pass with our kernel, and with PyTorch's code."""
    function, arguments = _call(each, device, dtype)
    launches = []
    for own in (True, False):
        spec = each.spec._replace(pointwise_kernel=True, own=Own(own, own, own, own))
        call = partial(function, spec)
        call = call if options is None else compiling.compiled(call, options)
        launches.append(launch(partial(call, *arguments)))
    rest = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)
    taken: list[list[float]] = [[], []]
    for _ in range(LAUNCHES):
        for one, found in zip(launches, taken, strict=True):
            rest.zero_()  # the caches hold none of the arguments
            found.append(duration(one))
    ours, plain = map(statistics.median, taken)
    return ours, plain


def _call(
    each: Pass, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[..., object], tuple[Any, ...]]:
    """The function of a pass, and its arguments after the first one, which is the spec."""
    batch, channels, height, width = each.x

    def images(number: int) -> Tensor:
        found = torch.empty(batch, number, height, width, device=device, dtype=dtype)
        return found.to(memory_format=torch.channels_last).normal_()

    x = images(channels)
    weight = torch.randn(each.filters, channels, 1, 1, device=device, dtype=dtype)
    table = None
    if each.project:
        table = torch.rand(batch if each.gated else 1, 4, channels, device=device)
    if not each.backward:
        return fused_block.pointwise, (x, table, weight)
    affine = torch.rand(1, 3, each.filters, device=device)
    of_y = images(each.filters), images(each.filters), affine
    skip = images(channels) if each.spec.shortcut and not each.project else None
    return fused_block.pointwise_backward, (of_y, (x, table, weight), skip)


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
