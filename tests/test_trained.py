"""A trained network opens from every place, and the library loads it by one call."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPO, STEP
from safetensors.torch import load_file, save_file

from fasttrain import checkpoint, config, description, matching, trained
from fasttrain.description import Description
from fasttrain.faults import Fault
from fasttrain.model import mobilenetv3_large, mobilenetv3_small


def opened(path: Path, average: bool = True, recipe: config.Recipe | None = None) -> Description:
    return trained.open_trained(path, average, recipe, print).description


def test_a_run_is_described_with_the_accuracy_that_it_measured(trained_run: Path) -> None:
    found = opened(trained_run)
    record = checkpoint.read_state(trained_run / STEP).state.last_eval
    assert (found.network, found.classes) == ("MobileNetV3-Small 0.35", ("a", "b", "c"))
    assert (found.top1, found.top5) == (record["top1"], record["top5"])
    how = found.preprocessing
    assert (how.resize_px, how.crop_px, how.interpolation) == (36, 32, "bilinear")
    assert found.average is False
    assert description.parse(found.model_dump_json(), "x") == found
    with pytest.raises(Fault, match=r"^x: its description is not what this fasttrain writes \(arc"):
        description.parse("{}", "x")


@pytest.fixture
def trained_run(trained: Path) -> Path:
    """The run of the fixture `trained`; a module has that name here."""
    return trained


def test_the_average_is_taken_where_there_is_one(trained_run: Path, tmp_path: Path) -> None:
    state = load_file(trained_run / STEP / "model.safetensors")
    both = {"model": state, "model_ema": {name: t + 1 for name, t in state.items()}}
    torch.save(both, tmp_path / "both.pth")
    recipe = config.load(trained_run / "recipe.toml")
    assert opened(tmp_path / "both.pth", True, recipe).average is True
    assert opened(tmp_path / "both.pth", False, recipe).average is False
    name = "classifier.3.bias"
    networks = [
        mobilenetv3_small(0.35, weights=tmp_path / "both.pth", average=average).state_dict()
        for average in (True, False)
    ]
    assert torch.equal(networks[0][name], state[name] + 1)
    assert torch.equal(networks[1][name], state[name])


def test_the_library_loads_weights_by_one_call(trained_run: Path) -> None:
    expected = load_file(trained_run / STEP / "model.safetensors")
    file = trained_run / STEP / "model.safetensors"
    for place in (trained_run, trained_run / STEP, file, str(file)):
        network = mobilenetv3_small(0.35, weights=place)
        assert network.training and network.classifier[3].out_features == 3
        assert all(torch.equal(t, expected[n]) for n, t in network.state_dict().items())
    assert mobilenetv3_small(0.35, num_classes=3, weights=file).about.endswith("with 3 classes")


Build = Callable[[Path], object]
WRONG: list[tuple[Build, str]] = [
    (
        lambda run: mobilenetv3_large(weights=run),
        "these weights are of MobileNetV3-Small 0.35 with 3 classes, not of MobileNetV3-Large 1 "
        'with 3 classes; call mobilenetv3_small(width=0.35, weights="...")',
    ),
    (
        lambda run: mobilenetv3_small(0.75, weights=run),
        "not of MobileNetV3-Small 0.75 with 3 classes; call mobilenetv3_small(width=0.35, weights",
    ),
    (
        lambda run: mobilenetv3_small(0.35, 1000, weights=run),
        "the weights have 3 classes, but num_classes = 1,000; leave num_classes out, or train a "
        "network with other classes that starts from these weights (recipes/finetune.toml)",
    ),
    (lambda run: mobilenetv3_small(weights="/no"), "/no is not a checkpoint of fasttrain"),
]


@pytest.mark.parametrize(("build", "message"), WRONG)
def test_weights_of_another_network_are_refused(
    build: Build, message: str, trained_run: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(trained_run)


def test_weights_without_a_description_need_a_recipe(trained_run: Path, tmp_path: Path) -> None:
    state = load_file(trained_run / STEP / "model.safetensors")
    save_file(state, tmp_path / "bare.safetensors")
    with pytest.raises(
        Fault, match=r"bare.safetensors is a file of weights that does not describe"
    ):
        opened(tmp_path / "bare.safetensors")
    headless = {name: t for name, t in state.items() if not name.startswith("classifier.3")}
    save_file(headless, tmp_path / "bare.safetensors")
    with pytest.raises(Fault, match="the weights have no last layer, so they have no classes"):
        mobilenetv3_small(0.35, weights=tmp_path / "bare.safetensors")


def test_imagenets_classes_have_english_names() -> None:
    names = description.readable(matching.imagenet())
    assert len(names) == 1000
    assert names["n01440764"] == "tench" and names["n02123045"] == "tabby"
    assert names["n15075141"] == "toilet tissue"
    assert description.readable(("n01440764", "n02102040"))["n02102040"] == "English springer"
    assert description.readable(("cat", "dog")) == {} == description.readable(None)


def test_the_examples_of_the_library_run(dataset: Path) -> None:
    """The code blocks of fasttrain/README.md, one after the other, on the tests' images."""
    page = (REPO / "fasttrain" / "README.md").read_text()
    section = page.partition("## Use as a library")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks[1:]:
        small = block.replace("data/imagenet", str(dataset)).replace("mobilenetv3_large(", "small(")
        small = small.replace("crop_px=224", "crop_px=32").replace("_size=256", "_size=8")
        names["small"] = lambda **options: mobilenetv3_small(0.35, **options)
        exec(compile(small, "fasttrain/README.md", "exec"), names)
    loss = names["loss"]
    assert isinstance(loss, torch.Tensor) and bool(loss.isfinite())
