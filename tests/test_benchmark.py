"""benchmark.py measures every contestant in its own process, and reports one that crashes."""

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark
import pytest
from benchmarks import input as inputs
from benchmarks import (
    output,
    own_process,
    pipelines,
    plot,
    scaling,
    steps,
)
from conftest import shard

from fasttrain import shards
from fasttrain.sharding import Policy

pytestmark = pytest.mark.filterwarnings("ignore:.*capabilities of TorchVision are deprecated")

KEYS = {"images", "seconds", "images_per_s", "cpu_ms_per_image", "first_batch_s", "foreign_cpu"}
TINY = ("--images", 16, "--batch", 8, "--crop-px", 32, "--threads", 1, "--repeats", 1)


@pytest.fixture
def measured(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[dict[str, Any]]]:
    """Runs `benchmark.py input` and returns the lines it printed."""

    def command(*words: Any) -> list[dict[str, Any]]:
        benchmark.main(["input", *(str(word) for word in words)])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return command


def job(name: str, dataset: Path, folder: Path | None = None, **changes: Any) -> pipelines.InputJob:
    settings = {"threads": 1, "batch": 8, "crop_px": 32, "images": 16} | changes
    return pipelines.InputJob(name=name, shards=dataset, folder=folder, **settings)


@pytest.mark.slow
def test_the_input_is_measured_beside_other_pipelines(
    dataset: Path,
    folder: Path,
    measured: Callable[..., list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("fasttrain", "torchvision v1", "webdataset")
    monkeypatch.setattr(pipelines, "PIPELINES", {name: pipelines.PIPELINES[name] for name in names})
    machine, ours, theirs, tars, total = measured(dataset, "--folder", folder, *TINY)
    assert {"cpu", "cpus", "python", "torch", "commit"} <= set(machine)
    more = {"threads", "batch", "peak_rss_gib", "bytes_per_image", "mean_pixels", "disturbed"}
    assert KEYS | more | {"queue_depth", "speed_over"} <= set(ours)
    assert KEYS | more <= set(theirs) and theirs["name"] == "torchvision v1"
    assert ours["images"] == 32 and ours["peak_rss_gib"] > 0  # four batches of the one thread
    assert set(ours["speed_over"]) == {"torchvision v1", "webdataset"}
    assert ours["mean_pixels"] == theirs["mean_pixels"]
    assert KEYS | more <= set(tars) and tars["bytes_per_image"] == ours["bytes_per_image"]
    assert total["measurements"] == 3 and total["failed"] == 0


@pytest.mark.slow
def test_torchvision_v2_makes_batches(dataset: Path, folder: Path) -> None:
    assert set(own_process.measure(job("torchvision v2", dataset, folder), "input")) >= KEYS


@pytest.mark.parametrize("name", ["fasttrain", "DALI reader", "decode alone"])
def test_pipelines_that_use_threads_make_batches(name: str, dataset: Path) -> None:
    assert set(inputs.measure(job(name, dataset))) >= KEYS


@pytest.mark.parametrize("name", ["fasttrain", "DALI reader"])
def test_pipelines_read_raw_shards(name: str, folder: Path, tmp_path: Path) -> None:
    shard(folder, tmp_path, Policy(store="raw"))
    assert set(inputs.measure(job(name, tmp_path))) >= KEYS


@pytest.mark.parametrize("name", pipelines.READERS)
def test_reading_is_measured_without_decoding(name: str, dataset: Path) -> None:
    assert inputs.measure(job(name, dataset, raw=True))["loader_us_per_image"] > 0


def test_pipelines_that_cannot_take_part_are_left_out(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    split = shards.open_split(dataset, "train")
    reasons = {name: inputs.why_not(job(name, dataset), split) for name in pipelines.PIPELINES}
    assert {name for name, reason in reasons.items() if reason} == {
        "torchvision v1",
        "torchvision v2",
        "webdataset",
    }
    assert reasons["webdataset"] == "not installed: pip install -e '.[bench]'"
    raw = inputs.why_not(job("decode alone", dataset), dataclasses.replace(split, store="raw"))
    assert raw == "raw shards need no decoding"


def test_contestants_take_turns(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []

    def measure(job: own_process.Job, part: str) -> own_process.Result:
        order.append(job.name)
        return {"images_per_s": len(order)}

    monkeypatch.setattr(own_process, "measure", measure)
    jobs = [job("fasttrain", dataset), job("webdataset", dataset)]
    turns = own_process.take_turns(jobs, "input", 2, lambda job: {"cached": 0.5})
    assert order == ["fasttrain", "webdataset"] * 2
    assert turns[jobs[1]] == [{"images_per_s": n, "cached": 0.5} for n in (2, 4)]
    assert capsys.readouterr().err.splitlines()[-1] == "2/2 webdataset"


def test_figures_are_medians_of_the_turns() -> None:
    turns: list[dict[str, Any]] = [
        {"a": 1.0, "b": None},
        {"a": 3.00004, "b": None},
        {"a": 8.0, "c": 2},
    ]
    assert output.medians(turns, ("a", "b", "c", "d")) == {"a": 3.0, "b": None, "c": 2.0}
    # Both sides of a pair slow down together, so the ratio is that of each turn.
    assert output.paired_ratio([10, 5, 20], [5, 2.5, 11]) == 2.0


def test_a_table_shows_the_figures_to_people(capsys: pytest.CaptureFixture[str]) -> None:
    step = {"batch": 64, "precision": "no", "layout": "channels_last", "step_ms": 640.25}
    output.show([
        {"cpu": "of this machine"},
        {"name": "fasttrain", "execution": "eager", "images_per_s": 1234.5, **step},
        {"name": "torchvision", "execution": "compile", "images_per_s": 99.87, **step},
        {"name": "timm", "skipped": "not installed"},
        {"name": "other", "failed": [{"failed": "Traceback\nlast words"}]},
        {"batch": 64, "precision": "no", "best": {"fasttrain": "eager"},
         "speed_over": {"torchvision": 12.345}},
        {"batch": 64, "loop_over_step": {"fasttrain loop": 0.98}},
    ])  # fmt: skip
    out, text = capsys.readouterr()
    assert not out
    for part in (
        "batch 64, precision no, layout channels_last", "execution", "1,234", "99.87", "640.2",
        "timm was left out: not installed", "other failed: last words",
        "fasttrain (batch 64, no, eager) is 12.35 times as fast as torchvision",
        "the loop has 0.980 of the speed of the bare updates",
    ):  # fmt: skip
        assert part in text, part


def test_a_crash_is_reported_in_a_line(
    dataset: Path,
    measured: Callable[..., list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    crash = tmp_path / "python"
    crash.write_text("#!/bin/sh\necho 'last words' >&2\nkill -SEGV $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crash))
    with pytest.raises(SystemExit) as stopped:
        measured(dataset, *TINY, "--raw")
    assert stopped.value.code == 1
    _, *lines, total = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [line["name"] for line in lines] == list(pipelines.READERS)
    for line in lines:
        assert line["failed"] == [{"failed": "SIGSEGV", "error": "last words"}]
    assert total["failed"] == len(lines)


def test_lists_of_settings_are_measured_in_all_combinations(dataset: Path) -> None:
    parser = argparse.ArgumentParser()
    inputs.add_arguments(parser)
    words = [str(dataset), "--threads", "1,2", "--batch", "4,8", "--queue-depth", "1,2,4"]
    jobs = list(inputs.all_jobs(parser.parse_args(words)))
    assert len(jobs) == len(set(jobs)) == 2 * 2 * (3 + len(pipelines.PIPELINES) - 1)
    gpu = list(inputs.all_jobs(parser.parse_args([*words, "--device", "gpu"])))
    strategies = {job.decode for job in gpu if job.name == "fasttrain"}
    assert strategies == {"cpu", "gpu_full", "gpu_window"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "8,46"], "--batch 46: more than the 45 training images"),
        (["--threads", "0"], "argument --threads: '0' is not a whole number from 1"),
        (["--batch", "8", "--folder", "nowhere"], "no images in nowhere/train/<class>/"),
        (["--batch", "8", "--cold"], "warm-up and shuffling included. That is more than the 45"),
        (["--batch", "8", "--raw", "--device", "gpu"], "--raw: the CPU does the reading"),
        (["--batch", "8", "--device", "gpu"], "--device gpu: torch finds no GPU here"),
    ],
)
def test_wrong_options_are_refused(
    words: list[str], message: str, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["input", str(dataset), *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_another_folder_is_refused(
    dataset: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["input", str(tmp_path)])
    assert "no data set at" in capsys.readouterr().err
    (tmp_path / "train").symlink_to(folder / "val")
    with pytest.raises(SystemExit):
        benchmark.main(["input", str(dataset), "--batch", "8", "--folder", str(tmp_path)])
    assert "it has 13 training images, but the shards have 45" in capsys.readouterr().err


def test_cached_bytes_of_a_file_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10_000))
    assert inputs.num_cached(path) == 10_000
    assert 0 <= inputs.drop_from_cache([path])["cached"] <= 1


# --------------------------------------------------------------------------------------------------
# step, loop and scaling
# --------------------------------------------------------------------------------------------------


def step_job(name: str, **changes: Any) -> steps.StepJob:
    settings: dict[str, Any] = {
        "name": name,
        "arch": "small", "width": 0.75, "batch": 4, "px": 32, "precision": "no", "seconds": 0.1,
        "execution": "eager", "layout": "channels_last", "device": "cpu", "threads": 1,
    }  # fmt: skip
    return steps.StepJob(**settings | changes)


@pytest.mark.parametrize("name", ["fasttrain", "plain loop", "torchvision", "timm"])
def test_each_contestant_trains(name: str) -> None:
    if name == "timm":
        pytest.importorskip("timm")
    job = step_job(name)
    update = steps.fasttrain_update(job) if name == "fasttrain" else steps.rival_update(job)
    losses = [update().item() for _ in range(4)]
    assert 3 < losses[0] < 15 and losses[-1] != losses[0]


@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_loop_is_compared_with_the_bare_step(
    capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest, deterministic: bool
) -> None:
    words = "loop --arch small --crop-px 32 --batch 4 --threads 1 --repeats 1 --seconds 0.2".split()
    if deterministic:  # which is for the whole process, so it needs its own
        words += ["--deterministic"]
    else:
        request.getfixturevalue("measured_here")
    benchmark.main([*words, "--profile"])
    machine, bare, *profiled, ratio = map(json.loads, capsys.readouterr().out.splitlines())
    if deterministic:
        *profiled, repeats, loop, cost = profiled
        assert repeats["name"] == "fasttrain deterministic" and repeats["execution"] == "eager"
        assert 0.2 < cost["speed_over"]["fasttrain deterministic"] < 5
    else:
        *profiled, loop = profiled
    assert machine["torch"] and bare["name"] == "fasttrain" and loop["name"] == "fasttrain loop"
    assert bare["images_per_s"] > 0 and bare["first_step_s"] > 0 and bare["peak_gib"] > 0
    assert 0.2 < ratio["loop_over_step"]["fasttrain loop"] < 5
    copied, *rows = profiled
    assert copied["copy_gb_per_s"] > 0
    assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)
    (convolved,) = (row for row in rows if row["name"] == "aten::convolution_backward")
    assert convolved["mb"] > 0 and convolved["of_copy"] > 0


def test_modes_that_the_machine_lacks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (("--modes", "graph"), "a CUDA graph needs a GPU"),
        (("--modes", "fast"), "fast: not among eager, compile, compile_fuse, graph"),
        (("--device", "gpu"), "torch finds no GPU here"),
    ):
        with pytest.raises(SystemExit):
            benchmark.main(["step", *words])
        assert said in capsys.readouterr().err


FIGURES = scaling.Figures(
    step_s={8: 0.008, 64: 0.016, 1024: 0.1024},
    gradient_bytes=20_000_000,
    per_node=8,
    inside=100e9,
    between=10e9,
    latency_s=1e-5,
)


def predicted(devices: int, batch: int = 1024, **changes: Any) -> dict[str, Any]:
    training = scaling.Training(images=1_281_167, val_images=50_000, epochs=150)
    return scaling.predict(devices, batch, training, FIGURES._replace(**changes))


def test_a_prediction_interpolates_between_measured_batches() -> None:
    seconds = [scaling.compute_s(n, FIGURES.step_s) for n in (1, 8, 36, 64, 1024, 2048)]
    assert seconds == pytest.approx([0.008, 0.008, 0.012, 0.016, 0.1024, 0.2048])


def test_one_device_exchanges_nothing_and_the_epoch_adds_up() -> None:
    one = predicted(1)
    assert one["exchange_ms"] == 0 and one["images_per_s"] == 10_000 and one["limit"] == "compute"
    assert one["efficiency"] == 1 and one["lr"] == 0.4
    epoch = 1251 * 0.1024 + 50_000 / (3 * 10_000)
    assert one["epoch_s"] == pytest.approx(epoch, abs=0.1)
    assert one["run_h"] == pytest.approx(150 * epoch / 3600, abs=0.01)


def test_a_prediction_names_its_limit() -> None:
    eight = predicted(8)
    ring = 2 * 7 / 8 * 20e6 / 100e9 + 2 * 2 * 3 * 1e-5
    assert eight["exchange_ms"] == pytest.approx(1e3 * ring, abs=1e-3)
    assert predicted(16)["exchange_ms"] > eight["exchange_ms"] + 2
    assert predicted(512)["limit"] == "too few images a device"
    assert predicted(512, between=1e8)["limit"] == "exchange of gradients"
    starved = predicted(8, input_rate=5000.0)
    assert starved["limit"] == "input" and starved["images_per_s"] == 5000
    assert predicted(16, input_rate=5000.0)["images_per_s"] == 10_000
    assert predicted(8, batch=4096)["lr"] == 1.6


GIVEN = ("scaling", "--step-ms", "128:9,1024:60", "--inside", "200", "--batch", "1024")


def test_scaling_takes_given_figures(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main([*GIVEN, "--devices", "1,8,64"])
    about, *lines = map(json.loads, capsys.readouterr().out.splitlines())
    assert about["gradient_bytes"] == 4 * 5_483_032
    assert [line["devices"] for line in lines] == [1, 8, 64]
    assert lines[0]["images_per_s"] == round(1024 / 0.06)


def test_a_prediction_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [predicted(devices, batch) for batch in (1024, 4096) for devices in (1, 8, 512)]
    figure = plot.figure_of(rows, "title")
    (axes,) = figure.axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["global batch 1,024"].get_xdata().tolist() == [1, 8, 512]
    assert lines["global batch 4,096"].get_ydata().tolist() == [
        row["images_per_s"] for row in rows[3:]
    ]
    # Within 1 %, because the efficiency that it follows from is rounded.
    assert lines["ideal"].get_ydata()[-1] == pytest.approx(512 * 10_000, rel=0.01)
    plot.draw(rows, "title", tmp_path / "a.svg")
    plot.draw(rows, "title", tmp_path / "b.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text() and "global batch 4,096" in drawn


def test_a_drawing_without_matplotlib_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stopped:
        benchmark.main([*GIVEN, "--plot", str(tmp_path / "x.svg")])
    assert stopped.value.code == 2
    assert "matplotlib draws it and is not installed; install it with\n    pip install -e" in (
        capsys.readouterr().err
    )


def test_links_between_two_processes_are_measured() -> None:
    speed, latency = scaling.measure_links(4_000_000, "cpu")
    assert 1e7 < speed < 1e12 and 0 < latency < 0.1
