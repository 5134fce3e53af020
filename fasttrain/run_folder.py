"""The run folder: its files, and whether a command may start or resume there. Needs no torch.

    recipe.toml             the recipe in full
    environment.json        one entry per start: versions, hardware, commit, command
    metrics.jsonl           one line per event: train, eval, best, skipped, limit, done
    samples-rank0.jsonl     with log.samples: the samples of that rank in each update
    skipped_step_....json   a skipped update whose loss was not finite, with its samples
    checkpoints/            step_00012512/ and so on; best links to one of them
    trackers.json           with log.trackers: the run that the trackers hold
    tensorboard/, wandb/    with log.trackers: their files
    evaluation/             what tools/evaluate.py found: predictions, classes, confusions
    DONE                    the closing event, written last
    lock                    held by the process that trains here
    stop                    a file that a user makes to have the run save and stop
    moving                  says what is being moved aside; removed when the move is complete
    before-20261124T.../    the files that a start with `checkpoint.resume` moved aside

`step` in a line is the 0-based index of the last update that the line describes.
"""

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fasttrain import config, files
from fasttrain.config import Recipe
from fasttrain.faults import ConfigError

RECIPE = "recipe.toml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
DONE = "DONE"
LOCK = "lock"
STOP = "stop"
MOVING = "moving"
STEP = re.compile(r"step_(\d{8,})")  # a complete checkpoint, named by its number of updates
WORDS = ("auto", "force", "anew")  # any other checkpoint.resume is the path of a checkpoint
LOCK_WAIT_S = 30.0  # the process of a stopped job may take this long to end


def samples_file(rank: int) -> str:
    """Name of the file in which `rank` logs the samples of its updates."""
    return f"samples-rank{rank}.jsonl"


@dataclass(frozen=True, slots=True)
class ResumeRule:
    """The meaning of `checkpoint.resume`. No other code interprets that setting."""

    text: str

    @property
    def newest(self) -> bool:
        """Continue from the newest good checkpoint, if there is one (`auto`, `force`)."""
        return self.text in ("auto", "force")

    @property
    def forced(self) -> bool:
        """Continue although the recipe or the data changed (`force`)."""
        return self.text == "force"

    @property
    def anew(self) -> bool:
        """Start from step 0, and move aside what is in the run folder (`anew`)."""
        return self.text == "anew"

    @property
    def named(self) -> Path | None:
        """Continue from this checkpoint, and move aside later ones (a path)."""
        return None if self.text in WORDS else Path(self.text)

    @property
    def after_restart(self) -> "ResumeRule":
        """The rule when a launcher starts the same job again: the work of the job is kept."""
        return ResumeRule("auto")

    @property
    def expects_same_run(self) -> bool:
        """Refuse the folder of another run, and leave a complete run alone (`auto`)."""
        return self.text == "auto"


def resume_of(recipe: Recipe) -> ResumeRule:
    """How a start of this recipe resumes."""
    return ResumeRule(recipe.checkpoint.resume)


def check(recipe: Recipe) -> dict[str, Any] | None:
    """Checks that the recipe may run in its folder.

    Returns:
        The closing event of the run if it is complete; else None.
    Raises:
        ConfigError: the folder holds a run of another recipe; its `DONE` is damaged; or the
            checkpoint or the weights that the recipe names do not exist.
    """
    folder, resume = run_dir(recipe), resume_of(recipe)
    if resume.named and resume.named.is_file():
        raise ConfigError(
            f'[checkpoint] resume = "{resume.text}": is a file, not the folder of a checkpoint; to '
            "start a new run from these weights: --set checkpoint.resume=auto --set "
            f"model.weights={resume.text}"
        )
    if (start := weights_to_read(recipe)) and not start.exists():
        raise ConfigError(
            f'[model] weights = "{start}": there is no such file or folder; name a run folder, a '
            "checkpoint or a file of weights"
        )
    if resume.named and not resume.named.is_dir():
        raise ConfigError(
            f'[checkpoint] resume = "{resume.text}": there is no such checkpoint; must be '
            f"{', '.join(WORDS)}, or the folder of a checkpoint"
        )
    if not resume.expects_same_run or _moves_all(folder):
        return None
    _check_same_run(folder, recipe)
    return _closing_event(folder, recipe.train.max_steps)


