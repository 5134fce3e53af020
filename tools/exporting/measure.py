"""Compares a written network with PyTorch's, and times both."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-4  # for logits up to 1; larger logits may differ in proportion
BATCHES = (1, 3)
WARM_UP, MEASURED_S, LEAST = 3, 1.0, 5

Logits = Callable[[Tensor], Tensor]


class Difference(NamedTuple):
    """How far logits are from PyTorch's on random images."""

    largest: float  # difference of one logit
    scale: float  # the largest logit of PyTorch

    @property
    def is_small(self) -> bool:
        """True if it is no more than rounding."""
        return self.largest <= TOLERANCE * max(1.0, self.scale)


@torch.no_grad()
def difference(expected: Logits, found: Logits, px: int) -> Difference:
    """Compares two networks on random images of `px` pixels, one and three at a time."""
    random = torch.Generator().manual_seed(0)
    largest, scale = 0.0, 0.0
    for size in BATCHES:
        images = torch.randn(size, 3, px, px, generator=random)
        logits = expected(images)
        largest = max(largest, float((found(images) - logits).abs().max()))
        scale = max(scale, float(logits.abs().max()))
    return Difference(largest, scale)


@torch.no_grad()
def latency_ms(network: Logits, px: int) -> float:
    """The median time for one image of `px` pixels, in milliseconds."""
    image = torch.randn(1, 3, px, px, generator=torch.Generator().manual_seed(0))
    for _ in range(WARM_UP):
        network(image)
    times: list[float] = []
    while len(times) < LEAST or sum(times) < MEASURED_S:
        begun = time.perf_counter()
        network(image)
        times.append(time.perf_counter() - begun)
    return 1000 * statistics.median(times)
