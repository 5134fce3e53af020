"""Every meter equals a count by hand."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from fasttrain.metrics import Clock, EvalSums, Meter, used_memory


def test_sums_are_exact_over_uneven_batches() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(23, 10), torch.randint(0, 10, (23,))
    sums = EvalSums(torch.device("cpu"))
    for part in (slice(0, 10), slice(10, 20), slice(20, 23)):
        sums.add(logits[part], labels[part])
    order = logits.argsort(1, descending=True)
    top1 = sum(int(label == row[0]) for label, row in zip(labels, order, strict=True))
    top5 = sum(int(label in row[:5]) for label, row in zip(labels, order, strict=True))
    assert sums.result() == {
        "top1": pytest.approx(100 * top1 / 23),
        "top5": pytest.approx(100 * top5 / 23),
        "loss": pytest.approx(F.cross_entropy(logits, labels).item()),
        "seen": 23,
    }


def test_top5_works_with_fewer_than_five_classes() -> None:
    sums = EvalSums(torch.device("cpu"))
    sums.add(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([1, 0]))
    result = sums.result()
    assert (result["top1"], result["top5"]) == (50.0, 100.0)


def test_memory_and_time_of_a_cpu_are_measured_and_its_energy_is_not() -> None:
    memory = used_memory(torch.device("cpu"))
    assert 0.05 < memory.used_gib < memory.total_gib
    meter = Meter(torch.device("cpu"))
    assert meter.joules() == 0 and 0 <= meter.seconds() < 1


def test_the_energy_of_a_gpu_is_read_from_its_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = iter([1e6, 5e6, 7.5e6])  # millijoules; the first reading is a trial
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-1234": "handle"}[uuid],
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    about = SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    assert Meter(torch.device("cuda")).joules() == 2500.0
    monkeypatch.setitem(sys.modules, "pynvml", None)  # is not installed
    assert Meter(torch.device("cuda")).joules() == 0


def test_clock_leaves_out_the_first_step_and_pauses() -> None:
    clock = Clock(torch.device("cpu"))
    with clock.waiting():
        time.sleep(0.2)
    clock.step(10)  # the first step: not counted
    with clock.waiting():
        time.sleep(0.1)
    time.sleep(0.1)
    clock.step(10)
    with clock.paused():
        time.sleep(0.3)
    rate, wait = clock.lap("log")
    assert 10 / 0.3 < rate <= 10 / 0.2
    assert 0.3 < wait < 0.6
    time.sleep(0.1)
    clock.step(5)
    assert 5 / 0.2 < clock.lap("log")[0] <= 5 / 0.1
    rate, wait = clock.lap("epoch")  # of its own: since the start
    assert 15 / 0.5 < rate <= 15 / 0.3 and 0.2 < wait < 0.4


class Event:
    """A CUDA event of a GPU that still works for `busy_s` on what was queued before."""

    busy_until = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = max(time.perf_counter(), Event.busy_until)

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.at - time.perf_counter()))

    def elapsed_time(self, after: "Event") -> float:
        assert time.perf_counter() >= after.at  # CUDA refuses to tell it earlier
        return 1000 * (after.at - self.at)


@pytest.mark.parametrize(("busy_s", "expected"), [(0.0, 0.2), (0.1, 0.1), (0.5, 0.0)])
def test_a_gpu_that_still_works_does_not_wait(
    monkeypatch: pytest.MonkeyPatch, busy_s: float, expected: float
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock(torch.device("cuda", 0))
    clock.step(10)
    Event.busy_until = time.perf_counter() + busy_s
    with clock.waiting():  # of the host
        time.sleep(0.2)
    clock.step(10)
    clock.lap("log")
    assert clock.wait_s == pytest.approx(expected, abs=0.05)
