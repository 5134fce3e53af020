"""The JSON lines of a benchmark as a table for people, on standard error."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Line = dict[str, Any]

# In the order of the columns. What is alike in all rows stands above the table.
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
}


def show(lines: Sequence[Line], console: Console | None = None) -> None:
    """Prints the contestants with their figures, who was left out, and the ratios."""
    console = console or Console(stderr=True)
    rows = [line for line in lines if "name" in line and FIGURES.keys() & line.keys()]
    if rows:
        alike, table = _table(rows)
        _say(console, alike)
        console.print(table)
    for line in lines:
        if "skipped" in line or ("failed" in line and "name" in line):
            what = "was left out" if "skipped" in line else "failed"
            reason = line["skipped"] if "skipped" in line else _last_words(line["failed"])
            _say(console, f"{line['name']} {what}: {reason}")
        for other, ratio in line.get("speed_over", {}).items():
            _say(console, f"{_who(line)} is {ratio:.2f} times as fast as {other}")
        for ratio in line.get("loop_over_step", {}).values():
            _say(console, f"the loop has {ratio:.3f} of the speed of the bare updates")


def _table(rows: Sequence[Line]) -> tuple[str, Table]:
    """What is alike in all rows, and a table of the rest."""

    def values(key: str) -> list[Any]:
        return [row.get(key) for row in rows]

    differ = {key for key in SETTINGS if len({str(value) for value in values(key)}) > 1}
    alike = [
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
    return ", ".join(alike), table


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _who(line: Line) -> str:
    """The name of who is compared, with what tells it from others of that name."""
    details = [str(line[key]) for key in ("threads", "queue_depth", "decode") if key in line]
    if "best" in line:
        details = [f"batch {line['batch']}", line["precision"], line["best"]["fasttrain"]]
    name = line.get("name", "fasttrain")
    return f"{name} ({', '.join(details)})" if details else str(name)


def _last_words(failed: Any) -> str:
    """The last line of what a contestant that failed wrote."""
    while isinstance(failed, list) and failed:
        failed = failed[-1]
    text = failed.get("failed", failed) if isinstance(failed, dict) else failed
    return (str(text).strip().splitlines() or ["nothing was written"])[-1]


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
