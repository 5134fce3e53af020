"""All that can be measured about fasttrain on this machine, the most important first.

Within --minutes it measures the machine, the tests that need a GPU, updates, kernels, the share of
the bound that updates reach, input, loop, train.py and Imagenette. Each measurement runs in its own
process with a time limit. One that fails is recorded and does not end the others. DIR/record.jsonl
has every result as soon as it is known, and DIR/record.md has tables for RECORDS.md. A later call
adds to the record what is missing: --stages, --arch, --batch and --modes choose a part.
"""

import argparse
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.options import MODES, amount, check_modes, choose_device, counts, words
from benchmarks.record import gpu_tests, images, machine, traffic, training, updates
from benchmarks.record.journal import LEAST_S, Failed, Record, Run, Skip, say
from benchmarks.record.updates import OTHERS, STAGE_S
from fasttrain import runtime, shards
from fasttrain.arguments import positive
from fasttrain.shards import Split

# All modes: first eager, which the others are compared with, then those that are probably fastest.
MOST_TELLING = sorted(MODES, key=lambda mode: (mode != "eager", "graph" not in mode))


class Stage(NamedTuple):
    """A part of the record, and its share of the time relative to the other stages."""

    measure: Callable[[Run, list[Split]], None]
    share: float


STAGES = {
    "machine": Stage(machine.stage, 1),
    "tests": Stage(gpu_tests.stage, 4),
    "step": Stage(updates.stage_step, 8),
    "profile": Stage(updates.stage_profile, 2),
    "operators": Stage(updates.stage_operators, 2),
    "traffic": Stage(traffic.stage, 1),
    "input": Stage(images.stage, 4),
    "loop": Stage(updates.stage_loop, 2),
    "train": Stage(training.stage_train, 5),
    "imagenette": Stage(training.stage_imagenette, 4),
}
# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def add_arguments(part: argparse.ArgumentParser) -> None:
    """Declares the options of `benchmark.py record`."""
    part.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the record; what an existing record lacks is added",
    )
    part.add_argument(
        "--scratch", type=Path, metavar="DIR", help="for pictures and runs (default: that of --out)"
    )
    part.add_argument("--minutes", type=amount, default=10.0, metavar="N")
    part.add_argument(
        "--data", type=Path, nargs="+", action="extend", default=[], metavar="SHARDS",
        help="data sets (default: raw shards of random pictures)",
    )  # fmt: skip
    lists: tuple[tuple[str, Sequence[str], str | None, str], ...] = (
        ("--stages", [*STAGES], ",".join(STAGES), "(default: all)"),
        ("--arch", ["large", "small"], "large,small", "(default: both)"),
        ("--modes", MODES, None, "modes of fasttrain (default: all; CPU: eager)"),
        ("--rivals", [*OTHERS, "none"], ",".join(OTHERS), "compare with (default: both)"),
        ("--rival-modes", ["eager", "compile"], None, "modes of these (default: both; CPU: eager)"),
    )
    for name, known, default, text in lists:
        part.add_argument(
            name, type=partial(words, known), default=default, metavar="A,B", help=text
        )
    part.add_argument(
        "--tests", default="", metavar="EXPRESSION", help="choose tests as pytest -k does"
    )
    numbers = (
        ("--crop-px", None, "side of the images (default: 224; CPU: 64)"),
        (
            "--threads",
            len(os.sched_getaffinity(0)),
            "of torch and of the input (default: %(default)s)",
        ),
        ("--repeats", 1, "turns of step and loop (default: 1)"),
        ("--images", None, "to time in each measurement of the input"),
        ("--updates", None, "of train (default: 300; CPU: 24)"),
    )
    for name, number, text in numbers:
        part.add_argument(name, type=positive, default=number, metavar="N", help=text)
    part.add_argument("--batch", type=counts, metavar="N,...",
                      help="(default: 1024,128; CPU: 16)")  # fmt: skip
    part.add_argument("--width", type=amount, default=1.0, metavar="W")
    part.add_argument("--seconds", type=amount, metavar="S",
                      help="of updates to time (default: 2)")  # fmt: skip
    part.add_argument("--precision", choices=["bf16", "no"], help="(default: bf16; CPU: no)")
    part.add_argument("--device", choices=["cpu", "gpu"], help="(default: a GPU if there is one)")


