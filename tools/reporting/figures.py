"""Draws figures with matplotlib, each in a light and a dark version."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from fasttrain.faults import ConfigError

WIDTH_IN, HEIGHT_IN = 4.0, 2.8  # small, so that letters can be read on a phone
LEFT_IN = 0.58  # of the axes, with room for 102,000
PNG_DPI = 200
MAX_RUNS = 8  # more colours are hard to tell apart
NAME_LENGTH = 26  # longer names are cut in the legend
FAR = 30.0  # ratio of the largest value to the smallest
DENSE = 40  # points of a curve; more markers would hide it
MANY_POINTS = 500  # from here on a thin line shows more
BAR_IN = 0.2  # height of a bar with its gap
MARKERS = "osD^vPX*"  # of runs, so that they differ without colours too


class Theme(NamedTuple):
    """The colours of a version."""

    background: str
    ink: str
    muted: str
    grid: str
    runs: tuple[str, ...]  # the palette of Okabe and Ito for people with colour blindness


LIGHT = Theme(
    "#ffffff", "#1b1f24", "#59636e", "#e4e7eb",
    ("#0072b2", "#d55e00", "#009e73", "#b0589a", "#b87d00", "#3f9ad1", "#333333", "#882255"),
)  # fmt: skip
DARK = Theme(
    "#161b22", "#e6edf3", "#9da7b3", "#2b323b",
    ("#58a6ff", "#ff9a52", "#3fcf9c", "#e39ad0", "#f0c454", "#a8d8ff", "#cccccc", "#e0709a"),
)  # fmt: skip
THEMES = {"light": LIGHT, "dark": DARK}


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a chart."""

    run: int  # decides the colour and the marker
    x: Sequence[float]
    y: Sequence[float]
    style: Literal["line", "dotted", "steps"] = "line"
    marked: bool = False  # a marker at each point


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over a common axis."""

    title: str
    x_label: str
    curves: Sequence[Curve]
    names: Sequence[str]  # of all runs of the page
    styles: Mapping[str, str] = field(default_factory=dict)  # meaning of each style, if not obvious
    levels: Mapping[float, str] = field(default_factory=dict)  # dashed lines with their texts
    restarts: Mapping[int, Sequence[float]] = field(default_factory=dict)  # x, by run
    zero: bool = False  # the vertical axis begins at 0
    log: bool = False  # the vertical axis is logarithmic if the values differ by FAR


class Bars(NamedTuple):
    """The accuracy of each class: a bar each, or a curve if there are many."""

    title: str
    names: Sequence[str]  # the best first
    percent: Sequence[float]


class Picture(NamedTuple):
    """A figure in both versions."""

    svg: dict[str, bytes]  # by theme
    png: dict[str, bytes]


def check() -> None:
    """Refuses a page that could not be drawn, before files are read.

    Raises:
        ConfigError: matplotlib or jinja2 is missing.
    """
    from importlib.util import find_spec

    if missing := [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]:
        raise ConfigError(
            f"the report needs packages that are not installed: {', '.join(missing)}; install them "
            "with\n    pip install -e '.[report]'"
        )


def draw(what: Chart | Bars) -> Picture:
    """Draws both versions, as SVG for the page and as PNG."""
    import matplotlib as mpl

    svg, png = {}, {}
    # The same records give the same files: no random ids and no dates. Letters stay text.
    settings = {"svg.hashsalt": "fasttrain", "svg.fonttype": "none", "font.size": 8.5}
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context(settings):
        for name, theme in THEMES.items():
            figure = _bars(what, theme) if isinstance(what, Bars) else _chart(what, theme)
            svg[name] = _saved(figure, format="svg", metadata=nothing)
            png[name] = _saved(figure, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return Picture(svg, png)


def _saved(figure: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, facecolor=figure.get_facecolor(), **how)
    return buffer.getvalue()


def _axes(title: str, theme: Theme, height_in: float, room: tuple[float, float]) -> Any:
    """Makes a figure with one set of axes and its title.

    Args:
        room: inches left of the axes, and above them.
    """
    from matplotlib.figure import Figure

    left, top = room
    figure = Figure(figsize=(WIDTH_IN, height_in), facecolor=theme.background)
    bottom, right = 0.46, 0.16
    axes = figure.add_axes(
        (
            left / WIDTH_IN,
            bottom / height_in,
            1 - (left + right) / WIDTH_IN,
            1 - (top + bottom) / height_in,
        ),
        facecolor=theme.background,
    )
    figure.text(
        0.12 / WIDTH_IN, 1 - 0.1 / height_in, title, va="top", color=theme.ink, size=9.5,
        weight="bold",
    )  # fmt: skip
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.muted)
    axes.tick_params(colors=theme.muted, length=0, labelsize=8, which="both")
    axes.grid(axis="y", color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    return axes


def short(name: str, length: int = NAME_LENGTH) -> str:
    """Cuts the middle out of a long name. Dollar signs would start a formula."""
    if len(name) > length:
        half = (length - 1) // 2
        name = f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"
    return name.replace("$", r"\$")


# --------------------------------------------------------------------------------------------------
# Curves
# --------------------------------------------------------------------------------------------------

LINES = {"line": "-", "dotted": (0, (1, 1.2)), "steps": "-"}


def _chart(chart: Chart, theme: Theme) -> Any:
    entries = _legend(chart, theme)
    rows = -(-len(entries) // 2)
    axes = _axes(chart.title, theme, HEIGHT_IN, (LEFT_IN, 0.4 + 0.155 * rows))
    for curve in chart.curves:
        _draw_curve(axes, curve, theme)
    axes.set_xlabel(chart.x_label, color=theme.muted, size=8.5)
    _scale(axes, chart)
    for run, places in chart.restarts.items():
        for x in places:
            axes.axvline(x, color=theme.runs[run], linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    for value, text in chart.levels.items():
        _draw_level(axes, value, text, theme)
    if entries:
        axes.figure.legend(
            handles=entries, loc="upper left", ncols=2, frameon=False, labelcolor=theme.ink,
            bbox_to_anchor=(0.1 / WIDTH_IN, 1 - 0.27 / HEIGHT_IN), fontsize=8,
            handlelength=1.8, columnspacing=1.4, labelspacing=0.35, borderaxespad=0.2,
        )  # fmt: skip
    return axes.figure


def _draw_curve(axes: Any, curve: Curve, theme: Theme) -> None:
    last = len(curve.x) - 1
    every = None if curve.marked and last < DENSE else [last]
    axes.plot(
        curve.x,
        curve.y,
        color=theme.runs[curve.run],
        linewidth=1.4 if last < MANY_POINTS else 0.8,
        linestyle=LINES[curve.style],
        drawstyle="steps-post" if curve.style == "steps" else "default",
        marker=MARKERS[curve.run],
        markersize=3.2,
        markevery=every,
    )


def _scale(axes: Any, chart: Chart) -> None:
    """Chooses the ends and the form of the axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    values = [y for curve in chart.curves for y in curve.y if 0 < y < float("inf")]
    if chart.log and values and max(values) > FAR * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if chart.zero:
        axes.set_ylim(0, 1.08 * max(values, default=1.0))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
    axes.set_xlim(left=0)
    axes.margins(x=0.03)


