"""Files of weights are read safely, unwrapped, compared, and mapped by class name."""

import argparse
import warnings
from functools import partial
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fasttrain import checkpoint, matching, weights
from fasttrain.faults import Fault
from fasttrain.matching import Known
from fasttrain.model import build_model
from fasttrain.weights import WeightsError

NAMES = ("ant", "bee", "cat", "dog")
LAST = "classifier.3.weight"


def network(seed: int = 0, num_classes: int = 4, width: float = 0.35) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("small", width, num_classes, 0.2)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return network().state_dict()


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def saved(content: Any, tmp_path: Path, **options: Any) -> Path:
    path = tmp_path / "weights.pth"
    torch.save(content, path, **options)
    return path


def refused(path: Path) -> str:
    with pytest.raises(WeightsError) as error:
        weights.load(weights.read(path), network())
    message = str(error.value)
    assert message.startswith(f"{path}: ") and len(message.splitlines()) <= 3
    assert len(message) < 700 + len(str(path)) and "weights_only" not in message
    return message


def script_of_torchvision(state: dict[str, Tensor]) -> dict[str, Any]:
    average = {"n_averaged": torch.tensor(9), **prefixed("module.", state)}
    return {
        "model": state,
        "model_ema": {name: t + 1 for name, t in average.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "args": argparse.Namespace(lr=0.1, output_dir=PosixPath("/tmp")),
        "epoch": 3,
    }


WRAPPERS: dict[str, Any] = {
    "bare": lambda state: state,
    "DataParallel": partial(prefixed, "module."),
    "imagenet.py": lambda state: {
        "epoch": 150, "arch": "x", "state_dict": prefixed("module.", state),
        "best_acc1": np.float64(67.2), "optimizer": {}, "random": np.random.get_state(),
    },
    "torchvision": script_of_torchvision,
    "compiled": lambda state: {"model": prefixed("module._orig_mod.", state)},
    "Lightning": lambda state: {"state_dict": prefixed("model.net.", state), "epoch": 3},
    "nested": lambda state: {"model": {"state_dict": state}},
    "profiled": lambda state: {**state, "total_ops": state[LAST], "x.total_params": state[LAST]},
    "half": lambda state: {name: value.half() for name, value in state.items()},
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_of_training_scripts_are_understood(
    wrapper: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    module = network(seed=1)
    found = weights.read(saved(WRAPPERS[wrapper](state), tmp_path))
    assert weights.load(found, module) == ""
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-2, atol=1e-3)
    assert found.has_average == (wrapper == "torchvision")


def test_the_moving_average_is_taken_where_it_is_asked_for(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    found = weights.read(saved(script_of_torchvision(state), tmp_path), average=True)
    assert torch.equal(found.tensors[LAST], state[LAST] + 1)
    with pytest.raises(WeightsError, match="holds no moving average; leave out --ema"):
        weights.read(saved(state, tmp_path), average=True)


def test_a_file_is_known_by_its_content_not_its_name(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "named.pth"
    save_file(dict(state), path)
    assert weights.read(path).tensors.keys() == state.keys()
    other = saved(state, tmp_path).rename(tmp_path / "named.safetensors")
    assert weights.read(other).tensors.keys() == state.keys()


def test_weights_without_batch_counters_load(state: dict[str, Tensor], tmp_path: Path) -> None:
    old = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    weights.load(
        weights.read(saved(old, tmp_path, _use_new_zipfile_serialization=False)), network()
    )


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"classes": list(NAMES)}, NAMES),
        ({"class_to_idx": {name: row for row, name in enumerate(NAMES)}}, NAMES),
        ({"classes": ["ant", "bee"]}, None),
        ({"classes": 4}, None),
    ],
)
def test_class_names_are_read_from_the_file(
    names: dict[str, Any], expected: Any, state: dict[str, Tensor], tmp_path: Path
) -> None:
    found = weights.read(saved({"state_dict": state, **names}, tmp_path))
    assert found.known == Known(4, expected)


def test_class_names_may_be_given(state: dict[str, Tensor], tmp_path: Path) -> None:
    found = weights.read(saved(state, tmp_path))
    assert weights.with_names(found, NAMES).known == Known(4, NAMES)
    with pytest.raises(WeightsError, match="the network has 4 classes, the list names 3"):
        weights.with_names(found, NAMES[:3])


