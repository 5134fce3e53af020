"""Draws the prediction of `benchmark.py scaling` with matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasttrain.faults import ConfigError

# The marker says what limits a prediction; for every other limit it is a square.
MARKERS = {"compute": "o", "too few images a device": "o"}
LEGEND = "dot: compute limits; ring: too few images a device; square: links or input"


def check(path: Path) -> None:
    """Refuses a drawing that could not be written, before anything is measured.

    Raises:
        ConfigError: the folder of `path` or matplotlib is missing.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no such folder; make it")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"--plot {path}: matplotlib draws it and is not installed; install it with\n"
            "    pip install -e '.[bench]'"
        ) from None


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Writes images/s over devices, a line for each global batch; both axes are logarithmic.

    Args:
        rows: predictions of `scaling.predict`.
        path: its suffix gives the format, such as .svg or .png.
    """
    import matplotlib as mpl

    # The same rows give the same file: no random ids, no date, and letters stay text.
    with mpl.rc_context({"svg.hashsalt": "fasttrain", "svg.fonttype": "none"}):
        figure = figure_of(rows, title)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def figure_of(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """The drawing as a matplotlib Figure, which needs no display."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot(
        title=title, xlabel="devices", ylabel="images/s", xscale="log", yscale="log"
    )
    axes.set_xscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y", color="#ddd")
    devices = sorted({row["devices"] for row in rows})
    one = max(row["images_per_s"] / row["devices"] / row["efficiency"] for row in rows)
    ideal = [count * one for count in devices]
    axes.plot(devices, ideal, color="#888", linestyle="--", label="ideal")
    for batch in sorted({row["batch"] for row in rows}):
        draw_batch(axes, [row for row in rows if row["batch"] == batch])
    axes.legend(title=LEGEND, title_fontsize="small", alignment="left", frameon=False)
    return figure


def draw_batch(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Draws the line of one global batch, with a marker for each number of devices."""
    counts, rates = zip(*((row["devices"], row["images_per_s"]) for row in rows), strict=True)
    (line,) = axes.plot(counts, rates, label=f"global batch {rows[0]['batch']:,}")
    for row in rows:
        axes.plot(
            row["devices"],
            row["images_per_s"],
            marker=MARKERS.get(row["limit"], "s"),
            color=line.get_color(),
            markerfacecolor=line.get_color() if row["limit"] == "compute" else "white",
        )
