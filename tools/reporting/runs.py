"""Reads run folders: recipe, records, starts, and when each line was written."""

import json
import shlex
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError

from fasttrain import config, run_folder, shards
from fasttrain.config import Recipe
from fasttrain.faults import ConfigError

SHOWN = 8  # folders in a message
Time = Annotated[float, Field(ge=0, lt=1e11)]  # seconds since 1970
State = Literal["done", "going", "stopped", "unknown"]


class Line(BaseModel):
    """A line of `metrics.jsonl`."""

    step: NonNegativeInt
    epoch: NonNegativeInt
    time: Time | None = None  # earlier versions wrote no times


class TrainLine(Line):
    loss: float
    lr: float
    images_per_s: float
    data_wait: float


class EvalLine(Line):
    top1: float
    top5: float
    loss: float | None
    seen: int
    ema_top1: float | None = None
    ema_top5: float | None = None


class SkippedLine(Line):
    number: int


class LimitLine(Line):
    limit: str
    images_per_s: float


class DoneLine(Line):
    schedule_steps: PositiveInt
    seconds: FiniteFloat


KINDS: dict[str, type[Line]] = {
    "train": TrainLine,
    "eval": EvalLine,
    "skipped": SkippedLine,
    "limit": LimitLine,
    "done": DoneLine,
}


@dataclass(frozen=True, slots=True)
class Metrics:
    """The lines of a run, in their order."""

    train: list[TrainLine] = field(default_factory=list)
    evals: list[EvalLine] = field(default_factory=list)
    skipped: list[SkippedLine] = field(default_factory=list)
    limits: list[LimitLine] = field(default_factory=list)
    done: list[DoneLine] = field(default_factory=list)  # at most one
    num_damaged: int = 0  # lines that could not be read

    @property
    def lines(self) -> list[Line]:
        """All lines but the closing one, which repeats the last evaluation."""
        return [*self.train, *self.evals, *self.skipped, *self.limits]


class Start(BaseModel):
    """An entry of `environment.json`: one start of the run."""

    started: str = ""
    time: Time | None = None
    world_size: PositiveInt
    device: str = ""
    host: str = ""
    cpus: int | None = None
    cpu_threads: int | None = None
    data_threads: int | None = None
    command: list[str] = []
    commit: str | None = None
    python: str = ""
    versions: dict[str, str] = {}
    slurm_job_id: str | None = None

    @property
    def begun(self) -> float | None:
        """When the run was started, in seconds since 1970; None if that is not known."""
        try:
            return self.time or datetime.fromisoformat(self.started).timestamp()
        except ValueError:
            return None

    @property
    def when(self) -> str:
        """The time of the start for people."""
        begun = self.begun
        if begun is None:
            return "at an unknown time"
        return f"{datetime.fromtimestamp(begun, UTC):%Y-%m-%d %H:%M:%S} UTC"

    @property
    def command_line(self) -> str:
        return shlex.join(self.command)

    @property
    def hardware(self) -> str:
        """The devices of the run: `8 x NVIDIA H100 80GB HBM3`."""
        return f"{self.world_size} x {self.device or 'an unknown device'}"


class Spent(NamedTuple):
    """What a run had cost when a line was written."""

    wall_s: float
    device_s: float


