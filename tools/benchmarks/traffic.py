"""Bytes of memory that an update moves on a GPU, counted from the network for several plans.

eager, compile and compile_fuse are what the modes of `train.execution` do. depthwise, project and
expand have kernels of ours for these layers of the blocks, and are otherwise as compile_fuse.

The bound is the rate at which all bytes move as fast as a copy on the device. A GPU measures its
copy itself; --bandwidth gives it elsewhere. --rate or --profile says what a run measured: then the
share of the bound that the run reached is printed, and what each plan gives

    at the same share    if all kernels move bytes at that share of a copy's speed
    by kind              if each kind of kernel is as fast as the profile says, and kernels of ours
                         are as fast as Inductor's

With --profile and another --bandwidth, these two are for a GPU of that bandwidth.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks import plans
from benchmarks.layers import Layer
from benchmarks.options import MODES, amount
from benchmarks.output import Line, for_people, machine, rounded, say, write
from benchmarks.plans import PLANS, Kind, Plan, Setting
from fasttrain.arguments import positive
from fasttrain.faults import ConfigError
from fasttrain.model import ARCHS

# Kinds of a profile's kernels that are not elementwise; and sums of other rows.
KIND_OF: dict[str, Kind] = {"depthwise convolutions": "depthwise", "convolutions": "convolution"}
SUMS = ("all convolutions", "bookkeeping")


class Measured(NamedTuple):
    """What a run measured."""

    mode: str  # of `train.execution`, or a plan
    images_per_s: float
    bandwidth: float  # bytes/s of a copy on its GPU
    kernel_ms: Mapping[Kind, float] = {}  # of an update, by kind of kernel; empty if unknown


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


def add_arguments(part: argparse.ArgumentParser) -> None:
    """Declares the options of `benchmark.py traffic`."""
    part.add_argument("--arch", choices=ARCHS, default="large", help="(default: %(default)s)")
    part.add_argument("--width", type=amount, default=1.0, metavar="W", help="(default: 1)")
    numbers = (("--crop-px", 224, "side of the images"), ("--batch", 1024, "images of an update"))
    for name, number, text in numbers:
        text += " (default: %(default)s)"
        part.add_argument(name, type=positive, default=number, metavar="N", help=text)
    part.add_argument(
        "--precision", choices=[*plans.SIZES], default="bf16", help="(default: %(default)s)"
    )
    part.add_argument(
        "--bandwidth",
        type=amount,
        metavar="B",
        help="bytes/s that a copy on the device reads and writes, such as 3.0e12 "
        "(default: that of the profile; else measured, on a GPU)",
    )
    runs = part.add_mutually_exclusive_group()
    runs.add_argument(
        "--rate",
        type=rate,
        metavar="MODE:IMAGES_PER_S",
        help="what a run on such a GPU reached, in a mode or by a plan",
    )
    runs.add_argument(
        "--profile", type=Path, metavar="FILE", help="DIR/record.jsonl of `benchmark.py record`"
    )


def rate(text: str) -> tuple[str, float]:
    """`compile:9000`: a mode or plan, and its images/s."""
    mode, _, number = text.partition(":")
    known = dict.fromkeys((*MODES, *PLANS))
    if mode not in known:
        raise argparse.ArgumentTypeError(f"{mode}: not among {', '.join(known)}")
    return mode, amount(number)


def run(arguments: argparse.Namespace) -> None:
    """Prints a line for each layer, for each plan, and for the run that was measured.

    Raises:
        ConfigError: the file has no profile of this update, or --rate lacks a bandwidth.
    """
    setting = Setting(
        arguments.arch,
        arguments.width,
        arguments.crop_px,
        arguments.batch,
        arguments.precision,
    )
    measured = read_profile(arguments.profile, setting) if arguments.profile else None
    bandwidth = arguments.bandwidth or (measured.bandwidth if measured else bandwidth_here())
    if arguments.rate:
        if not bandwidth:
            raise ConfigError("--rate: no GPU here whose copy could be measured; add --bandwidth")
        mode, images_per_s = arguments.rate
        measured = Measured(mode, images_per_s, bandwidth)
    write(machine() | ({"copy_gb_per_s": bandwidth / 1e9} if bandwidth else {}))
    lines = [*layer_lines(setting)]
    for line in [*lines, *plan_lines(setting, bandwidth, measured)]:
        write(line)
    if measured:
        write(reached(setting, measured))
    show_layers(lines)
    if not bandwidth:
        say("No bound: there is no GPU here whose copy could be measured; --bandwidth gives one")


def bandwidth_here() -> float | None:
    """Bytes/s of a copy on the GPU of this machine; None if there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    from benchmarks import profiles

    return profiles.copy_bandwidth("cuda")


