"""export.py writes every form whole, with PyTorch's logits, and predict.py opens each."""

import argparse
import json
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate
import export
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import STEP, Refused, lines
from exporting import forms, hub, measure
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fasttrain import config, deployed, trained
from fasttrain.faults import Fault
from fasttrain.model import build_model, mobilenetv3_small

Export = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Export:
    """Runs the command in this process. Returns its result and its messages."""
    monkeypatch.setattr(measure, "MEASURED_S", 0.0)

    def run(*words: Any) -> tuple[dict[str, Any], str]:
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
        export.main()
        found = capsys.readouterr()
        return json.loads(found.out.splitlines()[-1]), found.err

    return run


def logits_of(path: Path, images: torch.Tensor) -> torch.Tensor:
    found = deployed.open_network(path, True, None, print).logits(images)
    return found


def test_files_of_tensors_hold_the_network_and_its_description(
    trained: Path, tmp_path: Path, exported: Export
) -> None:
    expected = load_file(trained / STEP / "model.safetensors")
    for suffix in (".safetensors", ".pth"):
        out = tmp_path / f"network{suffix}"
        result, said = exported(trained, out)
        assert result["form"] == suffix and result["bytes"] == out.stat().st_size
        assert result["max_difference"] == 0 and result["latency_ms"] > 0
        assert result["average"] is False and "writing the weights in " in said
        found = deployed.open_network(out, True, None, print)
        assert found.form == "weights" and found.description.classes == ("a", "b", "c")
        network = mobilenetv3_small(0.35, weights=out)
        assert all(torch.equal(t, expected[n]) for n, t in network.state_dict().items())
    with safe_open(tmp_path / "network.safetensors", "pt") as file:
        told = json.loads(file.metadata()["fasttrain"])
    assert told["preprocessing"]["resize_px"] == 36 and told["top1"] is not None
    # A script that knows nothing of fasttrain reads a bare state dict.
    bare = torch.load(tmp_path / "network.pth", weights_only=True)
    assert type(bare) is OrderedDict and list(bare) == list(network.state_dict())
    build_model("small", 0.35, 3, 0.0).load_state_dict(bare)


def test_an_average_is_exported_where_there_is_one(
    trained: Path, tmp_path: Path, exported: Export
) -> None:
    state = load_file(trained / STEP / "model.safetensors")
    both = {"model": state, "model_ema": {name: t * 0.9 for name, t in state.items()}}
    torch.save(both, tmp_path / "both.pth")
    words: list[Path | str] = [tmp_path / "both.pth", tmp_path / "out.safetensors"]
    words += ["--recipe", trained / "recipe.toml"]
    name = "classifier.3.weight"
    result, said = exported(*words)
    assert result["average"] is True and "writing the moving average of the weights in" in said
    assert torch.equal(load_file(tmp_path / "out.safetensors")[name], state[name] * 0.9)
    result, _ = exported(*words, "--no-ema", "--overwrite")
    assert result["average"] is False
    assert torch.equal(load_file(tmp_path / "out.safetensors")[name], state[name])


@pytest.mark.parametrize("suffix", [".onnx", pytest.param(".pt2", marks=pytest.mark.slow)])
def test_programs_take_batches_of_any_size(
    suffix: str, trained: Path, tmp_path: Path, exported: Export
) -> None:
    pytest.importorskip("onnxruntime")
    out = tmp_path / f"network{suffix}"
    result, _ = exported(trained, out)
    assert result["max_difference"] < 1e-4 and result["torch_latency_ms"] > 0
    found = deployed.open_network(out, True, None, print)
    assert found.form == suffix and found.description.classes == ("a", "b", "c")
    assert found.description.preprocessing.crop_px == 32
    for size in (1, 3, 7):
        assert found.logits(torch.zeros(size, 3, 32, 32)).shape == (size, 3)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    out.write_bytes(out.read_bytes()[:3000])
    with pytest.raises(Fault, match=f"network{suffix}: cannot be opened"):
        deployed.open_network(out, True, None, print)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".pte"])
