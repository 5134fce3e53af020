"""Computes a network's logits in evaluation: eagerly, compiled, or as a CUDA graph."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fasttrain.batch import Batch
from fasttrain.compiling import compiled
from fasttrain.learner import Learner

Run = Callable[[Any, Callable[[], object]], None]  # runs a function under a key
Record = Callable[[Batch, Tensor], None]  # gets a batch and its logits


class Mirrored(nn.Module):
    """Averages a network's logits for an image and for its mirror image, as test-time augmentation.

    The logits are averaged in float32, not the probabilities.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        """Maps images `(B, 3, S, S)` to logits float32 `(B, C)`."""
        logits: Tensor = self.module(images).float() + self.module(images.flip(3)).float()
        return logits / 2


class Evaluator:
    """Computes a network's logits in evaluation, in the same way as the updates.

    A batch of a shape that was rehearsed runs compiled, as a graph, or both. A batch of another
    shape runs eagerly: the last batch of an evaluation may be smaller.
    """

    def __init__(
        self,
        module: nn.Module,
        options: dict[str, Any] | None = None,
        run: Run | None = None,
        record: Record | None = None,
    ) -> None:
        """
        Args:
            options: the compiler's options; None compiles nothing.
            run: runs a function under a key, as a CUDA graph; None records nothing.
            record: an evaluation gives it each batch and its logits.
        """
        self.module = module
        self.record = record
        self.forward: Callable[[Tensor], Tensor] = module
        if options is not None:
            self.forward = compiled(lambda images: module(images), options)
        self.run = run
        self.plain = options is None and run is None
        self.rehearsed: dict[torch.Size, tuple[Tensor, Tensor]] = {}  # images and logits

    def __call__(self, images: Tensor) -> Tensor:
        """Maps images `(B, 3, S, S)` to logits `(B, C)`. The next call may overwrite the result."""
        if images.shape not in self.rehearsed:
            logits: Tensor = self.module(images)
            return logits
        if self.run is None:
            return self.forward(images)
        inputs, logits = self.rehearsed[images.shape]
        inputs.copy_(images, non_blocking=True)
        self.run((id(self), images.shape), lambda: logits.copy_(self.forward(inputs)))
        return logits

    @torch.no_grad()
    def rehearse(self, images: Tensor) -> None:
        """Compiles and records the forward pass for batches of this shape."""
        if self.plain or images.shape in self.rehearsed:
            return
        was_training, was_cached = self.module.training, torch.is_autocast_cache_enabled()
        self.module.eval()
        # A graph must contain the casts of the weights: autocast's cache would leave them out.
        torch.set_autocast_cache_enabled(False)
        try:
            logits = self.forward(images)
            self.rehearsed[images.shape] = images.clone(), torch.empty_like(logits)
            self(images)
        finally:
            torch.set_autocast_cache_enabled(was_cached)
            self.module.train(was_training)


def evaluators_of(
    learner: Learner, options: dict[str, Any] | None, run: Run | None
) -> list[Evaluator]:
    """Evaluators for the network and, if there is one, for its moving average."""
    modules = [learner.module, *([learner.ema.module] if learner.ema else [])]
    return [Evaluator(module, options, run) for module in modules]


def rehearse_all(
    accelerator: Accelerator, evaluators: Sequence[Evaluator], batches: Sequence[Tensor]
) -> None:
    """Rehearses each evaluator for batches of these shapes, under the accelerator's autocast."""
    for evaluator in evaluators:
        for images in batches:
            with accelerator.autocast():
                evaluator.rehearse(images)