# --------------------------------------------------------------------------------------------------
# What a run measured
# --------------------------------------------------------------------------------------------------


def read_profile(path: Path, setting: Setting) -> Measured:
    """The last profile of this update in a file of JSON lines.

    Raises:
        ConfigError: the file is no such file, or has no profile of this update.
    """
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        text = f"--profile {path}: {error}; name DIR/record.jsonl of `benchmark.py record`"
        raise ConfigError(text) from None
    found = profile_in(lines, setting)
    if found is None:
        raise ConfigError(
            f"--profile {path}: it has no profile of {setting.arch}, batch {setting.batch}, "
            f"{setting.px} px, {setting.precision}; it has {profiles_named(lines)}"
        )
    return found


def profile_in(lines: Sequence[Any], setting: Setting) -> Measured | None:
    """The last profile of this update in the lines of a record; None if there is none."""
    wanted = setting._asdict()
    for place in reversed(range(len(lines))):
        head = lines[place]
        if not is_profile(head):
            continue
        if any(head.get(key, value) != value for key, value in wanted.items()):
            continue
        return Measured(
            head["execution"],
            1e3 * setting.batch / head["step_ms"],
            1e9 * head["copy_gb_per_s"],
            kernel_ms(lines[place + 1 :]),
        )
    return None


def is_profile(line: Any) -> bool:
    """True if a line of a record is the first of a profile."""
    needed = {"execution", "step_ms", "copy_gb_per_s"}
    return isinstance(line, dict) and line.get("stage") == "profile" and needed <= line.keys()


def profiles_named(lines: Sequence[Any]) -> str:
    """The updates that a file has profiles of, as text."""
    keys = ("arch", "batch", "px", "precision")
    heads = [line for line in lines if is_profile(line)]
    return "; ".join(", ".join(str(head.get(key)) for key in keys) for head in heads) or "none"


def kernel_ms(lines: Sequence[Any]) -> dict[Kind, float]:
    """Milliseconds of an update by kind of kernel, from the lines that follow a profile's first."""
    found: dict[Kind, float] = {}
    for line in lines:
        if is_profile(line) or line.get("stage") != "profile":
            break
        if "kind" in line and line["kind"] not in SUMS:
            kind = KIND_OF.get(line["kind"], "elementwise")
            found[kind] = found.get(kind, 0.0) + line["ms"]
    return found


# --------------------------------------------------------------------------------------------------
# What follows for the plans
# --------------------------------------------------------------------------------------------------


def plan_lines(
    setting: Setting, bandwidth: float | None, measured: Measured | None
) -> Iterator[Line]:
    """A line for each plan: MB an image, the bound, and what the measured run lets expect."""
    for plan in PLANS:
        found = plans.passes(plan, setting)
        per_image = 1e6 * setting.batch
        forward = sum(each.moved for each in found if each.forward)
        num_bytes = sum(each.moved for each in found)
        line: Line = {
            "name": plan,
            **setting._asdict(),
            "forward_mb": forward / per_image,
            "backward_mb": (num_bytes - forward) / per_image,
            "mb_per_image": num_bytes / per_image,
            "kept_gib": plans.kept(plan, setting) / 2**30,
        }
        if bandwidth:
            line["bound_ms"] = 1e3 * num_bytes / bandwidth
            line["bound_images_per_s"] = setting.batch * bandwidth / num_bytes
            line |= expected(plan, setting, bandwidth, measured) if measured else {}
        kinds: Line = {kind: size / per_image for kind, size in plans.by_kind(found).items()}
        yield rounded(line) | {"mb_by_kind": rounded(kinds)}