def _draw_level(axes: Any, value: float, text: str, theme: Theme) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, value - 2), max(high, value + 6))
    axes.axhline(value, color=theme.muted, linewidth=1.1, linestyle=(0, (5, 3)))
    axes.annotate(
        text, (0, value), xycoords=("axes fraction", "data"), xytext=(3, 3),
        textcoords="offset points", color=theme.muted, size=8,
        bbox={"facecolor": theme.background, "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )  # fmt: skip


def _legend(chart: Chart, theme: Theme) -> list[Any]:
    """The entries of the legend: runs if there are several, then styles if they need words."""
    from matplotlib.lines import Line2D

    shown = sorted({curve.run for curve in chart.curves} | set(chart.restarts))
    entries = []
    if len(chart.names) > 1:
        for run in shown:
            entry = Line2D([], [], color=theme.runs[run], marker=MARKERS[run], markersize=3.6)
            entry.set_label(short(chart.names[run]))
            entries.append(entry)
    color = theme.runs[shown[0]] if len(chart.names) == 1 and shown else theme.muted
    for style, text in chart.styles.items():
        entries.append(Line2D([], [], color=color, linestyle=LINES[style], label=text))
    if any(chart.restarts.values()):
        entries.append(Line2D([], [], color=color, linestyle=(0, (4, 3)), lw=0.9, label="restart"))
    return entries


# --------------------------------------------------------------------------------------------------
# Classes
# --------------------------------------------------------------------------------------------------

MANY = 40  # classes; from here on a curve is clearer than bars


def _bars(bars: Bars, theme: Theme) -> Any:
    if len(bars.names) > MANY:
        return _ranks(bars, theme)
    labels = [short(name, 24) for name in bars.names]
    height_in = 0.95 + BAR_IN * len(labels)
    left = 0.25 + 0.068 * max(map(len, labels))
    axes = _axes(bars.title, theme, height_in, (left, 0.42))
    places = range(len(labels))
    axes.barh(places, bars.percent, height=0.72, color=theme.runs[0])
    axes.set_yticks(places, labels, color=theme.ink)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("top-1, % of the class's images", color=theme.muted, size=8.5)
    axes.grid(False, axis="y")
    axes.grid(axis="x", color=theme.grid, linewidth=0.7)
    for place, value in zip(places, bars.percent, strict=True):
        axes.annotate(
            f"{value:.1f}", (value, place), xytext=(3, 0), textcoords="offset points",
            va="center", color=theme.ink, size=7.5,
        )  # fmt: skip
    return axes.figure


def _ranks(bars: Bars, theme: Theme) -> Any:
    """Draws a curve over the classes' ranks. The middle class is marked."""
    axes = _axes(bars.title, theme, HEIGHT_IN, (LEFT_IN, 0.42))
    ranks = range(1, len(bars.percent) + 1)
    axes.fill_between(ranks, bars.percent, color=theme.runs[0], alpha=0.25, linewidth=0)
    axes.plot(ranks, bars.percent, color=theme.runs[0], linewidth=1.6)
    middle = (len(bars.percent) - 1) // 2
    axes.plot([middle + 1], [bars.percent[middle]], "o", color=theme.runs[0], markersize=4.5)
    axes.annotate(
        f"half of the classes\nhave at least {bars.percent[middle]:.1f} %",
        (middle + 1, bars.percent[middle]), xytext=(-4, -8), textcoords="offset points",
        ha="center", va="top", color=theme.ink, size=8,
    )  # fmt: skip
    axes.set_xlim(1, len(bars.percent))
    axes.set_ylim(0, 105)
    axes.set_xlabel("classes, the best first", color=theme.muted, size=8.5)
    return axes.figure
