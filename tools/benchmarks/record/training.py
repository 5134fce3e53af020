"""The stages `train` and `imagenette`: whole runs of train.py, started as users start them."""

import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

from benchmarks import own_process
from benchmarks.record.commands import Logged, wait_for
from benchmarks.record.images import made_up
from benchmarks.record.journal import REPO, Run, Skip
from benchmarks.record.updates import best_mode, step_job, told, warm
from benchmarks.steps import StepJob
from fasttrain import config, run_folder, schedule
from fasttrain.shards import Split

IMAGENETTE = "n01440764"  # a class that only Imagenette has among data sets of ten classes
GOALS = (80.0, 85.0, 90.0)  # top-1 on Imagenette, percent


class Launched(NamedTuple):
    """How a start of train.py ended."""

    code: int | None  # None where the time limit ended it
    seconds: float
    stopping_s: float | None  # from the request to stop to the end; None without a request


class Training:
    """A run of train.py that is started once or more, as users start it."""

    def __init__(self, run: Run, recipe: config.Recipe, name: str) -> None:
        self.run = run
        self.folder = run.arguments.scratch / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        log = recipe.log.model_copy(update={"run_dir": self.folder / "run"})
        recipe = recipe.model_copy(update={"log": log})
        self.recipe = self.folder / "recipe.toml"
        self.recipe.write_text(config.dumps(recipe))
        self.log = self.folder / "train.log"
        self.metrics = self.folder / "run" / run_folder.METRICS

    def start(self, stop_when: Callable[[], bool] = lambda: False) -> Launched:
        """Launches train.py, and asks it to stop as soon as `stop_when` returns True."""
        begun, stopped_at = time.monotonic(), 0.0

        def look() -> None:
            nonlocal stopped_at
            if not stopped_at and stop_when():
                (self.folder / "run" / run_folder.STOP).touch()
                stopped_at = time.monotonic()

        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
        command = [*launcher, str(REPO / "fasttrain" / "train.py"), str(self.recipe)]
        environ = {} if self.run.gpu else {"ACCELERATE_USE_CPU": "true"}
        (code,) = wait_for([Logged(command, self.log, **environ)], self.run.left_s(), look)
        now = time.monotonic()
        return Launched(code, now - begun, now - stopped_at if stopped_at else None)

    def lines(self, event: str) -> list[dict[str, Any]]:
        """The complete lines of an event in metrics.jsonl."""
        text = self.metrics.read_text() if self.metrics.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        return [line for line in map(json.loads, whole.splitlines()) if line["event"] == event]

    def said(self) -> list[str]:
        """What the run printed about its decoder, its mode and what limits it."""
        words = ("decode:", "execution:", "input:", "raw images:", "WARNING", "SKIPPED")
        lines = map(str.strip, self.log.read_text(errors="replace").splitlines())
        kept = [line[:500] for line in lines if line.startswith(words) or " is the limit" in line]
        return [*dict.fromkeys(kept)]

    def check(self, launched: Launched, stopped: bool = False) -> None:
        """Checks how a start ended.

        Raises:
            RuntimeError: it failed, took too long, or ended before it was asked to stop.
        """
        if launched.code is None:
            raise RuntimeError(f"train.py: did not end in time\n{self.last_words()}")
        if launched.code and not (stopped and launched.stopping_s):
            raise RuntimeError(f"train.py: exit code {launched.code}\n{self.last_words()}")
        if stopped and launched.stopping_s is None:
            raise RuntimeError(f"train.py: ended before it was asked to stop\n{self.last_words()}")

    def last_words(self) -> str:
        """The last lines that train.py printed, without the traceback that its launcher adds."""
        text = self.log.read_text(errors="replace")
        launchers = text.rfind("Traceback (most recent call last)")
        if "CalledProcessError" in text[launchers:]:
            text = text[:launchers]
        return own_process.last_lines(text)


# --------------------------------------------------------------------------------------------------
# train
# --------------------------------------------------------------------------------------------------


