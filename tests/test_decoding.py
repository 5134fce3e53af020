"""The fastest decoder that works is chosen, and a decoder that crashes does not end the run."""

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain import config, decoder, decoding, loaders, makers, shards
from fasttrain.batch import Placement
from fasttrain.decoder import Decoder
from fasttrain.decoding import DecodeError, DecoderTrial, Job
from fasttrain.shards import Split

JOB = Job(gpu=True, threads=1, batch_size=12, half=True)
ON_CPU = JOB._replace(gpu=False, half=False)
CPU = Placement(torch.device("cpu"), half=False, threads=1)


def choose(
    split: Split, gpu: bool, trials: dict[str, DecoderTrial], **settings: Any
) -> tuple[str, float | str, str]:
    given = config.Data.model_validate({"root": split.root, **settings})
    chosen, why = decoding.choose_decoder(
        split, given, JOB._replace(gpu=gpu), {}, trials.__getitem__
    )
    return chosen.strategy, chosen.load, why


def test_the_fastest_decoder_that_works_is_chosen(split: Split) -> None:
    trials = {
        "gpu_window": DecoderTrial("gpu_window", 0, 0, "crashed with signal 11"),
        "gpu_full": DecoderTrial("gpu_full", 5000, 0.4, load=0.3),
        "cpu": DecoderTrial("cpu", 900, 0),
    }
    decode, load, why = choose(split, True, trials)
    assert (decode, load) == ("gpu_full", 0.3)
    assert "gpu_window: crashed with signal 11" in why and "cpu: 900 images/s, 0" in why
    assert "gpu_full: 5,000 images/s with hw_decoder_load 0.3, 0.40/255" in why
    trials["gpu_full"] = DecoderTrial("gpu_full", 0, 9, "wrong pixels")
    assert choose(split, True, trials)[:2] == ("cpu", "auto")
    trials["cpu"] = DecoderTrial("cpu", 0, 0, "failed: no")
    with pytest.raises(DecodeError, match="no way of decoding works here"):
        choose(split, True, trials)


def test_without_a_gpu_or_a_choice_no_decoder_is_tried(split: Split) -> None:
    assert choose(split, False, {})[0] == "cpu"
    assert choose(split, True, {}, decode="gpu_window")[0] == "gpu_window"
    with pytest.raises(DecodeError, match="decode = gpu_window: this process has no GPU"):
        choose(split, False, {}, decode="gpu_window")


def test_a_chosen_decoder_comes_before_the_recipes(split: Split, raw: Path) -> None:
    data = config.Data(decode="cpu", hw_decoder_load=0.7)
    on_gpu = CPU._replace(device=torch.device("cuda", 0))
    chosen = Decoder("gpu_window", 0.1)
    assert makers.decoder_of(split, data, on_gpu._replace(decoder=chosen)) == chosen
    assert makers.decoder_of(split, data, on_gpu) == Decoder("cpu", 0.7)
    guessed = [makers.decoder_of(split, config.Data(), where) for where in (on_gpu, CPU)]
    assert guessed == [Decoder("gpu_full"), Decoder("cpu")]
    pixels = shards.open_split(raw, "train")
    assert makers.decoder_of(pixels, data, on_gpu._replace(decoder=chosen)) == Decoder("raw")


