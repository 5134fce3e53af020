"""Updates on a batch that stays on the device: everything of a run but the input.

`benchmark.py step` compares fasttrain with a plain eager loop on the same network, and with the
networks of torchvision and timm. Each is measured in every layout and, compiled or not, in every
mode; the best of each counts. On a GPU everything is channels-last, the plain loop is left out, and
all compilation comes first, several at a time. --profile says where the time goes.

`benchmark.py loop` compares the loop itself, on such a batch, with the bare updates.
"""

import argparse
import importlib.util
import itertools
import os
import statistics
import sys
import typing
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks import own_process
from benchmarks.options import (
    MODES,
    NOT_INSTALLED,
    amount,
    check_modes,
    choose_device,
    counts,
    words,
)
from benchmarks.output import machine, medians, paired_ratio, write
from benchmarks.own_process import Result
from fasttrain.arguments import positive

if typing.TYPE_CHECKING:  # it imports torch, which takes seconds
    from benchmarks.steps import StepJob

FIGURES = ("images_per_s", "step_ms", "first_step_s", "peak_gib", "first_loss", "loss")
CPUS_TO_COMPILE = 3  # for each process that compiles: one traces, the others make kernels


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def add_arguments(part: argparse.ArgumentParser) -> None:
    """Declares the options of `benchmark.py step`, `loop` and `scaling`."""
    part.add_argument(
        "--arch", choices=["large", "small"], default="large", help="(default: large)"
    )
    part.add_argument(
        "--width",
        type=amount,
        default=1.0,
        metavar="W",
        help="width of the network; timm has 1 and 0.75",
    )
    part.add_argument("--crop-px", type=positive, default=224, metavar="N", help="(default: 224)")
    part.add_argument("--device", choices=["cpu", "gpu"], help="(default: a GPU if there is one)")
    cpus = len(os.sched_getaffinity(0))
    part.add_argument(
        "--threads", type=positive, default=cpus, metavar="N", help="of torch, on a CPU"
    )
    part.add_argument("--seconds", type=amount, metavar="S", help="to time (default: 4; GPU: 2)")
    part.add_argument("--repeats", type=positive, metavar="N", help="turns (default: 3; GPU: 2)")
    part.add_argument("--profile", action="store_true", help="list fasttrain's operations by time")
    part.add_argument(
        "--deterministic", action="store_true", help="also measure train.deterministic"
    )
    part.add_argument(
        "--batch", type=counts, metavar="N,...", help="images in a batch (default: 1024; CPU: 64)"
    )
    lists = (
        (
            "--modes",
            MODES,
            "of carrying out updates (default: all; CPU: eager, because compiling takes minutes)",
        ),
        ("--precision", ("bf16", "fp16", "no"), "(default: bf16; CPU: no)"),
    )
    for name, known, text in lists:
        part.add_argument(name, type=partial(words, known), metavar="A,B", help=text)


def settle(arguments: argparse.Namespace) -> None:
    """Fills in the defaults that depend on the device.

    Raises:
        ConfigError: the machine lacks what an option asks for.
    """
    arguments.device = choose_device(arguments.device)
    gpu = arguments.device == "gpu"
    arguments.repeats = arguments.repeats or (2 if gpu else 3)
    arguments.seconds = arguments.seconds or (2.0 if gpu else 4.0)
    arguments.batch = arguments.batch or [1024 if gpu else 64]
    arguments.precision = arguments.precision or ["bf16" if gpu else "no"]
    arguments.modes = arguments.modes or ([*MODES] if gpu else ["eager"])
    check_modes(arguments.modes, arguments.device)


# --------------------------------------------------------------------------------------------------
# The comparison
# --------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> None:
    """Measures every contestant in turns; prints a line for each, then the ratios.

    Raises:
        ConfigError: wrong options.
        SystemExit: an eager contestant failed; its line has the error.
    """
    settle(arguments)
    write(machine())
    jobs = list(jobs_of(arguments))
    if arguments.device == "gpu":
        warm_all([job for job in jobs if job.compiles], own_process.LIMIT_S)
    turns = own_process.take_turns(jobs, "step", arguments.repeats)
    for job in jobs:
        report(job, turns[job])
    for setting in dict.fromkeys(setting_of(job) for job in jobs):
        report_ratios([job for job in jobs if setting_of(job) == setting], turns)
    if any("failed" in turn and job.execution == "eager" for job in jobs for turn in turns[job]):
        raise SystemExit(1)


