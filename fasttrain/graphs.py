"""Functions recorded as CUDA graphs: the host then launches one thing instead of a thousand."""

import contextlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor


class Recorder:
    """Runs functions of no arguments on a CUDA device as graphs, recorded when first asked for.

    A recording that fails leaves the process as it was: its stream, generator, allocator and the
    tensors that the function changes.

    Source: CUDA graphs as PyTorch has them, pytorch.org/docs/stable/notes/cuda.html.
    """

    WARM_UPS = 3  # before recording: kernels are chosen and compiled, memory is found

    def __init__(self, touched: Sequence[Tensor]) -> None:
        """`touched` are the tensors that functions change in place and that outlive them."""
        self.touched = touched
        self.graphs: dict[Hashable, Any] = {}
        # One stream for warming up and recording, so that one takes over the other's memory.
        self.stream: Any = None
        self.pool: Any = None

    def __call__(self, key: Hashable, function: Callable[[], object]) -> None:
        """Runs `function`; `key` tells it from others, and its shapes from other shapes."""
        self.record(key, function)
        self.graphs[key].replay()

    def record(self, key: Hashable, function: Callable[[], object]) -> None:
        """Records `function` under `key` unless it is recorded already. Runs nothing for good.

        No other thread may call CUDA functions that a capture forbids meanwhile: DALI
        synchronises the device when one of its tensors dies.

        Raises:
            Exception: what the function raised, or CUDA said of it.
        """
        if key not in self.graphs:
            self.graphs[key] = self._recorded(function)

    def close(self) -> None:
        """Frees the graphs and their memory."""
        self.graphs.clear()
        self.pool = None

    def _recorded(self, function: Callable[[], object]) -> Any:
        self.stream = self.stream or torch.cuda.Stream()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        # Warming up changes weights and draws numbers; both are put back.
        drawn = torch.cuda.get_rng_state()
        kept = [tensor.clone() for tensor in self.touched]
        try:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(self.WARM_UPS):
                    function()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            return self._capture(function)
        finally:
            with torch.no_grad():
                for tensor, before in zip(self.touched, kept, strict=True):
                    tensor.copy_(before)
            torch.cuda.set_rng_state(drawn)
            torch.cuda.synchronize()

    def _capture(self, function: Callable[[], object]) -> Any:
        graph = torch.cuda.CUDAGraph()
        # `torch.cuda.graph` does not give the stream back where the end of a capture fails.
        with torch.cuda.stream(self.stream):
            # Other threads may allocate meanwhile, which another mode would call a fault.
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                function()
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
        return graph

    def _abandon(self, graph: Any) -> None:
        """Leaves a capture that failed."""
        with contextlib.suppress(RuntimeError):  # it says less than the first cause
            graph.capture_end()
        device = torch.cuda.current_device()
        # Where CUDA refused the end, torch 2.11 still allocates to the pool; 2.14 does not, and the
        # graph gives the pool back by itself. To give it back twice would end the process.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device, self.pool)
            torch._C._cuda_releasePool(device, self.pool)
        self.pool = None  # what it held is not reused
        # Else the generator counts as being recorded, and refuses to be seeded (torch 2.11).
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())