def test_weights_of_other_networks_are_counted_not_listed(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    foreign = torchvision.models.mobilenet_v3_small(num_classes=4).state_dict()
    said = refused(saved(foreign, tmp_path))
    assert "these weights do not fit MobileNetV3-Small 0.35 with 4 classes: 201 of its 244" in said
    assert (
        "(features.1.conv.0.weight, features.1.conv.1.weight, features.1.conv.1.bias, ...)" in said
    )
    said = refused(saved(build_model("large", 0.5, 4, 0.2).state_dict(), tmp_path))
    assert (
        "they are of MobileNetV3-Large 0.5 with 4 classes: set [model] arch = "
        '"large", width = 0.5' in said
    )
    said = refused(saved(network(num_classes=7).state_dict(), tmp_path))
    assert "--set model.weights=" in said


def test_code_in_a_weights_file_is_not_run(tmp_path: Path) -> None:
    module = network()
    for zipped in (True, False):
        said = refused(saved(module, tmp_path, _use_new_zipfile_serialization=zipped))
        assert (
            "holds Python objects (fasttrain." in said and "torch.save(model.state_dict()" in said
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(tmp_path / "scripted.pt")
    assert "is a TorchScript program" in refused(tmp_path / "scripted.pt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; copy it again"),
        (b"\n<!DOCTYPE html>", "is a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        (b"PK\x03\x04 cut short", "is damaged or not a file of weights"),
        (b"[model]\narch = 1", "is damaged or not a file of weights"),
        (b"\x10\0\0\0\0\0\0\0{ cut short", "is damaged or cut short"),
    ],
)
def test_a_file_of_another_format_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    assert said in refused(path)


def test_a_file_without_network_weights_is_refused(tmp_path: Path) -> None:
    assert "holds no network (its keys: epoch, lr)" in refused(
        saved({"epoch": 1, "lr": 2}, tmp_path)
    )
    assert "holds no network (but a list)" in refused(saved([1], tmp_path))
    assert "cannot be read (No such file" in refused(tmp_path / "nowhere.pth")
    assert "cannot be read (Is a directory" in refused(tmp_path)
    two = prefixed("model.", network().state_dict()) | prefixed("ema.", network().state_dict())
    assert "holds 2 networks, under model., ema." in refused(saved(two, tmp_path))


def test_rows_are_mapped_by_class_and_the_others_keep_their_start(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    found = weights.read(saved({"state_dict": state, "classes": list(NAMES)}, tmp_path))
    module = network(seed=1, num_classes=3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    said = weights.load(found, module, partial(matching.to_start_from, data=["cow", "dog", "ant"]))
    assert "for 2 of 3 classes" in said
    after = module.state_dict()
    for name in (LAST, "classifier.3.bias"):
        assert torch.equal(
            after[name], torch.stack([before[name][0], state[name][3], state[name][0]])
        )
    for name, value in after.items():
        assert name.startswith("classifier.3") or torch.equal(value, state[name])
    with pytest.raises(Fault, match="1 of the data's 3 classes are unknown to the network: cow"):
        weights.load(found, module, partial(matching.to_evaluate, data=["cow", "dog", "ant"]))


def test_weights_without_their_last_layer_are_a_start(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    backbone = {name: t for name, t in state.items() if not name.startswith("classifier.3")}
    found, module = weights.read(saved(backbone, tmp_path)), network(seed=1)
    last = module.state_dict()[LAST].clone()
    said = weights.load(found, module, partial(matching.to_start_from, data=NAMES))
    assert said == "the last layer is new: the weights have none"
    assert torch.equal(module.state_dict()[LAST], last)
    with pytest.raises(WeightsError, match=r"2 of its 244 tensors are missing \(classifier.3"):
        weights.load(found, network())


def test_digests_tell_files_apart(state: dict[str, Tensor], tmp_path: Path) -> None:
    found = weights.read(saved(state, tmp_path))
    other = dict(state) | {LAST: state[LAST] + 1e-6}
    assert found.digest() == weights.read(saved(state, tmp_path)).digest()
    assert found.digest() != weights.read(saved(other, tmp_path)).digest()


def test_a_file_of_a_checkpoint_brings_names_and_recipe(tmp_path: Path) -> None:
    from test_checkpoint import ABOUT, learner

    about = ABOUT | {"classes": list(NAMES), "recipe": {"model": {"arch": "small", "width": 0.35}}}
    (tmp_path / "checkpoints").mkdir()
    folder = checkpoint.save(tmp_path / "checkpoints", learner(step=4), about, keep=2)
    for path in (tmp_path, folder, folder / "model.safetensors", folder / "ema.safetensors"):
        found, recipe = checkpoint.open_weights(path, False, print)
        assert found.known == Known(4, NAMES) and recipe and recipe.model.width == 0.35
        assert (
            found.path.name == ("ema" if path.name.startswith("ema") else "model") + ".safetensors"
        )
    loose = (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    found, recipe = checkpoint.open_weights(loose, False, print)
    assert found.known == Known(4, None) and recipe is None
