"""evaluate.py gives the result that the run measured, by class name, in the stated precision."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import evaluate
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from shard_files import renamed
from torch import Tensor

from fasttrain import checkpoint, modes, train
from fasttrain.faults import Fault

Evaluate = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def evaluated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Evaluate]:
    """Runs the command in this process. Returns its result and its messages."""

    def run(*words: Any) -> tuple[dict[str, Any], str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        AcceleratorState._reset_state(reset_partial_state=True)  # of another precision, perhaps
        evaluate.main()
        found = capsys.readouterr()
        return json.loads(found.out.splitlines()[-1]), found.err

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def finished(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """The checkpoint of a finished run, with a moving average."""
    train.main([str(tiny(optim={"ema_decay": 0.9}, train={"max_steps": 5}))])
    return checkpoint.find(tmp_path / "run" / "checkpoints")[0]


def test_an_evaluation_gives_the_accuracy_that_the_run_measured(
    finished: Path, dataset: Path, tmp_path: Path, evaluated: Evaluate
) -> None:
    done = json.loads((tmp_path / "run" / "DONE").read_text())
    torch.save(load_file(finished / "model.safetensors"), tmp_path / "weights.pth")
    wrapped = {"state_dict": {}, "state_dict_ema": load_file(finished / "ema.safetensors")}
    torch.save(wrapped, tmp_path / "wrapped.pth")
    recipe = ["--recipe", tmp_path / "tiny.toml"]
    for words, prefix in (
        ([tmp_path / "run"], ""),
        ([finished, "--ema", "--batch-size", 5], "ema_"),
        ([finished / "ema.safetensors"], "ema_"),
        ([tmp_path / "weights.pth", *recipe], ""),
        ([tmp_path / "wrapped.pth", "--ema", *recipe], "ema_"),
    ):
        found, said = evaluated(*words, "--data", dataset)
        assert found["seen"] == 13 and "evaluating 13/13" in said and "1 x cpu, float32\n" in said
        for key in ("top1", "top5", "loss"):
            assert found[key] == pytest.approx(done[prefix + key], rel=1e-5)
    with pytest.raises(Fault, match="give the recipe of its network"):
        evaluate.find_weights(tmp_path / "weights.pth", False, None)


def with_classes(state: dict[str, Tensor], rows: list[int | None]) -> dict[str, Tensor]:
    """A state dict whose last layer has these of its own rows; None means a new row."""
    found = dict(state)
    for name in ("classifier.3.weight", "classifier.3.bias"):
        other = torch.full_like(state[name][0], 3.0)
        found[name] = torch.stack([other if row is None else state[name][row] for row in rows])
    return found


def test_classes_are_found_by_name_in_another_order_and_among_more(
    finished: Path, dataset: Path, tmp_path: Path, evaluated: Evaluate
) -> None:
    expected, _ = evaluated(finished, "--data", dataset)
    state = load_file(finished / "model.safetensors")
    words = ["--data", dataset, "--recipe", tmp_path / "tiny.toml"]
    more = {"model": with_classes(state, [None, 2, None, 0, 1]), "classes": list("xcyab")}
    torch.save(more, tmp_path / "more.pth")
    found, said = evaluated(tmp_path / "more.pth", *words)
    assert found == expected
    assert "evaluating 3 of the network's 5 classes, found by name" in said
    torch.save(more["model"], tmp_path / "unnamed.pth")
    (tmp_path / "classes.txt").write_text("x\nc\ny\na\nb\n")
    found, _ = evaluated(tmp_path / "unnamed.pth", *words, "--classes", tmp_path / "classes.txt")
    assert found == expected


def test_numbers_are_refused_until_they_are_said_to_be_numbers(
    finished: Path,
    dataset: Path,
    tmp_path: Path,
    evaluated: Evaluate,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected, _ = evaluated(finished, "--data", dataset)
    numbered = renamed(dataset, ["2", "0", "1"], tmp_path / "numbered")
    with pytest.raises(SystemExit) as status:
        evaluated(finished, "--data", numbered)
    assert status.value.code == 2 and "add --classes-by-number" in capsys.readouterr().err
    state = load_file(finished / "model.safetensors")
    # Class 2 of these weights is what the data calls 2, the first of its classes.
    torch.save(with_classes(state, [1, 2, 0]), tmp_path / "other.pth")
    words = ["--data", numbered, "--recipe", tmp_path / "tiny.toml", "--classes-by-number"]
    found, said = evaluated(tmp_path / "other.pth", *words)
    assert found == expected and "classes by number: 2 is class 2, 0 is class 0" in said


def test_a_slow_bfloat16_is_left_for_float32_unless_it_is_asked_for(
    finished: Path,
    dataset: Path,
    tiny: Callable[..., Path],
    evaluated: Evaluate,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [finished, "--data", dataset, "--recipe", tiny("bf16", train={"precision": "bf16"})]
    expected, _ = evaluated(finished, "--data", dataset)
    for ratio, precision, same, said in (
        (0.2, None, True, "1 x cpu, float32: the recipe's bfloat16 takes 5.0 times as long"),
        (0.2, "bf16", False, "1 x cpu, bfloat16\n"),
        (2.0, None, False, "1 x cpu, bfloat16\n"),
        (0.2, "no", True, "1 x cpu, float32\n"),
    ):
        monkeypatch.setattr(modes, "bf16_ratio", lambda *_, ratio=ratio, **__: ratio)
        found, told = evaluated(*words, *(["--precision", precision] if precision else []))
        assert said in told and (found["loss"] == expected["loss"]) == same
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)
    with pytest.raises(SystemExit) as status:
        evaluated(*words, "--precision", "fp16")
    assert status.value.code == 2
    assert "--precision fp16: needs a GPU; use bf16 or no" in capsys.readouterr().err
