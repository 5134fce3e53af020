"""train.sbatch makes the right calls; stand-ins replace srun, scontrol and the launcher."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CHECKOUT, command_path, environment

from fasttrain import runtime

SRUN = """#!/bin/bash
# Starts what it is given on every node, and passes SIGUSR1 on to all processes of the step.
nodes=$SLURM_NNODES
while [[ $1 == --* ]]; do
    echo "srun $1" >>"$CALLS"
    [ "$1" != --nodes=1 ] || nodes=1
    shift
done
echo "srun cpus $SRUN_CPUS_PER_TASK export $SLURM_EXPORT_ENV" >>"$CALLS"
for node in $(seq 0 $((nodes - 1))); do SLURM_NODEID=$node "$@" & pids+=" $!"; done
trap 'kill -USR1 $pids' USR1
code=0
for pid in $pids; do
    wait $pid; c=$?
    while kill -0 $pid 2>/dev/null; do wait $pid; c=$?; done
    [ $c = 0 ] || code=$c
done
exit $code
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >>"$CALLS"
case "$1 $2" in
"show hostnames") printf 'first\\nsecond\\n' ;;
"show job") echo "JobId=$4 $STATE" ;;
requeue*) exit 1 ;; # or the script would wait for its end
esac
"""
PYTHON = """#!/bin/bash
# The real one for the recipe; a launcher that notes its words and does as $TRAINER says.
[ "$2" = fasttrain.config ] && exec "$REAL" "$@"
echo "node $SLURM_NODEID cpu ${ACCELERATE_USE_CPU:-} launch $*" >>"$CALLS"
eval "$TRAINER"
"""
# Not in bash, which cannot trap what was ignored when it started.
ASKED = """exec "$REAL" -c 'import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(138))
open(os.environ["CALLS"] + ".ready" + os.environ["SLURM_NODEID"], "w")
time.sleep(60)'"""


class Submitted:
    """The outcome of a job."""

    def __init__(self, job: subprocess.Popen[str], calls: Path) -> None:
        self.output = job.communicate(timeout=60)[0]
        self.code = job.returncode
        self.calls = calls.read_text().splitlines() if calls.exists() else []
        self.requeued = [c for c in self.calls if c.startswith("scontrol requeue")]
        self.launches = sorted(c for c in self.calls if "accelerate.commands.launch" in c)