def test_eight_bits_keep_the_accuracy(
    suffix: str, trained: Path, dataset: Path, tmp_path: Path, exported: Export
) -> None:
    pytest.importorskip("torchao")
    if suffix == ".pte":
        pytest.importorskip("executorch")
    small, large = tmp_path / f"int8{suffix}", tmp_path / f"float{suffix}"
    words = ["--int8", "--data", dataset, "--calibration-images", 40]
    result, said = exported(trained, small, *words)
    exported(trained, large)
    assert result["seen"] == 13 and result["calibration_images"] >= 40
    assert abs(result["top1_int8"] - result["top1_float32"]) < 25  # of 13 images
    assert "calibrating on 45 training images" in said
    assert "in 8 bits, on 13 validation images" in said
    assert small.stat().st_size < 0.6 * large.stat().st_size
    images = torch.zeros(1, 3, 32, 32)
    assert (logits_of(small, images) - logits_of(large, images)).abs().max() < 1


def test_a_folder_for_the_hub_loads_in_one_call(
    trained: Path, tmp_path: Path, exported: Export
) -> None:
    pytest.importorskip("huggingface_hub")
    out = tmp_path / "network"
    result, _ = exported(trained, out)
    assert result["form"] == "folder" and result["max_difference"] == 0
    assert {path.name for path in out.iterdir()} == hub.NAMES
    assert mobilenetv3_small(0.35, weights=out).about.endswith("with 3 classes")
    told = json.loads((out / "config.json").read_text())
    assert told["classes"] == ["a", "b", "c"] and told["library_name"] == "fasttrain"
    card = (out / "README.md").read_text()
    top1 = told["top1"]
    assert f"| top-1 / top-5 | {top1:.2f} % / 100.00 % on the validation images |" in card
    assert card.startswith("---\n") and "pipeline_tag: image-classification" in card
    assert "mobilenetv3_small(0.35, weights=folder).eval()" in card
    assert "Resize the shorter side to 36 pixels (bilinear, with antialiasing)" in card
    assert str(tmp_path) not in card and str(trained) not in card  # no paths of this machine
    exported(trained, out, "--overwrite")
    (out / "mine.txt").touch()
    with pytest.raises(Fault, match=r"holds files that are not of an export \(mine.txt\)"):
        hub.remove(out)


