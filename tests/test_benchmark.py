"""benchmark.py measures every contestant in a process of its own and survives what befalls them."""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO, shard

sys.path.insert(0, str(REPO / "tools"))
import benchmark
import rivals

from fasttrain import shards

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


def job(name: str, dataset: Path, folder: Path | None = None, **changes: Any) -> rivals.Job:
    settings = {"threads": 1, "batch": 8, "crop_px": 32, "images": 16} | changes
    return rivals.Job(name=name, shards=dataset, folder=folder, **settings)


def test_command(
    dataset: Path,
    folder: Path,
    measured: Callable[..., list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("fasttrain", "torchvision v1", "webdataset")
    monkeypatch.setattr(rivals, "PIPELINES", {name: rivals.PIPELINES[name] for name in names})
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
def test_torchvision_v2(dataset: Path, folder: Path) -> None:
    assert set(benchmark.measure_apart(job("torchvision v2", dataset, folder))) >= KEYS


@pytest.mark.parametrize("name", ["fasttrain", "DALI reader", "decode alone"])
def test_pipelines_with_threads(name: str, dataset: Path) -> None:
    assert set(benchmark.measure_input(job(name, dataset))) >= KEYS


@pytest.mark.parametrize("name", ["fasttrain", "DALI reader"])
def test_raw_shards(name: str, folder: Path, tmp_path: Path) -> None:
    shard(folder, tmp_path, benchmark.Policy(store="raw"))
    assert set(benchmark.measure_input(job(name, tmp_path))) >= KEYS


@pytest.mark.parametrize("name", rivals.READERS)
def test_reading_alone(name: str, dataset: Path) -> None:
    assert benchmark.measure_input(job(name, dataset, raw=True))["loader_us_per_image"] > 0


def test_who_is_skipped(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    split = shards.open_split(dataset, "train")
    reasons = {name: benchmark.why_not(job(name, dataset), split) for name in rivals.PIPELINES}
    assert {name for name, reason in reasons.items() if reason} == {
        "torchvision v1",
        "torchvision v2",
        "webdataset",
    }
    assert reasons["webdataset"] == "not installed: pip install webdataset"
    raw = benchmark.why_not(job("decode alone", dataset), dataclasses.replace(split, store="raw"))
    assert raw == "nothing is left to decode in raw shards"


def test_a_crash_is_a_line(
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
    assert [line["name"] for line in lines] == list(rivals.READERS)
    for line in lines:
        assert line["failed"] == [{"failed": "SIGSEGV", "error": "last words"}]
    assert total["failed"] == len(lines)


def test_sweeps(dataset: Path) -> None:
    parser = benchmark.argparse.ArgumentParser()
    benchmark.add_input(parser)
    words = [str(dataset), "--threads", "1,2", "--batch", "4,8", "--queue-depth", "1,2,4"]
    jobs = list(benchmark.all_jobs(parser.parse_args(words)))
    assert len(jobs) == len(set(jobs)) == 2 * 2 * (3 + len(rivals.PIPELINES) - 1)
    gpu = list(benchmark.all_jobs(parser.parse_args([*words, "--device", "gpu"])))
    strategies = {job.decode for job in gpu if job.name == "fasttrain"}
    assert strategies == {"cpu", "gpu_full", "gpu_window"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "8,46"], "--batch 46: more than the 45 training images"),
        (["--threads", "0"], "argument --threads: '0' is no whole number from 1"),
        (["--batch", "8", "--folder", "nowhere"], "no images in nowhere/train/<class>/"),
        (["--batch", "8", "--cold"], "with those to warm up and shuffle, are more than the 45"),
        (["--batch", "8", "--raw", "--device", "gpu"], "--raw: reading is done on the CPU"),
        (["--batch", "8", "--device", "gpu"], "--device gpu: torch finds no GPU here"),
    ],
)
def test_bad_options(
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
    assert "13 training images, 45 in the shards" in capsys.readouterr().err


def test_the_page_cache_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10_000))
    assert benchmark.num_cached(path) == 10_000
    assert 0 <= benchmark.drop_from_cache([path])["cached"] <= 1
