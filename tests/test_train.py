"""The entry point refuses faults before it trains."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run

from fasttrain import config, forecast, loaders, modes, schedule, session, train


def test_fp16_without_a_gpu_is_refused(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as status:
        train.main([str(tiny(train={"precision": "fp16"}))])
    assert status.value.code == 2
    assert "precision = fp16: needs a GPU; use bf16 or no" in capsys.readouterr().err


def test_the_slow_part_is_named_before_it_starts(
    tiny: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = str(tiny())
    with monkeypatch.context() as patch:
        patch.delattr("fasttrain.gpus", raising=False)
        patch.setitem(sys.modules, "fasttrain.gpus", None)  # importing it fails
        with pytest.raises(ImportError):
            train.main([recipe])
    assert capsys.readouterr().out == "loading torch and DALI\n"

    said: list[str] = []

    class Reached(Exception):
        pass

    def slow(*_: object, **__: object) -> None:
        said.append(capsys.readouterr().out)
        raise Reached

    for module, name, mode, line in (
        (modes, "try_mode", "auto", "timing a few updates"),
        (loaders, "measure", "eager", "measuring the input"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, slow)
            patch.setattr(forecast, "recall_rate", lambda key: None)
            with pytest.raises(Reached):
                train.main([recipe, "--set", f"train.execution={mode}"])
        assert said[-1].rstrip().endswith(line)


FAULTS = [
    ("data.root=/nowhere/imagenet", "looked for /nowhere/imagenet/manifest.json"),
    ("data.root=/nowhere/imagenet", "python tools/make_shards.py /path/to/imagenet /nowhere"),
    ("train.global_batch_size=46", "global_batch_size = 46: more than the 45 training"),
    ("train.epochs=abc", '[train] epochs = "abc": expected int, got str'),
]
NO_TORCH = """
import sys, time
begun = time.monotonic()
from fasttrain import train
recipe, *settings = sys.argv[1:]
for setting in settings:
    try:
        train.main([recipe, "--set", setting])
    except SystemExit as end:
        print(end.code)
print(time.monotonic() - begun, "torch" in sys.modules)
"""


def test_faults_are_found_before_torch_is_imported_and_nothing_is_written(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny()
    ended = run(["python", "-c", NO_TORCH, recipe, *(setting for setting, _ in FAULTS)])
    *codes, last = ended.stdout.splitlines()
    seconds, imported = last.split()
    assert codes == ["2"] * len(FAULTS) and "Traceback" not in ended.stderr
    for _, message in FAULTS:
        assert message in ended.stderr
    assert imported == "False" and float(seconds) < 10  # 0.4 s on an idle machine
    assert [*tmp_path.iterdir()] == [recipe]


@pytest.mark.slow
def test_a_learning_rate_that_the_batch_scales_is_told() -> None:
    optim = config.Optim(lr=0.1, lr_scaling="linear", lr_batch=256)
    recipe = config.Recipe(optim=optim, train=config.Train(global_batch_size=4096))
    plan = schedule.make_plan(recipe.train, recipe.optim, 10_000, 1)
    assert session.scaled_lr(recipe, plan) == (
        "peak learning rate 1.6: 0.1 for 256 images an update, scaled to 4,096 (linear)\n"
    )
    assert session.scaled_lr(config.Recipe(), plan) == ""


def test_the_launcher_shows_the_message_of_a_missing_data_set() -> None:
    failed = run(["accelerate", "launch", "fasttrain/train.py", "recipes/large.toml"], code=1)
    assert "no data set at data/imagenet (looked for " in failed.stderr
    assert "python tools/make_shards.py /path/to/imagenet data/imagenet" in failed.stderr