@dataclass(frozen=True, slots=True)
class Clock:
    """Turns the time of a line into time spent. Time between two starts does not count."""

    begins: tuple[float, ...]  # of each start, in seconds since 1970
    before: tuple[Spent, ...]  # what the earlier starts had cost
    processes: tuple[int, ...]
    end: float  # time of the last line

    def spent(self, time: float) -> Spent:
        """What the run had cost at `time`."""
        number = max(bisect_right(self.begins, time) - 1, 0)
        seconds = max(time - self.begins[number], 0.0)
        wall_s, device_s = self.before[number]
        return Spent(wall_s + seconds, device_s + seconds * self.processes[number])

    @property
    def total(self) -> Spent:
        return self.spent(self.end)


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder, read."""

    folder: Path
    name: str  # unique among the runs of a page
    recipe: Recipe
    metrics: Metrics
    starts: list[Start]
    state: State
    steps_per_epoch: int  # the number of updates so far, if `epoch_known` is False
    epoch_known: bool
    clock: Clock | None  # None if lines or starts have no times
    classes: tuple[str, ...]  # empty if they are not known
    notes: tuple[str, ...]  # for the reader of the page: what could not be read

    def epochs(self, line: Line) -> float:
        """Number of epochs that were done when the line was written."""
        return (line.step + 1) / self.steps_per_epoch

    @property
    def epochs_done(self) -> float:
        return max(map(self.epochs, self.metrics.lines), default=0.0)

    @property
    def spent(self) -> Spent | None:
        """The cost of the whole run; None if it is not known."""
        if self.clock:
            return self.clock.total
        if len(self.starts) == 1 and self.metrics.done:
            seconds = self.metrics.done[0].seconds
            return Spent(seconds, seconds * self.starts[0].world_size)
        return None

    @property
    def restarts(self) -> list[float]:
        """After how many epochs the run was interrupted and went on. Needs the times of lines."""
        if not self.clock:
            return []
        timed = sorted((line.time, self.epochs(line)) for line in self.metrics.lines if line.time)
        times = [time for time, _ in timed]
        places = [bisect_right(times, begun) for begun in self.clock.begins[1:]]
        return sorted({timed[place - 1][1] for place in places if 0 < place < len(timed)})

    @property
    def images_per_s(self) -> float | None:
        """Mean speed of the updates; None if no line has a speed."""
        # Lines stand for equal numbers of images, so their times are added up, not their speeds.
        rates = [line.images_per_s for line in self.metrics.train if line.images_per_s > 0]
        return len(rates) / sum(1 / rate for rate in rates) if rates else None

    @property
    def evaluate_command(self) -> str:
        """The command that writes the files about classes and mistakes."""
        words = ["python", "tools/evaluate.py", str(self.folder)]
        return shlex.join([*words, "--data", str(self.recipe.data.root)])


def read(folders: Sequence[Path]) -> list[Run]:
    """Reads run folders. A folder that is named twice is read once.

    Raises:
        ConfigError: a folder holds no run, or its recipe is damaged.
    """
    distinct: dict[Path, Path] = {}
    for folder in folders:
        distinct.setdefault(folder.resolve(), folder)
    names = _names([*distinct])
    return [_read(folder, name) for folder, name in zip(distinct.values(), names, strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """Short names that differ: the last part of each path, or more parts where these are equal."""
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _read(folder: Path, name: str) -> Run:
    if not (folder / run_folder.RECIPE).is_file():
        raise ConfigError(_no_run(folder))
    recipe = config.load(folder / run_folder.RECIPE, written_by_run=True)
    metrics = _read_metrics(folder / run_folder.METRICS)
    starts, notes = _read_starts(folder / run_folder.ENVIRONMENT)
    manifest = _manifest(recipe.data.root)
    steps, is_known = _steps_per_epoch(recipe, metrics, manifest)
    clock = _clock(metrics, starts)
    if num := metrics.num_damaged:
        lines = "1 line of metrics.jsonl is" if num == 1 else f"{num:,} lines of metrics.jsonl are"
        notes.append(f"{lines} damaged and left out.")
    if not metrics.lines:
        notes.append("There are no figures yet: the first line is written after some updates.")
    elif not is_known:
        notes.append("The length of an epoch is not known yet, so positions are not right.")
    if metrics.lines and not clock:
        notes.append(
            "Some or all records of this run have no times. So its curves are drawn over epochs "
            "only, and restarts are not marked."
        )
    return Run(
        folder=folder,
        name=name,
        recipe=recipe,
        metrics=metrics,
        starts=starts,
        state=_state(folder),
        steps_per_epoch=steps,
        epoch_known=is_known,
        clock=clock,
        classes=_classes(folder, manifest),
        notes=tuple(notes),
    )


def _no_run(folder: Path) -> str:
    """Says that a folder holds no run, and names the run folders in it."""
    if not folder.is_dir():
        return f"{folder}: there is no such folder; name a run folder, such as runs/large"
    inside = sorted(path.parent for path in folder.glob(f"*/{run_folder.RECIPE}"))
    remedy = "name one, such as runs/large"
    if inside:
        remedy = f"name the run folders in it: {' '.join(map(str, inside[:SHOWN]))}"
    return f"{folder} is not a run folder, because it has no {run_folder.RECIPE}; {remedy}"


def _state(folder: Path) -> State:
    if (folder / run_folder.DONE).exists():
        return "done"
    in_use = run_folder.in_use(folder)
    return "unknown" if in_use is None else "going" if in_use else "stopped"


def _read_metrics(path: Path) -> Metrics:
    """Reads the lines of a run. Counts those that are damaged, and ignores other events."""
    found: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    num_damaged = 0
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = json.loads(text)
            kind = KINDS.get(record["event"])
            if kind:
                found[record["event"]].append(kind.model_validate(record))
        except (ValueError, KeyError, TypeError, RecursionError):  # also pydantic's error
            num_damaged += 1
    return Metrics(
        found["train"], found["eval"], found["skipped"], found["limit"], found["done"][-1:],
        num_damaged,
    )  # fmt: skip


def _read_starts(path: Path) -> tuple[list[Start], list[str]]:
    """Returns the starts of a run, and a note if some of them cannot be read."""
    try:
        entries = [*json.loads(path.read_bytes())]
    except FileNotFoundError:
        return [], ["There is no environment.json, so hardware and starts are not known."]
    except (OSError, ValueError, TypeError):
        return [], ["environment.json is damaged, so hardware and starts are not known."]
    starts = []
    for entry in entries:
        try:
            starts.append(Start.model_validate(entry))
        except ValidationError:
            return [], ["environment.json is damaged, so hardware and starts are not known."]
    return starts, []


def _manifest(root: Path) -> dict[str, Any] | None:
    """The manifest of the run's data set; None if the data set is not here."""
    try:
        return shards.read_manifest(root)
    except shards.ShardError:
        return None


