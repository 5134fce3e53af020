"""A CUDA stream of a loader's own, and the way of its batches to the stream that trains."""

import contextlib
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def pinned(num_bytes: int) -> NDArray[np.uint8]:
    """At least so many bytes of host memory that a GPU can read by itself.

    Raises:
        MemoryError: the system gives none.
    """
    # PyTorch takes the next power of two in any case.
    size = 1 << (num_bytes - 1).bit_length()
    try:
        memory: NDArray[np.uint8] = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    except RuntimeError as error:
        raise MemoryError(
            f"{size / 1e6:,.0f} MB of pinned memory for a batch of raw images: {error}; free some "
            "memory of this machine, or lower train.micro_batch_size"
        ) from error
    return memory


class Lane:
    """Orders a loader's thread and the thread that takes its batches, on the device.

    Neither waits for what it has begun. The thread that takes batches makes its own stream wait for
    them, on the device; its host thread goes on. Their memory comes from the loader's stream, so
    the allocator is told who else uses it: when a batch dies, its memory is reused only after what
    that stream had been given by then. So a batch may be kept for as long as one likes.

    The loader's thread does wait, for the device: it makes a batch only once the one `ahead` before
    it has been used up there. Without that, a host that launches updates faster than the device
    runs them would have a batch in memory for each of them.

    While a graph is recorded, under `capture_error_mode="thread_local"`, the loader's thread may
    allocate and wait all the same; but nothing may be taken within the recording.

    On a CPU there is nothing to order.
    """

    def __init__(self, device: torch.device, ahead: int) -> None:
        """`ahead` is at least 2: a batch counts as used once the next one is asked for."""
        self.device = device
        self.ahead = ahead
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.number = 0  # of batches begun
        self.waited_s = 0.0  # in `begin`
        self.made: queue.SimpleQueue[Any] = queue.SimpleQueue()  # events, one a batch, in order
        self.used: queue.SimpleQueue[Any] = queue.SimpleQueue()

    # The loader's thread

    def begin(self, closed: threading.Event) -> bool:
        """Waits until one more batch may be made; False if `closed` was set meanwhile."""
        begun = time.perf_counter()
        if self.number >= self.ahead:
            while True:
                with contextlib.suppress(queue.Empty):
                    event = self.used.get(timeout=0.1)
                    break
                if closed.is_set():
                    return False
            if event is not None:
                event.synchronize()
        self.number += 1
        self.waited_s += time.perf_counter() - begun
        return True

    def work(self) -> contextlib.AbstractContextManager[Any]:
        """Within it, the thread's current stream is this one."""
        return torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext()

    def event(self) -> Any:
        """Happens when all that this stream was given is done; None on a CPU."""
        return self._recorded(self.stream) if self.stream else None

    def finish(self) -> None:
        """All of a batch has been given to the stream."""
        self.made.put(self.event())

    def close(self) -> None:
        """Waits for the stream."""
        if self.stream:
            self.stream.synchronize()

    # The thread that takes batches

    def take(self, tensors: Sequence[Tensor]) -> None:
        """From here on, the current stream may use the tensors of the next batch."""
        event = self.made.get_nowait()
        if event is None:
            return
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(stream)

    def give_back(self) -> None:
        """All that uses the batch taken last has been given to the current stream."""
        current = torch.cuda.current_stream(self.device) if self.stream else None
        self.used.put(self._recorded(current) if current else None)

    def _recorded(self, stream: Any) -> Any:
        # Blocking: the thread that waits sleeps, where it would keep a core busy.
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        return event
