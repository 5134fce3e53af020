"""train.sbatch trains on a real SLURM cluster of two nodes, which run on this machine.

apt-get install slurm-wlm slurm-wlm-basic-plugins munge iproute2 bubblewrap
python -m pytest -n 0 -m slurm tests/test_slurm.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import CHECKOUT, REPO, TIMEOUT_S, environment, lines, run
from runs import num_updates
from safetensors.torch import load_file
from test_readme import COMMANDS

from fasttrain import checkpoint

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not shutil.which("sbatch"), reason="SLURM is not installed"),
]
TWO_BY_TWO = {"FT_PROCS_PER_NODE": "2"}
# A container with its own process numbers, as pyxis and Apptainer may have them.
CONTAINER = "bwrap --dev-bind / / --unshare-pid --proc /proc --die-with-parent"


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.call("start", "2")

    def call(self, *words: str) -> None:
        command: list[str | Path] = [
            REPO / "tests" / "mini_cluster.sh",
            words[0],
            self.folder,
            *words[1:],
        ]
        nodes = {"FT_CPUS": "64", "FT_GPUS": "8"}  # which are not there
        env = environment(FT_OWNER_PID=str(os.getpid()), **nodes)
        env["PATH"] += ":/usr/sbin"
        subprocess.run(command, check=True, env=env, timeout=120)

    def command(self, *words: object, **changes: str) -> str:
        env = environment(SLURM_CONF=str(self.folder / "slurm.conf"), **changes)
        done = subprocess.run(
            [str(word) for word in words], cwd=CHECKOUT, env=env, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        return done.stdout

    def submit(self, *words: object, **changes: str) -> str:
        output = f"--output={self.folder}/job-%j.out"
        said = self.command("sbatch", "--parsable", output, "--cpus-per-task=2", *words, **changes)
        return said.strip()

    def state(self, job: str) -> dict[str, str]:
        shown = self.command("scontrol", "show", "job", "-o", job)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait(self, job: str, condition: Callable[[dict[str, str]], object]) -> dict[str, str]:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition(state := self.state(job)):
            assert time.monotonic() < deadline, f"{state}\n{self.output(job)}"
            time.sleep(0.3)
        return state

    def finish(self, job: str) -> dict[str, str]:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.wait(job, lambda state: state.get("JobState") in ended)

    def output(self, job: str) -> str:
        return "\n".join(p.read_text() for p in self.folder.glob(f"job-{job}*.out"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)  # munge asks for it, and pytest's folders are closed to others
    made = Cluster(folder / "c")
    yield made
    made.call("stop")
    shutil.rmtree(folder)


def long(tiny: Callable[..., Path], epochs: int = 24) -> Path:
    """A recipe that trains long enough for something to happen to it."""
    return tiny(
        train={"epochs": epochs, "eval_every_epochs": 8, "global_batch_size": 8},
        optim={"lr": 0.01},  # which two images a process stand
        checkpoint={"every_steps": 1000},
        log={"every_steps": 1},
    )


def assert_as_on_one_node(processes: int, recipe: Path, folder: Path) -> None:
    """Checks that a job left in `folder` what the processes of one node make without a stop."""
    here = folder.with_name("here")
    command = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(processes)]
    command += ["--main_process_port", "0", "fasttrain/train.py", str(recipe)]
    run([*command, "--set", f"log.run_dir={here}"], ACCELERATE_USE_CPU="1")
    ours, expected = (
        load_file(checkpoint.find(each / "checkpoints")[0] / "model.safetensors")
        for each in (folder, here)
    )
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    for event, keys in (("train", ("step", "loss", "lr")), ("eval", ("step", "top1", "loss"))):
        found, wanted = (
            [[line[key] for key in keys] for line in lines(each / "metrics.jsonl", event)]
            for each in (folder, here)
        )
        assert found == wanted


def test_two_nodes_give_the_weights_of_one(
    cluster: Cluster, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny(data={"stage": "/dev/shm/fasttrain-test"})  # of which each node has its own
    # However many tasks are asked for.
    job = cluster.submit(
        "--nodes=2", "--ntasks-per-node=2", "tools/train.sbatch", recipe, **TWO_BY_TWO
    )
    state = cluster.finish(job)
    assert state["JobState"] == "COMPLETED" and state["ExitCode"] == "0:0", cluster.output(job)
    assert re.search(r"stage: 0 MB on 2 nodes, of which 0 MB were copied", cluster.output(job))
    done = json.loads((tmp_path / "run" / "DONE").read_text())
    assert done["step"] == 14 and done["seen"] == 13
    (start,) = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert start["world_size"] == 4 and start["slurm_job_id"] == job
    assert_as_on_one_node(4, recipe, tmp_path / "run")


def test_before_the_time_limit_it_saves_and_is_requeued(
    cluster: Cluster, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Which is of three minutes here: two after its start. What a job that was requeued
    comes to is seen where it was preempted."""
    limit = ("--nodes=2", "--time=3", "--signal=B:USR1@60")
    job = cluster.submit(*limit, "tools/train.sbatch", long(tiny, epochs=2000), **TWO_BY_TWO)
    cluster.wait(job, lambda state: state["Restarts"] == "1")
    saved = checkpoint.find(tmp_path / "run" / "checkpoints")[0]
    before = num_updates(tmp_path / "run")
    assert int(saved.name.removeprefix("step_")) == before
    cluster.wait(job, lambda _: num_updates(tmp_path / "run") > before)
    cluster.command("scancel", job)
    cluster.finish(job)
    assert f"resuming from {saved}" in cluster.output(job)
    steps = [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl", "train")]
    assert steps == list(range(len(steps)))


def test_a_cancelled_job_saves_and_does_not_come_back(
    cluster: Cluster, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    job = cluster.submit("tools/train.sbatch", long(tiny))
    cluster.wait(job, lambda _: num_updates(tmp_path / "run") > 5)
    cluster.command("scancel", job)
    state = cluster.finish(job)
    assert state["JobState"] == "CANCELLED"
    time.sleep(8)  # a requeued job would wait for 5
    assert cluster.state(job)["JobState"] == "CANCELLED" and not (tmp_path / "run/DONE").exists()
    assert checkpoint.find(tmp_path / "run" / "checkpoints")


def test_a_job_runs_without_an_environment_and_with_one_process(
    cluster: Cluster, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    job = cluster.submit(
        f"--export=NONE,FT_PYTHON={sys.executable}", "tools/train.sbatch", tiny(),
    )  # fmt: skip
    state = cluster.finish(job)
    assert state["JobState"] == "COMPLETED", cluster.output(job)
    assert (tmp_path / "run" / "DONE").exists()


def test_a_preempted_job_continues_when_the_other_is_done(
    cluster: Cluster, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = long(tiny, epochs=60)
    words = ("--partition=low", "--nodes=2", "tools/train.sbatch", recipe)
    contained = {"FT_WRAP": CONTAINER} if shutil.which("bwrap") else {}
    job = cluster.submit(*words, **TWO_BY_TWO, **contained)
    cluster.wait(job, lambda _: num_updates(tmp_path / "run") > 5)
    other = cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 3")
    cluster.wait(job, lambda state: state["Restarts"] == "1")
    assert cluster.finish(other)["JobState"] == "COMPLETED"
    state = cluster.finish(job)
    assert state["JobState"] == "COMPLETED", cluster.output(job)
    assert "resuming from" in cluster.output(job)
    assert_as_on_one_node(4, recipe, tmp_path / "run")


def test_a_job_whose_node_dies_continues_on_the_nodes_that_are_left(
    cluster: Cluster, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = long(tiny)
    job = cluster.submit(
        "--nodes=2", "tools/train.sbatch", recipe, "--set", "checkpoint.every_steps=4"
    )
    cluster.wait(job, lambda _: num_updates(tmp_path / "run") > 9)
    cluster.call("fail", "ft2")
    cluster.wait(job, lambda state: state["JobState"] == "PENDING")
    cluster.command("scontrol", "update", f"jobid={job}", "numnodes=1", "numtasks=1")
    state = cluster.finish(job)
    cluster.call("recover", "ft2")
    assert state["JobState"] == "COMPLETED" and state["Restarts"] == "1", cluster.output(job)
    assert "resuming from" in cluster.output(job)
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [start["world_size"] for start in starts] == [2, 1]
    steps = [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl", "train")]
    assert steps == list(range(120))


def test_each_job_of_an_array_has_its_own_folder(
    cluster: Cluster, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    job = cluster.submit("--array=1-2", "tools/train.sbatch", tiny())
    for task in (1, 2):
        state = cluster.finish(f"{job}_{task}")
        assert state["JobState"] == "COMPLETED", cluster.output(job)
        assert (tmp_path / f"run-{task}" / "DONE").exists()


def test_the_commands_of_the_readme_work(cluster: Cluster, folder: Path, clone: Path) -> None:
    """From photographs to a run, submitted at once; on nodes without real GPUs, and for a while."""
    settings = {"train.global_batch_size": 8, "train.max_steps": 2, "train.precision": "no"}
    settings |= {"data.crop_px": 32, "train.micro_batch_size": 4}
    words = "".join(f" --set {name}={value}" for name, value in settings.items())
    script = "\n".join(command for command in COMMANDS if "sbatch" in command)
    script = script.replace("SOURCE", str(folder)).replace("large.toml", f"large.toml{words}")
    said = cluster.command(
        "bash", "-ec", f"cd {clone}\n{script}", PYTHONPATH=str(clone), ACCELERATE_USE_CPU="1",
        FT_PROCS_PER_NODE="1",
    )  # fmt: skip
    doctor, trained = re.findall(r"Submitted batch job (\d+)", said)
    states = [cluster.finish(job)["JobState"] for job in (doctor, trained)]
    outputs = {path.name: path.read_text() for path in clone.glob("*.out")}
    assert states == ["COMPLETED", "COMPLETED"], outputs
    assert "no fault was found" in outputs[f"slurm-{doctor}.out"]
    assert "done: runs/large" in outputs[f"fasttrain-{trained}.out"]


def test_wrong_launches_are_refused(
    cluster: Cluster, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Each fails at once, says why, and is not requeued."""
    wrong: list[tuple[list[object], dict[str, str], str]] = [
        (
            ["--nodes=2", "tools/train.sbatch", tiny()],
            {"FT_PROCS_PER_NODE": "3"},
            "global_batch_size = 8: does not divide over 6 processes",
        ),
        (
            ["--nodes=2", f"--wrap=srun python fasttrain/train.py {tiny()}"],
            {},
            "SLURM started 2 tasks, but no launcher connects their processes",
        ),
        (["tools/train.sbatch", tiny(), "--set", "train.epoch=3"], {}, "did you mean epochs?"),
        (
            ["--nodes=2", "tools/train.sbatch", tiny(data={"stage": "/proc/no"}, log={})],
            {},
            "[data] stage = /proc/no: ",
        ),
    ]
    for words, changes, said in wrong:
        job = cluster.submit(*words, **changes)
        state = cluster.finish(job)
        output = cluster.output(job)
        assert state["JobState"] == "FAILED" and state["Restarts"] == "0", output
        assert said in output


def test_an_array_makes_shards_and_a_job_after_it_verifies_them(
    cluster: Cluster, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    words = ["tools/make_shards.sbatch", folder, out]
    job = cluster.submit("--array=1-3", *words)
    wrap = f"--wrap=python tools/verify_shards.py {out}"
    after = cluster.submit(f"--dependency=afterok:{job}", wrap)
    state = cluster.finish(after)
    assert state["JobState"] == "COMPLETED", cluster.output(job) + cluster.output(after)
    run(["python", "tools/make_shards.py", folder, tmp_path / "here"])
    made, expected = ((root / "manifest.json").read_bytes() for root in (out, tmp_path / "here"))
    assert made == expected
    job = cluster.submit("--array=2-3", *words)
    for task in (2, 3):
        assert cluster.finish(f"{job}_{task}")["JobState"] == "FAILED"
    assert "from 1 without gaps, such as --array=1-8" in cluster.output(job)