def _steps_per_epoch(
    recipe: Recipe, metrics: Metrics, manifest: dict[str, Any] | None
) -> tuple[int, bool]:
    """Returns the number of updates in an epoch, and False if it is larger by an unknown number."""
    lines = metrics.lines
    if metrics.done:
        return max(metrics.done[0].schedule_steps // recipe.train.epochs, 1), True
    if manifest and "train" in manifest["splits"]:
        num_samples = manifest["splits"]["train"]["num_samples"]
        steps = max(num_samples // recipe.train.global_batch_size, 1)
        if all(line.step // steps == line.epoch for line in lines):
            return steps, True
    # The last update of epoch e, from 0, is (e + 1) * steps - 1. Earlier ones give lower bounds.
    steps = max((line.step // (line.epoch + 1) + 1 for line in lines), default=1)
    return steps, any(line.epoch > 0 for line in lines) or bool(metrics.evals)


def _clock(metrics: Metrics, starts: Sequence[Start]) -> Clock | None:
    """Makes the clock of a run. Returns None if a line or a start has no time."""
    lines = [*metrics.train, *metrics.evals]
    known = sorted(line.time for line in lines if line.time is not None)
    order = sorted((s.begun, s.world_size) for s in starts if s.begun is not None)
    if not known or len(known) < len(lines) or not order or len(order) < len(starts):
        return None
    first = [min(order[0][0], known[0])] + [begun for begun, _ in order[1:]]
    ends = []
    for begun, following in pairwise([*first, float("inf")]):
        ends.append(max((t for t in known if begun <= t < following), default=begun))
    processes = [size for _, size in order]
    seconds = [end - begun for begun, end in zip(first, ends, strict=True)]
    wall = accumulate(seconds, initial=0.0)
    device = accumulate((s * n for s, n in zip(seconds, processes, strict=True)), initial=0.0)
    before = tuple(Spent(*pair) for pair in zip(wall, device, strict=True))[:-1]
    return Clock(tuple(first), before, tuple(processes), known[-1])


def _classes(folder: Path, manifest: dict[str, Any] | None) -> tuple[str, ...]:
    """The class names of the run's data set, from its manifest or from the newest checkpoint."""
    if manifest:
        return tuple(manifest["classes"])
    found = [p for p in (folder / run_folder.CHECKPOINTS).glob("step_*") if "." not in p.name]
    for path in sorted(found, reverse=True):
        try:
            return tuple(map(str, json.loads((path / "state.json").read_bytes())["classes"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return ()


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The settings in which runs differ, each with the value of every run.

    Settings that may change when a run resumes, such as `train.micro_batch_size`, do not count.
    """
    recipes = [run.recipe for run in runs]
    changes = [change for other in recipes[1:] for change in config.differences(recipes[0], other)]
    names = dict.fromkeys(change.partition(":")[0] for change in changes)
    return {name: [_value(recipe, name) for recipe in recipes] for name in names}


def _value(recipe: Recipe, name: str) -> str:
    section, _, key = name.partition(".")
    value = recipe.model_dump(mode="json")[section][key]
    return "not set" if value is None else json.dumps(value)
