"""The training loop works on lists of batches, without files and without DALI."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import lines
from torch import nn

from fasttrain import checkpoint, execution, files, loop
from fasttrain.batch import Batch
from fasttrain.config import Checkpoint, Log, Optim, Recipe, Train
from fasttrain.display import TrainDisplay
from fasttrain.evaluator import Evaluator
from fasttrain.learner import Learner
from fasttrain.loop import Inputs, Outputs, Trainer
from fasttrain.mixing import Mix, build_mix
from fasttrain.model import mobilenetv3_small
from fasttrain.run_folder import JsonLines
from fasttrain.schedule import Plan, lr_at, make_plan


def random_batches(number: int, size: int, classes: int = 4, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch(
            torch.randn(size, 3, 32, 32, generator=generator),
            torch.randint(0, classes, (size,), generator=generator),
        )
        for _ in range(number)
    ]


def run_fit(
    model: nn.Module,
    batches: list[Batch],
    plan: Plan,
    folder: Path,
    optim: Optim | None = None,
    evaluate_on: list[Batch] | None = None,
    stop_requested: Callable[[], int] = lambda: 0,
    label_smoothing: float = 0.0,
    ema: bool = False,
    mix: Mix | None = None,
    max_skipped_steps: int = 0,
    every_steps: int = 1000,
    log_every_steps: int = 1,
    max_failures: int = 1,
    keep_best: bool = False,
) -> tuple[Learner, dict | None]:
    accelerator = Accelerator(cpu=True)
    recipe = Recipe(
        optim=optim or Optim(ema_decay=0.9 if ema else 0.0),
        train=Train(
            label_smoothing=label_smoothing, precision="no", max_skipped_steps=max_skipped_steps
        ),
        checkpoint=Checkpoint(
            every_steps=every_steps, keep=2, max_failures=max_failures, keep_best=keep_best
        ),
        log=Log(every_steps=log_every_steps),
    )
    learner = execution.prepare("eager", accelerator, model, recipe, plan)
    updater = execution.build("eager", accelerator, learner, plan, recipe)
    outputs = Outputs(
        checkpoints=folder,
        about={},
        display=TrainDisplay(plan, enabled=False),
        metrics=JsonLines(folder / "metrics.jsonl"),
        describe_samples=lambda step: [f"sample of update {step}"],
    )

    def repeat(step: int) -> Iterator[Batch]:
        for number in range(step * plan.accumulation, plan.total_steps * plan.accumulation):
            yield batches[number % len(batches)]

    evaluate_on = evaluate_on or batches[:1]
    inputs = Inputs(repeat, evaluate_on, sum(len(b.labels) for b in evaluate_on), mix)
    done = Trainer(updater, plan, inputs, outputs, recipe, stop_requested).fit()
    return learner, done


def test_a_run_learns_64_images_by_heart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = random_batches(4, 16)
    plan = make_plan(Train(epochs=30, global_batch_size=16), Optim(lr=0.05, warmup_lr=0.01), 64, 1)
    model = mobilenetv3_small(0.35, num_classes=4, dropout=0.0)
    _, done = run_fit(model, batches, plan, tmp_path, evaluate_on=batches, ema=True)
    assert done and done["seen"] == 64 and done["top1"] > 95 and done["ema_top1"] > 80
    losses = [line["loss"] for line in lines(tmp_path / "metrics.jsonl", "train")]
    assert len(losses) == 120 and losses[-1] < 0.1 * losses[0]


def test_an_evaluation_that_is_not_finite_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(TrainDisplay, "say", lambda self, text: said.append(text))
    batches = random_batches(2, 8)
    plan = make_plan(Train(epochs=1, global_batch_size=8), Optim(warmup_epochs=0), 16, 1)
    spoilt = [batches[0]._replace(images=batches[0].images * math.inf)]
    _, done = run_fit(Plain(), batches, plan, tmp_path, evaluate_on=spoilt)
    assert done and done["loss"] is None and "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    line, warning = (text for text in said if "finite" in text)
    assert "loss not finite  in " in line
    assert "WARNING: the evaluation after update 1 has a loss that is not finite" in warning


class Plain(nn.Sequential):
    """A network without BatchNorm and dropout, so a batch gives the mean of its halves."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, 2), nn.Hardswish(), nn.Conv2d(8, 8, 3, 2), nn.Hardswish(),
            nn.Flatten(), nn.Linear(392, 4),
        )  # fmt: skip


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_two_micro_batches_equal_one_batch(tmp_path: Path, label_smoothing: float) -> None:
    batches = random_batches(4, 8)
    halves = [
        Batch(batch.images[part], batch.labels[part])
        for batch in batches
        for part in (slice(0, 4), slice(4, 8))
    ]
    found = []
    for micro, given in ((8, batches), (4, halves)):
        torch.manual_seed(0)
        train = Train(epochs=2, global_batch_size=8, micro_batch_size=micro)
        plan = make_plan(train, Optim(warmup_epochs=1), 32, 1)
        assert plan.accumulation == 8 // micro
        folder = tmp_path / str(micro)
        folder.mkdir()
        learner, _ = run_fit(Plain(), given, plan, folder, label_smoothing=label_smoothing)
        losses = [line["loss"] for line in lines(folder / "metrics.jsonl", "train")]
        found.append((losses, learner.module.state_dict()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], rtol=1e-4, atol=1e-6)