def stage_train(run: Run, data: list[Split]) -> None:
    """Runs train.py on raw shards: two sizes of image, evaluations, a stop and a resume."""
    split = next((each for each in data if each.store == "raw"), None) or made_up(run)
    arch = run.arguments.arch[0]
    batch = min(run.arguments.batch[0], split.num_samples)
    job = step_job(run, "fasttrain", best_mode(run, arch, batch), arch, batch)
    job = job.model_copy(update={"classes": len(split.classes)})
    small = max(32, job.px * 3 // 4 // 16 * 16)
    about_it = {"arch": arch, "batch": batch, "execution": job.execution, "data": split.root.name}
    if job.compiles:
        changes = ({"evaluates": True}, {"px": small})
        warm(run, [job.model_copy(update=change) for change in changes], **about_it)
    bare = run.measure(job, "step", **told(job)).get("images_per_s")
    training = Training(run, recipe_of(run, split, job, small), "train")
    stop_and_resume(run, training, Told(about_it, bare), split.num_samples // batch)


def stop_and_resume(run: Run, training: "Training", told: "Told", steps_per_epoch: int) -> None:
    """Stops a run half-way, resumes it, and writes its speeds and how long both took.

    Raises:
        RuntimeError: one of the two starts failed or did not end in time.
    """
    last = config.load(training.recipe).train.epochs * steps_per_epoch
    first = training.start(lambda: any(x["step"] >= last // 2 for x in training.lines("train")))
    written = report_training(run, training, told)
    training.check(first, stopped=True)
    stopped_at = training.lines("train")[-1]["step"]
    begun = time.monotonic()
    resumed_s: list[float] = []

    def resumed() -> bool:
        if not resumed_s and training.lines("train")[-1]["step"] > stopped_at:
            resumed_s.append(time.monotonic() - begun)
        return False

    second = training.start(resumed)
    report_training(run, training, told, written)
    run.write(
        **told.settings, first_start_s=round(first.seconds, 1),
        stopping_s=round(first.stopping_s or 0, 2),
        resumed_s=round(resumed_s[0], 1) if resumed_s else None,
        steps=training.lines("train")[-1]["step"] + 1, of_steps=last,
        said=training.said(),
    )  # fmt: skip
    training.check(second)


def recipe_of(run: Run, split: Split, job: StepJob, small_px: int) -> config.Recipe:
    """The recipe of a short run, first on images of `small_px`, then of the job's size."""
    per_epoch = split.num_samples // job.batch
    epochs = max(4, -(-run.arguments.updates // per_epoch))
    return config.Recipe.model_validate(
        {
            "data": {
                "root": split.root, "crop_px": ((0, small_px), (epochs // 4, job.px)),
                "eval_crop_px": job.px, "eval_resize_px": round(job.px * 256 / 224),
                "threads": run.arguments.threads,
            },
            "model": {"arch": job.arch, "width": job.width},
            "optim": {"ema_decay": 0.999, "warmup_epochs": 1, "lr": 0.1, "warmup_lr": 0.01},
            "train": {
                "epochs": epochs, "global_batch_size": job.batch, "execution": job.execution,
                "precision": job.precision, "label_smoothing": 0.1,
                "eval_every_epochs": max(1, epochs // 2),
                "cpu_threads": 0 if run.gpu else run.arguments.threads,
            },
            "log": {"every_steps": max(1, epochs * per_epoch // 24)},
        }
    )  # fmt: skip


class Told(NamedTuple):
    """What the lines of a run say about it."""

    settings: dict[str, Any]
    bare: float | None  # images/s of the bare updates; None where they failed


def report_training(run: Run, training: Training, told: Told, written: int = 0) -> int:
    """Writes the speeds and evaluations of a start; returns how many train lines there are.

    The first line of a start is left out, because it holds the slow first updates. So is a line in
    which the size of the images changes.

    Args:
        written: how many train lines earlier starts wrote.
    """
    lines = training.lines("train")
    schedule_px = config.load(training.recipe).data.crop_px
    by_px: dict[int, list[dict[str, Any]]] = {}
    for previous, line in itertools.pairwise(lines[written:]):
        first, last = (schedule.crop_px_at(each["epoch"], schedule_px) for each in (previous, line))
        if first == last:
            by_px.setdefault(last, []).append(line)
    for px, group in by_px.items():
        speed = median(line["images_per_s"] for line in group)
        found = {
            "images_per_s": round(speed, 1),
            "data_wait": round(median(line["data_wait"] for line in group), 4),
            "loss": round(group[-1]["loss"], 4),
        }
        if told.bare and px == run.arguments.crop_px:
            found["over_bare_step"] = round(speed / told.bare, 3)
        run.write(**told.settings, px=px, resumed=written > 0, **found)
    for line in training.lines("eval"):
        if line["step"] > (lines[written - 1]["step"] if written else -1):
            run.write(**told.settings, eval_s=line["eval_s"], top1=line["top1"], step=line["step"])
    return len(lines)


# --------------------------------------------------------------------------------------------------
# imagenette
# --------------------------------------------------------------------------------------------------


def stage_imagenette(run: Run, data: list[Split]) -> None:
    """Trains on Imagenette; writes the minutes from the launch to each of GOALS.

    Raises:
        Skip: no data set is Imagenette.
        RuntimeError: the run ended without an evaluation.
    """
    split = next(
        (each for each in data if len(each.classes) == 10 and IMAGENETTE in each.classes), None
    )
    if split is None:
        raise Skip("needs Imagenette's shards: name them with --data")
    changes: dict[str, Any] = {"data.root": str(split.root), "train.eval_every_epochs": 1}
    if run.gpu:  # in a few minutes, a larger network learns more
        changes |= {
            "model.arch": "large", "model.width": 1.0, "train.epochs": 60,
            "train.precision": run.arguments.precision, "optim.ema_decay": 0.999,
        }  # fmt: skip
    recipe = config.load(REPO / "recipes" / "imagenette.toml").model_dump(mode="json")
    for key, value in changes.items():
        section, name = key.split(".")
        recipe[section][name] = value
    training = Training(run, config.Recipe.model_validate_json(json.dumps(recipe)), "imagenette")
    begun, reached = time.monotonic(), dict[float, float]()

    def reached_all() -> bool:
        best = max((top1_of(line) for line in training.lines("eval")), default=0.0)
        for goal in GOALS:
            if best >= goal and goal not in reached:
                reached[goal] = (time.monotonic() - begun) / 60
                run.write(goal=goal, minutes=round(reached[goal], 2), images=split.num_samples)
        return len(reached) == len(GOALS)

    launched = training.start(reached_all)
    reached_all()
    evaluations = training.lines("eval")
    best = max((top1_of(line) for line in evaluations), default=None)
    speeds = [line["images_per_s"] for line in training.lines("train")]
    run.write(
        best_top1=best, epochs=len(evaluations), minutes=round(launched.seconds / 60, 2),
        images_per_s=max(speeds, default=None), changes=changes | {"data.root": split.root.name},
        said=training.said(),
    )  # fmt: skip
    if not evaluations:
        raise RuntimeError(training.last_words())


def top1_of(line: dict[str, Any]) -> float:
    """The better top-1 of the network and its moving average, in percent."""
    return float(max(line["top1"], line.get("ema_top1", 0.0)))
