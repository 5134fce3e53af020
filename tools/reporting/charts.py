"""Turns the records of runs into charts."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from fasttrain.schedule import crop_px_at
from reporting import summary
from reporting.figures import Chart, Curve
from reporting.runs import Line, Run

L = TypeVar("L", bound=Line)
Position = Callable[[Run, Line], float]
MINUTE_S, HOUR_S = 60.0, 3600.0


class Axis(NamedTuple):
    """A horizontal axis: how far a run is when it writes a line."""

    key: str  # in names of files
    title: str  # for a choice of axes
    label: str
    position: Position
    runs: list[int]  # those that have positions on it


class Figure(NamedTuple):
    """A chart with its file name and a text for those who do not see it."""

    key: str
    chart: Chart
    text: str


def axes_for(runs: Sequence[Run]) -> list[Axis]:
    """The axes over which loss and accuracy are drawn. Time needs runs whose lines have times."""
    timed = [number for number, run in enumerate(runs) if run.clock]
    found = [Axis("epochs", "Epochs", "epochs", Run.epochs, [*range(len(runs))])]
    if not timed:
        return found
    longest_s = max(run.clock.total.wall_s for run in runs if run.clock)
    unit, unit_s = ("hours", HOUR_S) if longest_s > 2 * HOUR_S else ("minutes", MINUTE_S)

    def wall(run: Run, line: Line) -> float:
        return run.clock.spent(line.time).wall_s / unit_s if run.clock and line.time else 0.0

    def device(run: Run, line: Line) -> float:
        return run.clock.spent(line.time).device_s / HOUR_S if run.clock and line.time else 0.0

    return [
        *found,
        Axis("time", "Wall time", f"wall time, {unit}", wall, timed),
        Axis("device-hours", "Device-hours", "device-hours", device, timed),
    ]


def progress(runs: Sequence[Run], axis: Axis) -> list[Figure]:
    """Loss, accuracy and learning rate over an axis. A chart without curves is left out."""
    charts = [_loss(runs, axis), _accuracy(runs, axis), _lr(runs, axis)]
    return [figure for figure in charts if figure.chart.curves]


def speed(runs: Sequence[Run]) -> list[Figure]:
    """Throughput, waits for data and image sizes over epochs."""
    axis = axes_for(runs)[0]
    restarts = {number: run.restarts for number, run in enumerate(runs) if run.restarts}
    found = []
    for key, title, value in (
        ("throughput", "Throughput, images/s", lambda line: line.images_per_s),
        ("data-wait", "Share of time spent waiting for data, %", lambda line: 100 * line.data_wait),
    ):
        curves = [
            Curve(number, *_points(run, axis, timed, value))
            for number, run in enumerate(runs)
            # A line after a start may have no timed update; its speed is 0 then.
            if (timed := [line for line in run.metrics.train if line.images_per_s > 0])
        ]
        if curves:
            chart = Chart(title, axis.label, curves, _names(runs), restarts=restarts, zero=True)
            found.append(_figure(key, chart))
    return [*found, _image_sizes(runs)]


def _points(
    run: Run, axis: Axis, lines: Iterable[L], value: Callable[[L], float]
) -> tuple[list[float], list[float]]:
    points = sorted((axis.position(run, line), value(line)) for line in lines)
    return [x for x, _ in points], [y for _, y in points]


def _loss(runs: Sequence[Run], axis: Axis) -> Figure:
    curves = []
    for number in axis.runs:
        run = runs[number]
        if run.metrics.train:
            x, y = _points(run, axis, run.metrics.train, lambda line: line.loss)
            curves.append(Curve(number, x, y))
        if evals := [line for line in run.metrics.evals if line.loss is not None]:
            x, y = _points(run, axis, evals, lambda line: line.loss or 0.0)
            curves.append(Curve(number, x, y, style="dotted", marked=True))
    styles = {"line": "training", "dotted": "validation"}
    chart = Chart("Loss", axis.label, curves, _names(runs), styles, log=True)
    return _figure(f"loss-over-{axis.key}", chart)


def _accuracy(runs: Sequence[Run], axis: Axis) -> Figure:
    curves, styles = [], {}
    for number in axis.runs:
        run = runs[number]
        if run.metrics.evals:
            x, y = _points(run, axis, run.metrics.evals, lambda line: line.top1)
            curves.append(Curve(number, x, y, marked=True))
        if averaged := [line for line in run.metrics.evals if line.ema_top1 is not None]:
            x, y = _points(run, axis, averaged, lambda line: line.ema_top1 or 0.0)
            curves.append(Curve(number, x, y, style="dotted", marked=True))
            styles = {"line": "weights", "dotted": "EMA of the weights"}
    title = "Top-1 accuracy, % of the validation images"
    chart = Chart(title, axis.label, curves, _names(runs), styles, _levels(runs))
    return _figure(f"top-1-over-{axis.key}", chart)


def _levels(runs: Sequence[Run]) -> dict[float, str]:
    """The published accuracy of the runs' networks, each with its text."""
    known = {figures[0]: run for run in runs if (figures := summary.published(run))}
    return {
        top1: f"published{f' for {summary.network(run)}' if len(known) > 1 else ''}: {top1:.2f} %"
        for top1, run in known.items()
    }


def _lr(runs: Sequence[Run], axis: Axis) -> Figure:
    curves = [
        Curve(number, *_points(runs[number], axis, runs[number].metrics.train, lambda x: x.lr))
        for number in axis.runs
        if runs[number].metrics.train
    ]
    chart = Chart("Learning rate", axis.label, curves, _names(runs), zero=True)
    return _figure(f"learning-rate-over-{axis.key}", chart)


def _image_sizes(runs: Sequence[Run]) -> Figure:
    curves = []
    for number, run in enumerate(runs):
        if scales := run.recipe.data.scales_px:  # the updates draw sizes from the one to the other
            whole = [0.0, float(run.recipe.train.epochs)]
            curves += [Curve(number, whole, [px, px]) for px in (min(scales), max(scales))]
            continue
        epochs = [*range(run.recipe.train.epochs)]
        sizes = [crop_px_at(epoch, run.recipe.data.crop_px) for epoch in epochs]
        x = [*map(float, epochs), float(len(epochs))]
        curves.append(Curve(number, x, [*map(float, sizes), float(sizes[-1])], style="steps"))
    title = "Side of the training images, pixels"
    return _figure("image-size", Chart(title, "epochs", curves, _names(runs), zero=True))


def _names(runs: Sequence[Run]) -> list[str]:
    return [run.name for run in runs]


def _figure(key: str, chart: Chart) -> Figure:
    """Adds a text to a chart: the first and last value of each curve."""
    parts = []
    for curve in chart.curves:
        if curve.x:
            style = chart.styles.get(curve.style, "")
            name = ", ".join(filter(None, [chart.names[curve.run], style]))
            parts.append(f"{name}: from {curve.y[0]:.4g} to {curve.y[-1]:.4g}.")
    return Figure(key, chart, " ".join([f"{chart.title}, over {chart.x_label}.", *parts]))
