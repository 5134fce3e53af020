"""The stages `step`, `profile`, `operators` and `loop`: updates without the input."""

import itertools
import time
from importlib import util
from typing import Any, Literal

from benchmarks import operators, step
from benchmarks.operators import OperatorsJob
from benchmarks.output import rounded
from benchmarks.record.journal import Run
from benchmarks.steps import StepJob
from fasttrain.shards import Split

STAGE_S = 30.0  # the least time of a stage, because a process imports for seconds
WARM_SHARE = 0.6  # of the time of a setting, for compilation
LAUNCHES = 20  # of each operator
OTHERS: tuple[Literal["torchvision", "timm"], ...] = ("torchvision", "timm")


def step_job(run: Run, name: str, mode: str, arch: str, batch: int) -> StepJob:
    """The job of a contestant with the options of the command line."""
    arguments = run.arguments
    return StepJob.model_validate(
        {
            "name": name, "arch": arch, "width": arguments.width, "batch": batch,
            "px": arguments.crop_px, "precision": arguments.precision, "execution": mode,
            "layout": "channels_last", "device": run.device, "threads": arguments.threads,
            "seconds": arguments.seconds,
        }
    )  # fmt: skip


def contestants(run: Run, arch: str, batch: int) -> list[StepJob]:
    """The jobs of fasttrain and the other libraries, the most telling first."""
    named = [("fasttrain", mode) for mode in run.arguments.modes]
    named += [
        (name, mode)
        for mode, name in itertools.product(run.arguments.rival_modes, run.arguments.rivals)
        if util.find_spec(name)
    ]
    # fasttrain's fastest modes and the fastest of the others give the ratio. The rest comes later.
    late = {("fasttrain", "compile"), ("fasttrain", "compile_fuse")}
    late |= {(name, "eager") for name in OTHERS} if run.gpu else set()
    ordered = [each for each in named if each not in late] + [e for e in named if e in late]
    return [step_job(run, name, mode, arch, batch) for name, mode in ordered]


def stage_step(run: Run, data: list[Split]) -> None:
    """Measures all contestants for each network and batch, in equal shares of the time."""
    arguments, stop_at = run.arguments, run.stop_at
    settings = list(itertools.product(arguments.arch, arguments.batch))
    for number, (arch, batch) in enumerate(settings):
        run.stop_at = time.monotonic() + (stop_at - time.monotonic()) / (len(settings) - number)
        jobs = contestants(run, arch, batch)
        cold = warm(run, [job for job in jobs if job.compiles])
        jobs.sort(key=lambda job: job in cold)  # these may take all the time that is left
        for turn, job in itertools.product(range(arguments.repeats), jobs):
            run.measure(job, "step", **told(job), turn=turn)
    run.stop_at = stop_at


def warm(run: Run, jobs: list[StepJob], **about: Any) -> list[StepJob]:
    """Compiles for jobs and writes a line for each; returns those that failed.

    The line has the job's settings, or `about` and the job's size of image.
    """
    failed = []
    warmed = step.warm_all(jobs, run.left_s() * WARM_SHARE)
    for job, found in zip(jobs, warmed, strict=True):
        settings = {**about, "px": job.px} if about else told(job)
        run.write(**settings, warmed=True, **rounded(found))
        failed += [job] if "failed" in found else []
    return failed


def told(job: StepJob) -> dict[str, Any]:
    """What a line says about a job."""
    return job.model_dump(include={"name", "arch", "batch", "px", "precision", "execution"})


def best_mode(run: Run, arch: str, batch: int) -> str:
    """fasttrain's fastest mode in this record; without one, the mode that is probably fastest."""
    lines = [
        line for line in run.record.of("step", name="fasttrain", arch=arch, batch=batch)
        if line.get("images_per_s") and line["execution"] in run.arguments.modes
    ]  # fmt: skip
    if lines:
        return str(max(lines, key=lambda line: line["images_per_s"])["execution"])
    likely = ("compile_graph_fuse", "compile_graph", "graph", "compile", "eager")
    return next((mode for mode in likely if mode in run.arguments.modes), run.arguments.modes[0])


def stage_profile(run: Run, data: list[Split]) -> None:
    """Profiles fasttrain's update in its best mode."""
    arch, batch = run.arguments.arch[0], run.arguments.batch[0]
    job = step_job(run, "fasttrain", best_mode(run, arch, batch), arch, batch)
    run.measure(job, "profile", needed=True, **told(job))


def stage_operators(run: Run, data: list[Split]) -> None:
    """Times the operators of the fused kernels at each layer's shape."""
    arguments = run.arguments
    for arch in arguments.arch:
        job = OperatorsJob(
            name="operators", arch=arch, width=arguments.width, px=arguments.crop_px,
            batch=arguments.batch[0], precision=arguments.precision, kinds=[*operators.KINDS],
            device="cuda" if run.gpu else "cpu", launches=LAUNCHES,
        )  # fmt: skip
        about = job.model_dump(include={"arch", "batch", "px", "precision"})
        run.measure(job, "operators", **about)


def stage_loop(run: Run, data: list[Split]) -> None:
    """Measures the loop and the bare updates in turns, and writes the ratio of each turn."""
    arch, batch = run.arguments.arch[0], run.arguments.batch[0]
    mode = best_mode(run, arch, batch)
    for turn in range(run.arguments.repeats):
        found: dict[str, Any] = {}
        for name in ("fasttrain", "fasttrain loop"):
            job = step_job(run, name, mode, arch, batch)
            found[name] = run.measure(job, "step", **told(job), turn=turn).get("images_per_s")
        if all(found.values()):
            run.write(loop_over_step=round(found["fasttrain loop"] / found["fasttrain"], 3))
