"""The forecast says whether the input is fast enough, and what limits each epoch."""

import time
from pathlib import Path

import numpy as np
import pytest

from fasttrain import forecast, measured, shards
from fasttrain.forecast import Forecast, Rate, Stages

ADVICE = {"decode": "more cores", "storage": "another disk"}


def make(given: Rate, asked: Rate | None) -> tuple[Forecast, list[str], list[tuple[str, float]]]:
    said: list[str] = []
    kept: list[tuple[str, float]] = []
    outlook = Forecast(given, asked, Stages(), ADVICE, said.append, lambda *new: kept.append(new))
    return outlook, said, kept


def test_the_updates_are_compared_as_soon_as_they_are_known() -> None:
    outlook, said, kept = make(Rate(1000), None)
    outlook.start("these shards")
    assert said == ["input: 1,000 images/s, measured now, from these shards"]
    outlook.lap(0, 0)  # no update was counted yet
    outlook.lap(150, 0.25)
    outlook.lap(160, 0.25)  # said once
    assert said[1:] == ["updates: 200 images/s, measured now: the input is 5.0 times faster"]
    assert not kept  # the first updates may be disturbed


def test_a_slow_input_comes_with_advice_and_an_old_measurement_with_its_age() -> None:
    outlook, said, _ = make(Rate(1000, time.time() - 7000), Rate(900, time.time() - 3.1 * 86_400))
    outlook.start("these shards")
    assert "1,000 images/s, measured 2 hours ago" in said[0]
    assert "900 images/s, measured 3 days ago" in said[1] and said[1].endswith("more cores")
    outlook.lap(450, 0.5)
    assert len(said) == 2


@pytest.mark.parametrize(
    ("stages", "wait", "limit", "remedy"),
    [
        (Stages(storage_s=1, decode_s=2, full_s=7, images=10), 0.01, "compute", None),
        (Stages(storage_s=1, decode_s=8, full_s=1, images=10), 0.4, "decode", "more cores"),
        (Stages(storage_s=1, decode_s=2, full_s=7, images=10), 0.04, "compute", None),
        (Stages(storage_s=8, decode_s=1, full_s=1, images=10), 0.4, "storage", "another disk"),
    ],
)
def test_an_epoch_names_its_limit(
    stages: Stages, wait: float, limit: str, remedy: str | None
) -> None:
    outlook, said, _ = make(Rate(1000), None)
    outlook.stages = stages
    record = outlook.epoch(2, 123.4, wait)
    assert record["limit"] == limit and sum(list(record["loader"].values())[:3]) == pytest.approx(1)
    assert said[0].startswith(f"epoch 3: {limit} is the limit: 123 images/s, {wait:.0%}")
    assert (remedy or "waiting for data") in said[0]
    assert outlook.epoch(3, 123.4, 0)["loader"]["decode"] == 0  # of this epoch alone
    assert len(said) == (1 if limit == "compute" else 2)  # said where it changes


def test_later_runs_are_told_what_whole_epochs_measured() -> None:
    """A disturbed first measurement gives 60 images/s. An epoch at 500 corrects it."""
    outlook, _, kept = make(Rate(60), Rate(70))
    outlook.stages = Stages(full_s=10)
    outlook.epoch(0, 500, 0.0)
    assert not kept  # too short
    outlook.stages = Stages(full_s=50)
    outlook.epoch(1, 500, 0.0)
    assert kept == [("step", 500), ("input", 500)]
    outlook.stages = Stages(full_s=50, decode_s=100)
    outlook.epoch(2, 40, 0.5)  # the input was the limit
    assert kept[2:] == [("step", 80), ("input", 40)]


def test_a_remembered_rate_has_an_age_and_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forecast.remember_rate("a", 12.5)
    found = forecast.recall_rate("a")
    assert found and found.images_per_s == 12.5 and found.when().endswith("a minute ago")
    measured.remember("old", {"images_per_s": 1, "measured_at": time.time() - 31 * 86_400})
    measured.remember("other", 60.0)  # as an earlier version kept it
    assert forecast.recall_rate("old") is forecast.recall_rate("other") is None


def test_what_was_measured_is_kept_and_a_place_that_is_not_writable_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = measured.key_of("a", 1, Path("b"))
    assert measured.recall(key) is None
    measured.remember(key, [1, "x"])
    assert measured.recall(key) == [1, "x"]
    with monkeypatch.context() as lost:
        lost.setattr(measured, "cache_dir", lambda: Path("/proc/nowhere"))
        measured.remember(key, 2)
        assert measured.recall(key) is None


def test_advice_fits_the_shards(dataset: Path) -> None:
    split = shards.open_split(dataset, "train")
    assert "--store raw" in forecast.advice_for(split, "cpu", 2)["decode"]
    advice = forecast.advice_for(split, "gpu_full", 2)["decode"]
    pixels = split.width.astype(int) * split.height  # all smaller than 256
    gb = 3e-9 * pixels.sum()
    assert "several thousand" in advice and f"take {gb:.3g} GB" in advice
    assert forecast.raw_gb(split, 256) == pytest.approx(gb)
    assert forecast.raw_gb(split, 10) == pytest.approx(
        3e-9 * (pixels * (10 / np.minimum(split.width, split.height)) ** 2).sum()
    )
    text = forecast.describe(split, "cpu", 2, 1)
    assert "JPEG" in text and "decoded on the CPU" in text and "fit into the free memory" in text