def test_an_exported_network_can_be_evaluated(
    trained: Path, tmp_path: Path, exported: Export, dataset: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (last,) = lines(trained / "metrics.jsonl", "eval")
    for name in ("network.safetensors", "network"):
        exported(trained, tmp_path / name)
        words = ["evaluate", tmp_path / name, "--data", dataset, "--precision", "no"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        evaluate.main()
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["top1"] == last["top1"]


class FakeApi:
    """Stands in for `huggingface_hub.HfApi`."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo: str, **options: Any) -> None:
        if self.fault:
            raise RuntimeError(self.fault)
        self.calls.append((repo, options))

    def upload_folder(self, **options: Any) -> str:
        self.calls.append(("upload", options))
        return "https://hub.example/me/network"


def test_an_evaluation_and_an_export_measure_the_same_statistics(
    trained: Path,
    dataset: Path,
    tmp_path: Path,
    exported: Export,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "network.safetensors"
    precise = ["--precise-bn", dataset, "--precise-bn-images", 30]
    result, said = exported(trained, out, *precise)
    assert result["precise_bn_images"] == 30 and "measured on 30 training images of" in said
    before, after = load_file(trained / STEP / "model.safetensors"), load_file(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {n for n in before if n.endswith(("_mean", "_var", "_tracked"))}
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["fasttrain"])["top1"] is None  # of other statistics

    results = []
    for words in ([trained, *precise, "--out", tmp_path / "out"], [out], [trained]):
        # By default, a file of weights is evaluated in bfloat16 on a CPU that is fast in it.
        argv = ["evaluate.py", *map(str, words), "--data", str(dataset), "--precision", "no"]
        monkeypatch.setattr(sys, "argv", argv)
        AcceleratorState._reset_state(reset_partial_state=True)
        evaluate.main()
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5)
    assert results[0]["loss"] != pytest.approx(results[2]["loss"], rel=1e-3)
    about = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert about["precise_bn_images"] == 30


def test_a_folder_is_pushed(tmp_path: Path) -> None:
    api = FakeApi()
    assert hub.push(tmp_path, "me/network", True, api) == "https://hub.example/me/network"
    assert api.calls[0] == ("me/network", {"private": True, "exist_ok": True})
    assert api.calls[1][1]["folder_path"] == tmp_path
    assert api.calls[1][1]["repo_id"] == "me/network"
    with pytest.raises(Fault) as error:
        hub.push(tmp_path, "me/network", False, FakeApi("401 Unauthorized\nmore"))
    assert str(error.value) == (
        "--push me/network: the Hub did not take the folder (401 Unauthorized); "
        f"{tmp_path} is complete. Log in with `hf auth login`, or set HF_TOKEN, and push again "
        "with --overwrite"
    )


def test_the_pushed_card_loads_from_the_hub(trained: Path) -> None:
    pytest.importorskip("huggingface_hub")
    told = described(trained)
    card = hub.card(told, config.load(trained / "recipe.toml"), "me/network")
    assert 'folder = snapshot_download("me/network")' in card
    assert "model-index:\n- name: network\n" in card
    assert hub.card(told, None, "here").count("```") == 2  # without a recipe


def described(run: Path) -> Any:
    return trained.open_trained(run, True, None, print).description


def test_wrong_logits_are_never_written(
    trained: Path,
    tmp_path: Path,
    exported: Export,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(measure, "difference", lambda *_: measure.Difference(0.5, 2.0))
    with pytest.raises(SystemExit) as status:
        exported(trained, tmp_path / "network.pth")
    assert status.value.code == 2 and not (tmp_path / "network.pth").exists()
    assert "is not written: its logits differ from PyTorch's by 0.5" in capsys.readouterr().err


WRONG = [
    ("{run} {new}.tflite", "the suffix .tflite is no form; use .safetensors, .pth, .onnx, .pt2, "),
    ("{run} /nowhere/x.pth", "there is no folder /nowhere; make it first"),
    ("{run} {file}", "exists; choose another name, or replace it with --overwrite"),
    ("{run} {new}.pth --int8", "--int8: only .onnx, .pt2, .pte can be quantised"),
    ("{run} {new}.onnx --int8", "--int8: needs --data ROOT"),
    ("{run} {new}.onnx --int8 --data /nowhere", "no data set at /nowhere"),
    ("{run} {new}.onnx --data {data}", "--data: only --int8 reads images"),
    ("{run} {new}.onnx --push me/x", "--push: the Hub takes a folder; give OUT without"),
    ("{run} {new} --push x", "--push x: expected USER/NAME, such as me/mobilenetv3"),
    ("{run} {new} --push a/b/c", "--push a/b/c: "),
    ("{run} {new} --private", "--private: add --push USER/NAME"),
    ("{bare} {new}.pth", "is a file of weights that does not describe its network: give a recipe"),
    ("{run} {new}.pth --threads 0", "--threads: '0' is not a whole number from 1"),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_wrong_arguments_are_refused(
    words: str, message: str, trained: Path, dataset: Path, tmp_path: Path, refused: Refused
) -> None:
    save_file({"classifier.3.weight": torch.zeros(3, 4)}, tmp_path / "bare")
    (tmp_path / "file.pth").touch()
    places = {"run": trained, "data": dataset, "new": tmp_path / "new"}
    places |= {"bare": tmp_path / "bare", "file": tmp_path / "file.pth"}
    refused(export.main, words.format(**places).split(), message)
    assert not list(tmp_path.glob("new*"))


def test_every_form_that_the_command_knows_is_written() -> None:
    assert {*forms.FORMS, ""} == set(export.SUFFIXES) > set(export.QUANTISED)


def test_a_missing_package_is_told_with_its_command(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.setattr(deployed.importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "network.pte"
    message = ".pte needs executorch, which is not installed here: pip install -e '.[executorch]'"
    refused(export.main, [trained, out], message)
    arguments = argparse.Namespace(push=None, out=tmp_path / "network.onnx", int8=False)
    with pytest.raises(Fault, match=r"needs onnx, onnxscript, onnxruntime, which is not installed"):
        export.export(arguments)