def test_mixing_does_not_depend_on_what_was_drawn_before(tmp_path: Path) -> None:
    plan = make_plan(Train(epochs=2, global_batch_size=8), Optim(warmup_epochs=1), 32, 1)
    mix = build_mix(Train(mixup_alpha=0.2, cutmix_alpha=1.0), 4)
    losses = {}
    for name, given, drawn in (("plain", None, 0), ("one", mix, 0), ("other", mix, 5)):
        torch.manual_seed(0)
        model = Plain()
        torch.rand(drawn)
        folder = tmp_path / name
        folder.mkdir()
        run_fit(model, random_batches(4, 8), plan, folder, label_smoothing=0.1, mix=given)
        losses[name] = [line["loss"] for line in lines(folder / "metrics.jsonl", "train")]
    assert losses["one"] == losses["other"]
    assert all(one != plain for one, plain in zip(losses["one"], losses["plain"], strict=True))


def test_log_lines_describe_the_run(tmp_path: Path) -> None:
    batches = random_batches(3, 8)
    optim = Optim(lr=0.02, warmup_lr=0.01, warmup_epochs=1)
    plan = make_plan(Train(epochs=2, global_batch_size=8), optim, 24, 1)
    torch.manual_seed(0)
    model = mobilenetv3_small(0.35, num_classes=4)
    _, done = run_fit(model, batches, plan, tmp_path)
    trained = lines(tmp_path / "metrics.jsonl", "train")
    assert [line["step"] for line in trained] == list(range(6))
    assert [line["epoch"] for line in trained] == [0, 0, 0, 1, 1, 1]
    assert [line["lr"] for line in trained] == [lr_at(step, plan) for step in range(6)]
    assert all(0 <= line["data_wait"] <= 1 for line in trained)
    assert all(line["crop_px"] == 224 and line["memory_gib"] > 0.1 for line in trained)
    times = [line["time"] for line in trained]
    assert times == sorted(times) and abs(times[-1] - time.time()) < 60
    evaluated = lines(tmp_path / "metrics.jsonl", "eval")
    assert [(line["step"], line["epoch"], line["seen"]) for line in evaluated] == [
        (2, 0, 8),
        (5, 1, 8),
    ]
    (closing,) = lines(tmp_path / "metrics.jsonl", "done")
    assert closing == done and closing["top1"] == evaluated[-1]["top1"]
    assert [p.name for p in checkpoint.find(tmp_path)] == ["step_00000006"]


