"""What the entry point refuses before it trains."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run

from fasttrain import train


def test_fp16_without_a_gpu_is_refused(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as status:
        train.main([str(tiny(train={"precision": "fp16"}))])
    assert status.value.code == 2
    assert "precision = fp16: needs a GPU; use bf16 or no" in capsys.readouterr().err


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
