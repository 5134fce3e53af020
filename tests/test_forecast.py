"""The forecast: what it says of an input that is fast enough, of one that is not, and of epochs."""

from pathlib import Path

import numpy as np
import pytest

from fasttrain import forecast, shards
from fasttrain.forecast import Forecast, Stages


def make(delivers: float, asked: float | None) -> tuple[Forecast, list[str], list[float]]:
    said: list[str] = []
    remembered: list[float] = []
    advice = {"decode": "more cores", "storage": "another disk"}
    stages = Stages()
    return (
        Forecast(delivers, asked, stages, advice, said.append, remembered.append),
        said,
        remembered,
    )


def test_the_step_is_compared_as_soon_as_it_is_known() -> None:
    outlook, said, remembered = make(1000, None)
    outlook.start("these shards")
    assert said[0] == "input: 1,000 images/s from these shards" and len(said) == 2
    outlook.lap(0, 0)  # no update was counted yet
    outlook.lap(150, 0.25)
    outlook.lap(160, 0.25)  # said once
    assert said[2:] == ["step: 200 images/s, as measured now: the input is 5.0 times faster"]
    assert remembered == [200]


def test_a_slow_input_comes_with_advice() -> None:
    outlook, said, remembered = make(1000, 900)
    outlook.start("these shards")
    assert "as measured in an earlier run" in said[1] and said[1].endswith("more cores")
    outlook.lap(450, 0.5)
    assert len(said) == 2 and remembered == [900]


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
    outlook, said, _ = make(1000, None)
    outlook.stages = stages
    record = outlook.epoch(2, 123.4, wait)
    assert record["limit"] == limit and sum(list(record["loader"].values())[:3]) == pytest.approx(1)
    assert said[0].startswith(f"epoch 3: {limit} was the limit at 123 images/s, {wait:.0%}")
    assert (remedy or "waited for data") in said[0]
    assert outlook.epoch(3, 123.4, wait)["loader"]["decode"] == 0  # of this epoch alone


def test_what_was_measured_is_kept_and_a_place_that_is_not_writable_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = forecast.key_of("a", 1, Path("b"))
    assert forecast.recall(key) is None
    forecast.remember(key, [1, "x"])
    assert forecast.recall(key) == [1, "x"]
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    forecast.remember(key, 2)
    assert forecast.recall(key) is None


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
    assert "JPEG" in text and "decoded on the CPU" in text and "stay in memory" in text
