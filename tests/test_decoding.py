"""Choosing how to decode: the fastest that works, and a crash is a finding, not the end."""

import os
import signal
import sys
from pathlib import Path

import pytest

from fasttrain import config, decoding, shards
from fasttrain.decoding import DecodeError, Trial
from fasttrain.shards import Split


@pytest.fixture(scope="module")
def split(dataset: Path) -> Split:
    return shards.open_split(dataset, "train")


def choose(split: Split, gpu: bool, trials: dict[str, Trial], **settings: str) -> tuple[str, str]:
    data = config.Data.model_validate({"root": split.root, **settings})
    return decoding.choose(split, data, gpu, 1, {}, trials.__getitem__)


def test_the_fastest_that_works_is_taken(split: Split) -> None:
    trials = {
        "gpu_window": Trial("gpu_window", 0, 0, "crashed with signal 11"),
        "gpu_full": Trial("gpu_full", 5000, 0.4),
        "cpu": Trial("cpu", 900, 0),
    }
    decode, why = choose(split, True, trials)
    assert decode == "gpu_full"
    assert "gpu_window: crashed with signal 11" in why and "cpu: 900 images/s" in why
    trials["gpu_full"] = Trial("gpu_full", 0, 9, "wrong pixels")
    assert choose(split, True, trials)[0] == "cpu"
    trials["cpu"] = Trial("cpu", 0, 0, "failed: no")
    with pytest.raises(DecodeError, match="no way of decoding works here"):
        choose(split, True, trials)


def test_without_a_gpu_or_a_choice_nothing_is_tried(split: Split) -> None:
    assert choose(split, False, {})[0] == "cpu"
    assert choose(split, True, {}, decode="gpu_window")[0] == "gpu_window"
    with pytest.raises(DecodeError, match="decode = gpu_window: this process has no GPU"):
        choose(split, False, {}, decode="gpu_window")


def test_processes_agree_on_the_surest() -> None:
    assert decoding.agree(["gpu_window", "gpu_full"]) == "gpu_full"
    assert decoding.agree(["gpu_full", "cpu", "gpu_window"]) == "cpu"


@pytest.mark.parametrize("strategy", ["gpu_full", "gpu_window"])
def test_the_graphs_of_the_gpu_give_the_same_pixels_on_a_cpu(split: Split, strategy: str) -> None:
    data = config.Data(root=split.root, crop_px=32)
    trial = decoding.try_in_a_process(split, data, strategy, 1, "cpu", dict(os.environ))
    assert not trial.fault and trial.images_per_s > 0 and trial.difference < 0.5


def test_a_crash_is_a_finding(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nkill -{signal.SIGSEGV.value} $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    trial = decoding.try_in_a_process(split, config.Data(), "gpu_full", 1, "cpu", {})
    assert trial.fault == "crashed with signal 11"
