"""DALI's graphs fit DALI's schema for a GPU, and on a GPU they give the CPU's pixels."""

import json
import re
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
from nvidia.dali import backend, types

from fasttrain import config, decoding, loaders, pipeline
from fasttrain.batch import Batch, Placement
from fasttrain.decoder import Decoder
from fasttrain.pipeline import Form
from fasttrain.schedule import make_plan
from fasttrain.shards import Split

CPU = Placement(torch.device("cpu"), half=False, threads=2)
GPU = Placement(torch.device("cuda", 0), half=False, threads=4)
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rand": {"augment": "rand"},
    "trivial": {"augment": "trivial"},
    "jitter": {"color_jitter": (0.4, 0.4, 0.4, 0.1)},
    "erase": {"erase": 0.5},
    "all": {"augment": "rand", "color_jitter": (0.4, 0.4, 0.4, 0.1), "erase": 0.5},
}
DECODES = ("raw", "cpu", "gpu_full", "gpu_window")
# What DALI adds to every operator; not in the schema of each.
COMMON = {"device", "preserve_name", "preserve"}


# --------------------------------------------------------------------------------------------------
# Without a GPU
# --------------------------------------------------------------------------------------------------


class Node:
    """An operator of a graph, read from what its specification prints."""

    def __init__(self, operator: Any) -> None:
        spec = operator.spec
        head, _, rest = str(spec).partition("\n  Inputs:\n")
        _, _, arguments = rest.partition("\n  Arguments:\n")
        self.name = head.removeprefix("OpSpec for ").rstrip(":")
        found = re.findall(r"^    (\w+): (.*)$", arguments, re.MULTILINE)
        self.arguments = {name: value for name, value in found if not name.startswith("_")}
        self.device = self.arguments.get("device", "cpu")
        self.regular = spec.NumRegularInput()
        self.inputs = [(spec.InputName(i), spec.InputDevice(i)) for i in range(spec.NumInput())]
        self.outputs = [spec.OutputName(i) for i in range(spec.NumOutput())]
        self.schema = backend.GetSchema(self.name)  # type: ignore[attr-defined]


def test_no_generated_files_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI writes a graph with conditions as a Python file, and imports that file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = {name for name in sys.modules if "autograph_generated" in name}
    nodes_of(
        Form("train", Decoder("cpu"), (99, 99)),
        CPU,
        augment="rand",
        color_jitter=(0.1, 0.1, 0.1, 0),
    )
    nodes_of(Form("train", Decoder("raw"), (99, 99)), CPU, augment="trivial")
    assert not [*tmp_path.iterdir()]
    made = {name for name in sys.modules if "autograph_generated" in name}
    assert made > before or before  # converted functions are kept by DALI


def nodes_of(form: Form, place: Placement, **settings: Any) -> list[Node]:
    graph = pipeline.graph_of(form, config.Data(**settings), lambda number: (), place, 8)
    graph._build_graph()
    return [Node(operator) for operator in graph._ops]


GRAPHS = [("val", decode, "plain", half) for decode, half in product(DECODES, (False, True))]
GRAPHS += [("train", decode, "plain", half) for decode, half in product(DECODES, (False, True))]
GRAPHS += [("train", "gpu_full", change, True) for change in CHANGES if change != "plain"]
GRAPHS += [("train", "raw", "all", False)]


@pytest.mark.parametrize(("kind", "decode", "change", "half"), GRAPHS)
def test_graphs_for_a_gpu_fit_the_schema(kind: str, decode: str, change: str, half: bool) -> None:
    nodes = nodes_of(
        Form(kind, Decoder(decode), (500, 400)), GPU._replace(half=half), **CHANGES[change]
    )
    for node in nodes:
        schema = node.schema
        assert node.device in schema.GetSupportedBackends(), node.name
        assert schema.MinNumInput() <= node.regular <= schema.MaxNumInput(), node.name
        for name in node.arguments.keys() - COMMON:
            assert schema.HasArgument(name), (node.name, name)
        devices = [device for _, device in node.inputs]
        # Conditions, sizes and corners are on the CPU, wherever the images are; of these operators
        # the schema says of regular inputs, too, that they are.
        assert set(devices[node.regular :]) <= {"cpu"}, node.name
        if node.device == "mixed":
            assert devices == ["cpu"] * len(devices)
        if node.device == "gpu" and node.name != "Slice":
            assert set(devices[: node.regular]) <= {"gpu"}, node.name
        if node.name == "Slice":  # start and size are arguments
            assert devices[0] == node.device and node.regular == 1


@pytest.mark.parametrize("change", CHANGES)
def test_the_conversion_to_float16_is_the_last_operator(change: str) -> None:
    # On a GPU fewer operators take float16 than on a CPU: `Erase` does not, and a CPU cannot tell.
    form, place = Form("train", Decoder("gpu_full"), (500, 400)), GPU._replace(half=True)
    nodes = nodes_of(form, place, **CHANGES[change])
    used = {name for node in nodes for name, _ in node.inputs}
    half = [n for n in nodes if n.arguments.get("dtype") == str(int(types.FLOAT16))]
    assert [n.device for n in half] == ["gpu"]
    assert not used & set(half[0].outputs)


