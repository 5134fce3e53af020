"""doctor.py reports what a run would use on this node, and what would stop the run."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import benchmark
import doctor
import probes
import pytest
import torch
from benchmarks import steps
from conftest import REPO, run, shard

from fasttrain import config, modes, schedule
from fasttrain.faults import ConfigError

SECTIONS = {
    "launch", "versions", "gpus", "network", "cpus", "memory", "data", "input", "storage", "run",
    "job", "faults",
}  # fmt: skip
MULTI = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
Examined = Callable[..., tuple[dict[str, Any], list[str]]]


@pytest.fixture
def examined(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Examined:
    """Runs doctor.py here; returns the JSON object and the lines before it."""

    def check(code: int, *words: object, **environ: str) -> tuple[dict[str, Any], list[str]]:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as status:
            doctor.main([str(word) for word in words])
        *lines, last = capsys.readouterr().out.splitlines()
        assert status.value.code == code, "\n".join(lines)
        found = json.loads(last)
        assert [f"FAULT: {fault}" for fault in found["faults"]] == [
            line for line in lines if line.startswith("FAULT:")
        ]
        return found, lines

    return check


# --------------------------------------------------------------------------------------------------
# All of it
# --------------------------------------------------------------------------------------------------


def test_a_healthy_node_has_no_faults(
    examined: Examined, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    found, lines = examined(0, tiny())
    assert found.keys() == SECTIONS and found["faults"] == []
    assert lines[-1] == "no fault was found"
    data, storage, plan = found["data"], found["storage"], found["run"]
    assert (data["train_images"], data["val_images"], data["classes"]) == (45, 13, 3)
    assert 0 < data["size_gb"] < 0.01 and data["tars"] >= 5
    assert storage["in_order_mb_per_s"] > 0 and storage["at_random_images_per_s"] > 0
    assert 0 < storage["one_at_random_ms"] < 1500 and 0 < storage["opening_a_tar_ms"] < 1500
    assert found["input"]["input_images_per_s"] > 0 and found["input"]["decode"] == "cpu"
    assert (plan["micro_batch"], plan["accumulation"]) == (8, 1)
    assert (plan["steps_per_epoch"], plan["total_steps"], plan["processes"]) == (5, 15, 1)
    assert found["cpus"]["threads_each"] == 1 and found["memory"]["available_gb"] > 0
    assert found["gpus"]["for_this_process"] == 0
    assert not (tmp_path / "run").exists()  # nothing is left behind


def test_a_missing_data_set_is_a_fault(examined: Examined, tiny: Callable[..., Path]) -> None:
    found, _ = examined(1, tiny(), "--set", "data.root=/nowhere")
    (fault,) = found["faults"]
    assert fault.startswith("no data set at /nowhere ") and "tools/make_shards.py" in fault
    assert found.keys() == SECTIONS - {"storage"}
    assert found["input"]["input"] == "unknown (there are no images)"
    assert found["run"]["micro_batch"] == 8 and found["run"]["total_steps"] == "unknown"
    assert found["memory"]["available_gb"] > 0


def test_all_faults_are_printed_at_once(
    examined: Examined, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    settings = [
        ("train.micro_batch_size=3", "does not divide the 8 images"),
        ("train.precision=fp16", "precision = fp16: needs a GPU"),
        (f"log.run_dir={tmp_path}/file/run", 'run": cannot be written (Not a directory)'),
        (f"data.stage={tmp_path}/file/copy", "stage = "),
    ]
    words = [word for setting, _ in settings for word in ("--set", setting)]
    found, _ = examined(1, tiny(), *words)
    assert len(found["faults"]) == 4
    for _, said in settings:
        assert any(said in fault for fault in found["faults"]), said
    assert found["input"]["input_images_per_s"] > 0  # of other batches


def test_a_wrong_recipe_or_command_line_is_refused(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["/nowhere.toml"], [str(tiny()), "--set", "train.epochs=0"], []):
        with pytest.raises(SystemExit) as status:
            doctor.main(words)
        assert status.value.code == 2 and not capsys.readouterr().out


def test_a_stage_without_room_is_a_fault(
    examined: Examined, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(data={"stage": str(tmp_path / "stage")})
    found, _ = examined(0, recipe)
    assert found["storage"]["stage_to_copy_gb"] > found["data"]["size_gb"]  # with the indexes
    monkeypatch.setattr(doctor.staging, "free_bytes", lambda folder: 1000)
    found, _ = examined(1, recipe)
    assert "GB are to be copied, and 0.0 GB are free" in found["faults"][0]


@pytest.mark.slow
def test_two_processes_are_examined(tiny: Callable[..., Path]) -> None:
    done = run([*MULTI, "tools/doctor.py", tiny()], ACCELERATE_USE_CPU="1")
    found = json.loads(done.stdout.splitlines()[-1])
    assert "Traceback" not in done.stderr
    assert found["faults"] == [] and found["run"]["processes"] == 2
    assert found["run"]["micro_batch"] == 4 and done.stdout.count("\nversions\n") == 1
    assert [each["rank"] for each in found["job"]["processes"]] == [0, 1]
    assert found["job"]["gradients_mb"] > 1 and found["job"]["all_reduce_ms"] > 0
    assert found["job"]["all_reduce_rate_gb_per_s"] > 0
    assert 0 < found["job"]["all_reduce_of_one_ms"] < 1000


def test_a_fault_of_the_launch_is_named(examined: Examined, tiny: Callable[..., Path]) -> None:
    found, _ = examined(1, tiny(), WORLD_SIZE="2")
    assert found["run"]["processes"] == 2 and "no MASTER_ADDR" in found["faults"][0]
    assert len(found["faults"]) == 1
    found, _ = examined(1, tiny(), WORLD_SIZE="1", SLURM_RESTART_COUNT="many")
    assert 'SLURM_RESTART_COUNT = "many"' in found["faults"][0]


def test_unsupported_launch_settings_are_reported(
    examined: Examined, tiny: Callable[..., Path]
) -> None:
    found, _ = examined(1, tiny(), ACCELERATE_USE_FSDP="true")
    (fault,) = found["faults"]
    assert fault.startswith("the launch asks for FSDP") and found["run"]["processes"] == 1
    environ = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    (remark,) = doctor.Doctor(config.Recipe(), environ).launch()["remarks"]
    assert "STEPS = 4 is not used" in remark and environ == {"USE_TORCH_XLA": "0"}


def test_a_cpu_that_is_slow_in_bf16_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    examiner = doctor.Doctor(config.Recipe(model=config.Model(arch="small", width=0.35)), {})
    for ratio, faults in ((0.1, 1), (0.9, 0)):
        monkeypatch.setattr(modes, "bf16_ratio", lambda *_, ratio=ratio: ratio)
        examiner.faults.clear()
        assert examiner.precision() == {"bf16": f"{ratio} times as fast as float32 on this CPU"}
        assert len(examiner.faults) == faults
    monkeypatch.setattr(modes, "bf16_ratio", lambda *_: 1 / 12)
    examiner.precision()
    assert "takes 12.0 times as long as float32" in examiner.faults[0]


def test_a_job_of_slurm_is_described(examined: Examined, tiny: Callable[..., Path]) -> None:
    job = {"JOB_ID": "7", "NNODES": "2", "GPUS_ON_NODE": "2", "STEP_NUM_TASKS": "2"}
    found, _ = examined(0, tiny(), **{f"SLURM_{name}": value for name, value in job.items()})
    assert found["run"]["processes"] == 4 and found["run"]["micro_batch"] == 2
    assert found["cpus"]["processes_here"] == 2 and found["job"]["SLURM_JOB_ID"] == "7"
    assert found["input"]["measured"] == "in 1 of 4 processes; the total is extrapolated"


# --------------------------------------------------------------------------------------------------
# Its parts
# --------------------------------------------------------------------------------------------------


def test_the_number_of_processes_follows_from_the_environment() -> None:
    def size(gpus: int, **environ: str) -> tuple[int, int]:
        return doctor.world_of(environ, gpus)[:2]

    nodes = {"SLURM_NNODES": "3", "SLURM_GPUS_ON_NODE": "4"}
    assert size(0) == (1, 1) and size(8) == (8, 8)
    assert size(8, WORLD_SIZE="16", LOCAL_WORLD_SIZE="8", **nodes) == (16, 8)
    assert size(8, ACCELERATE_MIXED_PRECISION="no") == (1, 1)
    assert size(0, **nodes) == (12, 4)
    assert size(0, FT_PROCS_PER_NODE="2", **nodes) == (6, 2)
    assert size(0, SLURM_NNODES="3") == (3, 1)
    with pytest.raises(ConfigError, match="FT_PROCS_PER_NODE"):
        size(0, FT_PROCS_PER_NODE="two", **nodes)


def test_processes_that_could_not_join_are_named_before_joining() -> None:
    def faults(gpus: int = 0, **environ: str) -> list[str]:
        return [*doctor.launch_faults(environ, gpus, {"eth0": "up", "ib0": "up"})]

    assert faults() == faults(gpus=2, LOCAL_WORLD_SIZE="2", GLOO_SOCKET_IFNAME="ib0") == []
    assert "4 processes on this node, but 2 GPUs" in faults(gpus=2, LOCAL_WORLD_SIZE="4")[0]
    assert "only eth0, ib0" in faults(GLOO_SOCKET_IFNAME="ib1")[0]


TOPO = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tSYS\tPIX\t0-23\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tSYS\tSYS\t0-23\t0\t\tN/A\n"
    "GPU2\tSYS\tSYS\t X \tSYS\t0-23\t0\t\tN/A\n"
    "NIC0\tPIX\tSYS\tSYS\t X \n\nLegend:\n\n  X    = Self\n"
    "  SYS  = Connection traversing PCIe as well as the SMP interconnect\n"
)


def test_links_between_gpus_are_counted() -> None:
    assert probes.link_counts(TOPO) == ["2 x SYS, PCIe", "1 x NV18, NVLink"]
    assert probes.link_counts("\tGPU0\tCPU Affinity\nGPU0\t X \t0-15\n") == []
    assert probes.link_counts("") == []


def test_network_interfaces_are_read_from_sysfs(tmp_path: Path) -> None:
    files = {
        "net/eth0/operstate": "up\n", "net/eth0/speed": "25000\n", "net/ib0/operstate": "down\n",
        "net/ib0/speed": "-1\n", "net/lo/operstate": "unknown\n",
        "ib/mlx5_0/ports/1/state": "4: ACTIVE\n", "ib/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)\n",
        "ib/mlx5_1/ports/1/state": "1: DOWN\n",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert probes.interfaces(tmp_path / "net") == {
        "eth0": "up, 25,000 Mbit/s",
        "ib0": "down, speed unknown",
    }
    assert probes.infiniband(tmp_path / "ib") == [
        "mlx5_0 port 1: ACTIVE, 400 Gb/sec (4X NDR)",
        "mlx5_1 port 1: DOWN, unknown",
    ]
    assert probes.interfaces(tmp_path / "none") == {} and probes.infiniband(tmp_path / "no") == []


def test_a_driver_that_is_too_old_is_a_fault() -> None:
    built = {"torch": "13.0", "DALI": "13"}
    assert probes.cuda_faults(built, "13.1") == []
    assert [fault.split()[0] for fault in probes.cuda_faults(built, "12.8")] == ["torch", "DALI"]
    assert probes.same_cuda("13.0", "13") is True and probes.same_cuda("12.8", "13") is False
    assert str(probes.same_cuda("none", "13")).startswith("unknown")


def test_gpus_that_torch_does_not_see_are_a_fault(
    examined: Examined, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {
        "": "| NVIDIA-SMI 550.1  Driver Version: 550.1  CUDA Version: 12.4 |\n",
        "topo": TOPO,
        "--query-gpu=index,name,memory.total": "0, NVIDIA H100, 81559 MiB\n",
        "--query-gpu=driver_version": "550.1\n550.1\n",
    }
    monkeypatch.setattr(probes, "smi", lambda *words: said[words[0] if words else ""])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setattr(probes, "torch_gpus", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found, lines = examined(1, tiny())
    assert "torch finds none of the 1 GPUs" in " ".join(found["faults"])
    assert "but the driver has CUDA 12.4" in " ".join(found["faults"])
    assert found["gpus"]["found"] == ["0, NVIDIA H100, 81559 MiB"]
    assert found["versions"]["driver"] == "550.1"
    assert "  links                   2 x SYS, PCIe" in lines


def test_the_quota_of_a_container_is_read() -> None:
    assert probes.quota_in("150000 100000") == 1.5
    assert probes.quota_in("max 100000") is None and probes.quota_in("unknown") is None


def test_storage_over_a_network_comes_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    monkeypatch.setattr(probes.forecast, "available_bytes", lambda: 10**12)
    data = config.Data()
    for kind in ("nfs4", "lustre", "fuse.sshfs", "beegfs", "ceph"):
        copy, blocks, pread = probes.advice(kind, data, 10**9)
        assert "data.stage=/dev/shm/fasttrain copies the 1.0 GB" in copy
        assert "data.shuffle=blocks" in blocks and "data.read=pread" in pread
    assert "data.stage=/a/local/disk" in probes.advice("nfs", data, 10**12)[0]
    for kind in ("ext4", "xfs", "tmpfs", "fuseblk", "overlay"):
        assert probes.advice(kind, data, 10**9) == []
    assert probes.advice("nfs", data.model_copy(update={"stage": Path("/tmp")}), 1) == []


def test_the_time_left_in_a_job_is_shown() -> None:
    environ = {"SLURM_JOB_ID": "1", "SLURM_JOB_END_TIME": "1600"}
    assert doctor.slurm(environ, now=1000)["time_left_min"] == 10
    assert doctor.slurm({"SLURM_JOB_ID": "1"}, now=0)["time_left_min"] == "unknown"
    assert doctor.slurm({}, now=0) == {"slurm": None}


def test_reading_works_with_a_single_tar(folder: Path, tmp_path: Path) -> None:
    shard(folder, tmp_path, shard_size=100)
    split = doctor.train.open_data(config.Data(root=tmp_path))[0]
    assert probes.read_in_order(split)["in_order_mb_per_s"] > 0
    found = probes.read_at_random(split, threads=2)
    assert found["at_random_images_per_s"] > 0 and found["at_random_by_threads"] == 2


def test_a_trial_sees_the_gpu_of_its_process_alone() -> None:
    def gpu(**environ: str) -> str:
        kept = probes.on_own_gpu({"LOCAL_WORLD_SIZE": "4", "RANK": "6", "HOME": "/root", **environ})
        assert kept.keys() == {"HOME", "CUDA_VISIBLE_DEVICES"}
        return kept["CUDA_VISIBLE_DEVICES"]

    assert gpu() == gpu(LOCAL_RANK="0") == "0" and gpu(LOCAL_RANK="2") == "2"
    assert gpu(LOCAL_RANK="1", CUDA_VISIBLE_DEVICES="4,5") == "5"


def test_a_training_step_is_measured(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(command: list[str], **_: Any) -> Any:
        assert command[:2] == [sys.executable, str(REPO / "tools" / "benchmark.py")]
        benchmark.main(command[2:])
        return subprocess.CompletedProcess(command, 0, capsys.readouterr().out, "")

    def measured(job: steps.StepJob, profile: steps.Profile | None) -> dict[str, float]:
        assert profile is None
        assert (job.batch, job.px, job.arch, job.width) == (8, 32, "small", 0.35)
        return {"images_per_s": 1000.0, "step_ms": 8.0, "peak_gib": 1.0}

    recipe = config.load(tiny())
    plan = schedule.make_plan(recipe.train, recipe.optim, 45, 1)
    monkeypatch.setattr(probes.subprocess, "run", here)
    monkeypatch.setattr(steps, "measure", measured)
    examination = doctor.Doctor(recipe, {})
    found = {"step_images_per_s": 1000.0, "step_ms": 8.0, "step_peak_memory_gb": 2**30 / 1e9}
    assert examination.try_step(plan) == found and examination.faults == []


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", "--set train.micro_batch_size=4"),
        ("RuntimeError: no kernel image", "see versions and gpus above"),
    ],
)
def test_a_training_step_that_fails_is_a_fault(
    said: str, remedy: str, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], 1, "", f"Traceback\n  ...\n{said}\n")

    recipe = config.load(tiny())
    plan = schedule.make_plan(recipe.train, recipe.optim, 45, 1)
    monkeypatch.setattr(probes.subprocess, "run", fail)
    examination = doctor.Doctor(recipe, {})
    assert examination.try_step(plan) == {"failed": said}
    (fault,) = examination.faults
    assert said in fault and remedy in fault


def test_the_input_is_compared_with_the_steps(tiny: Callable[..., Path]) -> None:
    examination = doctor.Doctor(config.load(tiny()), {})
    examination.data()
    for asked, verdict in ((1.0, " times as fast as the steps"), (1e9, "limits them; to make")):
        examination.step = {"step_images_per_s": asked}
        found = examination.input()
        assert verdict in found["verdict"] and found["epoch_min"] > 0


def test_facts_are_shown_with_their_units() -> None:
    facts: dict[str, Any] = {
        "speed_mb_per_s": 1234.5,
        "X_Y": None,
        "a_b": [],
        "of": {"c_ms": 0.1},
        "d": True,
    }
    assert [*doctor.rows(facts)] == [
        ("speed", "1,234 MB/s"), ("X_Y", "not set"), ("a b", "none"), ("of", "c 0.1 ms"),
        ("d", "yes"),
    ]  # fmt: skip


def test_an_all_reduce_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: calls.append(values.shape))
    assert 0 < probes.all_reduce_s(7, "cpu", times=3) < 1
    assert calls == [(7,)] * 8  # 5 of them to warm up
