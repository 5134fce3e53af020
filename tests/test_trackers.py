"""Trackers get the records of a run, once each, also if it is stopped and resumed."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Refused, lines
from updates import recipe_for

from fasttrain import trackers, train
from fasttrain.trackers import Start, Trackers, flattened, numbers_of

TRAIN = {"event": "train", "step": 49, "epoch": 0, "loss": 2.5, "lr": 0.1, "images_per_s": 0.0}
EVAL = {"event": "eval", "step": 49, "epoch": 0, "top1": 61.5, "loss": None, "seen": 8}


class Fake:
    """Stands in for a tracker of Accelerate."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.settings: dict[str, Any] = {}
        self.finished = False

    def start(self) -> None:
        pass

    def store_init_configuration(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def log(self, row: dict[str, float], step: int) -> None:
        if self.fails:
            raise OSError("no space left\non the device")
        self.rows.append((step, row))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    """The trackers that a test starts are these."""
    found = {"tensorboard": Fake(), "wandb": Fake()}
    makers = {name: lambda trackers, start, one=one: one for name, one in found.items()}
    monkeypatch.setattr(trackers, "_MAKERS", makers)
    return found


def opened(folder: Path, said: list[str], first_step: int = 0, goes_on: bool = False) -> Trackers:
    start = Start(recipe_for(), folder, first_step, goes_on)
    return Trackers(["tensorboard", "wandb"], start, said.append)


def test_records_of_a_step_are_sent_together(tmp_path: Path, fakes: dict[str, Fake]) -> None:
    said: list[str] = []
    sender = opened(tmp_path, said)
    sender.log(TRAIN)
    sender.log(EVAL)
    sender.log({"event": "skipped", "step": 60, "epoch": 1, "number": 1})
    sender.log(TRAIN | {"step": 99, "loss": 2.0})
    sender.close()
    first, second = fakes["wandb"].rows
    assert first == (
        49,
        {
            "train/loss": 2.5, "train/lr": 0.1, "train/images_per_s": 0.0,
            "val/top1": 61.5, "epoch": 0,
        },
    )  # fmt: skip
    assert second[0] == 99 and fakes["tensorboard"].rows == fakes["wandb"].rows
    assert fakes["wandb"].finished and not said
    assert fakes["wandb"].settings["train.epochs"] == 9
    sender.log(TRAIN | {"step": 149})
    sender.close()
    assert len(fakes["wandb"].rows) == 2


def test_a_resumed_run_sends_no_step_twice(tmp_path: Path, fakes: dict[str, Fake]) -> None:
    said: list[str] = []
    first = opened(tmp_path, said)
    for step in (9, 19, 29):
        first.log(TRAIN | {"step": step})
    first.close()
    fakes["wandb"].settings = {}
    second = opened(tmp_path, said, first_step=15, goes_on=True)
    for step in (19, 29, 39):
        second.log(TRAIN | {"step": step})
    second.close()
    assert second.id == first.id and not fakes["wandb"].settings
    assert [step for step, _ in fakes["wandb"].rows] == [9, 19, 29, 39]
    # TensorBoard is told to drop the steps from 15 on.
    assert [step for step, _ in fakes["tensorboard"].rows] == [9, 19, 29, 19, 29, 39]
    other = opened(tmp_path, said)
    assert other.id != first.id and other.sent == -1


def test_a_tracker_that_fails_is_left_out(tmp_path: Path, fakes: dict[str, Fake]) -> None:
    said: list[str] = []
    fakes["wandb"].fails = True
    sender = opened(tmp_path, said)
    for step in (9, 19, 29):
        sender.log(TRAIN | {"step": step})
    sender.close()
    assert said == ["WARNING: the tracker wandb failed and gets nothing more: no space left"]
    assert len(fakes["tensorboard"].rows) == 3


def test_the_numbers_of_events() -> None:
    limit = {
        "event": "limit", "step": 9, "epoch": 1, "images_per_s": 5.0, "limit": "decode",
        "loader": {"storage": 0.1, "decode": 0.8},
    }  # fmt: skip
    assert numbers_of(limit) == {
        "epoch/images_per_s": 5.0, "loader/storage": 0.1, "loader/decode": 0.8, "epoch": 1,
    }  # fmt: skip
    assert numbers_of({"event": "done", "step": 9}) == {}
    settings = flattened(recipe_for())
    assert settings["train.label_smoothing"] == 0.1 and "model.weights" not in settings
    assert {*map(type, settings.values())} <= {bool, int, float, str}


def test_a_missing_package_is_told_before_the_start(
    tiny: Callable[..., Path], refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    recipe = tiny(log={"trackers": ["wandb"]})
    said = (
        '[log] trackers = ["wandb"]: the package wandb is not installed; pip install wandb, or '
        "leave it out"
    )
    refused(train.main, [recipe], said)


# --------------------------------------------------------------------------------------------------
# Real stores
# --------------------------------------------------------------------------------------------------


def stopped_and_resumed(tiny: Callable[..., Path], folder: Path, name: str) -> list[dict[str, Any]]:
    """The train records of a run of 4 updates that is stopped after 2 and resumed."""
    recipe = tiny(log={"trackers": [name], "every_steps": 1}, checkpoint={"every_steps": 2})
    train.main([str(recipe), "--set", "train.max_steps=2"])
    assert not (folder / "before").exists()
    train.main([str(recipe), "--set", "train.max_steps=4"])
    return lines(folder / "metrics.jsonl", "train")


def test_tensorboard_holds_the_records(tiny: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = stopped_and_resumed(tiny, tmp_path / "run", "tensorboard")
    store = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    store.Reload()
    losses = store.Scalars("train/loss")
    assert (
        [point.step for point in losses] == [record["step"] for record in records] == [0, 1, 2, 3]
    )
    assert [point.value for point in losses] == pytest.approx([r["loss"] for r in records])
    assert [point.step for point in store.Scalars("val/top1")] == [1, 3]
    (picture,) = store.Images("images")
    assert picture.width > 300 and picture.encoded_image_string.startswith(b"\x89PNG")
    (settings,) = tmp_path.glob("run/tensorboard/*/hparams.yml")
    assert "train.epochs" in settings.read_text()


@pytest.mark.slow
def test_trackio_holds_the_records(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # before it is imported
    pytest.importorskip("trackio", reason="Trackio is not installed")
    records = stopped_and_resumed(tiny, tmp_path / "run", "trackio")
    (path,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(path) as store:
        rows = [json.loads(text) for (text,) in store.execute("SELECT metrics FROM metrics")]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses == pytest.approx([record["loss"] for record in records])


@pytest.mark.slow
def test_mlflow_holds_the_records(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    pytest.importorskip("sqlalchemy", reason="mlflow-skinny has no store of its own")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    records = stopped_and_resumed(tiny, tmp_path / "run", "mlflow")
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in history] == [record["step"] for record in records]
    assert run.data.params["train.global_batch_size"] == "8"


@pytest.mark.slow
def test_wandb_writes_offline(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    stopped_and_resumed(tiny, tmp_path / "run", "wandb")
    found = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len({name.rpartition("-")[2] for name in found}) == 1  # the same run


def test_a_picture_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, Any]] = []
    images = {"tensorboard": lambda tracker, name, pixels: sent.append((name, pixels))}
    monkeypatch.setattr(trackers, "_IMAGES", images)
    monkeypatch.setattr(trackers, "_MAKERS", {"tensorboard": lambda *_: Fake()})
    start = Start(recipe_for(), tmp_path, 0, False)
    Trackers(["tensorboard"], start, print).image("images", np.zeros((2, 2, 3), np.uint8))
    assert sent[0][0] == "images"
