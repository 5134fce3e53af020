"""Sums of an evaluation on the device, and the clock that measures the throughput."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class EvalSums:
    """Sums of loss and hits over images. Only `result` waits for the device.

    Sums and counts are added over batches and ranks, so the result is exact for any distribution of
    the images. A mean of means would not be.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top1, top5, seen

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch: logits `(B, C)` of any float dtype, and labels int64 `(B,)`."""
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        seen = torch.full_like(loss, len(labels))
        self.sums += torch.stack([loss, hits[:, 0].sum(), hits.sum(), seen])

    def result(self) -> dict[str, Any]:
        """Reduces the sums over all ranks. Every rank must call this.

        Returns:
            `top1` and `top5` in percent, the mean `loss`, and `seen`, the number of images. Values
            have 6 decimals. The loss is None if it is not finite, because JSON has no such numbers.
        """
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.sums)
        loss, top1, top5, seen = self.sums.tolist()
        return {
            "top1": round(100 * top1 / seen, 6),
            "top5": round(100 * top5 / seen, 6),
            "loss": round(loss / seen, 6) if math.isfinite(loss) else None,
            "seen": int(seen),
        }


class Memory(NamedTuple):
    """Memory of a GPU and what all processes use of it; or of the machine and this process."""

    used_gib: float
    total_gib: float


def used_memory(device: torch.device) -> Memory:
    """The memory of a device. Does not wait for the device."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory((total - free) / 2**30, total / 2**30)
    pages = Path("/proc/self/statm").read_text().split()
    size = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * size
    return Memory(int(pages[1]) * size / 2**30, total / 2**30)


class Meter:
    """Measures time and energy from its creation on.

    A GPU since Volta counts its energy itself. NVML, which the driver brings, reads the counter.
    """

    def __init__(self, device: torch.device) -> None:
        self.begun = time.perf_counter()
        self.read = energy_counter(device)
        self.first = self.read() if self.read else 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self.begun

    def joules(self) -> float:
        """Energy of this process's GPU; 0 if it is not known."""
        return self.read() - self.first if self.read else 0.0


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """A function that reads the energy counter of a GPU in joules; None if there is none."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)

        def joules() -> float:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

        joules()
    except Exception:  # the package is missing, or the GPU or the container does not tell it
        return None
    return joules


class Clock:
    """Measures images/s, and the fraction of time that the device waited for data.

    The first step of a process (allocation, warm-up of kernels) and the time inside `paused` do not
    count. On a CPU, the device waits whenever the training thread does. On a GPU, earlier steps may
    still run meanwhile, so two events around each wait tell how long the GPU was idle.
    """

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.events: list[tuple[Any, Any, float]] = []  # begin, end, seconds of the host's wait
        self.start: float | None = None
        self.images, self.wait_s, self.pause_s = 0, 0.0, 0.0
        self.marks: dict[str, tuple[int, float, float]] = {}  # at the last lap of each name

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as a wait for data."""
        begin, start = self._event(), time.perf_counter()
        yield
        waited_s = time.perf_counter() - start
        if self.start is None:
            return
        if self.gpu:
            self.events.append((begin, self._event(), waited_s))
        else:
            self.wait_s += waited_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time inside."""
        start = time.perf_counter()
        yield
        self.pause_s += time.perf_counter() - start

    def step(self, images: int) -> None:
        """Counts an update on `images` images."""
        if self.start is None:
            self.start, self.pause_s = time.perf_counter(), 0.0
        else:
            self.images += images

    def lap(self, name: str) -> tuple[float, float]:
        """Returns images/s and the fraction of waiting since the last lap of this name.

        The first lap of a name counts from the start. With a GPU, the host waits until the latest
        batch has arrived there.
        """
        if self.events:
            self.events[-1][1].synchronize()  # else `elapsed_time` would fail
        for begin, end, waited_s in self.events:
            # The GPU's time from the end of all earlier work to the arrival of the batch. It also
            # contains delays of the host in queueing work, so it counts at most the host's wait.
            self.wait_s += min(begin.elapsed_time(end) / 1000, waited_s)
        self.events.clear()
        elapsed_s = time.perf_counter() - self.start - self.pause_s if self.start else 0.0
        now = self.images, elapsed_s, self.wait_s
        last = self.marks.get(name, (0, 0.0, 0.0))
        self.marks[name] = now
        images, seconds, wait_s = (a - b for a, b in zip(now, last, strict=True))
        seconds = max(seconds, 1e-9)
        return images / seconds, min(wait_s / seconds, 1.0)

    def mean(self) -> float:
        """Returns images/s since the start; 0 before the second update. Does not wait."""
        if self.start is None:
            return 0.0
        return self.images / max(time.perf_counter() - self.start - self.pause_s, 1e-9)

    def _event(self) -> Any:
        if not self.gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