def _check_same_run(folder: Path, recipe: Recipe) -> None:
    # Without a checkpoint there is no run to protect: the earlier start may have been refused.
    if not (folder / RECIPE).exists() or not any((folder / CHECKPOINTS).glob("step_*")):
        return
    changed = config.differences(config.load(folder / RECIPE, written_by_run=True), recipe)
    if changed:
        raise ConfigError(
            "\n  ".join([f"{folder} holds a run of another recipe:", *changed])
            + "\nuse the old values, or another folder with --set log.run_dir=..., or resume in "
            "spite of this with --set checkpoint.resume=force"
        )


def _closing_event(folder: Path, max_steps: int | None) -> dict[str, Any] | None:
    """Reads `DONE`. Returns None if there is no such file, or if `max_steps` was raised since."""
    if not (folder / DONE).exists() or (folder / MOVING).exists():
        return None
    try:
        done: dict[str, Any] = json.loads((folder / DONE).read_bytes())
        total_steps = min(done["schedule_steps"], max_steps or done["schedule_steps"])
        reached = done["step"] + 1 >= total_steps
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{folder / DONE} is damaged; remove it, and the same command resumes from the newest "
            "checkpoint"
        ) from None
    return done if reached else None


def weights_to_read(recipe: Recipe) -> Path | None:
    """`model.weights` if the run starts from them; None if it resumes from a checkpoint."""
    folder, resume = run_dir(recipe), resume_of(recipe)
    steps = [] if _moves_all(folder) else (folder / CHECKPOINTS).glob("step_*")
    found = any(STEP.fullmatch(path.name) for path in steps)
    resumes = found if resume.newest else not resume.anew
    return None if resumes else recipe.model.weights


def run_dir(recipe: Recipe) -> Path:
    """The run folder of a loaded recipe."""
    assert recipe.log.run_dir is not None
    return recipe.log.run_dir


@contextlib.contextmanager
def locked(recipe: Recipe) -> Iterator[None]:
    """Makes the run folder, and holds its lock inside the `with` block. Only rank 0 calls this.

    If an earlier start was killed while it moved files aside, this moves the rest.

    Raises:
        ConfigError: another process holds the lock, or the folder cannot be written.
    """
    folder = run_dir(recipe)
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        for path in (folder, folder / CHECKPOINTS):
            if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, f"no permission for {path}")
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(
            f'[log] run_dir = "{folder}": cannot be written ({error.strerror}); choose another '
            "with --set log.run_dir=..."
        ) from None
    try:
        _take(file, folder)
        if resume_of(recipe).newest:  # with any other rule, `begin` moves the files
            _move_aside(folder)
        yield
    finally:
        os.close(file)


def _take(file: int, folder: Path) -> None:
    """Locks the open lock file of a run folder, and writes the name of this process into it."""
    try:
        taken = files.lock(file, wait_s=LOCK_WAIT_S)
    except OSError:  # the file system has no locks
        return
    if not taken:
        holder = os.pread(file, 200, 0).decode(errors="replace").strip()
        raise ConfigError(
            f"{folder} is in use by {holder or 'another process'}; wait for it, stop it, or "
            "choose another folder with --set log.run_dir=..."
        )
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)


def in_use(folder: Path) -> bool | None:
    """Returns True if a process trains in the folder; None if its file system cannot tell.

    The lock is taken for a moment, without waiting. A run that starts just then waits for it.
    """
    try:
        file = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        return not files.lock(file, shared=True, wait_s=0)
    except OSError:
        return None
    finally:
        os.close(file)


def begin(recipe: Recipe, environment: dict[str, Any]) -> None:
    """Records a start in the run folder, and moves aside what is in its way. Only rank 0 calls it.

    Args:
        environment: the entry of this start in `environment.json`.
    Raises:
        OSError: the file system refused.
    """
    folder, resume = run_dir(recipe), resume_of(recipe)
    files.clear(folder)
    if not resume.newest:
        _plan_move(folder, resume.named)
        _move_aside(folder)
    (folder / DONE).unlink(missing_ok=True)
    # `resume` is meant for one start. Without it, a later start has the default, `auto`.
    files.write_text(folder / RECIPE, config.dumps(recipe, leave_out=("checkpoint.resume",)))
    starts = []
    if (folder / ENVIRONMENT).exists():
        try:
            starts = [*json.loads((folder / ENVIRONMENT).read_bytes())]
        except (OSError, ValueError, TypeError):  # the run needs no such file; keep it aside
            (folder / ENVIRONMENT).rename(folder / f"{ENVIRONMENT}.damaged")
    files.write_text(folder / ENVIRONMENT, json.dumps([*starts, environment], indent=1) + "\n")


