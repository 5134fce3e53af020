"""Processes that were launched together must fit together."""

import copy
from typing import Any

import pytest
import torch

from fasttrain import runtime
from fasttrain.config import Recipe
from fasttrain.runtime import LaunchError, Process


def found(number: int = 3) -> list[dict[str, Any]]:
    device = torch.device("cpu")
    return [
        runtime.facts(Process(rank, number, device, 1, 1), Recipe(), ("a" * 64, "b" * 64))
        for rank in range(number)
    ]


def test_equal_processes_fit() -> None:
    runtime.check_alike(found())
    several = [one | {"gpu": f"GPU-{rank}"} for rank, one in enumerate(found())]
    runtime.check_alike(several)
    runtime.check_alike(found(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fasttrain's code": "0123"}, "fasttrain's code: 0123 for rank 2 on "),
        ({"train.epochs": 90}, "train.epochs: 90 for rank 2 on .*, but rank 0 on .*: 150"),
        ({"train.micro_batch_size": 3}, "train.micro_batch_size: 3 for rank 2"),
        ({"the data set": ["c", "d"]}, r"the data set: \['c', 'd'\] for rank 2"),
        ({"torch": "2.10.0"}, "torch: 2.10.0 for rank 2"),
        ({"gpu": "GPU-0"}, "rank 2 on .* has the GPU of rank 0 on .*: launch one process per GPU"),
        ({"clock": 0.0}, r"the clock of rank 2 on .* is -\d+ s from the first's: set it"),
    ],
)
def test_others_are_refused(change: dict[str, Any], message: str) -> None:
    some = copy.deepcopy(found())
    some[0]["gpu"], some[1]["gpu"] = "GPU-0", "GPU-1"
    some[2] |= change
    with pytest.raises(LaunchError, match=message):
        runtime.check_alike(some)
