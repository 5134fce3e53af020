"""GPUs that a launch leaves idle are named, and each spelling of ACCELERATE_USE_CPU counts."""

import pytest
import torch

from fasttrain import gpus


@pytest.mark.parametrize(
    ("environ", "said"),
    [({}, 1), ({"WORLD_SIZE": "4"}, 0), ({"ACCELERATE_USE_CPU": "1"}, 0)],
)
def test_idle_gpus_are_reported(
    environ: dict[str, str], said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    remarks = gpus.idle_gpus(environ)
    assert len(remarks) == said
    assert not said or remarks[0].startswith("1 of 4 GPUs is used; accelerate launch --multi_gpu")


@pytest.mark.parametrize("word", ["1", "true", "YES", "y", "on", "T"])
def test_every_spelling_of_the_cpu_is_understood(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert not gpus.has_gpu({"ACCELERATE_USE_CPU": word})
    assert gpus.has_gpu({"ACCELERATE_USE_CPU": "false"}) and gpus.has_gpu({})
