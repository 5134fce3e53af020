"""Experiment trackers: TensorBoard, Weights & Biases, Trackio and MLflow, through Accelerate.

Only rank 0 has trackers. They work offline, unless the user's environment says otherwise. What they
get is also in `metrics.jsonl`, under the same 0-based step. A run that resumes goes on with the
same run of each tracker, and sends no step twice. Importing this module needs no torch.
"""

import contextlib
import importlib.util
import io
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fasttrain import files
from fasttrain.config import Recipe, Tracker
from fasttrain.faults import ConfigError

PROJECT = "fasttrain"  # the project or experiment, if the environment names none
STATE = "trackers.json"  # in the run folder: the tracked run, and the last step that was sent
# The fields of each event that are sent, and the group that trackers show them in.
SENT = {
    "train": ("train", ("loss", "lr", "crop_px", "images_per_s", "data_wait", "memory_gib")),
    "eval": ("val", ("top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss", "eval_s")),
    "limit": ("epoch", ("images_per_s", "data_wait")),
    "best": ("best", ("top1",)),
}


def check(names: Sequence[Tracker]) -> None:
    """Checks that the packages of trackers are installed.

    Raises:
        ConfigError: one is missing.
    """
    for name in names:
        needed: list[str] = [name]
        if name == "mlflow" and "MLFLOW_TRACKING_URI" not in os.environ:
            needed.append("sqlalchemy")  # the small package mlflow-skinny has no store of its own
        if any(importlib.util.find_spec(package) is None for package in needed):
            raise ConfigError(
                f"[log] trackers = {json.dumps(list(names))}: the package {name} is not installed; "
                f"pip install {name}, or leave it out"
            )


class Start(NamedTuple):
    """What trackers are told about a start."""

    recipe: Recipe
    folder: Path  # the run folder
    first_step: int  # 0-based: the first update of this start
    goes_on: bool  # with the tracked run of the start before, if there is one


class Trackers:
    """Sends records to trackers. A tracker that fails is left out, and the run goes on.

    Records of one step are sent together.
    """

    def __init__(self, names: Sequence[Tracker], start: Start, say: Callable[[str], None]) -> None:
        """
        Args:
            say: prints a line.
        """
        self.say = say
        self.path = start.folder / STATE
        known = _read(self.path) if start.goes_on else {}
        self.id: str = known.get("id") or uuid.uuid4().hex[:8]
        self.sent: int = known.get("sent", -1)
        self.mlflow_run: str | None = known.get("mlflow_run")
        self.row: dict[str, float] = {}  # of `step`
        self.step = -1
        self.active: dict[str, Any] = {}
        settings = flattened(start.recipe)
        for name in names:
            with self._guarded(name), _quietly():
                tracker = _MAKERS[name](self, start)
                tracker.start()
                self.active[name] = tracker
                if not known:
                    tracker.store_init_configuration(settings)
        if "mlflow" in self.active:
            self.mlflow_run = self.active["mlflow"].tracker.info.run_id
        self._remember()

    def log(self, record: Mapping[str, Any]) -> None:
        """Takes a record of `metrics.jsonl`. What has no number for trackers is left out."""
        found = numbers_of(record)
        if not found:
            return
        if record["step"] != self.step:
            self._send()
            self.step = record["step"]
        self.row |= found

    def image(self, name: str, pixels: Any) -> None:
        """Sends a picture, uint8 `(H, W, 3)`."""
        for tracker in [*self.active]:
            with self._guarded(tracker):
                _IMAGES[tracker](self.active[tracker], name, pixels)

    def close(self) -> None:
        """Sends what is left, and ends the trackers."""
        self._send()
        for name in [*self.active]:
            with self._guarded(name), _quietly():
                self.active[name].finish()
        self.active.clear()

    def _send(self) -> None:
        """Sends the row. A tracker that keeps all rows gets no step again that it has."""
        if not self.row:
            return
        row, self.row = self.row, {}
        again = self.step <= self.sent
        if not again:
            # Written before the row is sent: if the process is killed in between, a row is missing,
            # but none is there twice.
            self.sent = self.step
            self._remember()
        for name in [*self.active]:
            # TensorBoard has dropped the later steps of the start before.
            if not again or name == "tensorboard":
                with self._guarded(name):
                    self.active[name].log(row, step=self.step)

    def _remember(self) -> None:
        with contextlib.suppress(OSError):
            state = {"id": self.id, "sent": self.sent, "mlflow_run": self.mlflow_run}
            files.replace_text(self.path, json.dumps(state) + "\n")

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Any:
        try:
            yield
        except Exception as error:  # of any package, its service or its disk
            self.active.pop(name, None)
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.say(f"WARNING: the tracker {name} failed and gets nothing more: {said}")


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """What trackers get of a record: `train/loss` and so on. Empty if the event is not sent."""
    group, keys = SENT.get(record["event"], ("", ()))
    found = {f"{group}/{key}": record[key] for key in keys if record.get(key) is not None}
    for key, share in record.get("loader", {}).items():
        found[f"loader/{key}"] = share
    return found | ({"epoch": record["epoch"]} if found else {})


