"""A loader's own CUDA stream, and the handover of its batches to the stream that trains."""

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
    """Allocates at least `num_bytes` of pinned host memory, uint8.

    Raises:
        MemoryError: the system has no such memory left.
    """
    # PyTorch rounds up to the next power of two in any case: use all of it.
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
    """Synchronises a loader's thread with the thread that takes its batches, on the device.

    The taking thread never blocks: its CUDA stream waits for a batch on the device. The memory of a
    batch comes from the loader's stream, so `take` tells the allocator which stream uses it, too.
    When a batch dies, its memory is reused only after the work that this stream had at that time.
    So a batch may be kept for any time.

    The loader's thread does block: it makes a batch only once the device has finished with the
    batch that came `ahead` batches before. Otherwise, a host that launches updates faster than the
    device runs them would hold one batch in memory for each of them.

    While a graph is recorded under `capture_error_mode="thread_local"`, the loader's thread may
    allocate and wait. But `take` must not be called within the recording.

    On a CPU there is nothing to synchronise.
    """

    def __init__(self, device: torch.device, ahead: int) -> None:
        """
        Args:
            ahead: at least 2, because a batch counts as used only when the next one is taken.
        """
        self.device = device
        self.ahead = ahead
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.number = 0  # batches begun
        self.waited_s = 0.0  # time spent in `begin`
        # One event per batch, in order: that its work is done, and that its use is over.
        self.made: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.used: queue.SimpleQueue[Any] = queue.SimpleQueue()

    # Called by the loader's thread

    def begin(self, closed: threading.Event) -> bool:
        """Waits until one more batch may be made; returns False if `closed` was set meanwhile."""
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
        """A context in which this stream is the thread's current stream."""
        return torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext()

    def event(self) -> Any:
        """An event that occurs when this stream's work so far is done; None on a CPU."""
        return self._recorded(self.stream) if self.stream else None

    def finish(self) -> None:
        """Marks a batch as made: the stream holds all of its work."""
        self.made.put(self.event())

    def close(self) -> None:
        """Waits until the stream's work is done."""
        if self.stream:
            self.stream.synchronize()

    # Called by the thread that takes batches

    def take(self, tensors: Sequence[Tensor]) -> None:
        """Lets the current stream use the next batch. It waits on the device for the batch.

        Args:
            tensors: all tensors of the batch.
        """
        event = self.made.get_nowait()
        if event is None:
            return
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(stream)

    def give_back(self) -> None:
        """Marks the last batch as used: the current stream holds all work that needs it."""
        current = torch.cuda.current_stream(self.device) if self.stream else None
        self.used.put(self._recorded(current) if current else None)

    def _recorded(self, stream: Any) -> Any:
        # Blocking: a thread that waits sleeps instead of keeping a core busy.
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        return event
