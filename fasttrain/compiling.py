"""What torch.compile compiles for updates and evaluations, and with which options."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain import config

Loss = Callable[[Tensor, Tensor], Tensor]  # of images (B, 3, S, S) and labels, as `Updater.micro`

# Inductor writes a result that several kernels read, BatchNorm's output in the backward of
# hard-swish among them, in float32: 18 of 165 GB an update of Large at batch 1024 (counted from its
# schedule, torch 2.14.1). Above these numbers of reads and operations it does so only later.
FUSE = {"realize_reads_threshold": 16, "realize_opcount_threshold": 200}
MOST_SIZES = 64  # of images in a run, each compiled once


def compiler_options(mode: str) -> dict[str, Any] | None:
    """The compiler's options for a mode; None where it compiles nothing."""
    if "compile" not in mode:
        return None
    # Dropout is drawn as eager draws it.
    return {"fallback_random": True, **(FUSE if "fuse" in mode else {})}


def loss_function(model: nn.Module, train: config.Train, options: dict[str, Any] | None) -> Loss:
    """Mean cross-entropy of a batch; compiled, if there are options, for each size of image."""

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels, label_smoothing=train.label_smoothing)

    return loss_of if options is None else compiled(loss_of, options)


def compiled(function: Any, options: dict[str, Any]) -> Any:
    """The function compiled, once for each size of image, at its first call with that size."""
    from torch._dynamo import config as dynamo  # takes seconds

    # Beyond its limit, 8, the compiler would run further sizes eagerly without a word.
    dynamo.recompile_limit = MOST_SIZES
    dynamo.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False, options=options)