def settle(arguments: argparse.Namespace) -> None:
    """Fills in the defaults that depend on the device.

    Raises:
        ConfigError: the machine lacks what an option asks for.
    """
    arguments.device = choose_device(arguments.device)
    gpu = arguments.device == "gpu"
    arguments.scratch = arguments.scratch or arguments.out
    arguments.crop_px = arguments.crop_px or (224 if gpu else 64)
    arguments.batch = arguments.batch or ([1024, 128] if gpu else [16])
    arguments.updates = arguments.updates or (300 if gpu else 24)
    arguments.seconds = arguments.seconds or 2.0
    arguments.precision = arguments.precision or ("bf16" if gpu else "no")
    arguments.modes = arguments.modes or ([*MOST_TELLING] if gpu else ["eager"])
    arguments.rival_modes = arguments.rival_modes or (["compile", "eager"] if gpu else ["eager"])
    arguments.rivals = [name for name in arguments.rivals if name != "none"]
    check_modes(arguments.modes, arguments.device)


# --------------------------------------------------------------------------------------------------
# The stages
# --------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> None:
    """Runs the chosen stages one after the other, each in its share of the time.

    Raises:
        Fault: an option or a data set is wrong.
    """
    settle(arguments)
    data = [shards.open_split(root, "train") for root in arguments.data]
    # SIGTERM acts as Ctrl-C does, so that running measurements are ended too.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        run_stages(arguments, data)
    finally:
        signal.signal(signal.SIGTERM, previous)


def run_stages(arguments: argparse.Namespace, data: list[Split]) -> None:
    """Runs the stages, and writes the record as it goes."""
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    shared = Run(arguments, Record(arguments.out), 0.0)
    end = time.monotonic() + 60 * arguments.minutes
    chosen = [name for name in STAGES if name in arguments.stages]
    shared.record.write("record", **about(arguments))
    for number, name in enumerate(chosen):
        shares = [STAGES[each].share for each in chosen[number:]]
        begun, shared.stage = time.monotonic(), name
        share_s = (end - begun) * shares[0] / sum(shares)
        shared.stop_at = min(end, begun + max(share_s, STAGE_S))
        say(f"{name}: at most {max(0, shared.left_s()):.0f} s")
        try:
            outcome = run_stage(shared, data)
        except (KeyboardInterrupt, SystemExit):
            shared.write(ended="stopped", seconds=round(time.monotonic() - begun, 1))
            raise
        shared.write(**outcome, seconds=round(time.monotonic() - begun, 1))
        say(f"{name}: {outcome.get('failed') or outcome.get('skipped') or outcome['ended']}")
    sys.stdout.write(f"{shared.record.tables}\n")


def run_stage(shared: Run, data: list[Split]) -> dict[str, str]:
    """Runs one stage; returns how it ended, because the next stage runs in any case."""
    try:
        if shared.left_s() < LEAST_S:
            raise Skip("no time left")
        STAGES[shared.stage].measure(shared, data)
        return {"ended": "done"}
    except Skip as reason:
        return {"ended": "skipped", "skipped": str(reason)}
    except Failed:
        return {"ended": "failed"}
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return {"ended": "failed", "failed": text.splitlines()[0], "error": text[-2000:]}


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """Versions, commit and options."""
    packages = ("torch", "triton", "torchvision", "timm", "accelerate", "numpy")
    versions = {
        each.name: each.version for each in metadata.distributions()
        if each.name in packages or each.name.startswith("nvidia-dali-cuda")
    }  # fmt: skip
    return {
        "versions": {"python": platform.python_version(), **dict(sorted(versions.items()))},
        "commit": runtime.commit(),
        "stages": arguments.stages,
        "minutes": arguments.minutes,
        "device": arguments.device,
    }
