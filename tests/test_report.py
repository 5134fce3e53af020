"""report.py shows what the records of runs say, on a page that needs no other file."""

import csv
import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import report
from conftest import REPO, Refused
from reporting import charts, evaluations, figures, page, runs, seeds, summary
from reporting.runs import Spent

from fasttrain import config, files, matching, shards

T0 = 1_700_000_000.0  # 2023-11-14 22:13:20 UTC
START = {"world_size": 2, "device": "Test GPU", "host": "node1", "command": ["train.py", "a.toml"]}
STEPS = 4  # in an epoch of the runs below


def train_line(step: int, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    line = {"event": "train", "step": step, "epoch": step // STEPS, "loss": loss, "lr": 0.1}
    return line | {"images_per_s": 100.0, "data_wait": 0.25} | more


def eval_line(step: int, top1: float, **more: Any) -> dict[str, Any]:
    line = {"event": "eval", "step": step, "epoch": step // STEPS, "top1": top1, "top5": 90.0}
    return line | {"loss": 1.5, "seen": 13, "eval_s": 1.0} | more


def write_run(
    folder: Path, lines: list[Any], starts: list[dict[str, Any]] | None = None, **sections: Any
) -> Path:
    """Writes a run folder. `sections` change the recipe; a line that is a text is written as is."""
    folder.mkdir(parents=True)
    recipe: dict[str, dict[str, Any]] = {
        "train": {"epochs": 3},
        "optim": {"warmup_epochs": 1},
        "log": {"run_dir": str(folder)},
    }
    for section, table in sections.items():
        recipe[section] = recipe.get(section, {}) | table
    text = config.dumps(config.Recipe.model_validate_json(json.dumps(recipe)))
    (folder / "recipe.toml").write_text(text)
    written = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in written))
    (folder / "environment.json").write_text(json.dumps(starts or [START]))
    return folder


def write_evaluation(
    folder: Path, dataset: Path, rows: list[tuple[Any, ...]], names: tuple[str, ...] = tuple("abc")
) -> None:
    """Writes the files of an evaluation.

    Args:
        rows: sample, label, predicted, confidence and label_probability of each image.
    """
    folder.mkdir(parents=True)
    per_class = []
    for name in names:
        hits = [row[1] == row[2] for row in rows if row[1] == name]
        top1 = 100 * sum(hits) / max(len(hits), 1)
        per_class.append({"class": name, "images": len(hits), "top1": top1, "top5": 100.0})
    pairs = sorted({row[1:3] for row in rows if row[1] != row[2]})
    counts = {pair: sum(row[1:3] == pair for row in rows) for pair in pairs}
    confusions = [
        {"label": label, "predicted": predicted, "images": counts[label, predicted]}
        for label, predicted in sorted(pairs, key=lambda pair: -counts[pair])
    ]
    result = {
        "weights": "run/model.safetensors", "average": False, "data": str(dataset), "split": "val",
        "crop_px": 32, "resize_px": 36, "flip": False, "top1": 50.0, "top5": 100.0, "loss": 0.5,
        "seen": len(rows), "classes": per_class, "confusions": confusions,
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(result))
    with (folder / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("sample", "label", "predicted", "confidence", "label_probability"))
        writer.writerows(rows)


DRAWN = figures.Picture(
    {"light": b"<svg/>", "dark": b"<svg/>"},
    dict.fromkeys(("light", "dark"), b"\x89PNG\r\n\x1a\n" + bytes(8) + 2 * b"\0\0\1\0"),
)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Keeps the charts that would be drawn, which saves the time of drawing."""
    asked: list[Any] = []
    drawn = DRAWN

    def draw(what: Any) -> figures.Picture:
        asked.append(what)
        return drawn

    monkeypatch.setattr(figures, "draw", draw)
    return asked


def text_of(found: str) -> str:
    """The words of a page, without its tags."""
    body = re.sub(r"<style>.*?</style>", "", found, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def page_of(*folders: Path) -> tuple[str, str]:
    """The page of these runs, and its words."""
    made, _ = page.make(runs.read(folders))
    return made, text_of(made)


# --------------------------------------------------------------------------------------------------
# The whole command
# --------------------------------------------------------------------------------------------------


def two_runs(root: Path) -> list[Path]:
    """A run with two starts, times and an EMA; and a run without times, with another lr."""
    timed = [
        train_line(3, 2.0, time=T0 + 100),
        eval_line(3, 40.0, ema_top1=35.0, ema_top5=80.0, ema_loss=1.6, time=T0 + 110),
        train_line(7, 1.0, images_per_s=300.0, time=T0 + 1060),
        eval_line(7, 60.0, ema_top1=65.0, ema_top5=95.0, ema_loss=1.1, time=T0 + 1070),
        {"event": "limit", "step": 7, "epoch": 1, "limit": "decode", "images_per_s": 9.0},
    ]
    starts = [START | {"time": T0}, START | {"time": T0 + 1000, "world_size": 4}]
    first = write_run(root / "first", timed, starts, optim={"ema_decay": 0.9})
    second = write_run(root / "second", [train_line(3), eval_line(3, 50.0)], optim={"lr": 0.2})
    return [first, second]


def test_the_command_writes_a_page_that_needs_nothing_else(
    tmp_path: Path,
    undrawn: list[Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "r.html"
    words = ["report.py", *map(str, two_runs(tmp_path)), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    report.main()
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    pictures = tmp_path / "r_files"
    size = out.stat().st_size
    assert printed == {"page": str(out), "bytes": size, "pictures": str(pictures), "runs": 2}
    made = out.read_text()
    said = text_of(made)

    # 110 s of the first start on 2 processes, 70 s of the second on 4.
    assert "Wall time 3:00 min:s, in 2 starts" in said
    assert f"Device-hours {(110 * 2 + 70 * 4) / 3600:.3g}" in said
    # As many images at 100 as at 300 images/s.
    assert "Speed 150 images/s" in said
    assert "Best top-1 60.00 % after 2 epochs Last top-1 60.00 % after 2 epochs" in said
    assert "Best EMA top-1 65.00 % after 2 epochs" in said and "Last EMA top-5 95.00 %" in said
    assert "Stopped: 2 of 3 epochs are trained. The same command resumes it." in said
    assert "Hardware 2 x Test GPU, then 4 x Test GPU" in said
    assert "MobileNetV3-Large 1" in said and "Published" not in said
    assert "Of 1 epoch, the speed was limited by decode in 1." in said
    assert "setting first second optim.lr 0.4 0.2 optim.ema_decay 0.9 0.0" in said
    assert "Some or all records of this run have no times." in said
    assert "Only the curves over epochs show second, because records have no times." in said
    assert f"python tools/evaluate.py {tmp_path}/first --data data/imagenet" in said
    assert "2023-11-14 22:30:00 UTC on node1: 4 x Test GPU" in said
    for key in ("loss", "top-1", "learning-rate"):
        for axis in ("epochs", "time", "device-hours"):
            assert {f"{key}-over-{axis}{dark}.png" for dark in ("", "-dark")} <= {
                *os.listdir(pictures)
            }
    check_self_contained(made)


def check_self_contained(made: str) -> None:
    """Checks that a page refers to no other file."""
    assert "<script" not in made and "@import" not in made
    for value in re.findall(r'(?:src|href|srcset)="([^"]*)"', made):
        assert value.startswith("data:image/")
    assert "http" not in made.replace("http-equiv", "")


def test_each_wrong_command_is_refused(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "runs" / "one", [])
    refused(report.main, [], "the following arguments are required: RUN")
    refused(report.main, ["/nowhere"], "/nowhere: there is no such folder; name a run folder, such")
    refused(
        report.main, [run.parent],
        f"{run.parent} is not a run folder, because it has no recipe.toml; name the run folders in "
        f"it: {run}\n",
    )  # fmt: skip
    (tmp_path / "empty").mkdir()
    refused(report.main, [tmp_path / "empty"], "no recipe.toml; name one, such as runs/large")
    refused(report.main, [run, "--out", "/no/x.html"], "--out /no/x.html: there is no such folder")
    refused(report.main, [run, "--out", tmp_path], f"such as {tmp_path}/report.html")
    (tmp_path / "x_files").touch()
    refused(report.main, [run, "--out", tmp_path / "x.html"], "x_files, which is a file; remove it")
    many = [write_run(tmp_path / "many" / str(number), []) for number in range(9)]
    refused(report.main, [*many, "--out", tmp_path / "y.html"], "9 runs: a page shows at most 8")
    (run / "recipe.toml").write_text("[train]\nepoch = 3\n")
    refused(report.main, [run], "[train] epoch: unknown key; did you mean epochs?")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(
        report.main,
        [run],
        "not installed: matplotlib, jinja2; install them",
        "pip install -e '.[report]'",
    )
    assert not list(tmp_path.glob("*.html"))


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


def test_time_counts_from_each_start_to_its_last_line(tmp_path: Path) -> None:
    (run, untimed) = runs.read(two_runs(tmp_path))
    assert run.clock and run.steps_per_epoch == STEPS
    assert run.clock.spent(T0 + 100) == Spent(100, 200)
    assert run.clock.spent(T0 + 110) == Spent(110, 220)
    assert run.clock.spent(T0 + 1060) == Spent(170, 220 + 240)
    assert run.spent == Spent(180, 220 + 280)
    assert run.restarts == [1.0]
    reached = summary.Fact("Reached it", "after 1 epoch", "1:50 of wall time")
    assert summary._reached(run, run.metrics.evals[0].top1) == reached
    assert untimed.clock is None and untimed.spent is None and untimed.restarts == []
    assert [axis.runs for axis in charts.axes_for([run, untimed])] == [[0, 1], [0], [0]]


def test_a_run_without_times_has_the_time_of_its_closing_line(tmp_path: Path) -> None:
    done = eval_line(11, 70.0) | {"event": "done", "schedule_steps": 12, "seconds": 90.0}
    folder = write_run(tmp_path / "run", [eval_line(11, 70.0), done])
    (folder / "DONE").touch()
    (run,) = runs.read([folder])
    assert (run.spent, run.state, run.epochs_done) == (Spent(90, 180), "done", 3.0)
    assert summary.state(run) == "Done: 3 of 3 epochs are trained."
    fact = summary.Fact("Wall time", "1:30", "min:s, without the preparation")
    assert fact in summary.facts(run)


def test_starts_of_earlier_versions_have_a_date(tmp_path: Path) -> None:
    start = START | {"started": "2023-11-14T22:13:20+00:00"}
    (run,) = runs.read([write_run(tmp_path / "run", [train_line(1, time=T0 + 5)], [start])])
    assert run.spent == Spent(5, 10)


def test_damaged_lines_are_counted_and_left_out(tmp_path: Path, undrawn: list[Any]) -> None:
    damaged = [
        '{"event": "train", "st',
        "",
        "[1]",
        "7",
        '{"event": "eval", "step": -1}',
        '{"event": "train", "step": 1}',
        "\0",
    ]
    lines = [train_line(3), *damaged, {"event": "of another version"}, eval_line(3, 12.5)]
    folder = write_run(tmp_path / "run", lines)
    (run,) = runs.read([folder])
    assert (len(run.metrics.train), len(run.metrics.evals)) == (1, 1)
    assert run.metrics.num_damaged == len(damaged)
    _, said = page_of(folder)
    assert "7 lines of metrics.jsonl are damaged and left out." in said and "12.50 %" in said


@pytest.mark.parametrize(
    "content", ["", "{", '[{"device": "no world size"}]', '[{"world_size": 1, "time": 1e20}]', None]
)
def test_a_run_that_has_just_begun_has_a_page(
    content: str | None, tmp_path: Path, undrawn: list[Any]
) -> None:
    folder = write_run(tmp_path / "run", [])
    if content is None:
        (folder / "metrics.jsonl").unlink()
    else:
        (folder / "environment.json").write_text(content)
    _, said = page_of(folder)
    assert "Stopped: 0 of 3 epochs are trained." in said
    assert "There are no figures yet" in said and "There are no figures to draw yet." in said
    assert ("environment.json is damaged" in said) == (content is not None)


def test_a_run_that_is_going_says_so(tmp_path: Path, undrawn: list[Any]) -> None:
    lines = [train_line(1, time=T0 + 9)]
    folder = write_run(tmp_path / "run", lines, [START | {"time": T0}])
    with files.locked(folder / "lock"):
        made, said = page_of(folder)
    assert "Going: a part of the first of 3 epochs is trained, and it trains on." in said
    assert "Top-1 \N{EN DASH} the run was not evaluated yet" in said
    assert "Stopped: a part of the first" in page_of(folder)[1]
    assert made.count('type="radio"') == 3


@pytest.mark.parametrize(
    ("lines", "steps", "known"),
    [
        ([train_line(2)], 3, False),  # within the first epoch
        ([train_line(2), eval_line(3, 1.0)], 4, True),
        ([train_line(5)], 3, True),  # a bound of the last epoch; nothing better is known
    ],
)
def test_the_length_of_an_epoch_follows_from_the_lines(
    lines: list[Any], steps: int, known: bool, tmp_path: Path
) -> None:
    (run,) = runs.read([write_run(tmp_path / "run", lines)])
    assert run.steps_per_epoch == steps
    assert ("The length of an epoch is not known" in "".join(run.notes)) == (not known)


def test_the_length_of_an_epoch_is_that_of_the_data_set(tmp_path: Path, dataset: Path) -> None:
    line = train_line(2) | {"epoch": 0}
    data, train = {"root": str(dataset)}, {"global_batch_size": 9}
    (run,) = runs.read([write_run(tmp_path / "run", [line], data=data, train=train)])
    assert (run.steps_per_epoch, run.epochs_done, run.classes) == (5, 0.6, ("a", "b", "c"))


def test_names_are_short_and_differ(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / one / "run", []) for one in ("a", "b")]
    assert [run.name for run in runs.read([*folders, folders[0]])] == ["a/run", "b/run"]
    assert [run.name for run in runs.read(folders[:1])] == ["run"]


# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------


def test_charts_hold_the_values_of_the_lines(tmp_path: Path) -> None:
    found = runs.read(two_runs(tmp_path))
    epochs, time, device_hours = charts.axes_for(found)
    loss, accuracy, _ = charts.progress(found, epochs)
    assert [(c.run, c.style, c.x, c.y) for c in loss.chart.curves] == [
        (0, "line", [1, 2], [2.0, 1.0]),
        (0, "dotted", [1, 2], [1.5, 1.5]),
        (1, "line", [1], [1.0]),
        (1, "dotted", [1], [1.5]),
    ]
    assert [(c.run, c.y) for c in accuracy.chart.curves] == [
        (0, [40, 60]),
        (0, [35, 65]),
        (1, [50]),
    ]
    assert accuracy.text == (
        "Top-1 accuracy, % of the validation images, over epochs. first, weights: from 40 to 60. "
        "first, EMA of the weights: from 35 to 65. second, weights: from 50 to 50."
    )
    assert charts.progress(found, time)[2].chart.curves[0].x == [100 / 60, 170 / 60]
    assert charts.progress(found, device_hours)[2].chart.curves[0].x == [200 / 3600, 460 / 3600]
    throughput, wait, size = charts.speed(found)
    assert throughput.chart.curves[0].y == [100, 300] and wait.chart.curves[0].y == [25, 25]
    assert throughput.chart.restarts == {0: [1.0]}
    assert size.chart.curves[0].y == [224] * 4


def test_image_sizes_follow_the_schedule(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [], data={"crop_px": [[0, 128], [2, 160]]})
    (size,) = charts.speed(runs.read([folder]))
    assert (size.chart.curves[0].x, size.chart.curves[0].y) == ([0, 1, 2, 3], [128, 128, 160, 160])


def test_image_sizes_that_updates_draw_are_shown_as_a_range(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [], data={"scales_px": [128, 320, 224]})
    (size,) = charts.speed(runs.read([folder]))
    assert [(c.x, c.y) for c in size.chart.curves] == [([0, 3], [128, 128]), ([0, 3], [320, 320])]


def with_classes(folder: Path, names: tuple[str, ...]) -> Path:
    """Gives a run a checkpoint that names its classes."""
    checkpoint = folder / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"classes": names}))
    return folder


def test_runs_that_differ_in_the_seed_alone_have_a_mean_and_a_spread(
    tmp_path: Path, undrawn: list[Any]
) -> None:
    def run(name: str, top1: float, seed: int, last: int = 11, **sections: Any) -> Path:
        lines = [eval_line(3, 10.0), eval_line(last, top1, ema_top1=top1 + 1)]
        sections["train"] = {"seed": seed} | sections.get("train", {})
        return write_run(tmp_path / name, lines, **sections)

    folders = [
        run("plain-0", 60.0, 0), run("plain-1", 63.0, 1), run("plain-2", 61.5, 2),
        run("smooth-0", 64.0, 0, train={"label_smoothing": 0.1}),
        run("smooth-1", 65.0, 1, train={"label_smoothing": 0.1, "cpu_threads": 1}),
        run("shorter", 50.0, 3, last=7), run("alone", 70.0, 0, optim={"lr": 0.3}),
        write_run(tmp_path / "not evaluated", [train_line(1)], train={"seed": 4}),
    ]  # fmt: skip
    found = seeds.groups(runs.read(folders))
    assert [[run.name for run in group.runs] for group in found] == [
        ["plain-0", "plain-1", "plain-2"], ["smooth-0", "smooth-1"]
    ]  # fmt: skip
    assert found[0].top1 == seeds.Spread(61.5, 1.5, 60.0, 63.0) and found[0].epochs == 3
    assert found[1].ema_top1 and found[1].ema_top1.mean == 65.5
    said = page_of(*folders)[1]
    row = "plain-0, plain-1, plain-2 3 3 61.50 ± 1.50 % 60.00, 63.00 62.50 ± 1.50 %"
    assert "Several seeds" in said and row in said
    assert "Several seeds" not in page_of(*folders[-3:])[1]


def test_published_figures_are_shown_for_imagenet_alone(tmp_path: Path) -> None:
    imagenet = matching.imagenet()
    lines = [eval_line(3, 70.0)]
    folders = [
        with_classes(write_run(tmp_path / "large", lines), imagenet),
        with_classes(write_run(tmp_path / "small", lines, model={"arch": "small"}), imagenet),
        with_classes(write_run(tmp_path / "ten", lines), imagenet[:10]),
        with_classes(write_run(tmp_path / "wide", lines, model={"width": 2.0}), imagenet),
    ]
    found = runs.read(folders)
    assert [summary.published(run) for run in found] == [
        (74.28, 91.928), (67.214, 87.304), None, None,
    ]  # fmt: skip
    assert summary.Fact("Reached it", "not yet") in summary.facts(found[0])
    assert summary.Fact("Reached it", "after 1 epoch") in summary.facts(found[1])
    both = charts.progress(found, charts.axes_for(found)[0])[1].chart.levels
    assert both == {
        74.28: "published for MobileNetV3-Large 1: 74.28 %",
        67.214: "published for MobileNetV3-Small 1: 67.21 %",
    }
    one = charts.progress(found[:1], charts.axes_for(found[:1])[0])[1].chart.levels
    assert one == {74.28: "published: 74.28 %"}


def test_published_figures_are_those_of_the_readme() -> None:
    text = (REPO / "README.md").read_text()
    rows = re.findall(r"^\| \[`(\w+)\.toml`\].*?\| ([\d.]+) / ([\d.]+) \|", text, re.M)
    found = {}
    for name, top1, top5 in rows:
        model = config.load(REPO / "recipes" / f"{name}.toml").model
        found[model.arch, model.width] = (float(top1), float(top5))
    assert found == summary.PUBLISHED


def test_every_kind_of_figure_can_be_drawn() -> None:
    """Long names, formulas, values that are not finite, one point, many classes."""
    curves = [
        figures.Curve(0, [1.0, 2.0, 3.0], [5.0, float("nan"), 0.01]),
        figures.Curve(1, [1.0], [3.0], style="dotted", marked=True),
    ]
    names = ["a" * 90, "$x_{"]
    chart = figures.Chart("Loss", "epochs", curves, names, levels={4.0: "published"})
    many = figures.Bars("Classes", [str(n) for n in range(1000)], [n / 10 for n in range(1000)])
    for what, label in ((chart, "epochs"), (many, "classes, the best first")):
        drawn = figures.draw(what)
        assert drawn.png["light"][:4] == drawn.png["dark"][:4] == b"\x89PNG"
        for name, theme in figures.THEMES.items():
            text = drawn.svg[name].decode()
            assert theme.ink in text and f">{label}<" in text
            links = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', text)
            assert links and all((one or other).startswith("#") for one, other in links)
            # The names of formats are never opened.
            assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>', "", text)
    assert figures.short("a" * 90) == "a" * 12 + "\N{HORIZONTAL ELLIPSIS}" + "a" * 12
    assert drawn == figures.draw(many)  # the same values give the same files


# --------------------------------------------------------------------------------------------------
# Classes and mistakes
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(dataset: Path) -> list[tuple[Any, ...]]:
    """Predictions for the validation images: classes a and b are right, c is taken for a."""
    split = shards.open_split(dataset, "val")
    labels = [split.classes[label] for label in split.label]
    guesses = ["a" if label == "c" else label for label in labels]
    return [
        (n, label, guess, 0.5 + n / 100, 0.25)
        for n, (label, guess) in enumerate(zip(labels, guesses, strict=True))
    ]


@pytest.fixture
def evaluated(tmp_path: Path, dataset: Path, rows: list[tuple[Any, ...]]) -> Path:
    """The folder of a run with an evaluation."""
    lines = [eval_line(3, 50.0)]
    folder = write_run(tmp_path / "run", lines, data={"root": str(dataset)})
    write_evaluation(folder / "evaluation", dataset, rows)
    return folder


def photos_of(made: str) -> int:
    return made.count('src="data:image/jpeg')


def test_mistakes_are_shown_with_their_images(
    evaluated: Path, rows: list[tuple[Any, ...]], undrawn: list[Any]
) -> None:
    made, said = page_of(evaluated)
    mistakes = [row for row in rows if row[1] == "c"]
    number = len(mistakes)
    assert number == 4
    assert f"c is taken for a in {number} of {number} images." in said
    surest = mistakes[-1]
    assert f"c , taken for a {100 * surest[3]:.1f} % sure; 25.0 % for the right class" in said
    assert photos_of(made) == 2 * number  # once among confusions, once among mistakes
    assert "All classes, the best first class images top-1 top-5 a 5 100.0 % 100.0 %" in said
    bars = next(one for one in undrawn if isinstance(one, figures.Bars))
    assert (bars.names, bars.percent) == (["a", "b", "c"], [100.0, 100.0, 0.0])
    check_self_contained(made)


def test_without_the_data_set_the_page_says_so(
    evaluated: Path, copied: Path, undrawn: list[Any]
) -> None:
    path = evaluated / "evaluation" / "evaluation.json"
    result = json.loads(path.read_text())
    recipe = (evaluated / "recipe.toml").read_text()
    place = json.dumps(result["data"])
    (evaluated / "recipe.toml").write_text(recipe.replace(place, '"/nowhere"'))
    path.write_text(json.dumps(result | {"data": "/gone"}))
    made, said = page_of(evaluated)
    assert photos_of(made) == 0 and "c is taken for a" in said
    assert "There are no images here: no data set at /gone" in said
    # The data set was moved: the recipe names its place.
    (evaluated / "recipe.toml").write_text(recipe.replace(place, json.dumps(str(copied))))
    assert photos_of(page_of(evaluated)[0]) == 8
    # An image whose bytes changed is left out.
    tar = copied / "val-000000.tar"
    split = shards.open_split(copied, "val")
    data = bytearray(tar.read_bytes())
    first = next(n for n in range(13) if split.classes[split.label[n]] == "c")
    assert split.shard_paths[split.shard[first]] == tar
    data[int(split.offset[first]) + 300] ^= 255
    tar.write_bytes(data)
    assert photos_of(page_of(evaluated)[0]) == 6
    # Another data set has the place.
    path.write_text(json.dumps(result | {"data": "/gone", "seen": 12}))
    assert "There are no images here" in page_of(evaluated)[1]


def test_several_data_sets_have_a_section_each(
    evaluated: Path, dataset: Path, rows: list[tuple[Any, ...]], undrawn: list[Any]
) -> None:
    folder = evaluated / "evaluation"
    shutil.move(folder, evaluated / "first")
    folder.mkdir()
    shutil.move(evaluated / "first", folder / "first")
    right = [(row[0], row[1], row[1], 0.9, 0.9) for row in rows]
    write_evaluation(folder / "second", dataset, right)
    made, pictures = page.make(runs.read([evaluated]))
    assert {"classes-run-first.png", "classes-run-second.png"} <= set(pictures)
    assert "The network makes no mistakes on these images." in made


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("evaluation.json", lambda text: text[:50], "is damaged (the file: "),
        ("evaluation.json", lambda text: text.replace('"seen"', '"s"'), "is damaged (seen: Field"),
        ("predictions.csv", lambda text: text.replace("0.5", "x"), "is damaged (confidence: "),
        ("predictions.csv", None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_damaged_evaluation_is_refused(
    name: str,
    change: Callable[[str], str] | None,
    fault: str,
    evaluated: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    path = evaluated / "evaluation" / name
    text = path.read_text()
    path.unlink()
    if change:
        path.write_text(change(text))
    refused(
        report.main, [evaluated, "--out", tmp_path / "x.html"], f"{path} {fault}",
        f"; make it again with\n    python tools/evaluate.py {evaluated} --data ",
    )  # fmt: skip


def test_names_from_files_cannot_change_the_page(
    tmp_path: Path, dataset: Path, undrawn: list[Any]
) -> None:
    evil = "<script>alert('x')</script>&\""
    start = START | {"host": evil, "command": ["train.py", evil], "device": evil}
    folder = write_run(tmp_path / evil.replace("/", "\\"), [eval_line(3, 50.0)], [start])
    rows = [(0, evil, "b", 0.9, 0.1), (1, "b", evil, 0.9, 0.1)]
    write_evaluation(folder / "evaluation", tmp_path / evil, rows, (evil, "b"))
    made, said = page_of(folder)
    assert "<script" not in made and said.count(evil) > 5
    (bars,) = (one for one in undrawn if isinstance(one, figures.Bars))
    assert bars.names == [evil, "b"]


@pytest.mark.slow  # imports torchvision's networks
def test_classes_of_imagenet_are_shown_in_words() -> None:
    found = evaluations.words_for(["n01440764", "n03888257"])
    assert found == {"n01440764": "tench", "n03888257": "parachute"}
    assert evaluations.words_for(["n01440764", "cat"]) == {"n01440764": "", "cat": ""}


# --------------------------------------------------------------------------------------------------
# In a browser
# --------------------------------------------------------------------------------------------------

FRAME = """<iframe id="f" src="r.html" width="360" height="900"></iframe><script>
document.getElementById("f").onload = (event) => {
  const page = event.target.contentDocument;
  const broken = [...page.images].filter((image) => !image.naturalWidth).length;
  const hidden = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  document.title = `${hidden} px too wide, ${broken} broken of ${page.images.length}`;
};</script>"""


@pytest.mark.slow
def test_a_browser_shows_the_page_without_an_error(evaluated: Path, tmp_path: Path) -> None:
    """The console stays empty, each picture is shown, and 360 px are enough."""
    if not (browser := shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no Chromium")
    report.report([evaluated, *two_runs(tmp_path)], tmp_path / "r.html")
    (tmp_path / "frame.html").write_text(FRAME)
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=8000", "--dump-dom", f"file://{tmp_path / 'frame.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    number = (tmp_path / "r.html").read_text().count("<img ")
    assert f"<title>0 px too wide, 0 broken of {number}</title>" in done.stdout
    assert "CONSOLE" not in done.stderr
