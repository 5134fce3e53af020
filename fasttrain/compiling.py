"""torch.compile for updates and evaluations: the functions and the options."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain import config

Loss = Callable[[Tensor, Tensor], Tensor]  # images and labels, as `Updater.micro` takes; 0-d result

# Inductor stores a result in float32 if several kernels read it. One such result is BatchNorm's
# output in the backward of hard-swish. For Large at batch 1024 these are 18 of the 165 GB of an
# update (counted from Inductor's schedule, torch 2.14.1). With these thresholds, Inductor stores a
# result only if it has more reads or operations.
FUSE = {"realize_reads_threshold": 16, "realize_opcount_threshold": 200}
MAX_IMAGE_SIZES = 64  # in a run; each is compiled once


def compiler_options(mode: str) -> dict[str, Any] | None:
    """The compiler's options for a mode; None if the mode compiles nothing."""
    if "compile" not in mode:
        return None
    # With `fallback_random`, dropout draws the same numbers as in eager mode.
    return {"fallback_random": True, **(FUSE if "fuse" in mode else {})}


def loss_function(model: nn.Module, recipe: config.Recipe, options: dict[str, Any] | None) -> Loss:
    """The function that gives the mean cross-entropy of a batch (0-d).

    With a teacher, its labels are those of `distilling.join`, and the function gives the weighted
    sum of two cross-entropies. The second differs from the Kullback-Leibler divergence by the
    teacher's entropy, which has no gradient.

    Args:
        options: the compiler's options; None returns a function that is not compiled.

    Source of the second loss: Distilling the Knowledge in a Neural Network, arXiv:1503.02531.
    """
    smoothing, distill = recipe.train.label_smoothing, recipe.distill
    weight, temperature = distill.weight, distill.temperature

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels, label_smoothing=smoothing)

    def distilled_loss_of(images: Tensor, labels: Tensor) -> Tensor:
        logits = model(images).float()
        hard, soft = labels.chunk(2, 1)
        by_labels = F.cross_entropy(logits, hard, label_smoothing=smoothing)
        by_teacher = F.cross_entropy(logits / temperature, soft) * temperature**2
        return (1 - weight) * by_labels + weight * by_teacher

    chosen = distilled_loss_of if distill.on else loss_of
    return chosen if options is None else compiled(chosen, options)


def compiled(function: Any, options: dict[str, Any]) -> Any:
    """`function`, compiled anew at its first call with each image size."""
    from torch._dynamo import config as dynamo  # the import takes seconds

    # The default limit is 8 sizes. Further sizes would run eagerly without a warning.
    dynamo.recompile_limit = MAX_IMAGE_SIZES
    dynamo.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False, options=options)