@pytest.mark.parametrize("ema", [False, True])
def test_the_best_checkpoint_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: bool
) -> None:
    """The best of five evaluations is the second one; the newest two checkpoints stay beside it."""
    accuracies = iter([50.0, 70.0, 60.0, 70.0, 65.0])

    def evaluate(*_: object) -> list[dict[str, Any]]:
        result = {"top1": next(accuracies), "top5": 90.0, "loss": 1.0, "seen": 8}
        return [{**result, "top1": 1.0}, result] if ema else [result]

    monkeypatch.setattr(loop, "evaluate", evaluate)
    plan = make_plan(Train(epochs=5, global_batch_size=8), Optim(warmup_epochs=1), 32, 1)
    learner, done = run_fit(
        Plain(), random_batches(4, 8), plan, tmp_path, ema=ema, keep_best=True, every_steps=3
    )
    names = ["step_00000020", "step_00000018", "step_00000008"]
    assert [path.name for path in checkpoint.find(tmp_path)] == names
    assert (tmp_path / "best").resolve().name == names[-1]
    assert [
        (line["step"], line["top1"], line["ema"], line["checkpoint"])
        for line in lines(tmp_path / "metrics.jsonl", "best")
    ] == [(3, 50, ema, "checkpoints/step_00000004"), (7, 70, ema, "checkpoints/step_00000008")]
    assert done and done["best"] == {"step": 7, "epoch": 1, "top1": 70.0, "ema": ema}
    assert learner.state.best["step"] == 7 and learner.state.seconds == pytest.approx(
        done["seconds"], abs=0.01
    )


