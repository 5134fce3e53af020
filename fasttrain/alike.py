"""Checks that the processes that were launched together belong to one run."""

import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fasttrain import config
from fasttrain.digests import code_digest
from fasttrain.launch import LaunchError
from fasttrain.runtime import Process

CLOCK_S = 60.0  # largest difference allowed between the clocks of two machines


def facts(process: Process, recipe: config.Recipe, digests: Sequence[str]) -> dict[str, Any]:
    """Returns what `check` compares. All ranks call this at the same time: it reads the clock.

    Args:
        digests: those of the splits.
    """
    may_differ = config.may_vary(per_machine=True)
    gpu = process.device.type == "cuda"
    return {
        "process": f"rank {process.rank} on {platform.node()}",
        "gpu": str(torch.cuda.get_device_properties(process.device).uuid) if gpu else None,
        "clock": time.time(),
        "fasttrain's code": code_digest(),
        "torch": torch.__version__,
        "the data set": [digest[:12] for digest in digests],
        **{
            f"{section}.{key}": value
            for section, table in recipe.model_dump(mode="json").items()
            for key, value in table.items()
            if f"{section}.{key}" not in may_differ
        },
    }


def check(found: Sequence[Mapping[str, Any]]) -> None:
    """Checks that processes belong to one run.

    Args:
        found: the `facts` of each rank.
    Raises:
        LaunchError: ranks differ in code, data or settings, share a GPU, or their clocks differ.
    """
    first, faults, gpus = found[0], [], dict[str, str]()
    for other in found[1:]:
        where = f"{other['process']}, but {first['process']}"
        faults += [
            f"{name}: {other[name]} for {where}: {value}"
            for name, value in first.items()
            if name not in ("process", "gpu", "clock") and other[name] != value
        ]
        if abs(other["clock"] - first["clock"]) > CLOCK_S:
            ahead = other["clock"] - first["clock"]
            faults.append(
                f"the clock of {other['process']} is {ahead:+.0f} s from that of "
                f"{first['process']}: set it"
            )
    for each in found:
        name = each["process"]
        if each["gpu"] and (holder := gpus.setdefault(each["gpu"], name)) != name:
            faults.append(f"{name} has the GPU of {holder}: launch one process per GPU")
    if faults:
        raise LaunchError("\n  ".join(["these processes do not fit together:", *faults]))
