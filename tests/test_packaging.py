"""The wheel, the console commands, the container and the page of settings hold what they name."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import REPO, Refused, environment, run

import fasttrain
from fasttrain import commands, config, settings_page

HELPERS = ("probes", "teachers")  # that tools import
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())


def test_each_tool_has_a_console_command() -> None:
    tools = {path.stem for path in (REPO / "tools").glob("*.py") if path.stem not in HELPERS}
    assert tools == commands.TOOLS.keys()
    scripts = PROJECT["project"]["scripts"]
    assert scripts.pop("fasttrain-train") == "fasttrain.train:main"
    assert scripts == dict.fromkeys(commands.TOOLS.values(), "fasttrain.commands:run_tool")


def test_the_wheel_has_every_package() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in (REPO / "tools").rglob("*.py")}
    tools = [".".join(["fasttrain", *folder.relative_to(REPO).parts]) for folder in folders]
    assert sorted(listed) == sorted(["fasttrain", "fasttrain.recipes", *tools])
    for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items():
        assert package in listed and (REPO / folder).is_dir()


def test_shipped_recipes_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("large", "large.toml"):
        assert commands.recipe(Path(name)) == REPO / "recipes" / "large.toml"
    assert config.load_or_exit(["small_075"]).model.width == 0.75
    (tmp_path / "large").write_text("[model]\nwidth = 0.5\n")
    assert config.load_or_exit(["large"]).model.width == 0.5  # a file of the user's own
    refused(config.load_or_exit, ["larg"], "larg: cannot read this recipe", "large.toml")


def test_commands_are_named_as_they_can_be_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert commands.command("evaluate") == "python tools/evaluate.py"
    monkeypatch.setattr(commands, "HERE", tmp_path)
    (tmp_path / "tools").mkdir()
    assert commands.command("evaluate") == "fasttrain-evaluate"


def test_the_page_of_settings_is_that_of_the_code() -> None:
    page = (REPO / "recipes" / "SETTINGS.md").read_text()
    assert page == settings_page.page(), "python -m fasttrain.settings_page > recipes/SETTINGS.md"
    assert (
        "| `label_smoothing` | number from 0 to 1 | `0.0` | Fraction of the target that is spread "
        "over all classes. |"
    ) in page
    assert "| `keep` * | whole number from 2 | `3` |" in page


def test_the_container_copies_what_is_there() -> None:
    text = re.sub(r"\\\n", " ", (REPO / "tools" / "Dockerfile").read_text())
    steps = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    assert {words[0] for words in steps} == {"FROM", "RUN", "WORKDIR", "COPY", "CMD"}
    copied = [name for words in steps if words[0] == "COPY" for name in words[1:-1]]
    assert {"pyproject.toml", "fasttrain", "tools", "recipes"} <= {*copied}
    assert all((REPO / name).exists() for name in copied)
    extras = re.search(r"'\.\[([\w,]+)\]'", text)
    assert extras and {*extras[1].split(",")} <= PROJECT["project"]["optional-dependencies"].keys()
    called = json.loads(text.partition("CMD ")[2])
    assert called[0] in PROJECT["project"]["scripts"]
    assert commands.recipe(Path(called[1])).is_file()


def test_the_sky_task_names_files_and_settings_that_exist(tmp_path: Path) -> None:
    task = yaml.safe_load((REPO / "tools" / "skypilot.yaml").read_text())
    assert (REPO / task["envs"]["RECIPE"]).is_file()
    subprocess.run(["bash", "-n"], input=task["setup"] + task["run"], text=True, check=True)
    changes = re.findall(r"--set (\S+)", task["run"])
    assert len(changes) == 3 and config.load(REPO / task["envs"]["RECIPE"], changes)
    # Which command would run on the second of two nodes of 8 GPUs.
    (tmp_path / "accelerate").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "accelerate").chmod(0o755)
    node = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "RECIPE": task["envs"]["RECIPE"],
        "PATH": f"{tmp_path}:/usr/bin:/bin",
    }
    out = subprocess.run(
        ["bash", "-c", task["run"]], env=node, capture_output=True, text=True, check=True
    ).stdout
    assert out.startswith(
        "launch --multi_gpu --rdzv_backend static --machine_rank 1 --main_process_ip 10.0.0.1 "
        "--main_process_port 29500 --num_machines 2 --num_processes 16 fasttrain/train.py "
        "recipes/large.toml --set data.root="
    )


@pytest.mark.slow
def test_a_wheel_trains_outside_the_checkout(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet"]
    source = tmp_path / "source"  # a build leaves files in its folder
    subprocess.run(["git", "clone", "--quiet", REPO, source], check=True)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    run([*pip, *build])
    (wheel,) = tmp_path.glob("*.whl")
    assert fasttrain.__version__ in wheel.name
    there = tmp_path / "there"
    run([*pip, "install", "--no-deps", "--no-compile", "--target", there, wheel])

    def call(*words: str) -> str:
        command = [there / "bin" / words[0], *words[1:]]
        done = subprocess.run(
            [*map(str, command)],
            cwd=tmp_path,
            env=environment(PYTHONPATH=str(there)),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call("fasttrain-digits")
    out = call("fasttrain-train", "demo", "--set", "train.max_steps=2")
    assert "to evaluate: fasttrain-evaluate runs/demo --data data/digits" in out
    assert json.loads(call("fasttrain-evaluate", "runs/demo", "--data", "data/digits"))["seen"]
