"""Compiles the Triton kernels of the fused blocks before training, in several processes.

Triton compiles a kernel at its first launch, one kernel after the other: Large has some 50, which
take minutes. Here processes compile them side by side into Triton's cache on disk. They need no
GPU: the operators run on tensors without data, and a stand-in for Triton's driver says which GPU to
compile for, and launches nothing.

`python -m fasttrain.kernel_build` is such a process. It reads its task from stdin.
"""

import copy
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain import fused_block
from fasttrain.digests import code_digest
from fasttrain.model import InvertedResidual

SOURCES = ("depthwise_gpu", "pointwise_gpu", "triton_parts", "operators", "fused_block")  # modules
WORKERS = 8  # processes at most; each needs 0.7 GB of memory
# Name of an operator, then its arguments. A tensor is {"shape": [...], "dtype": "bfloat16"}.
Call = list[Any]


class Target(NamedTuple):
    """The GPU to compile for."""

    capability: int  # 90 for compute capability 9.0
    processors: int  # multiprocessors: how the work is cut depends on their number


def target_of(device: torch.device) -> Target:
    """The GPU of this machine."""
    properties = torch.cuda.get_device_properties(device)
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)


# --------------------------------------------------------------------------------------------------
# What to compile
# --------------------------------------------------------------------------------------------------


def calls_of(
    network: nn.Module, images: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]
) -> list[Call]:
    """The operators that an update calls, the slowest to compile first.

    Args:
        network: after `model.use_kernels`, in training mode.
        images: their number and side.
        dtypes: of images in blocks, and of the convolutions' weights.
    """
    seen: dict[str, Call] = {}
    for _, block, side in blocks_of(network, images[1]):
        for call in _calls_of_block(block, images[0], side, dtypes):
            seen[json.dumps(call)] = call
    return sorted(seen.values(), key=_cost, reverse=True)


def blocks_of(network: nn.Module, px: int) -> Iterator[tuple[int, InvertedResidual, int]]:
    """The number of each block that trains by kernels, the block, and the side of its input.

    Args:
        px: side of the images.
    """
    side = -(-px // 2)  # after the stem
    blocks = [layer for layer in network.modules() if isinstance(layer, InvertedResidual)]
    for number, block in enumerate(blocks):
        if block.kernels and block.training:
            yield number, block, side
        side = -(-side // block.spec.stride)


def _calls_of_block(
    block: InvertedResidual, batch: int, side: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> list[Call]:
    bare = copy.deepcopy(block).to("meta")
    convolutions = [layer for layer in bare.modules() if isinstance(layer, nn.Conv2d)]
    for convolution in convolutions:
        convolution.to(dtypes[1])
    channels = block.hidden if not block.spec.expands else convolutions[0].in_channels
    z = torch.empty(batch, side, side, channels, dtype=dtypes[0], device="meta")
    with _Recorder() as recorder:
        out = fused_block.run(bare.spec, bare._layers(), z.permute(0, 3, 1, 2).requires_grad_())
        out.backward(torch.empty_like(out))
    return recorder.calls


class _Recorder(TorchDispatchMode):
    """Keeps the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        space, _, name = function.name().partition("::")
        if space == "fasttrain":
            self.calls.append([name, *map(_described, args)])
        return function(*args, **(kwargs or {}))


def _described(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return {"shape": list(argument.shape), "dtype": str(argument.dtype).removeprefix("torch.")}
    return argument


def _cost(call: Call) -> int:
    """Taps of the kernel; the backward pass takes longer."""
    sides = [a["shape"][-1] for a in call if isinstance(a, dict) and len(a["shape"]) == 4]
    return 4 * min(sides) ** 2 + ("backward" in call[0])


# --------------------------------------------------------------------------------------------------
# Compiling
# --------------------------------------------------------------------------------------------------


def build(
    networks: Sequence[nn.Module],
    images: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    target: Target,
) -> None:
    """Compiles the kernels of networks into `TRITON_CACHE_DIR`, unless that was done before.

    A kernel that fails to compile will fail again at its first launch, which says why.

    Args:
        networks: each as `calls_of` takes it.
        images, dtypes: as `calls_of` takes them.
    """
    import triton

    facts: list[Any] = [images, list(map(str, dtypes)), target]
    for network in networks:
        specs = [(number, block.spec) for number, block, _ in blocks_of(network, images[1])]
        facts += [str(network), specs]
    text = json.dumps([triton.__version__, code_digest(modules=SOURCES), *facts])
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    done = folder / f"fasttrain-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if done.exists():
        return
    calls = {str(call): call for network in networks for call in calls_of(network, images, dtypes)}
    slowest_first = sorted(calls.values(), key=_cost, reverse=True)
    if compile_side_by_side(slowest_first, target):
        folder.mkdir(parents=True, exist_ok=True)
        done.touch()


def compile_side_by_side(calls: list[Call], target: Target) -> bool:
    """Compiles the kernels of calls in several processes. Returns False if one of them failed."""
    number = min(WORKERS, len(os.sched_getaffinity(0)), len(calls))
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "fasttrain.kernel_build"],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": _python_path(), "CUDA_VISIBLE_DEVICES": ""},
        )
        for _ in range(number)
    ]
    for first, worker in enumerate(workers):
        assert worker.stdin
        json.dump([target, calls[first::number]], worker.stdin)
        worker.stdin.close()
    codes = [worker.wait() for worker in workers]
    return not any(codes)


def _python_path() -> str:
    """The folder of this package first, as it may not be installed."""
    return os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])


class _Driver:
    """Stands in for Triton's driver of a GPU."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", target.capability, 32)

    def get_current_target(self) -> Any:
        """The GPU to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """The device under which Triton keeps the kernel."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Not used, as nothing is launched."""
        return 0


def compile_calls(calls: Iterable[Call], target: Target) -> None:
    """Compiles the kernels of calls in this process, which cannot launch kernels afterwards."""
    from triton.runtime import driver, jit

    from fasttrain import depthwise_gpu, pointwise_gpu

    def compile_only(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            kernel.run(*args, grid=grid, warmup=True, **kwargs)

        return launch

    driver.set_active(_Driver(target))
    jit.KernelInterface.__getitem__ = compile_only
    for module in (depthwise_gpu, pointwise_gpu):
        module.processors = lambda device: target.processors  # type: ignore[attr-defined]
    pointwise_gpu.capability_of = lambda x: target.capability // 10
    for name, *arguments in calls:
        module = depthwise_gpu if name.startswith("depthwise") else pointwise_gpu
        getattr(module, name)(*map(_made, arguments))


def _made(argument: Any) -> Any:
    """The argument that `_described` described; a tensor has no data."""
    if not isinstance(argument, dict):
        return argument
    shape, dtype = argument["shape"], getattr(torch, argument["dtype"])
    images = len(shape) == 4
    return torch.empty(
        shape,
        dtype=dtype,
        device="meta",
        memory_format=torch.channels_last if images else torch.contiguous_format,
    )


if __name__ == "__main__":
    target_, calls_ = json.load(sys.stdin)
    compile_calls(calls_, Target(*target_))
