"""A run may start from weights with other classes and frozen stages, and resumes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file
from shard_files import renamed

from fasttrain import checkpoint, config, train

LAST = "classifier.3."


def newest(run: Path) -> Path:
    return checkpoint.find(run / "checkpoints")[0]


def test_a_run_starts_from_weights_of_other_classes_and_resumes_without_them(
    tiny: Callable[..., Path], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train.main([str(tiny(train={"max_steps": 2}, log={"run_dir": str(first)}))])
    source = load_file(newest(first) / "model.safetensors")
    other = renamed(dataset, ["b", "x", "a"], tmp_path / "other")
    recipe = tiny(
        data={"root": str(other)},
        model={"weights": str(first)},
        optim={"frozen_stages": 5, "backbone_lr_factor": 0.1, "ema_decay": 0.5},
        train={"max_steps": 2},
        log={"run_dir": str(second)},
    )
    capsys.readouterr()
    train.main([str(recipe)])
    said = capsys.readouterr().out
    assert f"starting from {newest(first)}/model.safetensors\nthe last layer is kept for" in said
    assert "for 2 of 3 classes, found by name: the weights have 3 classes, the data 3" in said
    for name in ("model", "ema"):
        found = load_file(newest(second) / f"{name}.safetensors")
        for tensor, value in found.items():
            same = torch.equal(value, source[tensor])
            assert same == (not tensor.startswith("classifier"))
    # The last layer began with the rows of b and a, and a new one between them.
    weight = load_file(newest(second) / "model.safetensors")[f"{LAST}weight"]
    for row, before in ((0, 1), (2, 0)):
        assert (weight[row] - source[f"{LAST}weight"][before]).abs().max() < 0.05
    shutil.rmtree(first)
    train.main([str(recipe), "--set", "train.max_steps=4"])
    assert f"resuming from {second}" in capsys.readouterr().out
    assert newest(second).name == "step_00000004"


def test_unusable_starting_weights_are_refused(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights.pth"
    torch.save({"conv_stem.weight": torch.zeros(1)}, weights)
    for settings, said in (
        (
            ["model.weights=/nowhere"],
            '[model] weights = "/nowhere": there is no such file or folder',
        ),
        ([f"checkpoint.resume={weights}"], f"--set model.weights={weights}"),
        ([f"model.weights={weights}"], "these weights do not fit MobileNetV3-Small 0.35 with 3"),
        (["optim.frozen_stages=2"], "[optim] frozen_stages = 2: these stages would keep their"),
    ):
        with pytest.raises(SystemExit) as status:
            train.main([str(tiny()), *(word for text in settings for word in ("--set", text))])
        assert status.value.code == 2 and said in capsys.readouterr().err
        assert not (tmp_path / "run" / "recipe.toml").exists()


def test_the_recipe_for_own_images_loads() -> None:
    recipe = config.load(REPO / "recipes" / "finetune.toml")
    assert recipe.model.weights and recipe.optim.backbone_lr_factor < 1
    assert config.Recipe.model_validate_json(json.dumps(recipe.model_dump(mode="json"))) == recipe