def flattened(recipe: Recipe) -> dict[str, Any]:
    """The recipe as hyperparameters: `train.epochs` and so on. Lists and paths become text."""
    return {
        f"{section}.{key}": value if isinstance(value, bool | int | float | str) else str(value)
        for section, table in recipe.model_dump(mode="json").items()
        for key, value in table.items()
        if value is not None
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):  # none yet, or damaged: a new tracked run
        return {}


@contextlib.contextmanager
def _quietly() -> Any:
    """Drops what packages print: it would break the live view."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# --------------------------------------------------------------------------------------------------
# The trackers
# --------------------------------------------------------------------------------------------------


def _tensorboard(trackers: Trackers, start: Start) -> Any:
    """Files in `tensorboard/` of the run folder; `tensorboard --logdir runs` shows all runs."""
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker("tensorboard", start.folder, purge_step=start.first_step)


def _wandb(trackers: Trackers, start: Start) -> Any:
    """Files in `wandb/` of the run folder. `wandb sync` or WANDB_MODE=online uploads them."""
    from accelerate.tracking import WandBTracker

    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    return WandBTracker(
        project, name=start.folder.name, id=trackers.id, resume="allow", dir=str(start.folder)
    )


def _trackio(trackers: Trackers, start: Start) -> Any:
    """Trackio's own store; `trackio show --project fasttrain` shows it."""
    from accelerate.tracking import TrackioTracker

    class Tracker(TrackioTracker):
        def finish(self) -> None:
            import trackio

            trackio.finish()  # the run's own method would be called again as Python ends

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    name = f"{start.folder.name}-{trackers.id}"
    return Tracker(
        project, name=name, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
    )


def _mlflow(trackers: Trackers, start: Start) -> Any:
    """A store beside the run folders, unless MLFLOW_TRACKING_URI names another one."""
    from accelerate.tracking import MLflowTracker

    class Tracker(MLflowTracker):
        def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
            # The store takes 44 ms for a row, in a thread of MLflow.
            super().log(values, step=step, synchronous=False, **kwargs)

        def finish(self) -> None:
            import mlflow

            mlflow.flush_async_logging()
            super().finish()

    store = start.folder.parent.resolve()
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{store / 'mlflow.db'}")
    return Tracker(
        PROJECT, str(store / "mlflow"), run_id=trackers.mlflow_run, run_name=start.folder.name
    )


_MAKERS: dict[str, Callable[[Trackers, Start], Any]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}


def _image_of_trackio(tracker: Any, name: str, pixels: Any) -> None:
    import trackio

    tracker.log({name: trackio.Image(pixels)}, step=0)


def _image_of_mlflow(tracker: Any, name: str, pixels: Any) -> None:
    import mlflow

    mlflow.log_image(pixels, f"{name}.png")


_IMAGES: dict[str, Callable[[Any, str, Any], None]] = {
    "tensorboard": lambda tracker, name, pixels: tracker.log_images(
        {name: pixels[None]}, step=0, dataformats="NHWC"
    ),
    "wandb": lambda tracker, name, pixels: tracker.log_images({name: [pixels]}, step=0),
    "trackio": _image_of_trackio,
    "mlflow": _image_of_mlflow,
}
