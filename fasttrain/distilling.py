"""Joins the labels of a batch with a teacher's probabilities, on the device.

The probabilities are stored ones, or a teacher computes them in the run. `compiling.loss_function`
has the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fasttrain.batch import Batch

# Maps a batch to its labels and the teacher's: see `join`.
Teach = Callable[[Batch], Tensor]


@dataclass(frozen=True, slots=True)
class Teacher:
    """A network whose probabilities are labels."""

    name: str
    digest: str  # of its weights
    module: nn.Module  # images of the run -> one logit for each class of the data


def dense(packed: Tensor, num_classes: int) -> Tensor:
    """Makes rows of probabilities for all classes from those of the k most probable ones.

    What these leave of 1 is spread evenly over the other classes.

    Args:
        packed: int16 `(B, 2, k)`, as `StoredLabels.take` gives them.
    Returns:
        float32 `(B, C)`; each row sums to 1.

    Source: github.com/apple/ml-dr, Reinforce Data, Multiply Impact, arXiv:2303.08983.
    """
    ids = packed[:, 0].long() & 0xFFFF
    probabilities = packed[:, 1].contiguous().view(torch.float16).float()
    others = max(num_classes - ids.shape[1], 1)
    rest = (1 - probabilities.sum(1, keepdim=True)).clamp(min=0) / others
    rows = rest.repeat(1, num_classes).scatter_(1, ids, probabilities)
    return rows / rows.sum(1, keepdim=True)  # float16 rounds the probabilities


def soften(rows: Tensor, temperature: float) -> Tensor:
    """Returns the probabilities `(B, C)` that logits give if they are divided by a temperature.

    Args:
        rows: the probabilities of the same logits at temperature 1.
    """
    if temperature == 1:
        return rows
    return rows.log().div(temperature).softmax(1)


def join(labels: Tensor, rows: Tensor) -> Tensor:
    """Puts the labels, as probabilities, and the teacher's probabilities side by side.

    So MixUp and CutMix mix both alike, and updates get one tensor.

    Args:
        labels: int64 `(B,)`.
        rows: float32 `(B, C)`.
    Returns:
        float32 `(B, 2 C)`.
    """
    hard = torch.zeros_like(rows).scatter_(1, labels[:, None], 1.0)
    return torch.cat([hard, rows], 1)


def from_stored(num_classes: int, temperature: float) -> Teach:
    """The function that takes the teacher's labels from the batch."""

    def teach(batch: Batch) -> Tensor:
        assert batch.soft is not None
        return join(batch.labels, soften(dense(batch.soft, num_classes), temperature))

    return teach


def from_teacher(teacher: Teacher, accelerator: Accelerator, temperature: float) -> Teach:
    """The function that lets a teacher look at the batch, before images are mixed.

    Args:
        teacher: its network is on the device, in evaluation mode.
    """

    def teach(batch: Batch) -> Tensor:
        with torch.inference_mode(), accelerator.autocast():
            logits = teacher.module(batch.images)
            rows = logits.float().div(temperature).softmax(1)
        # Autograd refuses tensors of inference mode. `join` makes new ones.
        return join(batch.labels, rows)

    return teach
