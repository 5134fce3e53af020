"""Where the time of an update goes, by operation. The speed of a copy is the comparison."""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import steps
from benchmarks.output import rounded
from benchmarks.own_process import Result
from benchmarks.steps import StepJob, Update

STEPS = 3  # to profile


def measure(job: StepJob) -> Result:
    """Where an update's time goes, by operation."""
    steps.start(job)
    update = steps.update_of(job)
    steps.timed(update, job, 2)
    step_ms = 1e3 * steps.timed(update, job, 3) / 3
    copied, *rows = operations(update, job)
    named = [{"operation": row.pop("name"), "launches": row.pop("calls"), **row} for row in rows]
    return {"step_ms": step_ms, **copied, "rows": [rounded(row) for row in named[:12]]}


def operations(update: Update, job: StepJob) -> list[Result]:
    """The slowest operations of an update, by their own milliseconds per step.

    Eager operations also have `mb`, the bytes that they move, and `of_copy`. That is the ratio of
    these bytes to the bytes that a copy on the device moves in the same time. The first row has the
    speed of that copy.
    """
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if job.gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        steps.timed(update, job, STEPS)
    moved = Traffic()
    with moved:
        update()
    copied = copy_bandwidth(job.device)
    key = "self_device_time_total" if job.gpu else "self_cpu_time_total"
    rows = []
    for event in profiler.key_averages():
        ms = getattr(event, key) / 1e3 / STEPS
        num_bytes = moved.bytes.get(event.key, 0)
        row = {"name": event.key[:80], "ms": round(ms, 3), "calls": event.count / STEPS}
        if num_bytes and ms:
            row["mb"] = round(num_bytes / 1e6, 1)
            row["of_copy"] = round(num_bytes / (ms / 1e3) / copied, 3)
        rows.append(row)
    rows.sort(key=lambda row: -row["ms"])
    return [{"copy_gb_per_s": round(copied / 1e9, 1)}, *rows[:25]]


class Traffic(TorchDispatchMode):
    """The fewest bytes that operations must read and write, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = itertools.chain(_tensors(args), _tensors(result))
            seen = {t.data_ptr(): t.nbytes for t in tensors}  # counts each tensor once
            name = function.name().split(".")[0]
            self.bytes[name] = self.bytes.get(name, 0) + sum(seen.values())
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested lists and tuples."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def copy_bandwidth(device: str) -> float:
    """Bytes/s that copying 256 MiB on the device reads and writes."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


def seconds_of(function: Callable[[], object], device: str) -> float:
    """The fewest seconds that a call of the function takes, over several tries."""
    gpu = device != "cpu"
    number = 20 if gpu else 1  # calls per try, so that launching and waiting hardly count
    found = []
    for _ in range(8):
        begun = time.perf_counter()
        for _ in range(number):
            function()
        if gpu:
            torch.cuda.synchronize()
        found.append((time.perf_counter() - begun) / number)
    return min(found)
