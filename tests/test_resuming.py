"""A run that is resumed ends bit for bit equal to a run that was never stopped."""

import contextlib
import gc
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TIMEOUT_S, lines, run, write_recipe
from runs import (
    ALL,
    assert_same_result,
    children_of,
    newest_step,
    result_of,
    start,
    wait_until,
)

from fasttrain import checkpoint, config, run_folder, stopping, train


class StopAfter:
    """Stands in for the request to stop. The request comes at call number `asked`.

    The loop calls it before the first update, after each update, and after each batch of an
    evaluation.
    """

    asked: int = sys.maxsize

    def __init__(self, *_: Any) -> None:
        self.left, self.decision = self.asked, 0

    def agreed(self, unsaved: bool) -> int:
        self.left -= 1
        self.decision = 0 if self.left else 143
        return self.decision


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StopAfter]]:
    """Makes runs in this process stop at call number `stop_after.asked` of the loop."""
    monkeypatch.setattr(stopping, "StopRequest", StopAfter)
    yield StopAfter
    StopAfter.asked = sys.maxsize


@pytest.fixture(scope="module")
def straight(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped: 15 updates of 2 micro-batches, dropout, EMA."""
    folder = tmp_path_factory.mktemp("straight")
    train.main([str(write_recipe(folder / "all.toml", dataset, folder / "run", **ALL))])
    assert len(lines(folder / "run" / "samples-rank0.jsonl")) == 15
    assert len({line["crop_px"] for line in lines(folder / "run" / "metrics.jsonl", "train")}) > 1
    return folder / "run"


@pytest.mark.parametrize(
    "stops",
    [
        [4, 8],  # after 3 updates, and in the evaluation after 5
        # [2] * 9 stops after each of the first updates, in 7 to 10 an evaluation is cut short.
        *(pytest.param(stops, marks=pytest.mark.slow) for stops in ([1], [12, 4], [2] * 9)),
    ],
)
def test_a_run_resumed_at_any_step_ends_bit_for_bit_equal(
    straight: Path,
    tiny: Callable[..., Path],
    tmp_path: Path,
    stop_after: type[StopAfter],
    stops: list[int],
) -> None:
    recipe = str(tiny(**ALL))
    for stop_after.asked in stops:
        with pytest.raises(SystemExit) as status:
            train.main([recipe])
        assert status.value.code == 143
    stop_after.asked = sys.maxsize
    train.main([recipe])
    assert_same_result(straight, tmp_path / "run")
    environments = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert len(environments) == len(stops) + 1


@pytest.mark.slow
def test_a_run_with_adamw_resumed_ends_bit_for_bit_equal(
    tiny: Callable[..., Path], tmp_path: Path, stop_after: type[StopAfter]
) -> None:
    adamw = {"name": "adamw", "lr": 0.004, "warmup_lr": 0.001, "weight_decay": 0.05}
    recipe = str(tiny(optim=adamw))
    train.main([recipe, "--set", f"log.run_dir={tmp_path / 'straight'}"])
    for stop_after.asked in (4, 8):
        with pytest.raises(SystemExit):
            train.main([recipe])
    stop_after.asked = sys.maxsize
    train.main([recipe])
    assert_same_result(tmp_path / "straight", tmp_path / "run")


def test_a_run_that_died_between_checkpoints_ends_bit_for_bit_equal(
    straight: Path, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is saved when the run dies, so lines past the last checkpoint must be cut."""
    recipe = str(tiny(**ALL))

    class Dies(StopAfter):
        def agreed(self, unsaved: bool) -> int:
            if super().agreed(unsaved):
                raise KeyboardInterrupt
            return 0

    for updates in (7, 10):  # checkpoints are at 4, 8, 12: each time some work is lost
        with monkeypatch.context() as patch:
            patch.setattr(stopping, "StopRequest", Dies)
            patch.setattr(Dies, "asked", updates)
            with pytest.raises(KeyboardInterrupt):
                train.main([recipe])
    monkeypatch.setattr(stopping, "StopRequest", StopAfter)
    train.main([recipe])
    assert_same_result(straight, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 5])