def test_a_decoder_that_failed_is_tried_again(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_gpu", lambda: "a GPU")
    trials = {
        "gpu_window": DecoderTrial("gpu_window", 0, 0, "no answer in 180 s"),
        "gpu_full": DecoderTrial("gpu_full", 5000, 0.4, load=0.3),
        "cpu": DecoderTrial("cpu", 900, 0),
    }
    assert choose(split, True, trials, crop_px=48)[0] == "gpu_full"
    again = {"gpu_window": DecoderTrial("gpu_window", 9000, 0.2, load=0.1)}
    assert choose(split, True, again, crop_px=48)[:2] == ("gpu_window", 0.1)
    assert choose(split, True, {}, crop_px=48)[0] == "gpu_window"  # all are known
    with pytest.raises(KeyError):  # in another precision, nothing is
        job = JOB._replace(half=False)
        none: dict[str, DecoderTrial] = {}
        decoding.choose_decoder(split, config.Data(crop_px=48), job, {}, none.__getitem__)


def test_processes_agree_on_a_decoder_that_works_on_all() -> None:
    assert decoder.surest(["gpu_window", "gpu_full"]) == "gpu_full"
    assert decoder.surest(["gpu_full", "cpu", "gpu_window"]) == "cpu"


def test_one_damaged_image_among_many_is_found() -> None:
    right = torch.rand(64, 3, 8, 8)
    wrong = right.clone()
    wrong[17] = -wrong[17] - 1
    assert decoding.differences_of(wrong, right)[:17] == [0.0] * 17
    assert "more than 12 in 1" in decoding.verdict(decoding.differences_of(wrong, right))
    wrong[17] = float("nan")
    assert "inf in the worst" in decoding.verdict(decoding.differences_of(wrong, right))
    near = (right + 0.02).half()  # about a step of 1/255
    assert decoding.verdict(decoding.differences_of(near, right)) == ""
    assert decoding.verdict([4.5] * 64).startswith("wrong pixels: 4.5/255")


def test_loads_are_tried_while_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoding.loads_to_try(config.Data(), 16) == [0.3, 0.15, 0.6]
    assert decoding.loads_to_try(config.Data(hw_decoder_load=0.7), 16) == [0.7]
    rates = {0.3: 10.0, 0.15: 20.0, 0.6: 5.0}
    assert decoding.fastest_load(list(rates), rates.__getitem__) == (0.15, 20.0)
    monkeypatch.setattr(decoding, "LOADS_S", -1)
    assert decoding.fastest_load(list(rates), rates.__getitem__) == (0.3, 10.0)


@pytest.mark.parametrize("strategy", ["gpu_full", "gpu_window"])
def test_a_trial_compares_images_and_measures(
    split: Split, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "MEASURED_S", 0.2)
    settings = config.Data(root=split.root, crop_px=32, erase=1.0)
    placement = CPU._replace(decoder=Decoder(strategy))
    trial = decoding.try_here(split, settings, ON_CPU, placement)
    assert not trial.fault and trial.images_per_s > 0 and trial.difference < 0.5
    assert trial.load is None  # on a CPU, nothing has a load

    made = loaders.train_batches

    def ruined(*arguments: Any) -> Any:
        for batch in made(*arguments):
            if placement in arguments:
                batch.images[7] = 9.0
            yield batch

    monkeypatch.setattr(loaders, "train_batches", ruined)
    trial = decoding.try_here(split, settings, ON_CPU, placement)
    assert "more than 12 in" in trial.fault and trial.images_per_s == 0


def test_a_decoder_is_tried_in_a_new_process(split: Split) -> None:
    settings = config.Data(root=split.root, crop_px=32)
    trial = decoding.try_in_a_process(split, settings, "gpu_full", ON_CPU, dict(os.environ))
    assert not trial.fault and trial.images_per_s > 0 and trial.difference < 0.5


def test_a_crash_of_a_decoder_is_recorded(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nkill -{signal.SIGSEGV.value} $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    trial = decoding.try_in_a_process(split, config.Data(), "gpu_full", ON_CPU, {})
    assert trial.fault == "crashed with signal 11"


def test_a_crash_writes_no_core_file(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []
    monkeypatch.setattr(resource, "setrlimit", lambda *limit: limits.append(limit))
    monkeypatch.setattr(decoding, "try_here", lambda *_: DecoderTrial("cpu", 1.0, 0.0))
    data = config.Data().model_dump_json()
    decoding._main(["cpu", str(split.root), "train", json.dumps(ON_CPU), data])
    assert limits[0] == (resource.RLIMIT_CORE, (0, 0))
