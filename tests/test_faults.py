"""A catalogue of wrong inputs, each with what is said: the fault, the place, the remedy.

More of recipes are in test_config.py, more of sources in test_sharding.py and test_sources.py.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO, TINY, run, shard

from fasttrain import caches, config, loop, run_folder, shards, train
from fasttrain.sharding import Policy

sys.path.insert(0, str(REPO / "tools"))
import benchmark
import evaluate
import make_shards
import verify_shards

Manifest = dict[str, Any]
Refused = Callable[..., None]
AGAIN = "make the data set again"


@pytest.fixture
def copied(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "shards"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs an entry point that must end with exit code 2 and these words on standard error."""

    def check(main: Callable[..., object], words: list[Any], *said: str) -> None:
        words = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", ["tool", *words])
        with pytest.raises(SystemExit) as status:
            main(*[words][: main.__code__.co_argcount])
        output = capsys.readouterr().err
        assert status.value.code == 2, output
        for text in said:
            assert text in output
        assert "Traceback" not in output

    return check


# --------------------------------------------------------------------------------------------------
# Recipes and settings
# --------------------------------------------------------------------------------------------------

RECIPES = [
    (b"[train\n", "not valid TOML: Expected ']'"),
    (b"[train]\n[train]\n", "not valid TOML: Cannot declare ('train',) twice (at line 2"),
    (b"\xff\xfe", "not valid TOML: 'utf-8' codec can't decode byte 0xff"),
    (b"\0", "not valid TOML: Invalid statement"),
    (b"x = " + b"[" * 5000, "not valid TOML: maximum recursion depth exceeded"),
    (b"[train]\nepochs = " + b"9" * 5000, "not valid TOML: Exceeds the limit (4300 digits)"),
    (b"[train]\nepochs = 0x" + b"f" * 5000, "[train] epochs = ...: must be less: 64 bits"),
    (b"[train]\nepochs." + b".".join([b"a"] * 3000) + b" = 1", "[train] epochs = ...: must be"),
    (b"epochs = 3", "[epochs]: unknown section; known are data, model, optim, train"),
    (b"train = 3", "train = 3: [train] must be a section"),
    (b"[[train]]\nepochs = 3", 'train = [{"epochs": 3}]: [train] must be a section'),
    (b"[train.epochs]\nvalue = 3", '[train] epochs = {"value": 3}: expected int, got dict'),
    (b"[train]\nepochs = 2026-01-01", '[train] epochs = "2026-01-01": expected int, got str'),
    (b"[train]\nEpochs = 3", "[train] Epochs: unknown key; did you mean epochs?"),
    (b"[data]\nroot = ''", '[data] root = "": must not be empty'),
    (b"[data]\nroot = '~nobody-here/x'", "there is no such user; write the path in full"),
    (b"[data]\nroot = './~nobody-here'", "there is no such user; write the path in full"),
    (b'[log]\nrun_dir = "a\\u0000"', 'run_dir = "a\\u0000": must be plain text, without control'),
    (b'[log]\nrun_dir = "a\\u007f"', 'run_dir = "a\\u007f": must be plain text, without control'),
]


