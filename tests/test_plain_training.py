"""fasttrain trains as a plain script of PyTorch and torchvision does, with the same result."""

import json
import sys
from pathlib import Path
from statistics import mean, stdev

import plain_training
import pytest
from conftest import REPO, lines, run

from fasttrain import config
from fasttrain.schedule import lr_at, make_plan

SCRIPT = REPO / "tests/plain_training.py"
TRAIN = REPO / "fasttrain/train.py"


@pytest.mark.parametrize("name", ["imagenette", "demo"])
def test_the_plain_script_has_the_recipes_settings_and_learning_rates(name: str) -> None:
    recipe = config.load(REPO / f"recipes/{name}.toml", ["data.crop_px=96"])
    assert plain_training.unknown_settings(recipe) == []
    plan = make_plan(recipe.train, recipe.optim, 1_437, 1)
    steps = range(plan.total_steps)
    plain = [plain_training.learning_rate(step, plan.steps_per_epoch, recipe) for step in steps]
    assert [lr_at(step, plan) for step in steps] == pytest.approx(plain)


def test_settings_that_the_plain_script_does_not_have_are_named() -> None:
    changes = ["data.erase=0.5", "train.mixup_alpha=0.2", "optim.ema_decay=0.9"]
    changes += ["data.crop_px=[[0, 96], [2, 128]]", "distill.views=3"]
    recipe = config.load(REPO / "recipes/demo.toml", [*changes[:4], "train.precision='bf16'"])
    assert set(plain_training.unknown_settings(recipe)) == {
        "train.precision", "data.crop_px", "data.erase", "optim.ema_decay", "train.mixup_alpha"
    }  # fmt: skip
    recipe = config.load(REPO / "recipes/demo.toml", changes[4:])
    assert plain_training.unknown_settings(recipe) == ["distill.views"]


@pytest.mark.slow  # seven trainings, of a minute each
def test_accuracy_and_loss_on_digits_are_those_of_the_plain_script(tmp_path: Path) -> None:
    digits = tmp_path / "digits"
    run([sys.executable, REPO / "tools/make_digits.py", digits])
    losses: dict[str, list[float]] = {"plain": [], "fasttrain": []}
    accuracies: dict[str, list[float]] = {"plain": [], "fasttrain": []}
    for seed in range(3):
        images, folder = tmp_path / "digits-images", tmp_path / f"run-{seed}"
        recipe = (REPO / "recipes/demo.toml", "--set", f"train.seed={seed}")
        done = run([sys.executable, SCRIPT, images, *recipe])
        plain = json.loads(done.stdout.splitlines()[-1])
        places = ("--set", f"data.root={digits}", "--set", f"log.run_dir={folder}")
        run([sys.executable, TRAIN, *recipe, *places])
        ours = lines(folder / "metrics.jsonl", "eval")[-1]
        for name, result in (("plain", plain), ("fasttrain", ours)):
            losses[name].append(result["loss"])
            accuracies[name].append(result["top1"])
    # Means of three differ by at most three of their own standard errors, and by a percent.
    error = (mean(stdev(each) ** 2 for each in losses.values()) * 2 / 3) ** 0.5
    assert abs(mean(losses["plain"]) - mean(losses["fasttrain"])) < 3 * error, losses
    assert abs(mean(accuracies["plain"]) - mean(accuracies["fasttrain"])) < 1, accuracies
