"""The run folder survives a kill or a loss of power at any moment."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from crashes import dies_at, loses_power_at

from fasttrain import config, files, run_folder
from fasttrain.config import Recipe

NOT_READ = (run_folder.LOCK, run_folder.MOVING)
CLOSING = {"event": "done", "step": 7, "schedule_steps": 8}


def recipe_for(folder: Path, resume: str = "auto") -> Recipe:
    return Recipe(log=config.Log(run_dir=folder), checkpoint=config.Checkpoint(resume=resume))


def old_run(folder: Path) -> None:
    """A finished run of 8 updates, as an earlier start left it."""
    for step in (4, 8):
        (folder / run_folder.CHECKPOINTS / f"step_{step:08d}").mkdir(parents=True)
    run_folder.begin(recipe_for(folder), {"started": "first"})
    records = [{"event": "train", "step": step} for step in range(8)]
    (folder / run_folder.METRICS).write_text("".join(f"{json.dumps(each)}\n" for each in records))
    files.write_text(folder / run_folder.DONE, json.dumps(CLOSING))


def start(folder: Path, resume: str) -> None:
    """Does all that a start does in the folder, from the lock to the removal of later lines."""
    recipe = recipe_for(folder, resume)
    with run_folder.locked(recipe):
        run_folder.begin(recipe, {"started": "again"})
        run_folder.cut_lines(folder, 4, -1)
        files.write_text(folder / run_folder.DONE, json.dumps(CLOSING))


def check_one_run(folder: Path, resume: str) -> None:
    """A start with `auto` finds the whole earlier run, or none of its files that had to move."""
    recipe = recipe_for(folder)
    done = run_folder.check(recipe)
    with run_folder.locked(recipe):
        pass
    assert run_folder.check(recipe) == done
    assert not (folder / run_folder.MOVING).exists()
    steps = sorted(path.name for path in (folder / run_folder.CHECKPOINTS).glob("step_*"))
    if steps == ["step_00000004", "step_00000008"]:
        assert done == CLOSING
        return
    assert steps == (["step_00000004"] if resume == "named" else [])
    ended = (folder / run_folder.DONE).exists()  # the start itself ended before the crash
    assert done == (CLOSING if ended else None)
    (aside,) = folder.glob("before-*")
    assert len((aside / run_folder.METRICS).read_text().splitlines()) == 8
    assert not ended or resume == "named" or (aside / run_folder.DONE).exists()


def check_whole(folder: Path) -> None:
    """Checks that no file that a person or a start reads is empty or cut."""
    for path in folder.rglob("*"):
        if path.is_dir() or path.name in NOT_READ or path.name.endswith(files.TEMPORARY):
            continue
        text = path.read_text()
        assert text, f"{path} is empty"
        if path.suffix == ".jsonl":
            assert [json.loads(line)["step"] for line in text.splitlines()] in (
                list(range(8)),
                list(range(4)),
            )
        elif path.suffix == ".toml":
            config.load(path)
        else:
            json.loads(text)


@pytest.mark.parametrize(
    ("resume", "crash"),
    [("auto", loses_power_at), ("anew", dies_at), ("named", loses_power_at)],
)
def test_a_start_survives_a_crash_at_any_file_system_call(
    tmp_path: Path, resume: str, crash: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # real ones take most of the test's time
    before, folder = tmp_path / "before", tmp_path / "run"
    old_run(before)
    how = str(folder / run_folder.CHECKPOINTS / "step_00000004") if resume == "named" else resume
    for number in itertools.count():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        more = (folder,) if crash is loses_power_at else ()
        crashed = crash(number, partial(start, folder, how), *more)
        check_whole(folder)
        if resume != "auto":
            check_one_run(folder, resume)
        run_folder.check(recipe_for(folder, how))
        start(folder, how)
        check_whole(folder)
        assert not list(folder.glob(f"*{files.TEMPORARY}"))
        starts = json.loads((folder / run_folder.ENVIRONMENT).read_bytes())
        assert starts[-1] == {"started": "again"}
        if not crashed:
            break
    assert number > 20


def test_lines_are_on_the_disk_when_a_checkpoint_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(path.read_bytes()))
    lines = run_folder.JsonLines(path)
    lines.write({"step": 0})
    lines.write({"step": 1})
    assert not synced  # a sync for each line would take longer than many an update
    lines.flush()
    assert synced == [b'{"step": 0}\n{"step": 1}\n']


@pytest.mark.parametrize(
    ("text", "newest", "forced", "anew", "named", "expects_same_run"),
    [
        ("auto", True, False, False, None, True),
        ("force", True, True, False, None, False),
        ("anew", False, False, True, None, False),
        ("runs/a/checkpoints/step_00000004", False, False, False, "step_00000004", False),
    ],
)
def test_each_way_to_resume_has_its_meaning(
    text: str, newest: bool, forced: bool, anew: bool, named: str | None, expects_same_run: bool
) -> None:
    resume = run_folder.ResumeRule(text)
    assert (resume.newest, resume.forced, resume.anew) == (newest, forced, anew)
    assert (resume.named and resume.named.name) == named
    assert resume.expects_same_run == expects_same_run
    assert resume.after_restart == run_folder.ResumeRule("auto")


def test_weights_are_read_only_by_a_run_that_begins(tmp_path: Path) -> None:
    folder, start = tmp_path / "run", tmp_path / "weights.pth"

    def read(resume: str) -> Path | None:
        recipe = recipe_for(folder, resume).model_copy(
            update={"model": config.Model(weights=start)}
        )
        return run_folder.weights_to_read(recipe)

    assert [read(resume) for resume in ("auto", "force", "anew")] == [start] * 3
    named = folder / run_folder.CHECKPOINTS / "step_00000004"
    named.mkdir(parents=True)
    assert [read(resume) for resume in ("auto", "force", "anew")] == [None, None, start]
    assert read(str(named)) is None


def test_a_folder_in_use_is_told_by_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_folder.in_use(tmp_path) is False
    with files.locked(tmp_path / run_folder.LOCK):
        assert run_folder.in_use(tmp_path) is True
    assert run_folder.in_use(tmp_path) is False

    def refuse(*_: object, **__: object) -> bool:
        raise OSError("no locks here")

    monkeypatch.setattr(files, "lock", refuse)
    assert run_folder.in_use(tmp_path) is None
