"""Sums on the device, their reduction over processes, and the clock of the throughput."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class EvalSums:
    """Sums of loss and hits over images; only `result` waits for the device.

    Sums and counts are added over batches and processes, so the result is exact however the images
    were dealt. Means of means would not be.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top1, top5, seen

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Takes in logits float `(B, C)` and labels int64 `(B,)`."""
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        seen = torch.full_like(loss, len(labels))
        self.sums += torch.stack([loss, hits[:, 0].sum(), hits.sum(), seen])

    def result(self) -> dict[str, Any]:
        """`top1` and `top5` in percent, mean `loss`, and the number of images `seen`.

        They are rounded to 6 digits after the point. The loss is None where it is not finite, as
        JSON has no such numbers.
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


class Clock:
    """Images/s, and the share of time that the device waited for data, between `lap`s.

    The first step of a process (allocation, warm-up of kernels) and whatever runs inside `paused`
    are not counted. On a CPU the training thread's wait is the device's. On a GPU it is not, while
    earlier steps still run there: two events around each wait tell how long the GPU stood still.
    """

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.events: list[tuple[Any, Any, float]] = []  # before, after, seconds of the host's wait
        self.start: float | None = None
        self.images, self.wait_s, self.pause_s = 0, 0.0, 0.0
        self.marks: dict[str, tuple[int, float, float]] = {}  # of the last lap of each name

    @contextmanager
    def waiting(self) -> Iterator[None]:
        before, start = self._event(), time.perf_counter()
        yield
        waited_s = time.perf_counter() - start
        if self.start is None:
            return
        if self.gpu:
            self.events.append((before, self._event(), waited_s))
        else:
            self.wait_s += waited_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.pause_s += time.perf_counter() - start

    def step(self, images: int) -> None:
        """An update on `images` images was issued."""
        if self.start is None:
            self.start, self.pause_s = time.perf_counter(), 0.0
        else:
            self.images += images

    def lap(self, name: str) -> tuple[float, float]:
        """Images/s and share of waiting since the last lap of this name, or since the start.

        On a GPU the host waits for the arrival of the latest batch there.
        """
        if self.events:
            self.events[-1][1].synchronize()  # or their times could not be told
        for before, after, waited_s in self.events:
            # From the end of all earlier work to the arrival of the batch, as the GPU saw it; the
            # host's own slowness in queueing work is not the input's.
            self.wait_s += min(before.elapsed_time(after) / 1000, waited_s)
        self.events.clear()
        elapsed_s = time.perf_counter() - self.start - self.pause_s if self.start else 0.0
        now = self.images, elapsed_s, self.wait_s
        last = self.marks.get(name, (0, 0.0, 0.0))
        self.marks[name] = now
        images, seconds, wait_s = (a - b for a, b in zip(now, last, strict=True))
        seconds = max(seconds, 1e-9)
        return images / seconds, min(wait_s / seconds, 1.0)

    def mean(self) -> float:
        """Images/s since the start; 0 before the second update. Waits for nothing."""
        if self.start is None:
            return 0.0
        return self.images / max(time.perf_counter() - self.start - self.pause_s, 1e-9)

    def _event(self) -> Any:
        if not self.gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
