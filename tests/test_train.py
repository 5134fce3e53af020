"""Whole runs through the entry point: resuming bit for bit, stopping, launching, refusing."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKOUT, REPO, TIMEOUT_S, environment, lines, run
from safetensors.torch import load_file

from fasttrain import checkpoint, config, run_folder, sampling, shards, stopping, train
from fasttrain.schedule import make_plan

ALL = {
    "data": {"augment": "trivial", "color_jitter": (0.4, 0.4, 0.4, 0.1), "erase": 0.5},
    "optim": {"ema_decay": 0.9},
    "train": {
        "micro_batch_size": 4,
        "cpu_threads": 1,
        "label_smoothing": 0.1,
        "mixup_alpha": 0.2,
        "cutmix_alpha": 1.0,
    },
    "log": {"samples": True},
}
MEASURED = ("images_per_s", "data_wait", "eval_s", "seconds", "limit", "loader")


class StopAfter:
    """Stands in for the request to stop: comes after it was asked for so many times.

    The loop asks once before the first update, after each, and after each batch of an evaluation.
    """

    asked: int = sys.maxsize

    def __init__(self, world_size: int, file: Path, timeout: timedelta) -> None:
        self.left, self.decision = self.asked, 0

    def patience_s(self) -> float:
        return 60.0

    def agreed(self) -> int:
        self.left -= 1
        self.decision = 0 if self.left else 143
        return self.decision


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StopAfter]]:
    monkeypatch.setattr(stopping, "StopRequest", StopAfter)
    yield StopAfter
    StopAfter.asked = sys.maxsize


def result_of(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, list[dict[str, Any]]]]:
    """Every tensor of the last checkpoint and every line of the run, less what was measured."""
    newest = checkpoint.find(folder / "checkpoints")[0]
    tensors = {
        f"{file.stem}.{name}": tensor
        for file in newest.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    training = torch.load(newest / "training.pt", weights_only=True)
    for number, values in training["optimizer"]["state"].items():
        tensors[f"momentum.{number}"] = values["momentum_buffer"]
    records = {
        path.name: [
            {key: value for key, value in record.items() if key not in MEASURED}
            for record in lines(path)
        ]
        for path in folder.glob("*.jsonl")
    }
    return tensors, records


def assert_same_result(a: Path, b: Path) -> None:
    (tensors_a, records_a), (tensors_b, records_b) = result_of(a), result_of(b)
    assert records_a == records_b
    assert tensors_a.keys() == tensors_b.keys()
    for name, tensor in tensors_a.items():
        assert torch.equal(tensor, tensors_b[name]), name


@pytest.mark.parametrize(
    "stops",
    [
        [4, 8],  # after 3 updates, and in the evaluation after 5
        # [2] * 9 stops after each of the first updates, in 7 to 10 an evaluation is cut short.
        *(pytest.param(stops, marks=pytest.mark.slow) for stops in ([1], [12, 4], [2] * 9)),
    ],
)
def test_resumed_at_any_step_it_ends_bit_for_bit_equal(
    tiny: Callable[..., Path], tmp_path: Path, stop_after: type[StopAfter], stops: list[int]
) -> None:
    recipe = str(tiny(**ALL))  # 15 updates of 2 micro-batches, with dropout and EMA
    straight = tmp_path / "straight"
    train.main([recipe, "--set", f"log.run_dir={straight}"])
    assert len(lines(straight / "samples-rank0.jsonl")) == 15
    resumed = tmp_path / "resumed"
    for stop_after.asked in stops:
        with pytest.raises(SystemExit) as status:
            train.main([recipe, "--set", f"log.run_dir={resumed}"])
        assert status.value.code == 143
    stop_after.asked = sys.maxsize
    train.main([recipe, "--set", f"log.run_dir={resumed}"])
    assert_same_result(straight, resumed)
    assert len(json.loads((resumed / "environment.json").read_text())) == len(stops) + 1


def test_killed_at_any_moment_it_ends_bit_for_bit_equal(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies without saving, so that lines past the last checkpoint must be cut."""
    recipe = str(tiny(**ALL))
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train.main([recipe, "--set", f"log.run_dir={straight}"])

    class Dies(StopAfter):
        def agreed(self) -> int:
            if super().agreed():
                raise KeyboardInterrupt
            return 0

    for updates in (7, 10):  # checkpoints are at 4, 8, 12: each time some work is lost
        with monkeypatch.context() as patch:
            patch.setattr(stopping, "StopRequest", Dies)
            patch.setattr(Dies, "asked", updates)
            with pytest.raises(KeyboardInterrupt):
                train.main([recipe, "--set", f"log.run_dir={killed}"])
    monkeypatch.setattr(stopping, "StopRequest", StopAfter)
    train.main([recipe, "--set", f"log.run_dir={killed}"])
    assert_same_result(straight, killed)