def write_done(folder: Path, record: dict[str, Any]) -> None:
    """Marks the run as done: writes its closing event into `DONE`.

    Raises:
        OSError: the file system refused.
    """
    files.write_text(folder / DONE, json.dumps(record) + "\n")


def _plan_move(folder: Path, named: Path | None) -> None:
    """Writes into `MOVING` what will be moved aside.

    The first line is the name of the target folder. If `named` is a checkpoint of this folder, the
    second line is its name, and only later checkpoints are moved. Otherwise the second line is
    empty, and everything is moved.
    """
    own = named is not None and named.resolve().parent == (folder / CHECKPOINTS).resolve()
    target = f"before-{datetime.now():%Y%m%dT%H%M%S.%f}"
    files.write_text(folder / MOVING, f"{target}\n{named.name if named and own else ''}\n")


def _moves_all(folder: Path) -> bool:
    """True if a start was killed while it moved all files of an earlier run aside."""
    plan = folder / MOVING
    return plan.exists() and not plan.read_text().splitlines()[1]


def _move_aside(folder: Path) -> None:
    """Moves the files of an earlier run aside as `MOVING` says, if there is such a file.

    Files are moved one after the other, and the process may be killed in between. `MOVING` is
    removed last, so a later start does not take the rest of the earlier run for its own.
    """
    if not (folder / MOVING).exists():
        return
    target, named = (folder / MOVING).read_text().splitlines()
    aside = folder / target
    aside.mkdir(exist_ok=True)
    if named:
        for path in folder.glob("*.jsonl"):  # copied, because `cut_lines` removes the later lines
            files.write_bytes(aside / path.name, path.read_bytes())
        (aside / CHECKPOINTS).mkdir(exist_ok=True)
        later = [path for path in (folder / CHECKPOINTS).iterdir() if path.name > named]
        files.move(later, aside / CHECKPOINTS)
        (folder / DONE).unlink(missing_ok=True)
    else:
        stays = {LOCK, MOVING}
        if (aside / CHECKPOINTS).exists():
            stays.add(CHECKPOINTS)  # an empty folder that `locked` made after the kill
        names = sorted(path.name for path in folder.iterdir())
        moved = [name for name in names if name not in stays and not name.startswith("before-")]
        files.move([folder / name for name in moved], aside)
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
    (folder / MOVING).unlink()


def cut_lines(folder: Path, first_step: int, last_eval: int) -> None:
    """Removes the lines that the resumed run will write again, from the files of all ranks.

    Args:
        first_step: lines of this step and later ones are removed.
        last_eval: evaluations of steps after this one are removed.
    Raises:
        OSError: the file system refused.
    """
    for path in [folder / METRICS, *folder.glob("samples-rank*.jsonl")]:
        if path.exists():
            lines = path.read_text(errors="surrogateescape").splitlines()
            kept = [line for line in lines if _is_kept(line, first_step, last_eval)]
            files.write_text(path, "".join(f"{line}\n" for line in kept))


def _is_kept(line: str, first_step: int, last_eval: int) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:  # half a line of a process that was killed
        return False
    try:
        if record["event"] in ("eval", "best") and record["step"] > last_eval:
            return False
        return bool(record["event"] != "done" and record["step"] < first_step)
    except (KeyError, TypeError):  # not a line of fasttrain
        return True


class JsonLines:
    """Appends records to a file, one line each. Other programs see a line at once.

    If the disk is full, the rest of a line is kept and written before the next one. So no line is
    lost or cut in two.
    """

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self.rest = b""

    def write(self, record: dict[str, Any]) -> None:
        self.rest += json.dumps(record).encode() + b"\n"
        with contextlib.suppress(OSError):  # `flush` will raise it
            self._write_rest()

    def flush(self) -> None:
        """Writes the rest that was kept, and syncs the file, so that it survives a loss of power.

        Raises:
            OSError: the file system refused.
        """
        self._write_rest()
        files.sync(self.file)

    def _write_rest(self) -> None:
        while self.rest:
            self.rest = self.rest[os.write(self.file, self.rest) :]
