"""What benchmarks print: JSON lines of results, and a table for people on standard error."""

import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.table import Table

Line = dict[str, Any]

written: list[Line] = []  # the lines that this process has printed


def write(line: Line) -> None:
    """Prints one JSON line on standard output at once."""
    written.append(line)
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def machine() -> Line:
    """The processor, the versions and the commit that the figures depend on."""
    from fasttrain import runtime  # imports torch, so only once the arguments are known to be right

    packages = ("torch", "torchvision", "webdataset", "simplejpeg", "pillow", "numpy", "psutil")
    versions = {
        distribution.name: distribution.version
        for distribution in metadata.distributions()
        if distribution.name.startswith("nvidia-dali-cuda") or distribution.name in packages
    }
    return {
        "cpu": runtime.cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **dict(sorted(versions.items())),
        "commit": runtime.commit(),
    }


# --------------------------------------------------------------------------------------------------
# Figures of several turns
# --------------------------------------------------------------------------------------------------


def rounded(found: Mapping[str, Any]) -> Line:
    """The line with its floating-point numbers rounded to four digits."""
    return {
        key: float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in found.items()
    }


def medians(turns: Sequence[Line], keys: Iterable[str]) -> Line:
    """The median of each key over the turns, to four digits; None if every turn has None.

    A key that no turn has is left out.
    """
    found: Line = {}
    for key in keys:
        values = [turn[key] for turn in turns if turn.get(key) is not None]
        if values:
            found[key] = float(f"{statistics.median(values):.4g}")
        elif any(key in turn for turn in turns):
            found[key] = None
    return found


def paired_ratio(ours: Iterable[float], theirs: Iterable[float]) -> float:
    """The median of ours / theirs within each turn, to three digits after the point.

    A machine that slows down between two turns changes both sides of a pair.
    """
    pairs = [own / other for own, other in zip(ours, theirs, strict=True)]
    return round(statistics.median(pairs), 3)


# --------------------------------------------------------------------------------------------------
# The table for people
# --------------------------------------------------------------------------------------------------

# Columns in their order. A setting that is equal in all rows stands above the table.
SETTINGS = {
    "batch": "batch",
    "precision": "precision",
    "execution": "execution",
    "layout": "layout",
    "threads": "threads",
    "queue_depth": "queue",
    "decode": "decode",
    "device": "device",
    "crop_px": "px",
    "px": "px",
    "arch": "arch",
    "width": "width",
}
FIGURES = {
    "images_per_s": "images/s",
    "mb_per_s": "MB/s",
    "step_ms": "ms",
    "cpu_ms_per_image": "CPU ms an image",
    "loader_us_per_image": "loader us an image",
    "peak_gib": "GiB",
    "peak_rss_gib": "GiB",
    "devices": "devices",
    "hours": "hours",
    "forward_mb": "forward, MB an image",
    "backward_mb": "backward",
    "mb_per_image": "together",
    "kept_gib": "kept, GiB",
    "bound_ms": "bound, ms",
    "bound_images_per_s": "images/s",
    "same_share_ms": "at the same share, ms",
    "same_share_images_per_s": "images/s",
    "by_kind_ms": "by kind, ms",
    "by_kind_images_per_s": "images/s",
}


def for_people() -> Console:
    """Standard error. A file or pipe gets wide lines, so that no table is cut."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else 160)


def show(lines: Sequence[Line], console: Console | None = None) -> None:
    """Prints a table of the contestants, then those left out or failed, then the ratios."""
    console = console or for_people()
    rows = [line for line in lines if "name" in line and FIGURES.keys() & line.keys()]
    if rows:
        shared, table = _table(rows)
        _say(console, shared)
        console.print(table)
    for line in lines:
        if "skipped" in line or ("failed" in line and "name" in line):
            what = "was left out" if "skipped" in line else "failed"
            reason = line["skipped"] if "skipped" in line else _last_words(line["failed"])
            _say(console, f"{line['name']} {what}: {reason}")
        for other, ratio in line.get("speed_over", {}).items():
            _say(console, f"{_who(line)} is {ratio:.2f} times as fast as {other}")
        if "of_bound" in line:
            _say(console, share_of_bound(line))
        for ratio in line.get("loop_over_step", {}).values():
            _say(console, f"the loop has {ratio:.3f} of the speed of the bare updates")


def _table(rows: Sequence[Line]) -> tuple[str, Table]:
    """The settings that all rows share, as text, and a table of everything else."""

    def values(key: str) -> list[Any]:
        return [row.get(key) for row in rows]

    differ = {key for key in SETTINGS if len({str(value) for value in values(key)}) > 1}
    shared = [
        f"{title} {rows[0][key]}"
        for key, title in SETTINGS.items()
        if key not in differ and rows[0].get(key) is not None
    ]
    columns = {"name": ""} | {k: t for k, t in SETTINGS.items() if k in differ}
    table = Table()
    for title in columns.values():
        table.add_column(title)
    figures = {key: title for key, title in FIGURES.items() if any(v for v in values(key))}
    for title in figures.values():
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*(_shown(row.get(key)) for key in (*columns, *figures)))
    return ", ".join(shared), table


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _who(line: Line) -> str:
    """The name of a contestant, with the settings that tell it from others of the same name."""
    details = [str(line[key]) for key in ("threads", "queue_depth", "decode") if key in line]
    if "best" in line:
        details = [f"batch {line['batch']}", line["precision"], line["best"]["fasttrain"]]
    name = line.get("name", "fasttrain")
    return f"{name} ({', '.join(details)})" if details else str(name)


def share_of_bound(line: Line) -> str:
    """What share of the bound a run reached, and each kind of kernel of a copy's speed."""
    kinds = line.get("of_copy_by_kind", {}).items()
    text = ", ".join(f"{kind} {share:.0%}" for kind, share in kinds)
    return (
        f"{line['run']} reached {line['of_bound']:.0%} of the bound: "
        f"{line['images_per_s']:,.0f} images/s where a copy moves {line['copy_gb_per_s']:,.0f} GB/s"
        + (f". Over the speed of a copy: {text}" if text else "")
    )


def _last_words(failed: Any) -> str:
    """The last line that a failed contestant wrote."""
    while isinstance(failed, list) and failed:
        failed = failed[-1]
    text = failed.get("failed", failed) if isinstance(failed, dict) else failed
    return (str(text).strip().splitlines() or ["nothing was written"])[-1]


def say(text: str) -> None:
    """Prints a line for people on standard error."""
    _say(for_people(), text)


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