def start(recipe: Path, *settings: str, world: int = 1) -> subprocess.Popen[str]:
    words = [word for setting in settings for word in ("--set", setting)]
    return subprocess.Popen(
        [*launch(world), "fasttrain/train.py", recipe, *words],
        cwd=CHECKOUT,
        env=environment(ACCELERATE_USE_CPU="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def children_of(launcher: int) -> list[int]:
    try:
        return [*map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split())]
    except OSError:
        return []


def pid_of_trainer(launcher: int) -> int:
    return children_of(launcher)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 5])
def test_killed_at_random_moments_it_ends_bit_for_bit_equal(
    tiny: Callable[..., Path], tmp_path: Path, kills: int
) -> None:
    """With SIGKILL, the launcher and its process: a real launch, and nothing tidied up."""
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
def test_a_process_of_three_killed_at_random_moments(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Or their launcher, 12 times in all: the others end by themselves."""
    changes: dict[str, Any] = ALL | {"checkpoint": {"every_steps": 3}}
    batches = {"global_batch_size": 12, "micro_batch_size": 2, "epochs": 80}
    changes["train"] = ALL["train"] | batches | {"eval_every_epochs": 10}
    changes["optim"] = ALL["optim"] | {"lr": 0.01}
    recipe, straight, killed = tiny(**changes), tmp_path / "straight", tmp_path / "killed"
    assert start(recipe, f"log.run_dir={straight}", world=3).communicate() and newest_step(straight)
    moments = random.Random(0)
    for number in range(12):
        launched = start(recipe, f"log.run_dir={killed}", world=3)
        done = 18 * number
        wait_until(lambda done=done: newest_step(killed) > done, f"update {done}")
        time.sleep(moments.uniform(0, 0.5))
        victims = [launched.pid, *children_of(launched.pid)]
        os.kill(moments.choice(victims), signal.SIGKILL)
        begun = time.monotonic()
        wait_until(lambda v=victims[1:]: not any(map(is_alive, v)), "the end of the others")
        print(f"kill {number + 1}: the others ended after {time.monotonic() - begun:.0f} s")
        launched.communicate()
    ended = start(recipe, f"log.run_dir={killed}", world=3)
    ended.communicate()
    assert ended.returncode == 0
    assert_same_result(straight, killed)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def num_updates(folder: Path) -> int:
    """Of a run that logs each."""
    path = folder / "metrics.jsonl"
    return len(lines(path, "train")) if path.exists() else 0


def newest_step(folder: Path) -> int:
    return max((int(p.name[5:]) for p in checkpoint.find(folder / "checkpoints")), default=0)


@pytest.mark.slow
def test_killed_at_500_random_moments_it_ends_bit_for_bit_equal(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Each time a forked process that has imported everything already, so that the moments fall
    into training, evaluating, saving and starting; `FASTTRAIN_KILLS` says how many."""
    import torch._dynamo  # noqa: F401  (seconds, at the first optimizer)
    from torchvision.transforms import v2  # noqa: F401

    from fasttrain import data, decoding, execution, loop  # noqa: F401

    changes: dict[str, Any] = ALL | {"checkpoint": {"every_steps": 1}}
    changes["train"] = ALL["train"] | {"epochs": 6}  # 30 updates
    recipe, straight = str(tiny(**changes)), tmp_path / "straight"

    def run_for(folder: Path, seconds: float) -> int:
        child = os.fork()
        if not child:
            status = 99
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


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_same_command_goes_on(
    tiny: Callable[..., Path],
    tmp_path: Path,
    number: signal.Signals,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SIGTERM goes to the launcher, as `kill` would send it; SIGINT to both, as Ctrl-C does; and
    of a launcher that is killed outright no orphan is left."""
    recipe = tiny(
        train={"epochs": 12, "eval_every_epochs": 12},
        checkpoint={"every_steps": 1000},
        log={"every_steps": 1},
    )
    folder = tmp_path / "run"
    launched = start(recipe)
    metrics = folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(lines(metrics, "train")) > 5, "a few updates")
    trainer = pid_of_trainer(launched.pid)
    os.kill(launched.pid, number)
    if number == signal.SIGINT:
        os.kill(trainer, number)
    wait_until(lambda: not Path(f"/proc/{trainer}").exists(), "the trainer's end")
    output = launched.communicate()[0]
    assert launched.returncode != 0
    (saved,) = checkpoint.find(folder / "checkpoints")
    assert f"stopped and saved as {saved}" in output
    step = checkpoint.read_state(saved).state.step
    assert 6 <= step < 60 and not (folder / "DONE").exists()
    if number != signal.SIGTERM:
        return

    train.main([str(recipe)])
    finished = capsys.readouterr().out
    assert f"going on from {saved}" in finished
    done = json.loads(finished.splitlines()[-1])
    assert done["step"] == 59 and done == json.loads((folder / "DONE").read_text())
    train.main([str(recipe), "--set", f"log.run_dir={tmp_path}/b"])
    assert_same_result(folder, tmp_path / "b")


def test_a_file_and_a_signal_stop_it(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The file by a status that says "try again"; SIGUSR1 as SLURM sends it before the limit."""
    recipe = tiny(
        train={"epochs": 200, "eval_every_epochs": 200},
        checkpoint={"every_steps": 1000},
        log={"every_steps": 1},
    )
    folder = tmp_path / "run"
    trainer = subprocess.Popen(
        [sys.executable, "fasttrain/train.py", recipe],
        cwd=CHECKOUT,
        env=environment(ACCELERATE_USE_CPU="1"),
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: num_updates(folder) > 5, "a few updates")
    trainer.send_signal(signal.SIGUSR1)
    output = trainer.communicate()[0]
    assert trainer.returncode == 128 + signal.SIGUSR1
    (saved,) = checkpoint.find(folder / "checkpoints")
    assert f"stopped and saved as {saved}" in output

    def touch_later() -> None:
        some = num_updates(folder) + 5
        wait_until(lambda: num_updates(folder) > some, "a few updates")
        (folder / "stop").touch()

    threading.Thread(target=touch_later).start()
    with pytest.raises(SystemExit) as status:
        train.main([str(recipe)])
    assert status.value.code == 75
    assert len(checkpoint.find(folder / "checkpoints")) == 2
    assert not (folder / "stop").exists() and not (folder / "DONE").exists()


def test_a_file_that_is_there_before_the_start_counts(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, stop = str(tiny(train={"max_steps": 2})), tmp_path / "run" / "stop"
    stop.parent.mkdir()
    stop.touch()
    with pytest.raises(SystemExit) as status:
        train.main([recipe])
    assert status.value.code == 75 and not stop.exists()
    assert "stopped before the first update; the same command goes on" in capsys.readouterr().out
    train.main([recipe])
    assert (tmp_path / "run" / "DONE").exists()


def test_before_the_first_update_a_signal_ends_it_at_once(tmp_path: Path) -> None:
    program = """
import os, signal, sys, time
from pathlib import Path
from fasttrain import stopping
stop = stopping.StopRequest(1, Path("stop"))
stop.say = lambda text: None
if "training" in sys.argv:
    stop.unsaved = lambda: True
    assert stop.agreed() == 0
    for number in (signal.SIGTERM, signal.SIGINT):  # the first of them
        os.kill(os.getpid(), number)
        time.sleep(0.3)
        assert stop.agreed() == 128 + number
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""
    for words in ([], ["training"]):
        ended = run([sys.executable, "-c", program, *words], code=130)
        assert ended.stderr == "stopped by SIGINT, without saving\n"


def test_a_folder_in_use_is_refused(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny()
    monkeypatch.setattr(run_folder, "LOCK_WAIT_S", 0.3)
    with run_folder.locked(config.load(path)), pytest.raises(SystemExit):
        train.main([str(path)])
    assert f"is in use by process {os.getpid()} on {os.uname().nodename}" in capsys.readouterr().err


def test_another_start_is_forced_anew_or_named(
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
    assert f"going on from {root / 'step_00000006'}" in output and steps() == [2, 5, 8]
    assert config.load(folder / "recipe.toml").checkpoint.resume == "auto"

    named = root / "step_00000004"
    output = go("train.max_steps=9", f"checkpoint.resume={named}")  # of the first recipe
    assert f"going on from {named}" in output and steps() == [2, 5, 8]
    (aside,) = folder.glob("before-*")
    assert {p.name for p in (aside / "checkpoints").iterdir()} >= {"step_00000009"}
    assert len(lines(aside / "metrics.jsonl", "train")) == 3

    output = go("train.max_steps=3", "train.seed=2", "checkpoint.resume=anew")
    assert "going on" not in output and steps() == [2]
    assert [p.name for p in checkpoint.find(root)] == ["step_00000003"]
    assert len([*folder.glob("before-*")]) == 2
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # as the same command when it is requeued
    output = go("train.max_steps=5", "train.seed=2", "checkpoint.resume=anew")
    assert f"going on from {root / 'step_00000003'}" in output
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


def test_a_process_that_hears_nothing_ends_after_its_launcher(tmp_path: Path) -> None:
    """As one that waits in an exchange that will never end."""
    deaf = (
        "import os, signal, time\n"
        "from fasttrain import stopping\n"
        "stopping.ORPHAN_S = 1\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "stopping.Follower({'ACCELERATE_MIXED_PRECISION': 'no'})\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run(['python', '-c', {deaf!r}])"],
        cwd=CHECKOUT,
        env=environment(),
    )
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "a start")
    process = Path(f"/proc/{(tmp_path / 'pid').read_text()}")
    launcher.kill()
    launcher.wait()
    assert process.exists()
    wait_until(lambda: not process.exists(), "the end of an orphan")


def test_a_process_that_dies_takes_the_others_along(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Within a minute, and its own traceback is the message."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(REPO)!r})\n"
        "from fasttrain import loop, train\n"
        "real = loop._update\n"
        "def update(accelerator, learner, *rest):\n"
        "    if learner.state.step == 3 and os.environ['RANK'] == '1':\n"
        "        raise ZeroDivisionError('of rank 1')\n"
        "    return real(accelerator, learner, *rest)\n"
        "loop._update = update\n"
        "train.main()\n"
    )
    launched = subprocess.Popen(
        [*launch(2), program, tiny()],
        cwd=CHECKOUT,
        env=environment(ACCELERATE_USE_CPU="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len(children_of(launched.pid)) == 2, "both processes")
    workers = children_of(launched.pid)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and lines(metrics, "train"), "update 3")
    begun = time.monotonic()
    errors = launched.communicate(timeout=TIMEOUT_S)[1]
    assert launched.returncode and time.monotonic() - begun < 60
    assert "ZeroDivisionError: of rank 1" in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_two_processes_see_the_global_batches_of_one(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    # 2 updates: enough to see that gradients are exchanged, too few for rounding to grow
    batch = {"global_batch_size": 16, "micro_batch_size": 4, "max_steps": 2}
    recipe = tiny(**ALL | {"train": batch})
    folders = {world: tmp_path / str(world) for world in (1, 2)}
    train.main([str(recipe), "--set", f"log.run_dir={folders[1]}"])
    words = [*launch(2), "fasttrain/train.py", recipe, "--set", f"log.run_dir={folders[2]}"]
    ended = run(words, ACCELERATE_USE_CPU="1")
    assert json.loads(ended.stdout.splitlines()[-1])["seen"] == 13
    assert "Warning" not in ended.stderr
    alone = lines(folders[1] / "samples-rank0.jsonl")
    ranks = [lines(folders[2] / f"samples-rank{rank}.jsonl") for rank in range(2)]
    for one, *both in zip(alone, *ranks, strict=True):
        assert len(one["ids"]) == 16 and {record["step"] for record in both} == {one["step"]}
        for key in ("ids", "windows", "flips"):
            # micro-batches of 4, dealt to the processes in turn
            dealt = [both[g % 2][key][4 * (g // 2) : 4 * (g // 2) + 4] for g in range(4)]
            assert one[key] == [value for group in dealt for value in group]
    a, b = (result_of(folder)[0] for folder in folders.values())
    for name, tensor in a.items():
        if "running" not in name and "num_batches" not in name:  # averaged, not accumulated
            torch.testing.assert_close(tensor, b[name], rtol=2e-3, atol=2e-4, msg=name)
    losses = [[r["loss"] for r in lines(f / "metrics.jsonl", "train")] for f in folders.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def launch(world: int) -> list[str]:
    if world == 1:
        return ["accelerate", "launch"]
    several = ["--multi_gpu", "--num_processes", str(world), "--main_process_port", "0"]
    return ["accelerate", "launch", *several]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_global_batches_are_the_same_on_any_number_of_processes(
    tiny: Callable[..., Path], tmp_path: Path, world: int
) -> None:
    """In real runs, for every accumulation that fits, as each process has logged.

    From two images on: BatchNorm has nothing to average over one pixel of one image.
    """
    batch = 24
    per_process = batch // world
    for micro in (n for n in range(2, per_process + 1) if per_process % n == 0):
        train_table = {"global_batch_size": batch, "micro_batch_size": micro, "max_steps": 2}
        folder = tmp_path / f"{micro}"
        recipe = tiny(
            train=train_table, log={"samples": True, "run_dir": str(folder)}, optim={"lr": 0.01}
        )
        run([*launch(world), "fasttrain/train.py", recipe], ACCELERATE_USE_CPU="1")
        given = config.load(recipe)
        split = shards.open_split(given.data.root, "train")
        plan = make_plan(given.train, given.optim, split.num_samples, 1)
        ranks = [lines(folder / f"samples-rank{rank}.jsonl") for rank in range(world)]
        for step in range(2):
            whole = (
                plan if micro == batch else replace(plan, micro_batch_size=batch, accumulation=1)
            )
            expected = sampling.train_draw(split, given.data, whole, step, 0, 0)
            for name, values in zip(("ids", "windows", "flips"), expected[:3], strict=True):
                found: list[Any] = []
                for group in range(batch // micro):  # micro-batches, dealt in turn
                    first = group // world * micro
                    found += ranks[group % world][step][name][first : first + micro]
                assert found == values.tolist()


@pytest.mark.slow
def test_begun_on_four_processes_and_continued_on_two_and_three(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """In the middle of an epoch, asked to stop by a file; each image is seen exactly once."""
    folder = tmp_path / "run"
    recipe = tiny(
        train={"global_batch_size": 12, "epochs": 40, "eval_every_epochs": 7},
        log={"samples": True, "every_steps": 1},
    )
    for world in (4, 2, 3):
        launched = subprocess.Popen(
            [*launch(world), "fasttrain/train.py", recipe],
            cwd=CHECKOUT,
            env=environment(ACCELERATE_USE_CPU="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if world != 3:
            some = num_updates(folder) + 4
            wait_until(lambda some=some: num_updates(folder) >= some, f"update {some}")
            (folder / "stop").touch()
        output = launched.communicate(timeout=TIMEOUT_S)[0]
        assert (launched.returncode == 0) == (world == 3), output
        assert world == 4 or "going on from" in output
    records = [r for path in folder.glob("samples-*.jsonl") for r in lines(path)]
    assert len({r["step"] for r in records}) == 120
    for epoch in range(40):
        ids = [i for r in records if r["step"] // 3 == epoch for i in r["ids"]]
        assert len(ids) == 36 and len(set(ids)) == 36


def test_a_run_on_two_processes_goes_on_on_one(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny(log={"samples": True}, train={"max_steps": 7})
    command = [*launch(2), "fasttrain/train.py", recipe]
    run(command, ACCELERATE_USE_CPU="1")
    rest = [str(recipe), "--set", "train.max_steps=15"]
    train.main(rest)
    output = capsys.readouterr().out
    assert "going on from" in output and "step_00000007" in output
    records = [r for p in (tmp_path / "run").glob("samples-*.jsonl") for r in lines(p)]
    for epoch in range(3):
        ids = [i for r in records if r["step"] // 5 == epoch for i in r["ids"]]
        assert len(ids) == 40 and len(set(ids)) == 40
    train.main(rest)
    again = capsys.readouterr().out.splitlines()
    assert again[0].endswith("is done, nothing to do") and json.loads(again[1])["step"] == 14


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_on_a_gpu_a_deterministic_run_ends_bit_for_bit_equal(
    tiny: Callable[..., Path], tmp_path: Path, precision: str
) -> None:
    ends_equal_when_resumed(tiny, tmp_path, precision, CUDA_VISIBLE_DEVICES="0")


def test_a_deterministic_run_ends_bit_for_bit_equal(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    ends_equal_when_resumed(tiny, tmp_path, "no")


def ends_equal_when_resumed(
    tiny: Callable[..., Path], tmp_path: Path, precision: str, **changes: str
) -> None:
    """A run in one go, and one that ends and starts again."""
    settings = {"deterministic": True, "precision": precision, "cpu_threads": 1}
    recipe = tiny(**ALL | {"train": ALL["train"] | settings})
    # In one process of its own, as `deterministic` stays set.
    program = "import sys\nfrom fasttrain import train\n"
    for folder, end in (("straight", 15), ("resumed", 7), ("resumed", 15)):
        words = ["--set", f"log.run_dir={tmp_path / folder}", "--set", f"train.max_steps={end}"]
        program += f"train.main([sys.argv[1], *{words!r}])\n"
    run(["python", "-c", program, recipe], **changes)
    ours, expected = (result_of(tmp_path / name)[0] for name in ("resumed", "straight"))
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


def test_fp16_without_a_gpu_is_refused(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as status:
        train.main([str(tiny(train={"precision": "fp16"}))])
    assert status.value.code == 2
    assert "precision = fp16: needs a GPU; use bf16 or no" in capsys.readouterr().err


def test_processes_that_believe_to_be_alone_are_stopped(tiny: Callable[..., Path]) -> None:
    failed = subprocess.run(
        [*launch(2), "fasttrain/train.py", tiny()],
        cwd=CHECKOUT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert failed.returncode != 0
    # Once, and at the end of the launcher's report.
    assert failed.stderr.count("2 processes were launched, but Accelerate joined 1") == 1
    assert "<NO_OTHER_FAILURES>" in failed.stderr
    report = failed.stderr.rpartition("Root Cause")[2]
    assert "traceback : 2 processes were launched" in report and len(report.splitlines()) < 12
    assert "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2" in failed.stderr


NO_TORCH = """
import sys, time
start = time.monotonic()
from fasttrain import train
try:
    train.main(sys.argv[1:])
finally:
    print(time.monotonic() - start, "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.root=/nowhere/imagenet"], "python tools/make_shards.py /path/to/imagenet /nowhere"),
        (["data.root=/nowhere/imagenet"], "looked for /nowhere/imagenet/manifest.json"),
        (["train.global_batch_size=46"], "global_batch_size = 46: more than the 45 training"),
        (["train.epochs=abc"], '[train] epochs = "abc": expected int, got str'),
    ],
)
def test_faults_are_found_before_torch_is_imported(
    tiny: Callable[..., Path], settings: list[str], message: str
) -> None:
    words = [word for setting in settings for word in ("--set", setting)]
    failed = run(["python", "-c", NO_TORCH, tiny(), *words], code=2)
    seconds, imported = failed.stdout.split()
    assert message in failed.stderr
    assert imported == "False" and float(seconds) < 5  # 0.4 s on an idle machine


def test_imagenet_recipe_without_imagenet_through_the_launcher() -> None:
    failed = run(["accelerate", "launch", "fasttrain/train.py", "recipes/large.toml"], code=1)
    assert "no data set at data/imagenet (looked for " in failed.stderr
    assert "python tools/make_shards.py /path/to/imagenet data/imagenet" in failed.stderr


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