@pytest.mark.parametrize(("content", "message"), RECIPES)
def test_recipes(content: bytes, message: str, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    refused(train.main, [path], f"{path}: ", message)


def test_recipes_that_are_no_files(tmp_path: Path, refused: Refused) -> None:
    refused(train.main, [tmp_path], f"{tmp_path}: cannot read this recipe (Is a directory)")
    refused(train.main, ["recipes/larg.toml"], "did you mean recipes/large.toml?\n", "demo.toml, ")
    refused(train.main, ["/nowhere.toml"], "/nowhere.toml: cannot read this recipe (No such file")
    refused(train.main, ["/proc/self/mem"], "/proc/self/mem: cannot read this recipe (Input/output")


SETTINGS: list[tuple[str, list[str]]] = [
    ("log.run_dir=", ["--set log.run_dir=: expected section.key=value"]),
    ("log.run_dir=$NOTHING_IN_IT", ['[log] run_dir = "$NOTHING_IN_IT": must not be empty']),
    ("log.run_dir=$NOT_SET/run", ["$NOT_SET is not set in the environment; set it or write the"]),
    ("log.run_dir=x${NOT_SET}", ["${NOT_SET} is not set in the environment; set it or write"]),
    ("log.run_dir=\udcff", ["must be plain text"]),
    ("train.seed=9223372036854775808", ["[train] seed = 9223372036854775808: must be less: 64"]),
    (
        "train.epochs=" + "[" * 5000,
        ['[train] epochs = "[[', "expected int, got str; for example epochs = 150"],
    ),
    ("train.micro_batch_size=x", ["expected int, got str; for example micro_batch_size = 8"]),
    ("data.root={file}", ["no data set at {file}", "python tools/make_shards.py"]),
    ("data.root=/nowhere", ["no data set at /nowhere", "--set data.root=/path/to/shards"]),
    ("data.short_side=256", ["asks for images of short side 256, those at", "--short-side 256"]),
    ("log.run_dir={file}", ['[log] run_dir = "{file}": cannot be written', "choose another"]),
    ("log.run_dir={file}/run", ["cannot be written (Not a directory)", "choose another with"]),
    ("log.run_dir=/proc/run", ['[log] run_dir = "/proc/run": cannot be written', "choose another"]),
    ("train.global_batch_size=99", ["global_batch_size = 99: more than the 45 training images"]),
    ("train.micro_batch_size=3", ["does not divide the 8 images of each", "2 or 4 would"]),
    ("checkpoint.resume=none", ['resume = "none": there is no such checkpoint', "must be auto"]),
    (
        "checkpoint.resume={file}",
        ["is a file, not the folder of a checkpoint", "model.weights={file}"],
    ),
    ("train.precision=fp16", ["[train] precision = fp16: needs a GPU; use bf16 or no"]),
    ("train.execution=graph", ["[train] execution = graph: needs a GPU; use auto"]),
    ("data.decode=gpu_full", ["decode = gpu_full: this process has no GPU; use cpu or auto"]),
]


@pytest.mark.parametrize(("setting", "said"), SETTINGS)
def test_settings(
    setting: str,
    said: list[str],
    tiny: Callable[..., Path],
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NOTHING_IN_IT", "")
    file = tmp_path / "file"
    file.write_text("")
    words = [tiny(), "--set", setting.replace("{file}", str(file))]
    refused(train.main, words, *(text.replace("{file}", str(file)) for text in said))


@pytest.mark.parametrize(
    ("environ", "words", "said"),
    [
        ({}, [], ["the following arguments are required: recipe"]),
        ({}, ["{recipe}", "--epochs", "3"], ["unrecognized arguments: --epochs 3"]),
        ({}, ["{recipe}", "--set"], ["argument --set: expected one argument"]),
        (
            {"WORLD_SIZE": "3"},
            ["{recipe}"],
            ["global_batch_size = 8: does not divide over 3 processes", "6 or 9", "launch 2 or 4"],
        ),
        (
            {"WORLD_SIZE": "2"},
            ["{recipe}", "--set", "train.micro_batch_size=3"],
            ["micro_batch_size = 3: does not divide the 4 images of each of 2", "2 or 4 would"],
        ),
        (
            {"WORLD_SIZE": "2"},
            ["{recipe}"],
            ["WORLD_SIZE = 2 in the environment, but no MASTER_ADDR: start", "accelerate launch"],
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "2"},
            ["{recipe}"],
            ["SLURM started 2 tasks, but none of them launched", "use tools/train.sbatch"],
        ),
        *(
            (
                {name: value},
                ["{recipe}", "--set", "train.cpu_threads=0"],
                [f'{name} = "{value}" in the environment: expected a'],
            )
            for name, value in (
                ("WORLD_SIZE", "x"),
                ("WORLD_SIZE", ""),
                ("WORLD_SIZE", "0"),
                ("SLURM_RESTART_COUNT", "-1"),
                ("SLURM_CPUS_PER_TASK", "2(x2)"),
                ("LOCAL_WORLD_SIZE", "0"),
            )
        ),
    ],
)
def test_launches(
    environ: dict[str, str],
    words: list[str],
    said: list[str],
    tiny: Callable[..., Path],
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    refused(train.main, [word.format(recipe=tiny()) for word in words], *said)


@pytest.mark.parametrize(("rank", "local", "speaks"), [(0, 0, 1), (1, 1, 0), (8, 0, 1), (9, 1, 0)])
def test_one_process_of_each_node_says_what_is_wrong(
    rank: int,
    local: int,
    speaks: bool,
    tiny: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local))
    with pytest.raises(SystemExit, match="2"):
        train.main([str(tiny(data={"root": "/nowhere"}))])
    said = capsys.readouterr().err
    assert said.startswith(f"rank {rank}: " if rank else "no data set") if speaks else not said


def test_what_befalls_all_processes_is_said_once_a_node_and_else_by_each(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    for name, value in (launched | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    for fault, said in (
        (loop.NonFiniteLoss("update 7"), ""),
        (loop.Unsaved("no space"), ""),
        (config.Fault("this one's tar"), "rank 3: this one's tar\n"),
    ):

        def fails(*_: object, fault: config.Fault = fault) -> None:
            raise fault

        monkeypatch.setattr(train, "train", fails)
        with pytest.raises(SystemExit, match="2"):
            train.main([str(tiny())])
        assert capsys.readouterr().err == said


def test_a_message_is_left_for_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch's prints it last; after Accelerate's own a line says that nothing follows."""

    def said(**environ: str) -> tuple[str, str]:
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="2"):
            for name, value in ({"LOCAL_RANK": "0", "RANK": "2"} | environ).items():
                patch.setenv(name, value)
            config.stop("no data", everywhere="EVERYWHERE" in environ)
        message = json.loads(report.read_text())["message"] if report.exists() else ""
        report.unlink(missing_ok=True)
        return capsys.readouterr().err, message

    report, line = tmp_path / "error.json", "rank 2: no data"
    monkeypatch.setattr(config, "FIRST_S", 0.01)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    elastic = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_ERROR_FILE": str(report)}
    assert said(**elastic) == ("", line)
    assert said(**elastic, EVERYWHERE="") == (f"{line}\n", line)
    assert said(**elastic | {"TORCHELASTIC_ERROR_FILE": "/nowhere/x"}) == (f"{line}\n", "")
    assert said(**elastic, LOCAL_RANK="1") == ("", line)  # as nobody has ended it
    follows = "(what follows is Accelerate's own, and says no more)\n"
    assert said(ACCELERATE_MIXED_PRECISION="no", RANK="0") == (f"no data\n{follows}", "")


def test_demo_without_its_data(refused: Refused) -> None:
    command = "make the demo's with\n    python tools/make_digits.py"
    refused(train.main, ["recipes/demo.toml"], "no data set at data/digits", command)


def test_nothing_is_written_and_torch_not_loaded_where_something_is_wrong(tmp_path: Path) -> None:
    code = (
        "import sys; from fasttrain import train\n"
        f"try: train.main(['recipes/large.toml', '--set', 'log.run_dir={tmp_path / 'run'}', "
        "'--set', 'data.root=/nowhere'])\n"
        "finally: print('torch' in sys.modules)"
    )
    done = run([sys.executable, "-c", code], code=2)
    assert done.stdout == "False\n" and "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# Data sets
# --------------------------------------------------------------------------------------------------


def of(manifest: Manifest, *place: Any) -> Any:
    """What lies at a place under `splits.train`."""
    node = manifest["splits"]["train"]
    for step in place:
        node = node[step]
    return node


MANIFESTS: list[tuple[Callable[[Manifest], object], str]] = [
    (lambda m: m.pop("version"), "manifest.json is damaged; make"),
    (lambda m: m.update(version=7), "has format version 7, this fasttrain reads 1; make"),
    (lambda m: m.update(version="1"), "has format version 1, this fasttrain reads 1; make"),
    (lambda m: m.pop("classes"), "is damaged: classes: Field required"),
    (lambda m: m.update(classes=[]), "is damaged: classes: List should have at least 1 item"),
    (lambda m: m.update(classes=["x"] * 70000), "classes: List should have at most 65536 items"),
    (lambda m: m.update(classes="abc"), "is damaged: classes: Input should be a valid list"),
    (lambda m: m.update(classes=[1, 2, 3]), "classes[0]: Input should be a valid string"),
    (lambda m: m.pop("policy"), "is damaged: policy: Field required"),
    (lambda m: m["policy"].pop("short_side"), "policy.short_side: Field required"),
    (lambda m: m["policy"].update(short_side=-1), "policy.short_side: Input should be greater"),
    (lambda m: m["policy"].update(store="png"), "policy.store: Input should be 'jpeg' or 'raw'"),
    (lambda m: m.pop("splits"), "is damaged: splits: Field required"),
    (lambda m: m.update(splits=[]), "is damaged: splits: Input should be a valid dict"),
    (lambda m: m.update(splits={}), "is damaged: splits: Dictionary should have at least 1 item"),
    (lambda m: m["splits"].update(train=None), "splits.train: Input should be a valid dict"),
    (lambda m: of(m).pop("index"), "splits.train.index: Field required"),
    (lambda m: of(m, "index").update(sha256=""), "splits.train.index.sha256: String should match"),
    (lambda m: of(m).pop("shards"), "splits.train.shards: Field required"),
    (lambda m: of(m).update(shards=[]), "splits.train.shards: List should have at least 1 item"),
    (
        lambda m: of(m).update(shards=of(m, "shards")[:1] * 70000),
        "splits.train.shards: List should have at most 65536 items",
    ),
    (lambda m: of(m).update(num_samples="45"), "splits.train.num_samples: Input should be a valid"),
    (lambda m: of(m).update(num_samples=44), "splits.train: its shards have another number of sam"),
    (lambda m: of(m).update(num_samples=0), "num_samples: Input should be greater than or equal"),
    (
        lambda m: of(m, "shards", 3).update(size=-1),
        "splits.train.shards[3].size: Input should be greater than or equal to 1",
    ),
    (
        lambda m: of(m, "shards", 3).update(size=1e4),
        "splits.train.shards[3].size: Input should be a valid integer",
    ),
    (
        lambda m: of(m, "shards", 3).update(size=2**64),
        "splits.train.shards[3].size: Input should be less than 1099511627776",
    ),
    (
        lambda m: of(m, "shards", 3).update(num_samples=-1),
        "splits.train.shards[3].num_samples: Input should be greater than or equal to 0",
    ),
    (lambda m: of(m, "shards", 3).pop("sha256"), "splits.train.shards[3].sha256: Field required"),
    (lambda m: of(m, "shards", 3).pop("idx_sha256"), "shards[3].idx_sha256: Field required"),
    *[
        (
            lambda m, name=name: of(m, "shards", 1).update(name=name),
            f"splits.train.shards[1].name: {name!r} is no file in the data set's folder",
        )
        for name in ("../../etc/passwd", "/etc/passwd", "sub/train-000001.tar", "..", "", "a\0b")
    ],
    (
        lambda m: of(m, "shards", 1).update(name="\ud800"),
        "shards[1].name: '\\ud800' is no file in the data set's folder",
    ),
    (lambda m: of(m, "shards", 1).update(name="x" * 999), "xxx' is no file in the data set's fold"),
    (lambda m: of(m, "shards", 1).update(name=3), "shards[1].name: Input should be a valid string"),
    (
        lambda m: of(m, "index").update(name="/etc/passwd"),
        "splits.train.index.name: '/etc/passwd' is no file in the data set's folder",
    ),
    (
        lambda m: of(m, "shards", 1).update(name=of(m, "shards", 0, "name")),
        "shards[1].name: train-000000.tar is that of splits.train.shards[0] already",
    ),
    (
        lambda m: m["splits"].update(val=of(m)),
        "splits.val.index.name: train.index is that of splits.train.index already",
    ),
    (
        lambda m: of(m, "shards", 0).update(size=1024),
        "manifest.json says 1,024: copy it anew or make",
    ),
]


@pytest.mark.parametrize("number", range(len(MANIFESTS)))
def test_manifests(number: int, copied: Path, tiny: Callable[..., Path], refused: Refused) -> None:
    change, message = MANIFESTS[number]
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    refused(train.main, [tiny(data={"root": str(copied)})], str(copied), message, AGAIN)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"\xff\xfe", b"{", b"[" * 100_000, b"null"])
def test_manifests_that_are_none(content: bytes, copied: Path) -> None:
    (copied / "manifest.json").write_bytes(content)
    with pytest.raises(shards.ShardError, match=f"manifest.json is damaged; {AGAIN}"):
        shards.read_manifest(copied)


def test_a_split_that_is_not_there(copied: Path) -> None:
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["splits"]["train"]
    path.write_text(json.dumps(manifest | {"of a newer": "minor version"}))
    with pytest.raises(shards.ShardError, match="no split train, only val; make it again of a"):
        shards.open_split(copied, "train")


INDEXES = [  # column, sample, value, what is said and of which sample
    ("offset", 3, 2**64 - 100, "its bytes lie outside of its tar", 3),
    ("offset", 3, 2**63, "its bytes lie outside of its tar", 3),
    ("size", 4, 2**32 - 1, "its bytes lie outside of its tar", 4),
    ("size", 4, 0, "it has no bytes or no pixels", 4),
    ("width", 7, 0, "it has no bytes or no pixels", 7),
    ("height", 8, 0, "it has no bytes or no pixels", 8),
    ("label", 6, 3, "there is no such class", 6),
    ("shard", 5, 60000, "there is no such shard", 5),
    ("shard", 0, 1, "manifest.json gives its shard other samples", 0),
    ("shard", 10, 1, "manifest.json gives its shard other samples", 10),
]


def change_index(path: Path, column: str, sample: int, value: int, count: int) -> None:
    data = bytearray(path.read_bytes())
    start = len(shards._INDEX_MAGIC) + 8
    for name, dtype in shards._COLUMNS:
        if name == column:
            np.frombuffer(data, dtype, count, start)[sample] = value
        start += count * np.dtype(dtype).itemsize
    path.write_bytes(data)


@pytest.mark.parametrize(("column", "sample", "value", "message", "first"), INDEXES)
def test_indexes(
    column: str,
    sample: int,
    value: int,
    message: str,
    first: int,
    copied: Path,
    tiny: Callable[..., Path],
    refused: Refused,
) -> None:
    change_index(copied / "train.index", column, sample, value, 45)
    said = f"{copied}/train.index is damaged: {message}, first of sample {first}; {AGAIN}"
    refused(train.main, [tiny(data={"root": str(copied)})], said)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-24],  # a sample less than it says
        lambda data: data + bytes(24),
        lambda data: data[:18] + bytes(8) + data[26:],  # says that it has none
        lambda data: data[:18] + b"\xff" * 8 + data[26:],
        lambda data: b"fasttrain index 2\n" + data[18:],
        lambda data: data[:3],
    ],
)
def test_indexes_of_another_form(change: Callable[[bytes], bytes], copied: Path) -> None:
    path = copied / "train.index"
    path.write_bytes(change(path.read_bytes()))
    manifest = json.loads((copied / "manifest.json").read_text())
    of(manifest, "index")["size"] = path.stat().st_size
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(shards.ShardError, match=r"train.index is damaged or of another version; "):
        shards.open_split(copied, "train")


def test_a_raw_index_with_more_pixels_than_bytes(folder: Path, tmp_path: Path) -> None:
    shard(folder, tmp_path / "raw", Policy(store="raw"))
    width = int(shards.open_split(tmp_path / "raw", "train").width[9])
    change_index(tmp_path / "raw" / "train.index", "width", 9, width + 1, 45)
    with pytest.raises(shards.ShardError, match="fewer bytes than pixels, first of sample 9"):
        shards.open_split(tmp_path / "raw", "train")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train.index", "shorten", "train.index has 100 bytes, manifest.json says"),
        ("train.index", "remove", "train.index: No such file or directory, but manifest.json"),
        ("train.index", "folder", "train.index is no file: copy it anew"),
        ("train.index", "flip", "train.index is damaged or of another version"),
        ("val-000000.tar", "shorten", "val-000000.tar has 100 bytes, manifest.json says"),
        ("train-000002.tar", "remove", "train-000002.tar: No such file or directory, but"),
        ("train-000002.tar", "folder", "train-000002.tar is no file: copy it anew"),
        ("manifest.json", "folder", "manifest.json: cannot be read (Is a directory)"),
        ("manifest.json", "remove", "manifest.json is missing; copy that too"),
    ],
)
def test_files_of_a_data_set(
    name: str,
    damage: str,
    message: str,
    copied: Path,
    tiny: Callable[..., Path],
    refused: Refused,
) -> None:
    path = copied / name
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data[:100] if damage == "shorten" else data)
    if damage in ("remove", "folder"):
        path.unlink()
    if damage == "folder":
        path.mkdir()
    said = [message] if name == "manifest.json" else [message, AGAIN]
    refused(train.main, [tiny(data={"root": str(copied)})], str(copied), *said)


# --------------------------------------------------------------------------------------------------
# Checkpoints and run folders
# --------------------------------------------------------------------------------------------------

STEP = Path("checkpoints", "step_00000002")


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with one checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    sections = {name: dict(table) for name, table in TINY.items()}
    sections["data"]["root"] = str(dataset)
    sections["train"]["max_steps"] = 2
    sections["log"]["run_dir"] = str(folder / "run")
    recipe = config.Recipe.model_validate_json(json.dumps(sections))
    (folder / "tiny.toml").write_text(config.dumps(recipe))
    train.main([str(folder / "tiny.toml")])
    return folder / "run"


@pytest.fixture
def going_on(trained: Path, tiny: Callable[..., Path], tmp_path: Path) -> list[Any]:
    """The words of a command that goes on with a copy of that run."""
    shutil.copytree(trained, tmp_path / "run")
    return [tiny(), "--set", "train.max_steps=3"]


@pytest.mark.parametrize("damage", ["remove", "empty", "flip"])
@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "state.json", "SHA256SUMS"])
def test_files_of_a_checkpoint(
    name: str, damage: str, going_on: list[Any], refused: Refused, tmp_path: Path
) -> None:
    path = tmp_path / "run" / STEP / name
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(b"" if damage == "empty" else data)
    if damage == "remove":
        path.unlink()
    said = f"{path}: No such file or directory" if damage == "remove" else f"{path} is damaged"
    if name == "SHA256SUMS":
        said = f"{path} is missing" if damage == "remove" else "model.safetensors is damaged"
    remedy = "restore one from a copy, or start anew in another folder: --set log.run_dir="
    refused(train.main, going_on, "no checkpoint under", said, remedy)


def change_state(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """As another fasttrain might have written it: its sums are right."""
    state = json.loads((folder / "state.json").read_text())
    change(state)
    (folder / "state.json").write_text(json.dumps(state))
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(sums))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda state: state.update(version=9),
            ["format version 9, this fasttrain reads 1; install the fasttrain that wrote it"],
        ),
        (
            lambda state: state["data"].update(train="0" * 64),
            ["the train index at", "is not the one it saw", "--set checkpoint.resume=force"],
        ),
        (
            lambda state: state["recipe"]["train"].update(seed=5),
            ["train.seed: 5 -> 0", "another folder with --set log.run_dir=..."],
        ),
        *(
            (change, [f"is not what this fasttrain writes (state.json, {place}", "from a copy"])
            for change, place in (
                (lambda state: state.clear(), "version: Field required"),
                (lambda state: state.pop("state"), "state: Field required"),
                (lambda state: state["state"].update(step="x"), "state.step: Input should be a"),
                (lambda state: state["recipe"]["train"].update(x=1), "recipe.train.x: Extra"),
                (lambda state: state.update(data=3), "data: Input should be an object"),
                (lambda state: state.update(execution={"": "fast"}), "execution.: Input should"),
            )
        ),
    ],
)
def test_checkpoints_of_others(
    change: Callable[[dict[str, Any]], object],
    said: list[str],
    going_on: list[Any],
    refused: Refused,
    tmp_path: Path,
) -> None:
    change_state(tmp_path / "run" / STEP, change)
    refused(train.main, going_on, f"{STEP.name} ", *said)


def test_a_training_state_of_another_form(
    going_on: list[Any], refused: Refused, tmp_path: Path
) -> None:
    folder = tmp_path / "run" / STEP
    for content in ({}, {"optimizer": {}}, {"optimizer": {"state": {}, "param_groups": []}}, [1]):
        torch.save(content, folder / "training.pt")
        change_state(folder, lambda state: None)
        refused(train.main, going_on, "training.pt does not fit this run", "restore it from a copy")
    (folder / "training.pt").write_bytes(b"no archive")
    change_state(folder, lambda state: None)
    refused(train.main, going_on, "training.pt does not fit this run", "restore it from a copy")


def test_damaged_files_of_a_run_folder(
    going_on: list[Any], refused: Refused, tmp_path: Path
) -> None:
    """A run goes on past what it can do without, and drops nothing but halves of lines."""
    folder = tmp_path / "run"
    for content in (b"", b"\xff\xfe", b"{", b"[]", b"{}", b'{"schedule_steps": 5}', b"null"):
        (folder / "DONE").write_bytes(content)
        refused(train.main, going_on, f"{folder}/DONE is damaged; remove it, and the same command")
    (folder / "DONE").unlink()
    (folder / "environment.json").write_bytes(b"\xff{")
    foreign = b'"\xff"', b'{"note": 3}', b"[]", b'{"event": 1, "step": "x"}'
    metrics = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(b"\n".join(foreign) + b"\n" + metrics + b"\0\0{")
    train.main([str(word) for word in going_on])
    assert (folder / "environment.json.damaged").read_bytes() == b"\xff{"
    assert len(json.loads((folder / "environment.json").read_text())) == 1
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    assert tuple(lines[:4]) == foreign
    assert [json.loads(line)["event"] for line in lines[4:]][-2:] == ["eval", "done"]


def test_run_folders(
    going_on: list[Any], refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as closed:  # as tests may be run by root, to whom all is open
        closed.setattr(os, "access", lambda path, mode: path != folder / "checkpoints")
        said = f"cannot be written (no permission for {folder}/checkpoints); choose another"
        refused(train.main, going_on, said)
    wider = [*going_on, "--set", "model.width=0.5"]
    refused(train.main, wider, f"{folder} holds a run of another recipe", "width: 0.35 -> 0.5")
    forced = [*wider, "--set", "checkpoint.resume=force"]
    refused(train.main, forced, "model.safetensors: these weights do not fit", "have another size")
    (folder / "recipe.toml").write_text("[train\n")
    refused(train.main, going_on, f"{folder}/recipe.toml: not valid TOML")
    (folder / "recipe.toml").unlink()
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").write_text("")
    refused(train.main, going_on, f'run_dir = "{folder}": cannot be written (File exists)')


def test_a_folder_in_which_nothing_was_saved_takes_another_recipe(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """As after a start that was refused, and whose remedy is another setting."""
    recipe = config.load(tiny())
    other = config.load(tiny(), ["model.width=0.5"])
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    run_folder.write_text(tmp_path / "run" / "recipe.toml", config.dumps(recipe))
    assert run_folder.check(other) is None
    (tmp_path / "run" / STEP).mkdir()
    with pytest.raises(config.ConfigError, match="holds a run of another recipe"):
        run_folder.check(other)


@pytest.mark.parametrize("cache", ["", "file"])
def test_a_cache_that_is_none_costs_nothing(
    cache: str,
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", cache and str(tmp_path / cache))
    monkeypatch.setattr(caches, "_temporary", lambda: tmp_path / "elsewhere")
    train.main([str(tiny(train={"max_steps": 1}))])
    assert (tmp_path / "run" / "DONE").exists()
    warning = f"WARNING: {tmp_path}/file/fasttrain cannot be written (Not a directory); measurem"
    assert capsys.readouterr().out.count(warning) == bool(cache)


# --------------------------------------------------------------------------------------------------
# Tools
# --------------------------------------------------------------------------------------------------

TOOLS: list[tuple[Any, str, list[str]]] = [
    (evaluate, "{run}", ["the following arguments are required: --data"]),
    (evaluate, "{run} --data /nowhere", ["no data set at /nowhere", "tools/make_shards.py"]),
    (evaluate, "{run} --data {data} --ema", ["has no moving average: [optim] ema_decay was 0"]),
    (
        evaluate,
        "{run} --data {data} --batch-size x",
        ["--batch-size: 'x' is no whole number from 1"],
    ),
    (evaluate, "{run} --data {data} --batch-size 0", ["--batch-size: '0' is no whole number"]),
    (evaluate, "{data} --data {data}", ["{data} is not a checkpoint of fasttrain", "state.json"]),
    (evaluate, "/nowhere --data {data}", ["/nowhere is not a checkpoint of fasttrain"]),
    (evaluate, "{empty} --data {data}", ["{empty} holds no checkpoint yet"]),
    (evaluate, "{weights} --data {data} --recipe /no", ["/no: cannot read this recipe"]),
    (evaluate, "{recipe} --data {data} --recipe {recipe}", ["{recipe}: is damaged or no file"]),
    (make_shards, "", ["the following arguments are required: SOURCE"]),
    (make_shards, "{folder}", ["name the folder OUT"]),
    (make_shards, "{folder} {new} --in-place", ["--in-place: without OUT"]),
    (make_shards, "{folder} --in-place", ["{folder} holds imagefolder, not WebDataset tars"]),
    (make_shards, "{folder} --in-place --short-side 9", ["name an OUT to re-encode them"]),
    (make_shards, "/nowhere {new}", ["/nowhere is not a folder", "train/<class>/"]),
    (make_shards, "{empty} {new}", ["{empty} holds none of the forms", "imagefolder: an Image"]),
    (make_shards, "{folder} {data} --seed 1", ["{data} already holds a finished data set, but"]),
    (make_shards, "{folder} {folder}", ["holds files of other origin (", "choose another"]),
    (make_shards, "{folder} {recipe}/new", ["cannot go on: [Errno 20] Not a directory"]),
    (make_shards, "{folder} {new} --part 9/8", ["--part: 9/8: expected I/N with I from 1 to N"]),
    (make_shards, "{folder} {new} --part x", ["--part: x: expected I/N", "such as 3/8"]),
    (make_shards, "{folder} {new} --quality 0", ["--quality: invalid choice: 0 (choose from 50"]),
    (make_shards, "{folder} {new} --seed -1", ["--seed -1: must not be negative"]),
    (make_shards, "{folder} {new} --workers 0", ["--workers: '0' is no whole number from 1"]),
    (make_shards, "{folder} {new} --store raw", ["--store raw: needs --short-side, such as 256"]),
    (make_shards, "{folder} {new} --form x", ["--form: invalid choice: 'x' (choose from"]),
    (verify_shards, "", ["the following arguments are required: OUT"]),
    (verify_shards, "{data} --workers 0", ["--workers: '0' is no whole number from 1"]),
    (verify_shards, "{data} --workers x", ["--workers: 'x' is no whole number from 1"]),
    (verify_shards, "{data} --fast", ["unrecognized arguments: --fast"]),
    (benchmark, "", ["the following arguments are required: PART"]),
    (benchmark, "data", ["PART: invalid choice: 'data' (choose from"]),
    (benchmark, "input /nowhere", ["no data set at /nowhere", "tools/make_shards.py"]),
    (benchmark, "input {data} --batch 99", ["--batch 99: more than the 45 training images; lower"]),
    (benchmark, "input {data} --threads 0", ["--threads: '0' is no whole number from 1"]),
    (benchmark, "input {data} --batch 4 --images 8 --folder /no", ["--folder /no: no images in"]),
    (benchmark, "step --batch none", ["--batch: 'none' is no whole number from 1"]),
    (benchmark, "step --modes fast", ["--modes: fast: not among eager, compile, "]),
    (benchmark, "step --modes graph", ["--modes: a CUDA graph needs a GPU; use eager,compile"]),
    (benchmark, "step --device gpu", ["--device gpu: torch finds no GPU here; leave it out"]),
    (benchmark, "step --width 0", ["--width: '0' is no number above 0"]),
    (benchmark, "step --seconds -1", ["--seconds: '-1' is no number above 0"]),
    (benchmark, "shards /nowhere", ["/nowhere is no folder; name an ImageFolder"]),
    (benchmark, "shards {folder} --repeats 0", ["--repeats: '0' is no whole number from 1"]),
    (benchmark, "scaling --step-ms x", ["argument --step-ms: invalid"]),
    (benchmark, "scaling --per-node 0", ["--per-node: '0' is no whole number from 1"]),
    (benchmark, "scaling --epochs 0", ["--epochs: '0' is no whole number from 1"]),
    (benchmark, "scaling --images 0", ["--images: '0' is no whole number from 1"]),
    (benchmark, "scaling --between 0", ["--between: '0' is no number above 0"]),
    (benchmark, "scaling --input-rate nan", ["--input-rate: 'nan' is no number above 0"]),
    (benchmark, "scaling --plot /no/x.svg", ["--plot /no/x.svg: there is no such folder; make"]),
]


@pytest.mark.parametrize(
    ("tool", "words", "said"), TOOLS, ids=[f"{tool.__name__} {words}" for tool, words, _ in TOOLS]
)
def test_tools(
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
