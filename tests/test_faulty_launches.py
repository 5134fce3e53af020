"""A wrong launch is refused, and the right number of its processes print the message."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Refused

from fasttrain import faults, loop, train
from fasttrain.faults import Fault


@pytest.mark.parametrize(
    ("environ", "words", "said"),
    [
        ({}, [], ["the following arguments are required: recipe"]),
        ({}, ["{recipe}", "--epochs", "3"], ["unrecognized arguments: --epochs 3"]),
        ({}, ["{recipe}", "--set"], ["argument --set: expected one argument"]),
        (
            {"WORLD_SIZE": "3"},
            ["{recipe}"],
            ["global_batch_size = 8: does not divide over 3 processes", "6 or 9", "launch 2 or 4"],
        ),
        (
            {"WORLD_SIZE": "2"},
            ["{recipe}", "--set", "train.micro_batch_size=3"],
            ["micro_batch_size = 3: does not divide the 4 images of each of 2", "use 2 or 4"],
        ),
        (
            {"WORLD_SIZE": "2"},
            ["{recipe}"],
            ["WORLD_SIZE = 2 in the environment, but no MASTER_ADDR: start", "accelerate launch"],
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "2"},
            ["{recipe}"],
            ["SLURM started 2 tasks, but no launcher connects", "use tools/train.sbatch"],
        ),
        *(
            (
                {name: value},
                ["{recipe}", "--set", "train.cpu_threads=0"],
                [f'{name} = "{value}" in the environment: expected a'],
            )
            for name, value in (
                ("WORLD_SIZE", "x"),
                ("WORLD_SIZE", ""),
                ("WORLD_SIZE", "0"),
                ("SLURM_RESTART_COUNT", "-1"),
                ("SLURM_CPUS_PER_TASK", "2(x2)"),
                ("LOCAL_WORLD_SIZE", "0"),
            )
        ),
    ],
)
def test_each_wrong_launch_is_refused(
    environ: dict[str, str],
    words: list[str],
    said: list[str],
    tiny: Callable[..., Path],
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    refused(train.main, [word.format(recipe=tiny()) for word in words], *said)


@pytest.mark.parametrize(("rank", "local", "speaks"), [(0, 0, 1), (1, 1, 0), (8, 0, 1), (9, 1, 0)])
def test_one_process_of_each_node_prints_the_fault(
    rank: int,
    local: int,
    speaks: bool,
    tiny: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local))
    with pytest.raises(SystemExit, match="2"):
        train.main([str(tiny(data={"root": "/nowhere"}))])
    said = capsys.readouterr().err
    assert said.startswith(f"rank {rank}: " if rank else "no data set") if speaks else not said


def test_a_fault_of_all_ranks_is_printed_once_and_a_fault_of_one_rank_by_that_rank(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    for name, value in (launched | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    for fault, said in (
        (loop.NonFiniteLoss("update 7"), ""),
        (loop.Unsaved("no space"), ""),
        (Fault("this one's tar"), "rank 3: this one's tar\n"),
    ):

        def fails(*_: object, fault: Fault = fault) -> None:
            raise fault

        monkeypatch.setattr(train, "train", fails)
        with pytest.raises(SystemExit, match="2"):
            train.main([str(tiny())])
        assert capsys.readouterr().err == said


def test_a_message_is_left_for_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch's launcher prints the message last.

    Accelerate's own launcher prints a traceback after it. A line says that this tells nothing new.
    """

    def said(**environ: str) -> tuple[str, str]:
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="2"):
            for name, value in ({"LOCAL_RANK": "0", "RANK": "2"} | environ).items():
                patch.setenv(name, value)
            faults.stop("no data", everywhere="EVERYWHERE" in environ)
        message = json.loads(report.read_text())["message"] if report.exists() else ""
        report.unlink(missing_ok=True)
        return capsys.readouterr().err, message

    report, line = tmp_path / "error.json", "rank 2: no data"
    monkeypatch.setattr(faults, "FIRST_S", 0.01)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    elastic = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_ERROR_FILE": str(report)}
    assert said(**elastic) == ("", line)
    assert said(**elastic, EVERYWHERE="") == (f"{line}\n", line)
    assert said(**elastic | {"TORCHELASTIC_ERROR_FILE": "/nowhere/x"}) == (f"{line}\n", "")
    assert said(**elastic, LOCAL_RANK="1") == ("", line)  # as nobody has ended it
    follows = "(the rest is Accelerate's traceback, which says no more)\n"
    assert said(ACCELERATE_MIXED_PRECISION="no", RANK="0") == (f"no data\n{follows}", "")
