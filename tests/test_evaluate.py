"""evaluate.py gives the result that the run measured, by class name, in the stated precision."""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import STEP, Refused, run
from runs import launch
from safetensors.torch import load_file
from shard_files import renamed
from torch import Tensor

from fasttrain import checkpoint, config, loaders, modes, predictions, shards, train
from fasttrain.batch import Placement
from fasttrain.faults import Fault
from fasttrain.model import build_model

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


CPU = Placement(torch.device("cpu"), half=False, threads=1)


def records(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def logits_of(run_dir: Path, dataset: Path, crop_px: int, resize_px: int) -> tuple[Tensor, Tensor]:
    """The trained network's logits for the validation images, and for their mirror images."""
    recipe, split = config.load(run_dir / "recipe.toml"), shards.open_split(dataset, "val")
    model = build_model(**recipe.model.network(), num_classes=len(split.classes)).eval()
    checkpoint.load_weights(run_dir / STEP / "model.safetensors", model)
    size = {"eval_crop_px": crop_px, "eval_resize_px": resize_px}
    data = recipe.data.model_copy(update=size)
    (batch,) = loaders.eval_loader(split, data, split.num_samples, 0, 1, CPU)
    with torch.no_grad():
        return model(batch.images), model(batch.images.flip(3))


def check_files(folder: Path, classes: list[str], result: dict[str, Any]) -> dict[str, Any]:
    """The files of an evaluation agree with each other and with its result."""
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    assert {key: found[key] for key in result} == result
    rows = records(folder / "predictions.csv")
    assert [int(row["sample"]) for row in rows] == list(range(found["seen"]))
    hits = [row["label"] == row["predicted"] for row in rows]
    assert 100 * np.mean(hits) == pytest.approx(found["top1"])
    assert [entry["class"] for entry in found["classes"]] == classes
    for entry, line in zip(found["classes"], records(folder / "per_class.csv"), strict=True):
        own = [hit for hit, row in zip(hits, rows, strict=True) if row["label"] == entry["class"]]
        assert entry["images"] == len(own) and entry["top1"] == pytest.approx(100 * np.mean(own))
        assert line == {key: str(value) for key, value in entry.items()}
    wrong = [(row["label"], row["predicted"]) for row in rows if row["label"] != row["predicted"]]
    listed = {(c["label"], c["predicted"]): c["images"] for c in found["confusions"]}
    assert listed == {pair: wrong.count(pair) for pair in wrong}
    assert list(listed.values()) == sorted(listed.values(), reverse=True)
    lines = records(folder / "confusions.csv")
    assert lines == [{key: str(value) for key, value in c.items()} for c in found["confusions"]]
    return found


@pytest.mark.slow
def test_two_processes_write_the_predictions_for_several_data_sets(
    trained: Path, dataset: Path, tmp_path: Path, evaluated: Evaluate
) -> None:
    """They are those of one process. Each image is there once, in the order of the split."""
    other = renamed(dataset, ["c", "a", "b"], tmp_path / "other")
    words = [trained / STEP, "--data", dataset, other, "--crop-px", 48, "--resize-px", 50]
    words += ["--tta", "flip", "--batch-size", 4, "--out"]
    one, said = evaluated(*words, tmp_path / "one")
    assert list(one) == [str(dataset), str(other)]
    assert "shorter side resized to 50 px, centre crop of 48 px; mean of the logits" in said
    assert f"weights: {trained / STEP / 'model.safetensors'} (not averaged)" in said
    assert f"data: {other}, 13 images\nevaluating the network's 3 classes, found by name" in said
    for result in one.values():
        assert f"{result['top1']:.2f}" in said.rpartition("top-1 %")[2]

    split = shards.open_split(dataset, "val")
    plain, mirrored = logits_of(trained, dataset, 48, 50)
    expected = ((plain + mirrored) / 2).softmax(1)
    rows = records(tmp_path / "one" / "shards" / "predictions.csv")
    for row, probabilities, label in zip(rows, expected, split.label.tolist(), strict=True):
        assert row["label"] == split.classes[label]
        assert row["predicted"] == split.classes[int(probabilities.argmax())]
        assert float(row["confidence"]) == pytest.approx(float(probabilities.max()), abs=1e-4)
        shown = float(row["label_probability"])
        assert shown == pytest.approx(float(probabilities[label]), abs=1e-4)

    command = [*launch(2), "tools/evaluate.py", *words, tmp_path / "two"]
    two = json.loads(run(command, ACCELERATE_USE_CPU="1").stdout.splitlines()[-1])
    for root, name, classes in ((dataset, "shards", "abc"), (other, "other", "cab")):
        found = check_files(tmp_path / "one" / name, list(classes), one[str(root)])
        assert found["weights"] == str(trained / STEP / "model.safetensors")
        about = {"average": False, "data": str(root), "split": "val", "crop_px": 48}
        about |= {"resize_px": 50, "flip": True}
        assert {key: found[key] for key in about} == about
        check_files(tmp_path / "two" / name, list(classes), two[str(root)])
        both = [records(tmp_path / part / name / "predictions.csv") for part in ("one", "two")]
        for a, b in zip(*both, strict=True):
            for key in ("sample", "label", "predicted"):
                assert a[key] == b[key]
            assert float(a["confidence"]) == pytest.approx(float(b["confidence"]), abs=2e-4)


def test_the_evaluation_of_a_run_is_kept_in_its_folder(
    finished: Path,
    dataset: Path,
    tmp_path: Path,
    evaluated: Evaluate,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run" / "evaluation"
    result, said = evaluated(tmp_path / "run", "--data", dataset, "--ema")
    assert f"files: {folder}\n" in said and "ema.safetensors (the moving average)" in said
    assert check_files(folder, ["a", "b", "c"], result)["average"]
    result, said = evaluated(finished, "--data", dataset)
    assert "files:" not in said and not list(finished.glob("evaluation*"))
    assert "there is also a moving average of these weights: --ema evaluates that" in said

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as status:
        patch.setattr(predictions, "write", full)
        evaluated(tmp_path / "run", "--data", dataset)
    found = capsys.readouterr()
    assert status.value.code == 2 and json.loads(found.out.splitlines()[-1]) == result
    assert f"{folder}: not written (No space left on device)\nfree some space, or" in found.err
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.touch()
    copy = renamed(dataset, ["a", "b", "c"], tmp_path / "copy" / "shards")
    both, said = evaluated(tmp_path / "run", "--data", dataset, copy)
    assert "no files: " in said and "evaluate them in two calls, each with its --out" in said
    again, said = evaluated(tmp_path / "run", "--data", dataset)
    assert again == both[str(copy)] == result
    assert f"no files: {folder} cannot be written (File exists); --out FOLDER writes them" in said


def test_the_crop_keeps_the_ratio_of_the_recipe_or_takes_the_fraction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = config.Data(eval_resize_px=256, eval_crop_px=224)
    for words, crop_px, resize_px in (
        ("", 224, 256),
        ("--crop-px 288", 288, 329),
        ("--crop-px 240 --crop-fraction 0.95", 240, 253),
        ("--crop-fraction 1", 224, 224),
        ("--resize-px 232", 224, 232),
        ("--crop-px 256 --resize-px 256", 256, 256),
    ):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "x", "--data", "y", *words.split()])
        found = evaluate.with_size(evaluate.parse(), data)
        assert (found.eval_crop_px, found.eval_resize_px) == (crop_px, resize_px), words