@pytest.fixture
def submit(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Submitted]:
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    recipe = tiny()

    def run(trainer: str, *words: str, usr1: bool = False, **changes: str) -> Submitted:
        calls = tmp_path / f"calls-{time.monotonic_ns()}"
        given = {
            "SLURM_JOB_ID": "1234", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2",
            "SLURM_CPUS_PER_TASK": "16", "SLURM_GPUS_ON_NODE": "8", "STATE": "JobState=RUNNING",
            "REAL": sys.executable, "CALLS": str(calls), "TRAINER": trainer,
            "PATH": f"{tmp_path}{os.pathsep}{command_path()}",
        }  # fmt: skip
        job = subprocess.Popen(
            ["bash", "tools/train.sbatch", recipe, *words],
            cwd=CHECKOUT,
            env=environment(**(given | changes)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if usr1:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and not all(
                Path(f"{calls}.ready{node}").exists() for node in (0, 1)
            ):
                time.sleep(0.05)
            job.send_signal(signal.SIGUSR1)
        return Submitted(job, calls)

    return run


def test_each_node_gets_one_launcher(submit: Callable[..., Submitted], tmp_path: Path) -> None:
    job = submit(f"touch {tmp_path}/run/DONE", "--set", "train.epochs=7")
    assert job.code == 0 and not job.requeued and "done: " in job.output
    assert [line.split(" launch ")[0] for line in job.launches] == ["node 0 cpu ", "node 1 cpu "]
    for node, line in enumerate(job.launches):
        for words in (
            f"--multi_gpu --rdzv_backend static --machine_rank {node} --main_process_ip first "
            "--main_process_port 28638 --num_machines 2 --num_processes 16",
            f"fasttrain/train.py {tmp_path}/tiny.toml --set train.epochs=7 "
            f"--set log.run_dir={tmp_path}/run",
        ):
            assert words in line
    assert "srun cpus 16 export ALL" in job.calls
    assert "srun --kill-on-bad-exit=1" in job.calls


def test_a_node_without_gpus_gets_one_process_by_default(
    submit: Callable[..., Submitted], tmp_path: Path
) -> None:
    changes = {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": ""}
    job = submit(f"touch {tmp_path}/run/DONE", **changes)
    (line,) = job.launches
    assert line.startswith("node 0 cpu 1 ") and "--multi_gpu" not in line
    assert "--num_machines 1 --num_processes 1 " in line
    job = submit("exit 0", FT_PROCS_PER_NODE="2", **changes)
    assert "--multi_gpu" in job.launches[0] and "--num_processes 2 " in job.launches[0]


def test_each_job_of_an_array_and_each_start_has_its_own(
    submit: Callable[..., Submitted], tmp_path: Path
) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "1230", "SLURM_ARRAY_TASK_ID": "4"}
    job = submit(f"touch {tmp_path}/run-4/DONE", **array)
    assert job.code == 0 and f"--set log.run_dir={tmp_path}/run-4" in job.launches[0]
    port = "--main_process_port 28639 "
    assert port in submit("exit 3", SLURM_RESTART_COUNT="1").launches[0]


@pytest.mark.parametrize(
    ("state", "restarts", "requeued"),
    [
        ("JobState=RUNNING Restarts=0", "0", True),
        ("JobState=RUNNING", "100", False),  # not endlessly
        ("JobState=COMPLETING", "0", False),  # after scancel
    ],
)
def test_before_the_time_limit_it_is_requeued(
    submit: Callable[..., Submitted], tmp_path: Path, state: str, restarts: str, requeued: bool
) -> None:
    job = submit(ASKED, usr1=True, STATE=state, SLURM_RESTART_COUNT=restarts)
    assert "SIGUSR1: saving" in job.output and (tmp_path / "run" / "stop").exists()
    assert job.requeued == (["scontrol requeue 1234"] if requeued else [])
    assert job.code == 138


def test_a_preemption_that_reached_only_the_processes_is_requeued(
    submit: Callable[..., Submitted],
) -> None:
    job = submit("exit 143", STATE="JobState=RUNNING PreemptTime=2026-11-24T10:00:00")
    assert job.requeued and job.code == 143
    assert not submit("exit 143", STATE="JobState=RUNNING PreemptTime=None").requeued


def test_neither_success_nor_failure_is_requeued(
    submit: Callable[..., Submitted], tmp_path: Path
) -> None:
    job = submit("exit 2")
    assert job.code == 2 and not job.requeued and "ended with 2, not done" in job.output
    job = submit(f"touch {tmp_path}/run/DONE; {ASKED}", usr1=True)
    assert job.code == 0 and not job.requeued  # the signal came when all was done
    (tmp_path / "run" / "DONE").unlink()
    assert submit("exit 0").code == 1  # says that all is well, but is not done


def test_a_wrong_recipe_ends_the_job_before_it_starts_processes(
    submit: Callable[..., Submitted],
) -> None:
    job = submit("exit 0", "--set", "train.epochs=0")
    assert job.code == 2 and not job.calls and "[train] epochs = 0: must be" in job.output


def test_processes_share_the_cpus_of_their_task() -> None:
    all_of_them = runtime.cpu_share({})
    assert runtime.cpu_share({"SLURM_CPUS_PER_TASK": "1"}) == 1
    assert runtime.cpu_share({"SLURM_CPUS_PER_TASK": "512"}) == all_of_them
    many = {"SLURM_CPUS_PER_TASK": "512", "LOCAL_WORLD_SIZE": "512"}
    assert runtime.cpu_share(many) == 1


def test_the_job_script_runs_in_a_container(
    submit: Callable[..., Submitted], tmp_path: Path
) -> None:
    """A command may start Python, as for Apptainer, or srun's options may, as for pyxis."""
    wrap = {"FT_WRAP": "env INSIDE=yes", "FT_SRUN": "--container-image=a --container-mounts=b:c"}
    job = submit(f'[ "$INSIDE" = yes ] && touch {tmp_path}/run/DONE', **wrap)
    assert job.code == 0 and len(job.launches) == 2, job.output
    assert job.calls.count("srun --container-image=a") == 2  # for the recipe, and for the run
    assert job.calls.count("srun --container-mounts=b:c") == 2


def test_each_node_has_one_launcher_for_any_number_of_tasks(
    submit: Callable[..., Submitted],
) -> None:
    """People often ask for one task per GPU. The launcher gets the CPUs of all tasks of a node."""
    job = submit("exit 0", SLURM_NTASKS="16", SLURM_CPUS_PER_TASK="8")
    assert len(job.launches) == 2 and "srun cpus 64 export ALL" in job.calls
    assert {"srun --nodes=2", "srun --ntasks=2", "srun --ntasks-per-node=1"} < set(job.calls)


def test_outside_slurm_the_job_script_is_refused(submit: Callable[..., Submitted]) -> None:
    job = submit("exit 0", SLURM_JOB_ID="")
    assert job.code == 2 and "not in a SLURM job: submit this script" in job.output


def test_missing_cpus_are_warned_of(submit: Callable[..., Submitted]) -> None:
    assert "WARNING: one CPU a node" in submit("exit 0", SLURM_CPUS_PER_TASK="").output
