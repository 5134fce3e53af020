"""The tools refuse wrong arguments with a message that says what to change."""

import os
from pathlib import Path
from typing import Any

import benchmark
import evaluate
import make_shards
import preview
import pytest
import verify_shards
from conftest import STEP, Refused

TOOLS: list[tuple[Any, str, list[str]]] = [
    (evaluate, "{run}", ["the following arguments are required: --data"]),
    (evaluate, "{run} --data /nowhere", ["no data set at /nowhere", "tools/make_shards.py"]),
    (evaluate, "{run} --data {data} --ema", ["has no moving average: [optim] ema_decay was 0"]),
    (
        evaluate,
        "{run} --data {data} --batch-size x",
        ["--batch-size: 'x' is not a whole number from 1"],
    ),
    (evaluate, "{run} --data {data} --batch-size 0", ["--batch-size: '0' is not a whole number"]),
    (evaluate, "{data} --data {data}", ["{data} is not a checkpoint of fasttrain", "state.json"]),
    (evaluate, "/nowhere --data {data}", ["/nowhere is not a checkpoint of fasttrain"]),
    (evaluate, "{empty} --data {data}", ["{empty} holds no checkpoint yet"]),
    (evaluate, "{weights} --data {data} --recipe /no", ["/no: cannot read this recipe"]),
    (evaluate, "{recipe} --data {data} --recipe {recipe}", ["{recipe}: is damaged or not a file"]),
    (evaluate, "{run} --data {data} {data}", ["--data: {data} is named twice; name each data set"]),
    (
        evaluate,
        "{run} --data {data} --crop-px 64 --resize-px 40",
        ["--resize-px 40: smaller than the crop of 64 px; raise it, or set a smaller --crop-px"],
    ),
    (
        evaluate,
        "{run} --data {data} --resize-px 20",
        ["--resize-px 20: smaller than the crop of 32 px of the recipe; raise it, or set"],
    ),
    (evaluate, "{run} --data {data} --crop-px 31", ["--crop-px 31: must be at least 32 pixels"]),
    (
        evaluate,
        "{run} --data {data} --crop-fraction 0.9 --resize-px 40",
        ["argument --resize-px: not allowed with argument --crop-fraction"],
    ),
    (
        evaluate,
        "{run} --data {data} --crop-fraction 1.1",
        ["--crop-fraction: '1.1' is not a number above 0 and at most 1"],
    ),
    (
        evaluate,
        "{run} --data {data} --out {recipe}",
        ["--out {recipe}: cannot be written (File exists); choose another folder"],
    ),
    (preview, "{recipe}", ["the following arguments are required: OUT"]),
    (preview, "/no {new}.png", ["/no: cannot read this recipe"]),
    (preview, "{recipe} {new}.gif", ["{new}.gif: its suffix must be one of .png, .jpg, .jpeg, .w"]),
    (preview, "{recipe} {new}/x.png", ["{new}/x.png: there is no folder {new}; make it first"]),
    (preview, "{recipe} {new}.png --set data.root=/no", ["no data set at /no"]),
    (preview, "{recipe} {new}.png --update 2", ["--update 2: the run has 2 updates, from 0 to 1"]),
    (preview, "{recipe} {new}.png --update -1", ["--update -1: the run has 2 updates, from 0 to"]),
    (preview, "{recipe} {new}.png --images 9", ["--images 9: an update has 8 images; lower it"]),
    (preview, "{recipe} {new}.png --images 0", ["--images: '0' is not a whole number from 1"]),
    (make_shards, "", ["the following arguments are required: SOURCE"]),
    (make_shards, "{folder}", ["name the folder OUT"]),
    (make_shards, "{folder} {new} --in-place", ["--in-place: leave out OUT"]),
    (make_shards, "{folder} --in-place", ["{folder} holds imagefolder, not WebDataset tars"]),
    (make_shards, "{folder} --in-place --short-side 9", ["name an OUT to re-encode them"]),
    (make_shards, "/nowhere {new}", ["/nowhere is not a folder", "train/<class>/"]),
    (make_shards, "{empty} {new}", ["{empty} holds none of the forms", "imagefolder: an Image"]),
    (make_shards, "{folder} {data} --seed 1", ["{data} already holds another finished data set"]),
    (
        make_shards,
        "{folder} {folder}",
        ["holds files that fasttrain did not write (", "choose another"],
    ),
    (make_shards, "{folder} {recipe}/new", ["cannot continue: [Errno 20] Not a directory"]),
    (make_shards, "{folder} {new} --part 9/8", ["--part: 9/8: expected I/N with I from 1 to N"]),
    (make_shards, "{folder} {new} --part 0/2", ["--part: 0/2: expected I/N with I from 1 to N"]),
    (make_shards, "{folder} {new} --part 1", ["--part: 1: expected I/N with I from 1 to N"]),
    (make_shards, "{folder} {new} --part x", ["--part: x: expected I/N", "such as 3/8"]),
    (make_shards, "{folder} {new} --quality 0", ["--quality: invalid choice: 0 (choose from 50"]),
    (make_shards, "{folder} {new} --seed -1", ["--seed -1: must not be negative"]),
    (make_shards, "{folder} {new} --workers 0", ["--workers: '0' is not a whole number from 1"]),
    (make_shards, "{folder} {new} --store raw", ["--store raw: needs --short-side, such as 256"]),
    (make_shards, "{folder} {new} --form x", ["--form: invalid choice: 'x' (choose from"]),
    (verify_shards, "", ["the following arguments are required: OUT"]),
    (verify_shards, "{data} --workers 0", ["--workers: '0' is not a whole number from 1"]),
    (verify_shards, "{data} --workers x", ["--workers: 'x' is not a whole number from 1"]),
    (verify_shards, "{data} --fast", ["unrecognized arguments: --fast"]),
    (benchmark, "", ["the following arguments are required: PART"]),
    (benchmark, "data", ["PART: invalid choice: 'data' (choose from"]),
    (benchmark, "input /nowhere", ["no data set at /nowhere", "tools/make_shards.py"]),
    (benchmark, "input {data} --batch 99", ["--batch 99: more than the 45 training images; lower"]),
    (benchmark, "input {data} --threads 0", ["--threads: '0' is not a whole number from 1"]),
    (benchmark, "input {data} --batch 4 --images 8 --folder /no", ["--folder /no: no images in"]),
    (benchmark, "step --batch none", ["--batch: 'none' is not a whole number from 1"]),
    (benchmark, "step --modes fast", ["--modes: fast: not among eager, compile, "]),
    (benchmark, "step --modes graph", ["--modes: a CUDA graph needs a GPU; use eager,compile"]),
    (
        benchmark,
        "step --device gpu",
        ["--device gpu: torch finds no GPU here; leave the option out"],
    ),
    (benchmark, "step --width 0", ["--width: '0' is not a number above 0"]),
    (benchmark, "step --seconds -1", ["--seconds: '-1' is not a number above 0"]),
    (benchmark, "shards /nowhere", ["/nowhere is not a folder; name an ImageFolder"]),
    (benchmark, "shards {folder} --repeats 0", ["--repeats: '0' is not a whole number from 1"]),
    (benchmark, "scaling --step-ms x", ["argument --step-ms: invalid"]),
    (benchmark, "scaling --per-node 0", ["--per-node: '0' is not a whole number from 1"]),
    (benchmark, "scaling --epochs 0", ["--epochs: '0' is not a whole number from 1"]),
    (benchmark, "scaling --images 0", ["--images: '0' is not a whole number from 1"]),
    (benchmark, "scaling --between 0", ["--between: '0' is not a number above 0"]),
    (benchmark, "scaling --input-rate nan", ["--input-rate: 'nan' is not a number above 0"]),
    (benchmark, "scaling --plot /no/x.svg", ["--plot /no/x.svg: there is no such folder; make"]),
]


@pytest.mark.parametrize(
    ("tool", "words", "said"), TOOLS, ids=[f"{tool.__name__} {words}" for tool, words, _ in TOOLS]
)
def test_each_wrong_command_line_is_refused(
    tool: Any,
    words: str,
    said: list[str],
    trained: Path,
    folder: Path,
    dataset: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    places = {
        "run": trained,
        "recipe": trained.with_name("tiny.toml"),
        "weights": trained / STEP / "model.safetensors",
        "data": dataset,
        "folder": folder,
        "empty": tmp_path / "empty",
        "new": tmp_path / "new",
    }
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    filled = words.format(**places).split()
    refused(tool.main, filled, *(text.format(**places) for text in said))
    assert not (tmp_path / "new").exists() and os.listdir(tmp_path) == ["empty"]