def test_a_fault_of_one_of_several_data_sets_names_it(
    trained: Path, dataset: Path, tmp_path: Path, refused: Refused
) -> None:
    strange = renamed(dataset, ["x", "y", "z"], tmp_path / "strange")
    words = [trained / STEP, "--data", dataset, strange]
    refused(
        evaluate.main, words, f"{strange}: 3 of the data's 3 classes are unknown to the network"
    )
    again = renamed(dataset, ["a", "b", "c"], tmp_path / "more" / "shards")
    words = [trained / STEP, "--data", dataset, again, "--out", tmp_path / "out"]
    refused(
        evaluate.main,
        words,
        f"--out {tmp_path / 'out'}: {tmp_path / 'out/shards'} would be the folder of two data "
        "sets, which have the same last name; evaluate them in two calls",
    )
    numbered = renamed(dataset, ["0", "1", "2"], tmp_path / "numbered")
    words = [trained / STEP, "--data", dataset, numbered]
    refused(evaluate.main, words, f"{numbered}: the data's class names are numbers (0, 1, 2)")


def test_numbers_count_for_the_data_sets_that_have_them(
    trained: Path, dataset: Path, tmp_path: Path, evaluated: Evaluate
) -> None:
    numbered = renamed(dataset, ["0", "1", "2"], tmp_path / "numbered")
    words = [trained / STEP, "--data", dataset, "--data", numbered, "--classes-by-number"]
    found, _ = evaluated(*words)
    assert found[str(dataset)] == found[str(numbered)]
