"""Records functions as CUDA graphs: the host launches one graph instead of a thousand kernels."""

import contextlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor


class Recorder:
    """Runs functions without arguments as CUDA graphs. The first call of a function records it.

    A recording that fails leaves the process as it was: the current stream, the generator, the
    allocator and the tensors that the function changes.

    Source: CUDA graphs in PyTorch, pytorch.org/docs/stable/notes/cuda.html.
    """

    WARM_UPS = 3  # calls before recording, which choose and compile kernels and allocate memory

    def __init__(self, touched: Sequence[Tensor]) -> None:
        """
        Args:
            touched: the tensors that the functions change in place and that outlive them.
        """
        self.touched = touched
        self.graphs: dict[Hashable, Any] = {}
        # Warm-up and recording share a stream, so that the recording reuses the warm-up's memory.
        self.stream: Any = None
        self.pool: Any = None

    def __call__(self, key: Hashable, function: Callable[[], object]) -> None:
        """Runs `function` as a graph.

        Args:
            key: names the function and the shapes that it works on.
        """
        self.record(key, function)
        self.graphs[key].replay()

    def record(self, key: Hashable, function: Callable[[], object]) -> None:
        """Records `function` under `key`, unless that was done before. Its effects are undone.

        Meanwhile no other thread may call a CUDA function that a capture forbids. DALI does so: it
        synchronises the device when one of its tensors dies.

        Raises:
            Exception: what the function or CUDA raised.
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
        # Warming up changes weights and draws random numbers. Both are restored below.
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
                for tensor, original in zip(self.touched, kept, strict=True):
                    tensor.copy_(original)
            torch.cuda.set_rng_state(drawn)
            torch.cuda.synchronize()

    def _capture(self, function: Callable[[], object]) -> Any:
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`: it does not restore the stream if the end of a capture fails.
        with torch.cuda.stream(self.stream):
            # In this mode other threads may allocate meanwhile. In other modes that is an error.
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                function()
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
        return graph

    def _abandon(self, graph: Any) -> None:
        """Ends a capture that failed, and restores allocator and generator."""
        with contextlib.suppress(RuntimeError):  # the first error tells more
            graph.capture_end()
        device = torch.cuda.current_device()
        # If CUDA refused to end the capture, torch 2.11 still allocates from the pool. torch 2.14
        # does not, and its graph releases the pool. Releasing it twice would end the process.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device, self.pool)
            torch._C._cuda_releasePool(device, self.pool)
        self.pool = None  # the next recording takes a new pool
        # Otherwise torch 2.11 takes the generator as being recorded and refuses to seed it.
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())