def jobs_of(arguments: argparse.Namespace) -> Iterator["StepJob"]:
    """Every contestant in every mode and layout, for each batch and precision."""
    from benchmarks.steps import StepJob

    names = contestants(arguments)
    for batch, precision, name in itertools.product(arguments.batch, arguments.precision, names):
        for mode, layout in itertools.product(*modes_and_layouts(name, arguments)):
            if "graph" in mode and precision == "fp16":
                continue
            yield StepJob(
                name=name,
                arch=arguments.arch,
                width=arguments.width,
                batch=batch,
                px=arguments.crop_px,
                precision=precision,
                execution=mode,
                layout=layout,
                device="cuda" if arguments.device == "gpu" else "cpu",
                threads=arguments.threads,
                seconds=arguments.seconds,
                profile=arguments.profile and name == "fasttrain",
            )


def contestants(arguments: argparse.Namespace) -> list[Any]:
    """The names of the contestants. Prints a line if timm is not installed."""
    names = ["fasttrain"]
    if arguments.deterministic:
        names += ["fasttrain deterministic"]
    if arguments.part == "loop":
        names += ["fasttrain loop"]
    if arguments.part == "step":
        # On a GPU, contiguous images are far slower, and torchvision's loop is the plain loop.
        names += ["torchvision"] if arguments.device == "gpu" else ["plain loop", "torchvision"]
        if importlib.util.find_spec("timm"):
            names += ["timm"]
        else:
            write({"name": "timm", "skipped": NOT_INSTALLED})
    return names


def modes_and_layouts(name: str, arguments: argparse.Namespace) -> tuple[list[str], list[Any]]:
    """The ways of carrying out updates, and the layouts of images, that a contestant has."""
    if name == "plain loop":
        return ["eager"], ["contiguous"]
    if name == "fasttrain deterministic":
        return ["eager"], ["channels_last"]
    if name.startswith("fasttrain"):
        return arguments.modes, ["channels_last"]
    modes = [mode for mode in arguments.modes if "graph" not in mode]
    on_cpu = arguments.device == "cpu"
    return modes, ["channels_last", "contiguous"] if on_cpu else ["channels_last"]


def warm_all(jobs: "Sequence[StepJob]", limit_s: float) -> list[Result]:
    """Compiles for all jobs, as many at a time as the CPUs and the GPU's memory allow."""
    from benchmarks import memory

    if not jobs:
        return []
    slots = max(1, len(os.sched_getaffinity(0)) // CPUS_TO_COMPILE)
    if jobs[0].gpu:
        slots = min(slots, memory.gpu_bytes() // max(map(memory.bytes_held, jobs)))
    slots = max(1, min(slots, len(jobs)))
    return own_process.warm(jobs, slots, limit_s, lambda text: sys.stderr.write(f"{text}\n"))


# --------------------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------------------


def setting_of(job: "StepJob") -> tuple[int, str]:
    """What contestants must share to be compared."""
    return job.batch, job.precision


def report(job: "StepJob", turns: Sequence[Result]) -> None:
    """Prints the line of a contestant, and its profile if there is one."""
    line = job.model_dump(exclude={"seconds", "profile"})
    good = [turn for turn in turns if "failed" not in turn]
    if len(good) < len(turns):
        line["failed"] = [turn for turn in turns if "failed" in turn]
    write(line | medians(good, FIGURES))
    for row in good[-1].get("profile", ()) if good else ():
        write({"profile": job.name, **row})


def report_ratios(jobs: "list[StepJob]", turns: dict[Any, list[Result]]) -> None:
    """Prints fasttrain's speed over each other contestant's, both in their fastest way."""
    best = fastest(jobs, turns)
    if "fasttrain" not in best:
        return
    ours = best.pop("fasttrain")
    for name, theirs in best.items():
        speeds = [[turn["images_per_s"] for turn in turns[job]] for job in (ours, theirs)]
        key = "speed_over"
        if name == "fasttrain loop":  # the loop's speed over the bare updates
            key = "loop_over_step"
            speeds.reverse()
        setting = {"batch": theirs.batch, "precision": theirs.precision}
        modes = {"fasttrain": ours.execution, name: f"{theirs.execution}, {theirs.layout}"}
        write({**setting, "best": modes, key: {name: paired_ratio(*speeds)}})


def fastest(jobs: "list[StepJob]", turns: dict[Any, list[Result]]) -> "dict[str, StepJob]":
    """The fastest job of each contestant by name, among the jobs that never failed."""

    def speed(job: "StepJob") -> float:
        return statistics.median(turn["images_per_s"] for turn in turns[job])

    best: dict[str, StepJob] = {}
    for name in dict.fromkeys(job.name for job in jobs):
        done = [j for j in jobs if j.name == name and not any("failed" in t for t in turns[j])]
        if done:
            best[name] = max(done, key=speed)
    return best
