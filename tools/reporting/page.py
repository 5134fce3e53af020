"""Puts words, tables and pictures together into one HTML page that needs no other file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from reporting import charts, evaluations, figures, runs, seeds, summary
from reporting.evaluations import ClassResult, Evaluation, Prediction
from reporting.figures import Picture
from reporting.photos import Photos, data_url
from reporting.runs import Run

HERE = Path(__file__).parent
FEW = 20  # classes; up to here one table lists them all
MOST = 10  # classes in the tables of the best and the worst
CONFUSIONS, EXAMPLES, MISTAKES = 8, 4, 12

TERMS = {
    "top-1": "the share of the validation images whose class the network names first.",
    "top-5": "the share of the validation images whose class is among the network's first five.",
    "epoch": "one pass over all training images.",
    "EMA": "an exponential moving average of the weights. It often is more accurate than the "
    "weights themselves.",
    "loss": "what the training makes smaller. The training loss may contain label smoothing and "
    "mixed images, so compare it only between runs with the same settings.",
    "learning rate": "the size of the steps by which the weights change.",
    "wall time": "the time that the run took on a clock, from each start to its last record, with "
    "preparation and evaluations. The time between two starts does not count. Updates that a "
    "restart repeated count once.",
    "device-hours": "the wall time times the number of processes, in hours. Each process uses one "
    "GPU, or a share of the CPU.",
    "data wait": "the share of the time in which the updates waited for images.",
}


class Shown(NamedTuple):
    """A picture within the page."""

    light: str  # data URLs
    dark: str
    width: int  # CSS pixels
    height: int
    text: str  # for those who do not see it


class Mistake(NamedTuple):
    """A validation image that the network took for another class."""

    image: str  # a data URL; "" if the image is not there
    prediction: Prediction


class Pair(NamedTuple):
    """Two classes that the network confused."""

    confusion: evaluations.Confusion
    of: int  # images of the class
    examples: list[Mistake]


class Section(NamedTuple):
    """What the page shows of an evaluation."""

    evaluation: Evaluation
    picture: Shown
    tables: dict[str, list[ClassResult]]  # by title
    pairs: list[Pair]
    mistakes: list[Mistake]
    fault: str  # why there are no images; "" if there are
    words: dict[str, str]  # for class names such as n01440764


class Card(NamedTuple):
    """What the page says of a run."""

    run: Run
    network: str
    state: str
    facts: list[summary.Fact]
    limits: str
    sections: list[Section]


class Tab(NamedTuple):
    """The charts over one axis."""

    axis: charts.Axis
    pictures: list[Shown]


@dataclass
class Album:
    """Draws pictures, and keeps their PNG files by name."""

    png: dict[str, bytes] = field(default_factory=dict)

    def add(self, key: str, what: figures.Chart | figures.Bars, text: str) -> Shown:
        """Draws a picture. Returns what the page needs of it."""
        drawn = figures.draw(what)
        for theme, data in drawn.png.items():
            self.png[f"{key}.png" if theme == "light" else f"{key}-{theme}.png"] = data
        urls = {theme: data_url("image/svg+xml", data) for theme, data in drawn.svg.items()}
        return Shown(urls["light"], urls["dark"], *_size_of(drawn), text)


def _size_of(picture: Picture) -> tuple[int, int]:
    """Width and height in CSS pixels, from the size of the PNG."""
    width, height = (int.from_bytes(picture.png["light"][at : at + 4]) for at in (16, 20))
    return round(width * 96 / figures.PNG_DPI), round(height * 96 / figures.PNG_DPI)


def make(found: Sequence[Run]) -> tuple[str, dict[str, bytes]]:
    """Makes the page of one or several runs.

    Returns:
        The page as HTML, and its pictures as PNG files by name.
    Raises:
        ConfigError: the files of an evaluation are damaged.
    """
    evaluated = [evaluations.read(run) for run in found]
    album = Album()
    tabs = [
        Tab(axis, [album.add(*figure) for figure in charts.progress(found, axis)])
        for axis in charts.axes_for(found)
    ]
    page = _template().render(
        title=", ".join(run.name for run in found),
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        style=(HERE / "style.css").read_text(),
        colors=[*zip(figures.LIGHT.runs, figures.DARK.runs, strict=True)],
        cards=[_card(run, given, album) for run, given in zip(found, evaluated, strict=True)],
        tabs=[tab for tab in tabs if tab.pictures],
        untimed=[run.name for run in found if run.metrics.lines and not run.clock],
        speed=[album.add(*figure) for figure in charts.speed(found)],
        restarted=any(run.restarts for run in found),
        differing=runs.differing(found),
        groups=seeds.groups(found),
        terms=TERMS,
    )
    return page, album.png


def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,  # names in files may hold anything
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def _card(run: Run, given: Sequence[Evaluation], album: Album) -> Card:
    return Card(
        run,
        summary.network(run),
        summary.state(run),
        summary.facts(run),
        summary.limits(run),
        [_section(run, one, album) for one in given],
    )


def _section(run: Run, evaluation: Evaluation, album: Album) -> Section:
    ranked, photos = evaluation.ranked, Photos(run, evaluation.result)
    words = evaluations.words_for([one.name for one in evaluation.result.classes])
    names = [words[one.name] or one.name for one in ranked]
    values = [one.top1 for one in ranked]
    bars = figures.Bars("Top-1 accuracy of each class, %", names, values)
    text = f"Accuracy of {len(ranked):,} classes"
    if ranked:
        text += f", from {values[0]:.1f} % ({names[0]}) to {values[-1]:.1f} % ({names[-1]})"
    key = "-".join(["classes", *run.name.split("/"), *_place(run, evaluation)])

    def shown(predictions: Sequence[Prediction]) -> list[Mistake]:
        return [Mistake(photos.show(one), one) for one in predictions]

    return Section(
        evaluation=evaluation,
        picture=album.add(key, bars, f"{text}."),
        tables=_tables(ranked),
        pairs=[
            Pair(pair, evaluation.images_of(pair.label), shown(examples))
            for pair, examples in evaluation.confusions(CONFUSIONS, EXAMPLES)
        ],
        mistakes=shown(evaluation.mistakes[:MISTAKES]),
        fault=photos.fault,
        words=words,
    )


def _place(run: Run, evaluation: Evaluation) -> tuple[str, ...]:
    """The parts of the evaluation's folder that tell it from others of the run."""
    return evaluation.folder.relative_to(run.folder / evaluations.FOLDER).parts


def _tables(ranked: list[ClassResult]) -> dict[str, list[ClassResult]]:
    if len(ranked) <= FEW:
        return {"All classes, the best first": ranked}
    return {"The worst classes": ranked[: -MOST - 1 : -1], "The best classes": ranked[:MOST]}
