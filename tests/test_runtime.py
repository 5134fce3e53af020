"""A process runs on the CPUs of its GPU's node, and rank 0 alone gives warnings."""

import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from updates import recipe_for

from fasttrain import runtime


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


@pytest.mark.parametrize(("rank", "told"), [(0, True), (1, False)])
def test_rank_0_alone_gives_warnings(
    monkeypatch: pytest.MonkeyPatch, rank: int, told: bool
) -> None:
    monkeypatch.setattr(runtime.stopping, "Follower", lambda *_: None)
    for name in ("keep_memory", "bind_to_node"):
        monkeypatch.setattr(runtime, name, lambda *_: None)
    accelerator: Any = SimpleNamespace(
        process_index=rank, num_processes=2, device=torch.device("cpu")
    )
    threads = torch.get_num_threads()
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        process = runtime.start(accelerator, recipe_for(cpu_threads=threads), {"WORLD_SIZE": "2"})
        warnings.warn("said by a package", stacklevel=1)
    assert process.rank == rank and bool(given) == told