def test_what_a_decoder_on_a_gpu_is_told() -> None:
    form, settings = (
        Form("train", Decoder("gpu_window"), (500, 400)),
        {"jpeg_fancy_upsampling": True},
    )
    (decoder,) = (n for n in nodes_of(form, GPU, **settings) if n.device == "mixed")
    assert decoder.name == "decoders__ImageSlice"
    told = decoder.arguments
    assert told["preallocate_height_hint"] == "500" and told["preallocate_width_hint"] == "400"
    assert told["affine"] == "False" and told["jpeg_fancy_upsampling"] == "True"
    assert float(told["hw_decoder_load"]) == form.decoder.load_for(GPU.threads) == 0.64
    assert not [n for n in nodes_of(form, CPU, **settings) if n.device != "cpu"]


def test_a_dlpack_capsule_holds_the_same_pixels() -> None:
    # `tensor_of` uses one on a GPU.
    images = pipeline.pixels_of([memoryview(bytes(range(12)))], [2])
    capsule = images.as_tensor().__dlpack__()  # type: ignore[attr-defined]
    assert torch.from_dlpack(capsule).flatten().tolist() == list(range(12))
    assert pipeline.tensor_of(images).shape == (1, 2, 2, 3)


# --------------------------------------------------------------------------------------------------
# On a GPU
# --------------------------------------------------------------------------------------------------


def batches(split: Split, place: Placement, training: bool = True, **settings: Any) -> list[Batch]:
    chosen = config.Data(
        root=split.root, crop_px=64, eval_resize_px=72, eval_crop_px=64, **settings
    )
    if not training:
        return list(loaders.eval_loader(split, chosen, 8, 0, 1, place))
    train = config.Train(epochs=6, global_batch_size=16)
    plan = make_plan(train, config.Optim(), split.num_samples, 1)
    found = list(loaders.train_batches(split, chosen, plan, 0, place, 0))
    assert len(found) > 8
    return found


def compare(found: list[Batch], expected: list[Batch], place: Placement) -> list[float]:
    """Mean differences of the images in steps of 1/255."""
    kind = torch.float16 if place.half else torch.float32
    far: list[float] = []
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.images.device == place.device and ours.images.dtype == kind
        assert ours.images.is_contiguous(memory_format=torch.channels_last)
        assert ours.labels.tolist() == theirs.labels.tolist()
        far += decoding.differences_of(ours.images, theirs.images)
    return far


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("fancy", "training", "half"),
    [(False, True, True), (False, False, True), (True, True, False), (True, False, True)],
)
@pytest.mark.parametrize("decode", DECODES[1:])
def test_on_a_gpu_each_decoder_gives_the_cpus_pixels(
    split: Split, decode: str, fancy: bool, training: bool, half: bool
) -> None:
    place = GPU._replace(half=half)
    settings = {"jpeg_fancy_upsampling": fancy, "decode": decode}
    found = batches(split, place, training, **settings)
    far = compare(found, batches(split, CPU, training, decode="cpu"), place)
    print(json.dumps({**settings, "mean": np.mean(far), "worst": max(far)}, default=float))
    assert decoding.verdict(far) == ""
    if decode == "cpu":  # only the resizing is another
        assert np.mean(far) < 0.6 and max(far) < 1.5


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_on_a_gpu_augmented_images_are_the_cpus(split: Split, change: str, half: bool) -> None:
    place, settings = GPU._replace(half=half), CHANGES[change] | {"decode": "cpu"}
    found = batches(split, place, **settings)
    expected = batches(split, CPU, **settings)
    far = compare(found, expected, place)
    print(json.dumps({"change": change, "mean": np.mean(far), "worst": max(far)}, default=float))
    # A step more or less is much after a histogram is equalised, or where an image is solarised.
    assert np.mean(far) < 3 and np.median(far) < 1.5
    for ours, theirs in zip(found, expected, strict=True):
        if theirs.draw and theirs.draw.augment.erase is not None:
            erased = theirs.draw.augment.erase.astype(int)
            for image, (y, x, h, w) in zip(ours.images, erased, strict=True):
                assert not image[:, y : y + h, x : x + w].any()


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_kept_batches_stay_as_they_are(split: Split) -> None:
    # No stream waits for DALI's, and its memory is used again.
    place = GPU._replace(half=True)
    kept = batches(split, place, decode="cpu")
    copies = [batch.images.clone() for batch in kept]
    for batch in batches(split, place, decode="cpu"):
        batch.images.mul_(2)
    for batch, copy in zip(kept, copies, strict=True):
        assert torch.equal(batch.images, copy)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_a_decoder_is_chosen(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr(decoding, "MEASURED_S", 0.3)
    job = decoding.Job(gpu=True, threads=4, batch_size=16, half=True)
    environ = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
    chosen, why = decoding.choose_decoder(
        split, config.Data(root=split.root, crop_px=64), job, environ
    )
    print(why)
    assert chosen.strategy in decoding.STRATEGIES
