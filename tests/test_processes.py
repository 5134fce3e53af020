"""Several processes train on the batches of one process, and none is left behind."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKOUT, REPO, TIMEOUT_S, environment, lines, run
from runs import (
    ALL,
    assert_same_result,
    children_of,
    is_alive,
    launch,
    newest_step,
    num_updates,
    result_of,
    start,
    wait_until,
)

from fasttrain import config, sampling, shards, train
from fasttrain.schedule import make_plan


def test_two_processes_see_the_batches_of_one_and_one_process_resumes_their_run(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 3 updates, 2 in an epoch: enough to see that gradients are reduced, too few for rounding to
    # grow, and the run is resumed in the middle of an epoch.
    batch = {"global_batch_size": 16, "micro_batch_size": 4, "max_steps": 3}
    recipe = tiny(**ALL | {"train": batch, "optim": ALL["optim"] | {"lr": 0.01}})
    one, two = tmp_path / "one", tmp_path / "two"
    train.main([str(recipe), "--set", f"log.run_dir={one}"])
    ended = run(
        [*launch(2), "fasttrain/train.py", recipe, "--set", f"log.run_dir={two}"],
        ACCELERATE_USE_CPU="1",
    )
    assert json.loads(ended.stdout.splitlines()[-1])["seen"] == 13
    assert "Warning" not in ended.stderr
    check_same_batches(one, two)
    check_close(one, two)

    capsys.readouterr()
    rest = [str(recipe), "--set", f"log.run_dir={two}", "--set", "train.max_steps=6"]
    train.main(rest)
    output = capsys.readouterr().out
    assert "resuming from" in output and "step_00000003" in output
    records = [record for path in two.glob("samples-*.jsonl") for record in lines(path)]
    for epoch in range(3):
        ids = [i for r in records if r["step"] // 2 == epoch for i in r["ids"]]
        assert len(ids) == 32 and len(set(ids)) == 32
    train.main(rest)
    again = capsys.readouterr().out.splitlines()
    assert again[0].endswith("is done, nothing to do") and json.loads(again[1])["step"] == 5


def check_same_batches(one: Path, two: Path) -> None:
    """Both processes of the run `two` together have drawn the global batches of the run `one`."""
    alone = lines(one / "samples-rank0.jsonl")
    ranks = [lines(two / f"samples-rank{rank}.jsonl") for rank in range(2)]
    for whole, *both in zip(alone, *ranks, strict=True):
        assert len(whole["ids"]) == 16 and {record["step"] for record in both} == {whole["step"]}
        for key in ("ids", "windows", "flips"):
            # micro-batches of 4, dealt to the processes in turn
            dealt = [both[g % 2][key][4 * (g // 2) : 4 * (g // 2) + 4] for g in range(4)]
            assert whole[key] == [value for group in dealt for value in group]


def check_close(one: Path, two: Path) -> None:
    """Weights, momenta and losses of both runs differ by rounding alone."""
    tensors, others = (result_of(folder)[0] for folder in (one, two))
    for name, tensor in tensors.items():
        if "running" not in name and "num_batches" not in name:  # averaged, not accumulated
            torch.testing.assert_close(tensor, others[name], rtol=2e-3, atol=2e-4, msg=name)
    trained = [lines(f / "metrics.jsonl", "train") for f in (one, two)]
    losses, sizes = ([[r[key] for r in run] for run in trained] for key in ("loss", "crop_px"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert sizes[0] == sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_global_batches_are_the_same_on_any_number_of_processes(
    tiny: Callable[..., Path], tmp_path: Path, world: int
) -> None:
    """Compares what each rank logged with the global batch, for every accumulation that fits.

    A micro-batch has at least two images, because BatchNorm cannot average one pixel of one image.
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
            expected = sampling.train_draw(split, given.data, whole, 0, step)
            for name, values in zip(("ids", "windows", "flips"), expected[:3], strict=True):
                found: list[Any] = []
                for group in range(batch // micro):  # micro-batches, dealt in turn
                    first = group // world * micro
                    found += ranks[group % world][step][name][first : first + micro]
                assert found == values.tolist()


@pytest.mark.slow
def test_a_run_of_four_processes_resumes_on_two_and_three(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """A file stops the run in the middle of an epoch. Each epoch still sees each image once."""
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
        assert world == 4 or "resuming from" in output
    records = [r for path in folder.glob("samples-*.jsonl") for r in lines(path)]
    assert len({r["step"] for r in records}) == 120
    for epoch in range(40):
        ids = [i for r in records if r["step"] // 3 == epoch for i in r["ids"]]
        assert len(ids) == 36 and len(set(ids)) == 36


def test_the_death_of_one_process_ends_the_others(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """The others end within a minute, and the message is the traceback of the one that died."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(REPO)!r})\n"
        "from fasttrain import loop, train\n"
        "real = loop.Trainer._update\n"
        "def update(trainer, batches):\n"
        "    if trainer.state.step == 3 and os.environ['RANK'] == '1':\n"
        "        raise ZeroDivisionError('of rank 1')\n"
        "    return real(trainer, batches)\n"
        "loop.Trainer._update = update\n"
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


@pytest.mark.slow
def test_three_processes_survive_random_kills_of_one_or_of_the_launcher(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """After each of 12 kills the other processes end by themselves, and the run can be resumed."""
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


def test_launched_processes_that_accelerate_did_not_join_are_stopped(
    tiny: Callable[..., Path],
) -> None:
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