def expected(plan: Plan, setting: Setting, bandwidth: float, measured: Measured) -> Line:
    """Images/s and ms of a plan, if kernels keep their speeds over that of a copy.

    Args:
        bandwidth: bytes/s of a copy on the GPU that this is for.
    """
    base, found = (plans.passes(p, setting) for p in (plans.plan_of(measured.mode), plan))
    base_kinds, kinds = plans.by_kind(base), plans.by_kind(found)
    faster = bandwidth / measured.bandwidth
    base_ms = 1e3 * setting.batch / measured.images_per_s
    ms = base_ms / faster * sum(kinds.values()) / sum(base_kinds.values())
    line: Line = {"same_share_ms": ms, "same_share_images_per_s": 1e3 * setting.batch / ms}
    if measured.kernel_ms.keys() >= base_kinds.keys():
        # Kernels may overlap or wait for each other: together they take as long as the update.
        scale = base_ms / sum(measured.kernel_ms.values())
        pace = {kind: scale * measured.kernel_ms[kind] / base_kinds[kind] for kind in base_kinds}
        pace["ours"] = pace["elementwise"]
        ms = sum(size * pace[kind] for kind, size in kinds.items()) / faster
        line |= {"by_kind_ms": ms, "by_kind_images_per_s": 1e3 * setting.batch / ms}
    return line


def reached(setting: Setting, measured: Measured) -> Line:
    """The share of a copy's speed that a run reached, as a whole and by kind of kernel."""
    plan = plans.plan_of(measured.mode)
    kinds = plans.by_kind(plans.passes(plan, setting))
    speed = measured.images_per_s / setting.batch * sum(kinds.values())
    by_kind: Line = {
        kind: size / (measured.kernel_ms[kind] / 1e3) / measured.bandwidth
        for kind, size in kinds.items()
        if measured.kernel_ms.get(kind)
    }
    line: Line = {
        "run": measured.mode,
        "plan": plan,
        "batch": setting.batch,
        "images_per_s": measured.images_per_s,
        "copy_gb_per_s": measured.bandwidth / 1e9,
        "of_bound": speed / measured.bandwidth,
    }
    return rounded(line) | ({"of_copy_by_kind": rounded(by_kind)} if by_kind else {})


# --------------------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------------------


def layer_lines(setting: Setting) -> Iterator[Line]:
    """A line for each layer, with MB an image forward and backward in each plan."""
    totals: dict[tuple[str, bool, Plan], int] = {}
    for plan in PLANS:
        for each in plans.passes(plan, setting):
            key = each.layer, each.forward, plan
            totals[key] = totals.get(key, 0) + each.moved
    about = {layer.name: described(layer) for layer in setting.network.layers}
    for name in dict.fromkeys(name for name, _, _ in totals):
        line: Line = {"layer": name, **about.get(name, {})}
        for forward, title in ((True, "forward_mb"), (False, "backward_mb")):
            moved = {plan: totals.get((name, forward, plan), 0) for plan in PLANS}
            line[title] = rounded({p: size / setting.batch / 1e6 for p, size in moved.items()})
        yield line


def described(layer: Layer) -> Line:
    """What a line says about a layer: its kind, kernel, channels and sides."""
    return {
        "kind": layer.kind,
        "kernel": layer.kernel,
        "stride": layer.stride,
        "channels": [layer.inputs[0], layer.outputs[0]],
        "px": [layer.inputs[1], layer.outputs[1]],
    }


def show_layers(lines: Sequence[Line]) -> None:
    """Prints the layers as a table for people: MB an image, forward and backward together."""
    table = Table()
    for title in ("MB an image", "", "channels", "px"):
        table.add_column(title)
    for plan in PLANS:
        table.add_column(plan, justify="right")
    for line in lines:
        what = f"{line['kind']} {line['kernel']}/{line['stride']}" if "kind" in line else ""
        sizes = [" > ".join(map(str, line.get(key, ()))) for key in ("channels", "px")]
        mb = [f"{line['forward_mb'][plan] + line['backward_mb'][plan]:.2f}" for plan in PLANS]
        table.add_row(line["layer"], what, *sizes, *mb)
    for_people().print(table)
