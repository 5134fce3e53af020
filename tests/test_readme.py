"""The README's own commands, the install aside."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REPO, environment

README = (REPO / "README.md").read_text()
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.strip()
]


def shell(command: str, clone: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command on one CPU: threads that wait for each other crawl where tests run beside."""
    cpu = max(os.sched_getaffinity(0))
    return subprocess.run(
        ["taskset", "-c", str(cpu), "bash", "-c", command],
        cwd=clone,
        env=environment(PYTHONPATH=str(clone)),
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_the_commands_are_those_we_know() -> None:
    assert COMMANDS == [
        "pip install -e '.[demo]' && python tools/make_digits.py && accelerate launch "
        "fasttrain/train.py recipes/demo.toml",
        "pip install -e '.[test]' && python -m pytest",
        "python tools/make_shards.py SOURCE data/imagenet",
        "python fasttrain/train.py recipes/large.toml",
        "accelerate launch --multi_gpu --num_processes 8 fasttrain/train.py recipes/large.toml",
        "python tools/evaluate.py runs/large --data data/imagenet",
        "python -m venv .venv && source .venv/bin/activate && pip install -e '.[sources]'",
        "made=$(sbatch --parsable --array=1-8 --cpus-per-task=16 tools/make_shards.sbatch SOURCE "
        "data/imagenet)",
        "good=$(sbatch --parsable --dependency=afterok:$made --cpus-per-task=16 --wrap "
        '"python tools/verify_shards.py data/imagenet")',
        "sbatch --dependency=afterok:$good --nodes=2 --gpus-per-node=8 --cpus-per-task=64 --wrap "
        '"srun python tools/doctor.py recipes/large.toml"',
        "sbatch --dependency=afterok:$good --nodes=2 --gpus-per-node=8 --cpus-per-task=64 "
        "--time=24:00:00 tools/train.sbatch recipes/large.toml",
        "accelerate launch --multi_gpu --rdzv_backend static --num_machines 2 --machine_rank 0 "
        "--main_process_ip FIRST \\",
        "--main_process_port 29500 --num_processes 16 fasttrain/train.py recipes/large.toml",
        "python tools/verify_shards.py data/imagenet",
        "python tools/benchmark.py input data/imagenet --folder IMAGEFOLDER   "
        "# torchvision, webdataset, DALI",
        "python tools/benchmark.py step     # the update without input: torchvision's and timm's "
        "networks",
        "python tools/benchmark.py loop     # what the loop adds to the bare update",
        "python tools/benchmark.py scaling  # a run on 1 to 512 devices, predicted, and what "
        "limits it",
        "pip install --group cuda12 && pip install --no-deps -e .",
    ]


@pytest.mark.parametrize(
    ("epochs", "top1"), [(4, 50), pytest.param(None, 95, marks=pytest.mark.slow)]
)
def test_demo(clone: Path, epochs: int | None, top1: float) -> None:
    """In full it is a slow test."""
    install, command = COMMANDS[0].split(" && ", 1)
    assert install == "pip install -e '.[demo]'"
    shutil.rmtree(clone / "runs", ignore_errors=True)
    shutil.rmtree(clone / "data", ignore_errors=True)
    done = shell(f"{command} --set train.epochs={epochs}" if epochs else command, clone)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["top1"] >= top1 and result["seen"] == 360
    assert result["seconds"] < 180
    assert "writing photographs of handwritten digits to data/digits-images" in done.stdout
    assert "run folder: runs/demo" in done.stdout
    assert len(list((clone / "data/digits-images").rglob("*.jpg"))) == 1797
    assert (clone / "runs/demo/DONE").exists()


def test_shard_train_and_evaluate(clone: Path, folder: Path) -> None:
    """The commands for ImageNet, on the tests' images and one process without a GPU."""
    # Those for a cluster are tested on one, test_slurm.py and test_two_machines.py.
    shard, plain, _, evaluate = COMMANDS[2:6]
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


def test_links_and_settings_exist() -> None:
    from fasttrain import config

    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPO / link).exists(), link
    known = {f"{s}.{k}" for s, table in config.Recipe().model_dump().items() for k in table}
    sections = "|".join(config.Recipe.model_fields)
    named = set(re.findall(rf"\b((?:{sections})\.[a-z_]+)\b", README))
    files = {name for name in named if name.endswith((".py", ".toml", ".safetensors", ".sbatch"))}
    assert named - known == files
