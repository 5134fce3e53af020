"""The stage `traffic`: bytes that an update moves, and what of the bound updates reached."""

import itertools

from benchmarks import own_process, traffic
from benchmarks.plans import Setting
from benchmarks.record.journal import Run, Skip
from benchmarks.record.machine import MachineJob
from benchmarks.record.updates import STAGE_S
from benchmarks.traffic import Measured
from fasttrain.shards import Split


def stage(run: Run, data: list[Split]) -> None:
    """Counts bytes for each network and batch; what the record has measured is set against them.

    Raises:
        Skip: the speed of a copy could not be measured.
    """
    bandwidth = copy_bandwidth(run)
    for arch, batch in itertools.product(run.arguments.arch, run.arguments.batch):
        setting = Setting(
            arch, run.arguments.width, run.arguments.crop_px, batch, run.arguments.precision
        )
        profiled = traffic.profile_in(run.record.lines, setting)
        for line in traffic.plan_lines(setting, bandwidth, profiled):
            run.write(**line)
        for measured in measured_in(run, setting, bandwidth):
            run.write(arch=arch, **traffic.reached(setting, measured))
        if profiled:
            run.write(arch=arch, **traffic.reached(setting, profiled))


def measured_in(run: Run, setting: Setting, bandwidth: float) -> list[Measured]:
    """The best turn of each mode of fasttrain in the record."""
    wanted = {key: value for key, value in setting._asdict().items() if key != "width"}
    best: dict[str, float] = {}
    for line in run.record.of("step", name="fasttrain", **wanted):
        if line.get("images_per_s"):
            mode = line["execution"]
            best[mode] = max(best.get(mode, 0.0), line["images_per_s"])
    return [Measured(mode, rate, bandwidth) for mode, rate in best.items()]


def copy_bandwidth(run: Run) -> float:
    """Bytes/s of a copy on the device: from this record, or else measured now.

    Raises:
        Skip: it could not be measured.
    """
    for line in reversed(run.record.lines):
        if "copy_gb_per_s" in line and line["stage"] == "machine":
            return 1e9 * float(line["copy_gb_per_s"])
    job = MachineJob(device=run.device, scratch=run.arguments.scratch, data=None)
    found = own_process.measure(job, "machine", max(run.left_s() / 4, STAGE_S))
    if "failed" in found:
        raise Skip(f"the speed of a copy could not be measured: {found['failed']}")
    return 1e9 * float(found["copy_gb_per_s"])
