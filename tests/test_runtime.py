"""Processes that were launched together must fit together."""

import copy
import os
from pathlib import Path
from types import SimpleNamespace
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


@pytest.mark.parametrize(
    ("processes", "gpus_of_nodes", "bound"),
    [
        (4, [0, 0, 1, 1], {4, 5, 6, 7}),
        (1, [1], None),  # which would lose half of the machine
        (2, [1, 1], None),  # and two would share one half
        (2, [-1, -1], None),  # the kernel knows of no node
    ],
)
def test_processes_stay_on_the_node_of_their_gpu(
    processes: int,
    gpus_of_nodes: list[int],
    bound: set[int] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for node, cpus in enumerate(("0-3", "4,5-7")):
        (tmp_path / f"devices/system/node/node{node}").mkdir(parents=True)
        (tmp_path / f"devices/system/node/node{node}/cpulist").write_text(f"{cpus}\n")
    for gpu, node in enumerate(gpus_of_nodes):
        (tmp_path / f"bus/pci/devices/0000:{gpu + 16:02x}:00.0").mkdir(parents=True)
        (tmp_path / f"bus/pci/devices/0000:{gpu + 16:02x}:00.0/numa_node").write_text(f"{node}\n")
    done: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: done.append(cpus))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus_of_nodes))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda gpu: SimpleNamespace(pci_domain_id=0, pci_bus_id=gpu + 16, pci_device_id=0),
    )
    monkeypatch.setattr(runtime, "cpu_share", lambda environ: 8 // processes)
    runtime.bind_to_node(processes - 1, {"LOCAL_WORLD_SIZE": str(processes)}, tmp_path)
    assert done == ([bound] if bound else [])


@pytest.mark.parametrize(
    ("environ", "said"),
    [({}, 1), ({"WORLD_SIZE": "4"}, 0), ({"ACCELERATE_USE_CPU": "1"}, 0)],
)
def test_gpus_that_are_left_idle_are_told(
    environ: dict[str, str], said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    remarks = runtime.idle_gpus(environ)
    assert len(remarks) == said
    assert not said or remarks[0].startswith("1 of 4 GPUs is used; accelerate launch --multi_gpu")
