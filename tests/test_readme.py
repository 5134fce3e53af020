"""Every command of the README pages runs, and all files that they name exist.

A command that cannot run here is checked as far as it goes: its options, settings and recipe.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPO, environment

from fasttrain import config

FOLDERS = ("", "fasttrain/", "recipes/", "tests/", "tools/")
PAGES = {f"{folder}README.md": (REPO / folder / "README.md").read_text() for folder in FOLDERS}
# Their links and names are checked, too; they have no commands in ```bash blocks.
MORE_PAGES = {
    name: (REPO / name).read_text()
    for name in (".github/CONTRIBUTING.md", "CHANGELOG.md", "recipes/RECORDS.md")
}
SETTINGS = [".pre-commit-config.yaml", ".github/workflows/tests.yml"]
SETTINGS += [".github/ISSUE_TEMPLATE/problem.yml"]

# Every command of every page, with the test that runs it, here or in another file.
HERE = "tests/test_readme.py"
KNOWN: dict[str, dict[str, str]] = {
    "README.md": {
        "pip install -e '.[demo]' && python tools/make_digits.py && accelerate launch "
        "fasttrain/train.py recipes/demo.toml": f"{HERE}::test_the_demo_trains",
        "pip install -e '.[test]' && python -m pytest": ".ci/run",
        "python tools/make_shards.py SOURCE data/imagenet": (
            f"{HERE}::test_commands_for_imagenet_work"
        ),
        "python tools/preview.py recipes/large.toml preview.png": "tests/test_preview.py",
        "python fasttrain/train.py recipes/large.toml": f"{HERE}::test_commands_for_imagenet_work",
        "accelerate launch --multi_gpu --num_processes 8 fasttrain/train.py recipes/large.toml": (
            "tests/test_processes.py"
        ),
        "python -m fasttrain.config recipes/large.toml": "tests/test_config.py",
        "python tools/evaluate.py runs/large --data data/imagenet": (
            f"{HERE}::test_commands_for_imagenet_work"
        ),
        "python tools/report.py runs/large --out report.html": "tests/test_report.py",
        "python tools/predict.py runs/large photo.jpg": "tests/test_predict.py",
        "python tools/export.py runs/large large.onnx": "tests/test_export.py",
        "python tools/make_shards.py my_images data/mine --val-fraction 0.1": (
            "tests/test_folders.py"
        ),
        "python tools/preview.py recipes/finetune.toml preview.png": "tests/test_preview.py",
        "accelerate launch fasttrain/train.py recipes/finetune.toml --set "
        "model.weights=runs/imagenette": "tests/test_finetune.py",
        "python tools/evaluate.py runs/finetune --data data/mine": "tests/test_evaluate.py",
        "python tools/predict.py runs/finetune photo.jpg": "tests/test_predict.py",
        "pip install --group cuda12 && pip install --no-deps -e .": "tests/test_layout.py",
        "python tools/doctor.py recipes/large.toml": "tests/test_doctor.py",
    },
    "fasttrain/README.md": {},
    "recipes/README.md": {
        "python -m fasttrain.config recipes/large.toml": "tests/test_config.py",
        "python -m fasttrain.config --diff recipes/large.toml recipes/large_long.toml": (
            "tests/test_config.py"
        ),
        "python fasttrain/train.py recipes/large.toml": f"{HERE}::test_commands_for_imagenet_work",
        "python tools/label.py runs/large recipes/small_distill.toml": "tests/test_label.py",
        "python fasttrain/train.py recipes/small_distill.toml": "tests/test_label.py",
    },
    "tests/README.md": {"pip install -e '.[test]' && python -m pytest": ".ci/run"},
    "tools/README.md": {
        "python tools/make_shards.py SOURCE data/imagenet --workers 8": (
            f"{HERE}::test_commands_for_imagenet_work"
        ),
        "python tools/make_digits.py": f"{HERE}::test_the_demo_trains",
        "python tools/verify_shards.py data/imagenet": f"{HERE}::test_commands_for_imagenet_work",
        "python tools/evaluate.py runs/large --data data/imagenet": (
            f"{HERE}::test_commands_for_imagenet_work"
        ),
        "python tools/evaluate.py mobilenetv3-large-1cd25616.pth --recipe recipes/large.toml "
        "--data data/imagenet": "tests/test_evaluate.py",
        "python tools/evaluate.py runs/large --data data/imagenet data/imagenet-a "
        "data/imagenet-r": "tests/test_evaluate.py",
        "python tools/preview.py recipes/large.toml preview.png": "tests/test_preview.py",
        "python tools/label.py runs/large recipes/small_distill.toml": "tests/test_label.py",
        "pip install -e '.[report]'": ".ci/run",
        "python tools/report.py runs/large --out report.html": "tests/test_report.py",
        "python tools/export.py runs/large large.onnx": "tests/test_export.py",
        "python tools/export.py runs/large large-int8.onnx --int8 --data data/imagenet": (
            "tests/test_export.py"
        ),
        "python tools/export.py runs/large mobilenetv3-large --push USER/NAME": (
            "tests/test_export.py"
        ),
        "python tools/predict.py large.onnx photo.jpg": "tests/test_predict.py",
        "python tools/predict.py runs/large photos --top 3 --draw predictions.png": (
            "tests/test_predict.py"
        ),
        "python tools/doctor.py recipes/large.toml": "tests/test_doctor.py",
        "accelerate launch --multi_gpu --num_processes 8 tools/doctor.py recipes/large.toml": (
            "tests/test_doctor.py"
        ),
        "python tools/benchmark.py input data/imagenet --folder IMAGEFOLDER": (
            "tests/test_benchmark.py"
        ),
        "python tools/benchmark.py step --arch large --batch 256,1024": "tests/test_benchmark.py",
        "python tools/benchmark.py loop": "tests/test_benchmark.py",
        "python tools/benchmark.py traffic --bandwidth 4.3e12 --rate compile_graph_fuse:16370": (
            "tests/test_traffic.py::test_command"
        ),
        "python tools/benchmark.py operators --arch large --batch 1024": (
            "tests/test_operators_benchmark.py"
        ),
        "python tools/benchmark.py scaling --step-ms 1024:60,128:9 --inside 200 --input-rate "
        "20000": "tests/test_benchmark.py",
        "python tools/benchmark.py shards IMAGEFOLDER": "tests/test_benchmark.py",
        "python tools/benchmark.py record --out DIR --minutes 10 --data data/imagenet": (
            "tests/test_record.py"
        ),
        "python -m venv .venv && source .venv/bin/activate && pip install -e '.[sources]'": (
            ".ci/run"
        ),
        "made=$(sbatch --parsable --array=1-8 --cpus-per-task=16 tools/make_shards.sbatch SOURCE "
        "data/imagenet)": "tests/test_slurm.py",
        "good=$(sbatch --parsable --dependency=afterok:$made --cpus-per-task=16 --wrap "
        '"python tools/verify_shards.py data/imagenet")': "tests/test_slurm.py",
        "sbatch --dependency=afterok:$good --nodes=2 --gpus-per-node=8 --cpus-per-task=64 --wrap "
        '"srun python tools/doctor.py recipes/large.toml"': "tests/test_slurm.py",
        "sbatch --dependency=afterok:$good --nodes=2 --gpus-per-node=8 --cpus-per-task=64 "
        "--time=24:00:00 tools/train.sbatch recipes/large.toml": "tests/test_slurm.py",
        "accelerate launch --multi_gpu --rdzv_backend static --num_machines 2 --machine_rank 0 "
        "--main_process_ip FIRST --main_process_port 29500 --num_processes 16 "
        "fasttrain/train.py recipes/large.toml": "tests/test_two_machines.py",
        "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2 "
        "fasttrain/train.py recipes/demo.toml": "tests/test_processes.py",
    },
}
COMMANDS = [command for commands in KNOWN.values() for command in commands]


def commands_of(page: str) -> list[str]:
    """The commands in the ```bash blocks of a page, each on one line."""
    blocks = re.findall(r"^ *```bash\n(.*?)```", page, re.S | re.M)
    lines = re.sub(r" \\\n\s*", " ", "\n".join(blocks)).splitlines()
    return [line.strip() for line in lines if line.strip()]


def mentions(page: str) -> list[str]:
    """The commands of ours that a page names, in blocks and within sentences."""
    inline = [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", page)]
    return [text for text in commands_of(page) + inline if re.search(r"\w+/\w+\.py ", text)]


def names_of(page: str) -> set[str]:
    """The files and folders of the project that a page names."""
    return set(re.findall(r"(?<![\w/.])(?:fasttrain|tools|tests|recipes|\.ci)/[\w./]*\w", page))


def slugs(page: str) -> set[str]:
    """The anchors that code hosts give to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page, re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def shell(command: str, clone: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command on one CPU. Beside other tests, threads that wait for each other are slow."""
    cpu = max(os.sched_getaffinity(0))
    return subprocess.run(
        ["taskset", "-c", str(cpu), "bash", "-c", command],
        cwd=clone,
        env=environment(PYTHONPATH=str(clone)),
        capture_output=True,
        text=True,
        timeout=400,
    )


# --------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_a_test_is_known_for_every_command(name: str) -> None:
    assert commands_of(PAGES[name]) == list(KNOWN[name])
    for test in KNOWN[name].values():
        file, _, function = test.partition("::")
        assert f"def {function}" in (REPO / file).read_text() or not function, test


DEMO_CASES = [(12, 0), pytest.param(None, 95, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("updates", "top1"), DEMO_CASES)
def test_the_demo_trains(clone: Path, updates: int | None, top1: float) -> None:
    """With all updates this is a slow test. A few updates show that the command works."""
    install, command = COMMANDS[0].split(" && ", 1)
    assert install == "pip install -e '.[demo]'"
    shutil.rmtree(clone / "runs", ignore_errors=True)
    shutil.rmtree(clone / "data", ignore_errors=True)
    done = shell(f"{command} --set train.max_steps={updates}" if updates else command, clone)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["top1"] >= top1 and result["seen"] == 360
    assert result["seconds"] < 180
    assert "writing photographs of handwritten digits to data/digits-images" in done.stdout
    assert "run folder: runs/demo" in done.stdout
    assert len(list((clone / "data/digits-images").rglob("*.jpg"))) == 1797
    assert (clone / "runs/demo/DONE").exists()


def test_commands_for_imagenet_work(clone: Path, folder: Path) -> None:
    """They run on the tests' images, in one process without a GPU."""
    shard, _, plain, _, _, evaluate = COMMANDS[2:8]
    verify = "python tools/verify_shards.py data/imagenet"
    assert shell(shard.replace("SOURCE", str(folder)), clone).returncode == 0
    small = "train.global_batch_size=8 train.max_steps=2 train.precision=no data.crop_px=32"
    settings = " ".join(f"--set {setting}" for setting in small.split())
    trained = shell(f"{plain} {settings}", clone)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    evaluated = shell(evaluate, clone)
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    assert json.loads(evaluated.stdout.splitlines()[-1])["seen"] == 13
    verified = shell(verify, clone)
    assert verified.returncode == 0, verified.stdout + verified.stderr


TOOLS = ["make_digits", "make_shards", "verify_shards", "evaluate", "preview", "report"]
TOOLS += ["export", "predict", "label", "doctor", "benchmark"]


@pytest.mark.parametrize("tool", TOOLS)
def test_the_tools_have_the_options_that_the_pages_name(
    tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--help` of a tool, or of its part, lists every option of its commands."""
    monkeypatch.syspath_prepend(str(REPO / "tools"))
    asked: dict[str, set[str]] = {}
    for text in [text for page in PAGES.values() for text in mentions(page)]:
        for words in re.findall(rf"tools/{tool}\.py ([^;&\")]*)", text):
            part = words.split()[0] if tool == "benchmark" else ""
            asked.setdefault(part, set()).update(re.findall(r"--[a-z][\w-]*", words))
    for part, options in asked.items():
        script = str(REPO / "tools" / f"{tool}.py")
        monkeypatch.setattr(sys, "argv", [script, *part.split(), "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(script, run_name="__main__")
        help_text = capsys.readouterr().out
        assert end.value.code == 0, part
        assert {option for option in options if option not in help_text} == set(), part


def test_accelerate_has_the_options_that_the_pages_name() -> None:
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    launches = [command for command in COMMANDS if "accelerate launch" in command]
    for command in launches:
        words = shlex.split(command.partition("accelerate launch ")[2])
        found = parser.parse_args(words)
        assert (REPO / found.training_script).exists(), command
        assert (REPO / found.training_script_args[0]).exists(), command


def test_recipes_take_the_settings_that_the_pages_change() -> None:
    for name, page in (PAGES | MORE_PAGES).items():
        text = " ".join(page.split())
        changes = re.findall(r"--set ([a-z]+\.\w+=[^\s`]+)", text)
        config.load(REPO / "recipes" / "large.toml", [c for c in changes if not c.endswith("..")])
        assert changes or name not in ("README.md", "tools/README.md", "recipes/README.md")


# --------------------------------------------------------------------------------------------------
# Links and names
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES | MORE_PAGES)
def test_every_link_leads_to_a_page(name: str) -> None:
    page = (PAGES | MORE_PAGES)[name]
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page):
        target = (REPO / name).parent / link if link else REPO / name
        assert target.exists(), link
        assert not anchor or anchor in slugs(target.read_text()), f"{link}#{anchor}"


@pytest.mark.parametrize("name", [name for name in PAGES | MORE_PAGES if name != "CHANGELOG.md"])
def test_every_setting_exists(name: str) -> None:
    page = (PAGES | MORE_PAGES)[name]
    known = {f"{s}.{k}" for s, table in config.Recipe().model_dump().items() for k in table}
    sections = "|".join(config.Recipe.model_fields)
    named = set(re.findall(rf"(?<![\w/.])((?:{sections})\.[a-z_]+)\b", page))
    files = {text for text in named if text.endswith((".py", ".toml", ".safetensors", ".sbatch"))}
    assert named - known <= files


@pytest.mark.parametrize("name", [*PAGES, ".github/CONTRIBUTING.md", *SETTINGS])
def test_every_file_exists(name: str) -> None:
    found = names_of((REPO / name).read_text())
    assert {path for path in found if not (REPO / path).exists()} == set()


def test_what_contributors_must_touch_is_there() -> None:
    """CONTRIBUTING.md says "`NAME` in `file`": the file has that name."""
    page = MORE_PAGES[".github/CONTRIBUTING.md"]
    found = re.findall(r"`(\w+)`\s+in\s+`([\w/]+\.py)`", page)
    assert len(found) >= 4
    for name, file in found:
        assert re.search(rf"\b{name}\b", (REPO / file).read_text()), (name, file)


def test_what_tests_share_is_listed() -> None:
    page = PAGES["tests/README.md"]
    shared = {path.name for path in (REPO / "tests").glob("*.py")}
    shared = {name for name in shared if not name.startswith("test_") and name != "conftest.py"}
    assert {name for name in shared if f"`{name}`" not in page} == set()
    text = (REPO / "tests" / "conftest.py").read_text()
    fixtures = set(re.findall(r"@pytest\.fixture.*\ndef (\w+)", text))
    assert {name for name in fixtures if f"`{name}`" not in page} == {"scratch"}


def test_the_slowest_tests_exist() -> None:
    between = PAGES["tests/README.md"].partition("slowest: begin -->")[2]
    for file, name in re.findall(r"(tests/\w+\.py)::(\w+)", between.partition("<!--")[0]):
        assert f"def {name}(" in (REPO / file).read_text(), f"{file}::{name}"


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_code_host_are_yaml(name: str) -> None:
    assert yaml.safe_load((REPO / name).read_text())


def test_the_code_host_and_pre_commit_run_our_checks() -> None:
    workflow = yaml.safe_load((REPO / SETTINGS[1]).read_text())
    steps = workflow["jobs"]["tests"]["steps"]
    assert steps[-1]["run"] == ".ci/run" and os.access(REPO / ".ci/run", os.X_OK)
    hooks = yaml.safe_load((REPO / SETTINGS[0]).read_text())["repos"][0]["hooks"]
    checks = (REPO / ".ci/run").read_text()
    assert [hook["entry"] for hook in hooks] == ["ruff check", "ruff format --check", "mypy"]
    assert all(hook["entry"] in checks for hook in hooks)
    assert "python tools/doctor.py RECIPE" in (REPO / SETTINGS[2]).read_text()