def test_a_stop_request_saves_a_checkpoint(tmp_path: Path) -> None:
    asked = iter([0, 0, 0, 15])
    plan = make_plan(Train(epochs=5, global_batch_size=8), Optim(), 32, 1)
    torch.manual_seed(0)
    _, done = run_fit(
        mobilenetv3_small(0.35, num_classes=4), random_batches(4, 8), plan, tmp_path,
        stop_requested=lambda: next(asked),
    )  # fmt: skip
    assert done is None
    assert [p.name for p in checkpoint.find(tmp_path)] == ["step_00000003"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    batches = random_batches(4, 8)
    batches[2].images.fill_(math.inf)
    plan = make_plan(Train(epochs=5, global_batch_size=8), Optim(), 32, 1)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    with pytest.raises(loop.NonFiniteLoss, match="update 2 has loss nan and gradient norm nan"):
        run_fit(mobilenetv3_small(0.35, num_classes=4), batches, plan, folder)
    assert checkpoint.find(folder) == []
    (record,) = lines(folder / "metrics.jsonl", "skipped")
    assert (record["step"], record["number"], record["loss"]) == (2, 1, ["nan"])
    told = json.loads((tmp_path / "skipped_step_00000002.json").read_text())
    assert told["samples"] == ["sample of update 2"] and told["lr"] == lr_at(2, plan)
    assert 0 < told["weight_norm"] < math.inf


def test_bad_updates_are_skipped_and_counted(tmp_path: Path) -> None:
    batches = random_batches(4, 8)
    batches[2].images.fill_(math.inf)
    plan = make_plan(Train(epochs=2, global_batch_size=8), Optim(), 32, 1)
    torch.manual_seed(0)
    model = mobilenetv3_small(0.35, num_classes=4)
    learner, done = run_fit(model, batches, plan, tmp_path, max_skipped_steps=2, log_every_steps=2)
    assert done and done["skipped_steps"] == learner.state.skipped_steps == 2
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl", "skipped")] == [2, 6]
    losses = [line["loss"] for line in lines(tmp_path / "metrics.jsonl", "train")]
    assert len(losses) == 4 and all(0.5 < loss < 3 for loss in losses)
    assert all(value.isfinite().all() for value in learner.module.state_dict().values())


@pytest.mark.parametrize("number", [28, 30, 122])  # no space, read-only, quota
def test_a_run_that_cannot_be_saved_continues_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Two saves fail and the next one works. Then saves fail until the run must stop."""
    failing = {4, 6, 10, 12, 14}
    tried: list[int] = []
    real = files._write_new

    def write(path: Path, data: bytes) -> None:
        step = int(path.parent.name[5:13])
        if step in failing:
            if step not in tried:
                tried.append(step)
            raise OSError(number, os.strerror(number))
        real(path, data)

    monkeypatch.setattr(files, "_write_new", write)
    plan = make_plan(Train(epochs=5, global_batch_size=8), Optim(), 32, 1)
    with pytest.raises(loop.Unsaved, match="the newest checkpoint is from update 8;") as error:
        run_fit(
            mobilenetv3_small(0.35, num_classes=4), random_batches(4, 8), plan, tmp_path,
            every_steps=2, max_failures=3,
        )  # fmt: skip
    assert os.strerror(number) in str(error.value)
    assert tried == [4, 6, 10, 12, 14]
    assert [p.name for p in checkpoint.find(tmp_path)] == ["step_00000008", "step_00000002"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_best_checkpoint_that_cannot_be_saved_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    real = files._write_new

    def write(path: Path, data: bytes) -> None:
        tried.append(path.parent.name[5:13])
        if path.parent.name.startswith("step_00000004"):
            raise OSError(28, os.strerror(28))
        real(path, data)

    accuracies = iter([50.0, 40.0])
    result = {"top5": 90.0, "loss": 1.0, "seen": 8}
    monkeypatch.setattr(files, "_write_new", write)
    monkeypatch.setattr(loop, "evaluate", lambda *_: [result | {"top1": next(accuracies)}])
    plan = make_plan(Train(epochs=2, global_batch_size=8), Optim(warmup_epochs=1), 32, 1)
    _, done = run_fit(Plain(), random_batches(4, 8), plan, tmp_path, keep_best=True, max_failures=3)
    assert {*tried} == {"00000004", "00000008"} and done and done["best"]["top1"] == 50
    assert not (tmp_path / "best").exists()


def test_a_run_folder_that_vanishes_stops_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    asked = iter(range(100))

    def vanish() -> int:
        if next(asked) == 5:
            folder.rename(tmp_path / "elsewhere")
        return 0

    plan = make_plan(Train(epochs=5, global_batch_size=8), Optim(), 32, 1)
    with pytest.raises(loop.Unsaved, match="No such file or directory"):
        run_fit(
            mobilenetv3_small(0.35, num_classes=4), random_batches(4, 8), plan, folder,
            stop_requested=vanish, every_steps=2, max_failures=2,
        )  # fmt: skip
    assert [p.name for p in checkpoint.find(tmp_path / "elsewhere")] == ["step_00000002"]


def test_lines_that_a_full_disk_refuses_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, real, room = JsonLines(tmp_path / "x.jsonl"), os.write, 20

    def write(descriptor: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(28, "No space left on device")
        done = real(descriptor, data[:room])
        room -= done
        return done

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        for step in range(5):
            file.write({"event": "train", "step": step})
        with pytest.raises(OSError, match="No space"):
            file.flush()
    assert (tmp_path / "x.jsonl").stat().st_size == 20
    file.write({"event": "train", "step": 5})
    assert [line["step"] for line in lines(tmp_path / "x.jsonl")] == list(range(6))


def test_an_evaluation_is_cut_short(tmp_path: Path) -> None:
    """The run that resumes first evaluates again."""
    asked = iter([0, 0, 0, 0, 0, 0, 75])
    plan = make_plan(Train(epochs=5, global_batch_size=8), Optim(), 32, 1)
    torch.manual_seed(0)
    learner, done = run_fit(
        mobilenetv3_small(0.35, num_classes=4), random_batches(4, 8), plan, tmp_path,
        evaluate_on=random_batches(4, 8), stop_requested=lambda: next(asked),
    )  # fmt: skip
    assert done is None and learner.module.training
    assert [p.name for p in checkpoint.find(tmp_path)] == ["step_00000004"]
    assert not lines(tmp_path / "metrics.jsonl", "eval") and not learner.state.last_eval


def test_evaluation_must_see_every_image() -> None:
    model = mobilenetv3_small(0.35, num_classes=4)
    model.train()
    with pytest.raises(RuntimeError, match="evaluated 8 of 9 images"):
        loop.evaluate(Accelerator(cpu=True), [Evaluator(model)], random_batches(1, 8), 9)
    assert model.training
