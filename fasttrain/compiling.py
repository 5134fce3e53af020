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


def loss_function(model: nn.Module, train: config.Train, options: dict[str, Any] | None) -> Loss:
    """The function that gives the mean cross-entropy of a batch (0-d).

    Args:
        options: the compiler's options; None returns a function that is not compiled.
    """

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels, label_smoothing=train.label_smoothing)

    return loss_of if options is None else compiled(loss_of, options)


def compiled(function: Any, options: dict[str, Any]) -> Any:
    """`function`, compiled anew at its first call with each image size."""
    from torch._dynamo import config as dynamo  # the import takes seconds

    # The default limit is 8 sizes. Further sizes would run eagerly without a warning.
    dynamo.recompile_limit = MAX_IMAGE_SIZES
    dynamo.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False, options=options)
