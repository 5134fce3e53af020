"""A wrong recipe or setting is refused with the fault, the place and the remedy.

test_config.py has more such tests.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Refused

from fasttrain import train

RECIPES = [
    (b"[train\n", "not valid TOML: Expected ']'"),
    (b"[train]\n[train]\n", "not valid TOML: Cannot declare ('train',) twice (at line 2"),
    (b"\xff\xfe", "not valid TOML: 'utf-8' codec can't decode byte 0xff"),
    (b"\0", "not valid TOML: Invalid statement"),
    (b"x = " + b"[" * 5000, "not valid TOML: maximum recursion depth exceeded"),
    (b"[train]\nepochs = " + b"9" * 5000, "not valid TOML: Exceeds the limit (4300 digits)"),
    (b"[train]\nepochs = 0x" + b"f" * 5000, "[train] epochs = ...: must be smaller; numbers have"),
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
def test_each_wrong_recipe_is_refused(
    content: bytes, message: str, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    refused(train.main, [path], f"{path}: ", message)


def test_a_recipe_that_cannot_be_read_is_refused(tmp_path: Path, refused: Refused) -> None:
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
    ("train.seed=9223372036854775808", ["[train] seed = 9223372036854775808: must be smaller"]),
    (
        "train.epochs=" + "[" * 5000,
        ['[train] epochs = "[[', "expected int, got str; for example epochs = 150"],
    ),
    ("train.micro_batch_size=x", ["expected int, got str; for example micro_batch_size = 8"]),
    ("data.root={file}", ["no data set at {file}", "python tools/make_shards.py"]),
    ("data.root=/nowhere", ["no data set at /nowhere", "--set data.root=/path/to/shards"]),
    (
        "data.short_side=256",
        ["asks for images of short side 256, but those at", "--short-side 256"],
    ),
    ("log.run_dir={file}", ['[log] run_dir = "{file}": cannot be written', "choose another"]),
    ("log.run_dir={file}/run", ["cannot be written (Not a directory)", "choose another with"]),
    ("log.run_dir=/proc/run", ['[log] run_dir = "/proc/run": cannot be written', "choose another"]),
    ("train.global_batch_size=99", ["global_batch_size = 99: more than the 45 training images"]),
    ("train.micro_batch_size=3", ["does not divide the 8 images of each", "use 2 or 4"]),
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
def test_each_wrong_setting_is_refused(
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


def test_the_demo_without_its_data_names_the_command_that_makes_them(refused: Refused) -> None:
    command = "make the demo's with\n    python tools/make_digits.py"
    refused(train.main, ["recipes/demo.toml"], "no data set at data/digits", command)
