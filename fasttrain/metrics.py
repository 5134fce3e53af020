"""Sums on the device, their reduction over processes, and the clock of the throughput."""

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
        """`top1` and `top5` in percent, mean `loss`, and the number of images `seen`."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.sums)
        loss, top1, top5, seen = self.sums.tolist()
        return {
            "top1": 100 * top1 / seen,
            "top5": 100 * top5 / seen,
            "loss": loss / seen,
            "seen": int(seen),
        }


class Clock:
    """Images/s and the share of time that the training thread waited for data, between `lap`s.

    The first step of a process (allocation, warm-up of kernels) and whatever runs inside `paused`
    are not counted.
    """

    def __init__(self) -> None:
        self.started = False
        self.total_images, self.total_s = 0, 0.0
        self._reset()

    def _reset(self) -> None:
        self.start = time.perf_counter()
        self.images, self.wait_s, self.pause_s = 0, 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.wait_s += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.pause_s += time.perf_counter() - start

    def step(self, images: int) -> None:
        """An update on `images` images was issued."""
        if self.started:
            self.images += images
        else:
            self.started = True
            self._reset()

    def lap(self) -> tuple[float, float]:
        """Images/s and share of waiting since the last lap; call it once the device is done."""
        elapsed = max(time.perf_counter() - self.start - self.pause_s, 1e-9)
        rate, wait = self.images / elapsed, self.wait_s / elapsed
        self.total_images += self.images
        self.total_s += elapsed
        self._reset()
        return rate, min(wait, 1.0)