def test_a_run_killed_at_random_moments_ends_bit_for_bit_equal(
    tiny: Callable[..., Path], tmp_path: Path, kills: int
) -> None:
    """SIGKILL ends the launcher and its trainer, so neither of them can clean up."""
    changes: dict[str, Any] = ALL | {"checkpoint": {"every_steps": 1}}
    changes["train"] = ALL["train"] | {"epochs": 2 + 2 * kills, "eval_every_epochs": 4}
    recipe, straight, killed = tiny(**changes), tmp_path / "straight", tmp_path / "killed"
    train.main([str(recipe), "--set", f"log.run_dir={straight}"])
    moments, metrics = random.Random(0), killed / "metrics.jsonl"
    for number in range(kills):
        done = 11 * number  # the run is shown to advance between kills
        launched = start(recipe, f"log.run_dir={killed}")
        wait_until(
            lambda done=done: metrics.exists() and newest_step(killed) > done, f"update {done}"
        )
        time.sleep(moments.uniform(0, 0.3))
        for process in (*children_of(launched.pid), launched.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        launched.communicate()
        wait_until(lambda pid=launched.pid: not children_of(pid), "the end")
    train.main([str(recipe), "--set", f"log.run_dir={killed}"])
    assert_same_result(straight, killed)


@pytest.mark.slow
def test_a_run_killed_at_500_random_moments_ends_bit_for_bit_equal(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Each run is a forked process that has imported everything already.

    So the kills fall into training, evaluating, saving and starting, and not into imports. The
    variable FASTTRAIN_KILLS changes their number.
    """
    import torch._dynamo  # noqa: F401  (seconds, at the first optimizer)
    from torchvision.transforms import v2  # noqa: F401

    from fasttrain import decoding, execution, loaders, loop  # noqa: F401

    changes: dict[str, Any] = ALL | {"checkpoint": {"every_steps": 1}}
    changes["train"] = ALL["train"] | {"epochs": 6}  # 30 updates
    recipe, straight = str(tiny(**changes)), tmp_path / "straight"

    def run_for(folder: Path, seconds: float) -> int:
        child = os.fork()
        if not child:
            status = 99
            # Pipelines of DALI that other tests left behind must not be destroyed here: a forked
            # process has none of their threads.
            gc.freeze()
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                train.main([recipe, "--set", f"log.run_dir={folder}"])
                status = 0
            finally:
                os._exit(status)
        deadline = time.monotonic() + seconds
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                ended = os.waitpid(child, 0)
                break
            time.sleep(0.002)
        return os.waitstatus_to_exitcode(ended[1])

    begun = time.monotonic()
    assert run_for(straight, TIMEOUT_S) == 0
    whole_s = time.monotonic() - begun
    number = int(os.environ.get("FASTTRAIN_KILLS", "500"))
    moments, kills, runs, folder = random.Random(0), 0, 0, tmp_path / "killed-0"
    while kills < number:
        status = run_for(folder, moments.uniform(0, whole_s))
        assert status in (0, -signal.SIGKILL), folder
        good = [not checkpoint.faults_of(p) for p in checkpoint.find(folder / "checkpoints")]
        assert all(good) and (len(good) >= 2 or newest_step(folder) < 2)
        kills += status != 0
        if status == 0:
            assert_same_result(straight, folder)
            shutil.rmtree(folder)
            runs += 1
            print(f"{kills} kills, {runs} runs that ended equal", flush=True)
            folder = tmp_path / f"killed-{runs}"
    assert run_for(folder, TIMEOUT_S) == 0
    assert_same_result(straight, folder)
    print(f"{kills} kills, {runs + 1} runs that ended equal; one takes {whole_s:.1f} s")


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_on_a_gpu_a_deterministic_run_resumed_ends_bit_for_bit_equal(
    tiny: Callable[..., Path], tmp_path: Path, precision: str
) -> None:
    check_deterministic(tiny, tmp_path, precision, CUDA_VISIBLE_DEVICES="0")


def test_a_deterministic_run_resumed_ends_bit_for_bit_equal(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    check_deterministic(tiny, tmp_path, "no")


def check_deterministic(
    tiny: Callable[..., Path], tmp_path: Path, precision: str, **changes: Any
) -> None:
    """Compares a run without a stop with one that ends after 3 updates and is resumed."""
    settings = {"deterministic": True, "precision": precision, "cpu_threads": 1}
    recipe = tiny(**ALL | {"train": ALL["train"] | settings})
    # One process of its own trains all three times, because `deterministic` stays set.
    program = "import sys\nfrom fasttrain import train\n"
    for folder, end in (("straight", 6), ("resumed", 3), ("resumed", 6)):
        words = ["--set", f"log.run_dir={tmp_path / folder}", "--set", f"train.max_steps={end}"]
        program += f"train.main([sys.argv[1], *{words!r}])\n"
    run(["python", "-c", program, recipe], **changes)
    ours, expected = (result_of(tmp_path / name)[0] for name in ("resumed", "straight"))
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


def test_another_recipe_on_an_old_run_is_refused(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(tiny(train={"max_steps": 2, "epochs": 3}))
    train.main([recipe])
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as status:
        train.main([recipe, "--set", "train.seed=1", "--set", "optim.lr=0.06"])
    assert status.value.code == 2
    message = capsys.readouterr().err
    assert "optim.lr: 0.05 -> 0.06" in message and "train.seed: 0 -> 1" in message
    assert "another folder with --set log.run_dir=" in message
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_resume_may_be_forced_or_anew_or_name_a_checkpoint(
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, folder = str(tiny(train={"max_steps": 6}, checkpoint={"keep": 9})), tmp_path / "run"
    root = folder / "checkpoints"

    def go(*settings: str, code: int | None = None) -> str:
        words = [word for setting in settings for word in ("--set", setting)]
        if code is None:
            train.main([recipe, *words])
        else:
            with pytest.raises(SystemExit) as status:
                train.main([recipe, *words])
            assert status.value.code == code
        return "".join(capsys.readouterr())

    def steps() -> list[int]:
        return [line["step"] for line in lines(folder / "metrics.jsonl", "train")]

    go()
    assert steps() == [2, 5]
    output = go("train.seed=1", "train.max_steps=9", code=2)
    assert "train.seed: 0 -> 1" in output and "--set checkpoint.resume=force" in output
    output = go("train.seed=1", "train.max_steps=9", "checkpoint.resume=force")
    assert "WARNING" in output and "train.seed: 0 -> 1" in output
    assert f"resuming from {root / 'step_00000006'}" in output and steps() == [2, 5, 8]
    assert config.load(folder / "recipe.toml").checkpoint.resume == "auto"

    named = root / "step_00000004"
    output = go("train.max_steps=9", f"checkpoint.resume={named}")  # of the first recipe
    assert f"resuming from {named}" in output and steps() == [2, 5, 8]
    (aside,) = folder.glob("before-*")
    assert {p.name for p in (aside / "checkpoints").iterdir()} >= {"step_00000009"}
    assert len(lines(aside / "metrics.jsonl", "train")) == 3

    output = go("train.max_steps=3", "train.seed=2", "checkpoint.resume=anew")
    assert "resuming" not in output and steps() == [2]
    assert [p.name for p in checkpoint.find(root)] == ["step_00000003"]
    assert len([*folder.glob("before-*")]) == 2
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # as the same command when it is requeued
    output = go("train.max_steps=5", "train.seed=2", "checkpoint.resume=anew")
    assert f"resuming from {root / 'step_00000003'}" in output
    monkeypatch.delenv("SLURM_RESTART_COUNT")

    output = go("checkpoint.resume=/nowhere", code=2)
    assert 'resume = "/nowhere": there is no such checkpoint; must be auto, force, anew' in output
    (root / "step_00000005" / "training.pt").unlink()
    output = go(f"checkpoint.resume={root / 'step_00000005'}", code=2)
    assert "training.pt: No such file or directory" in output
    go(f"checkpoint.resume={tmp_path}", code=2)  # a folder, but no checkpoint
    output = go(f"checkpoint.resume={root / 'step_00000003'}", code=2)  # of another recipe
    assert "train.seed: 2 -> 0" in output
    assert len([*folder.glob("before-*")]) == 2 and (root / "step_00000003").exists()


def test_a_folder_in_use_is_refused(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny()
    monkeypatch.setattr(run_folder, "LOCK_WAIT_S", 0.3)
    with run_folder.locked(config.load(path)), pytest.raises(SystemExit):
        train.main([str(path)])
    assert f"is in use by process {os.getpid()} on {os.uname().nodename}" in capsys.readouterr().err
