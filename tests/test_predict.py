"""predict.py sees the pixels of an evaluation, and its classes are those of evaluate.py."""

import json
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import predict
import pytest
import torch
from conftest import Refused, photograph
from PIL import Image

from fasttrain import config, description, loaders, photos, shards
from fasttrain.batch import Placement
from fasttrain.model import mobilenetv3_small

Predict = Callable[..., str]


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Predict:
    """Runs the command in this process. Returns its output."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words)])
        predict.main()
        return capsys.readouterr().out

    return run


def originals(split: shards.Split, folder: Path) -> list[Path]:
    """Writes the JPEGs of a split to files, in the order of its samples."""
    paths = []
    for sample in range(split.num_samples):
        tar = split.shard_paths[split.shard[sample]].read_bytes()
        offset, size = int(split.offset[sample]), int(split.size[sample])
        paths.append(folder / f"{sample:03d}.jpg")
        paths[-1].write_bytes(tar[offset : offset + size])
    return paths


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_and_classes_are_those_of_an_evaluation(
    interpolation: str, trained: Path, dataset: Path, tmp_path: Path, predicted: Predict
) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    text = (trained / "recipe.toml").read_text()
    (tmp_path / "r.toml").write_text(text.replace('"bilinear"', f'"{interpolation}"'))
    recipe = config.load(tmp_path / "r.toml")
    split = shards.open_split(dataset, "val")
    place = Placement(torch.device("cpu"), half=False, threads=1)
    batches = loaders.eval_loader(split, recipe.data, 5, 0, 1, place)
    expected = torch.cat([batch.images.clone() for batch in batches])
    paths = originals(split, tmp_path)
    how = description.preprocessing_of(recipe.data)
    found = photos.normalised([photos.centre(photos.read(path), how) for path in paths], how)
    steps = 255 * (found - expected).abs() * torch.tensor(how.std).view(3, 1, 1)
    assert steps.max() < 2.01  # 255ths
    network = mobilenetv3_small(0.35, weights=trained).eval()
    with torch.no_grad():
        wanted = network(expected).softmax(1)
    out = predicted(trained, *paths, "--json", "--recipe", tmp_path / "r.toml")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["image"] for line in lines] == [str(path) for path in paths]
    for line, row in zip(lines, wanted, strict=True):
        names = [split.classes[k] for k in row.argsort(descending=True)]
        assert [guess["class"] for guess in line["top"]] == names
        chances = [guess["probability"] for guess in line["top"]]
        assert chances == pytest.approx(row.sort(descending=True).values.tolist(), abs=5e-3)


def test_folders_are_searched_and_a_broken_image_is_named_at_the_end(
    trained: Path,
    tmp_path: Path,
    predicted: Predict,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng, deep = np.random.default_rng(0), tmp_path / "images" / "deep"
    deep.mkdir(parents=True)
    photograph(rng, 60, 40).save(deep / "b.PNG")
    photograph(rng, 40, 60).convert("CMYK").save(tmp_path / "images" / "a.jpg")
    (tmp_path / "images" / "notes.txt").touch()
    out = predicted(trained, tmp_path / "images", "--top", 2).splitlines()
    assert [line for line in out if line[0] != " "] == [
        str(tmp_path / "images" / name) for name in ("a.jpg", "deep/b.PNG")
    ]
    assert len(out) == 6 and " %  " in out[1]
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(SystemExit) as status:
        predicted(trained, tmp_path / "images", tmp_path / "gone.jpg", "--json")
    found = capsys.readouterr()
    assert status.value.code == 2 and len(found.out.splitlines()) == 2
    assert found.err.splitlines() == [
        f"{tmp_path}/images/broken.jpg: not an image, or of a format that PIL does not read",
        f"{tmp_path}/gone.jpg: cannot be read (No such file or directory)",
    ]


def test_exif_rotation_is_ignored_as_in_training(tmp_path: Path) -> None:
    image = photograph(np.random.default_rng(0), 60, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    found = photos.read(tmp_path / "turned.png")
    assert found.size == (60, 40) and np.array_equal(np.asarray(found), np.asarray(image))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_the_result_is_drawn(
    suffix: str, trained: Path, tmp_path: Path, predicted: Predict
) -> None:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths:
        photograph(rng, 60, 40).save(path)
    predicted(trained, *paths, "--draw", tmp_path / f"drawn{suffix}")
    with Image.open(tmp_path / f"drawn{suffix}") as drawn:
        assert drawn.size == (2 * (predict.TILE + predict.BARS + 32) + 16, 2 * 240 + 16)
        corner = drawn.convert("RGB").crop((16, 16, 16 + predict.TILE, 16 + predict.TILE))
    how = description.Preprocessing(resize_px=36, crop_px=32, interpolation="bilinear")
    seen = photos.centre(photos.read(paths[0]), how)
    tile = seen.resize(corner.size, Image.Resampling.LANCZOS)
    far = np.abs(np.asarray(corner, int) - np.asarray(tile, int))
    assert far.max() == 0 if suffix == ".png" else far.mean() < 5


def test_names_of_imagenet_are_shown_in_english() -> None:
    guess = predict.Guess("n02123045", "tabby", 0.25)
    assert predict.as_text(Path("x.jpg"), [guess]) == "x.jpg\n   25.0 %  n02123045 tabby\n"
    assert json.loads(predict.as_json(Path("x.jpg"), [guess, predict.Guess("cat", "", 0.1)])) == {
        "image": "x.jpg",
        "top": [
            {"class": "n02123045", "name": "tabby", "probability": 0.25},
            {"class": "cat", "probability": 0.1},
        ],
    }


WRONG = [
    ("/nowhere {image}", "/nowhere: there is no such file or folder; name a run folder, a check"),
    ("{run} {empty}", "{empty} holds no image file (.bmp, .gif, .jpeg"),
    ("{run} {image} --draw x.gif", "--draw x.gif: the picture must be .png, .jpg or .webp"),
    ("{run} {image} --draw /no/x.png", "--draw /no/x.png: there is no such folder; make it first"),
    ("{run} {image} --top 0", "--top: '0' is not a whole number from 1"),
    ("{onnx} {image}", "{onnx}: cannot be opened ("),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_wrong_arguments_are_refused(
    words: str, message: str, trained: Path, tmp_path: Path, refused: Refused
) -> None:
    if "onnx" in words:
        pytest.importorskip("onnxruntime")
    places = {name: tmp_path / name for name in ("empty", "image")} | {"run": trained}
    places |= {"onnx": tmp_path / "x.onnx"}
    places["empty"].mkdir()
    places["onnx"].write_bytes(b"no model")
    refused(predict.main, words.format(**places).split(), message.format(**places))


def test_top_may_be_more_than_the_classes(
    trained: Path, tmp_path: Path, predicted: Predict
) -> None:
    photograph(np.random.default_rng(0), 60, 40).save(tmp_path / "x.png")
    out = predicted(trained, tmp_path / "x.png", "--top", 9, "--json")
    names = [guess["class"] for guess in json.loads(out)["top"]]
    assert sorted(names) == list(chain("abc"))
