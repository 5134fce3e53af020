"""Says what this node and this job would train a recipe with, and whether the recipe fits.

    python tools/doctor.py RECIPE [--set SECTION.KEY=VALUE ...]
    accelerate launch --multi_gpu --num_processes 8 tools/doctor.py RECIPE

Looks at versions, GPUs, network, CPUs, memory, storage, decoding, the plan and the run folder, in
less than a minute as a rule. Launched as train.py is, it looks at every process, and times the
exchange of the gradients. It trains nothing and leaves the run folder as it is; of the demo it
makes the shards, as the run would.

What would stop the run is told by a line that begins with FAULT: and says what to do. What cannot
be told is unknown, for the reason given. The last line on standard output is one JSON object.
Ends with exit code 0; 1 if there are faults; 2 for a wrong command line or recipe.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fasttrain import config, decoding, forecast, run_folder, schedule, staging, train
from fasttrain.schedule import Plan
from fasttrain.shards import Split

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fasttrain.runtime import Process

Facts = dict[str, Any]  # the name of a quantity ends in its unit, one of `UNITS`

UNITS = {
    "_images_per_s": "images/s",
    "_mb_per_s": "MB/s",
    "_gb_per_s": "GB/s",
    "_mb": "MB",
    "_gb": "GB",
    "_ms": "ms",
    "_min": "minutes",
}
SMI_S = 30  # that nvidia-smi may take
STEP_S = 120  # that a trial of training steps may take
JOIN_S = 300  # that processes wait for each other
READ_S = 1.5  # of each way of reading
IN_ORDER_BYTES, AT_RANDOM_BYTES = 128 << 20, 64 << 20  # read at most
TARS = 32  # read from at most
PIECE_BYTES = 4 << 20
FOLIO_BYTES = 256 << 10  # the page cache drops no part of a folio, few of which are larger
NETWORK = (
    "nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse.", "cifs", "smb", "9p", "afs", "panfs",
    "wekafs", "glusterfs", "pvfs", "orangefs", "virtiofs",
)  # fmt: skip
SOCKETS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA")
OF_LAUNCHERS = ("RANK", "WORLD", "LOCAL_", "MASTER_", "ACCELERATE_", "TORCHELASTIC_", "GROUP_")
OF_JOBS = (
    "JOB_ID", "JOB_PARTITION", "JOB_NODELIST", "NNODES", "NTASKS", "GPUS_ON_NODE", "MEM_PER_NODE",
    "RESTART_COUNT",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="(repeatable)"
    )
    arguments = parser.parse_args(argv)
    try:
        recipe = config.load(arguments.recipe, arguments.set)
    except config.ConfigError as error:
        config.stop(str(error))
    doctor = Doctor(recipe, os.environ)
    doctor.say(f"{arguments.recipe} on {platform.node()}")
    try:
        doctor.examine()
    except Exception as error:  # of our own; what was found until then is told all the same
        doctor.fault(f"the examination broke off, please report it: {reason(error)}")
    raise SystemExit(doctor.finish())


class World(NamedTuple):
    """The processes of the run."""

    size: int
    here: int  # of them on this node
    source: str  # why so many


class Doctor:
    """Looks at one thing after the other; of several processes the first prints."""

    def __init__(self, recipe: config.Recipe, environ: Mapping[str, str]) -> None:
        self.recipe, self.environ = recipe, environ
        self.prints = environ.get("RANK", environ.get("SLURM_PROCID", "0")) == "0"
        self.found: dict[str, Facts] = {}
        self.faults: list[str] = []
        self.num_gpus = 0  # for this process
        self.world = World(1, 1, "unknown")
        self.splits: list[Split] = []  # train, val; none where they cannot be opened
        self.plan: Plan | None = None
        self.threads = 1  # that decode
        self.decode, self.why_decode = "cpu", "unknown"
        self.step: Facts = {"step": "not tried without a GPU"}
        self.accelerator: Accelerator | None = None
        self.process: Process | None = None  # None where the processes cannot join

    def examine(self) -> None:
        """All processes do all of this, as they wait for each other."""
        from fasttrain import runtime

        runtime.raise_file_limit()
        self.num_gpus = torch_gpus() if runtime.has_gpu(self.environ) else 0
        for probe in (self.versions, self.gpus, self.network):
            self.look(probe)
        with self.told():
            self.world = world_of(self.environ, self.num_gpus)
            # Tasks of srun may look at a node each; the run is launched by train.sbatch.
            tasks = "SLURM_STEP_NUM_TASKS"
            environ = {key: value for key, value in self.environ.items() if key != tasks}
            runtime.check_launch(self.recipe, environ)
        for probe in (self.cpus, self.memory, self.data):
            self.look(probe)
        with self.told():
            train_images = self.splits[0].num_samples if self.splits else None
            batch = self.recipe.train.global_batch_size
            self.plan = schedule.make_plan(
                self.recipe.train, self.recipe.optim, train_images or batch, self.world.size
            )
        self.choose_decoder()
        if self.plan and self.num_gpus:
            self.step = self.try_step(self.plan)  # apart, before this process touches the GPU
        self.join()
        self.look(self.input)
        if self.splits and self.environ.get("LOCAL_RANK", "0") == "0":
            self.look(self.storage)  # after the input, as it drops images from the page cache
        for probe in (self.run, self.job):
            self.look(probe)
        rank = self.process.rank if self.process else 0
        for place, faults in self.gather((f"rank {rank} on {platform.node()}", self.faults)):
            for fault in faults:
                if fault not in self.faults:
                    self.fault(f"{place}: {fault}")
        if self.accelerator:
            attempt(self.accelerator.end_training)

    # ---- what is said

    def say(self, line: str) -> None:
        if self.prints:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    def look(self, probe: Callable[[], Facts]) -> None:
        """Prints and keeps what a probe finds, or why it finds nothing."""
        facts: Facts = {"unknown": "by a fault, told at the end"}
        with self.told(lambda why: facts.update(unknown=why)):
            facts = probe()
        self.found[probe.__name__] = facts
        self.say(f"\n{probe.__name__}")
        for label, text in rows(facts):
            self.say(f"  {label:<24}{text}")

    def fault(self, message: str) -> None:
        """Notes what would stop the run, with its remedy, as one line."""
        line = " ".join(part.strip() for part in message.splitlines())
        if line not in self.faults:
            self.faults.append(line)

    @contextlib.contextmanager
    def told(self, otherwise: Callable[[str], None] | None = None) -> Iterator[None]:
        """Notes a fault that is raised within; `otherwise` gets the reason of other errors."""
        try:
            yield
        except config.Fault as fault:
            self.fault(str(fault))
        except Exception as error:
            if otherwise is None:
                raise
            otherwise(reason(error))

    def finish(self) -> int:
        """Prints the faults and the JSON object; returns the exit code."""
        self.say("" if self.faults else "\nnothing that was looked at would stop the run")
        for fault in self.faults:
            self.say(f"FAULT: {fault}")
            if not self.prints and "RANK" not in self.environ:  # a task of srun, all by itself
                sys.stderr.write(f"{platform.node()}: FAULT: {fault}\n")
        self.say(json.dumps({**self.found, "faults": self.faults}, default=str))
        return 1 if self.faults else 0

    # ---- the node

    def versions(self) -> Facts:
        import torch

        from fasttrain import runtime

        names = ["torch", "torchvision", "accelerate"]
        names += [d.name for d in metadata.distributions() if d.name.startswith("nvidia-dali-cuda")]
        built = {"torch": torch.version.cuda or "none"}
        if digits := re.search(r"cuda(\d+)0$", names[-1]):  # nvidia-dali-cuda130
            built["DALI"] = digits[1]
        driver = smi("--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
        # Such as "CUDA Version: 13.0": what is built for that or an older one runs on it.
        newest = re.search(r"CUDA[\w ]* Version: *([\d.]+)", smi())
        for message in cuda_faults(built, newest[1]) if newest else ():
            self.fault(message)
        return {
            "fasttrain": f"{metadata.version('fasttrain')}, commit {runtime.commit() or 'unknown'}",
            "python": platform.python_version(),
            **{name: attempt(metadata.version, name) for name in names},
            "driver": driver or None,
            "cuda": {**built, "driver": newest[1] if newest else None},
            "torch_and_dali_agree": agree(*built.values()),
        }

    def gpus(self) -> Facts:
        query = "--query-gpu=index,name,memory.total"
        found = smi(query, "--format=csv,noheader").splitlines()  # "0, NVIDIA H100, 81559 MiB"
        seen, visible = torch_gpus(), self.environ.get("CUDA_VISIBLE_DEVICES")
        on_cpu = self.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        if found and not seen and not on_cpu and visible not in ("", "-1", "NoDevFiles"):
            self.fault(
                f"torch finds none of the {len(found)} GPUs and would train on the CPU: install a "
                "torch with CUDA, update the driver, or say so with ACCELERATE_USE_CPU=1"
            )
        return {
            "found": found,
            "for_this_process": seen,
            "CUDA_VISIBLE_DEVICES": visible,
            "links": link_counts(smi("topo", "-m")),
        }

    def network(self) -> Facts:
        return {
            "interfaces": [f"{name}: {text}" for name, text in interfaces().items()],
            "infiniband": infiniband(),
            **{name: self.environ.get(name) for name in SOCKETS},
        }

    def cpus(self) -> Facts:
        from fasttrain import runtime

        share = {**self.environ, "LOCAL_WORLD_SIZE": str(self.world.here)}
        self.threads = runtime.data_threads(self.recipe.data, share)
        return {
            "model": runtime.cpu_name(),
            "of_the_machine": os.cpu_count(),
            "for_this_process": len(os.sched_getaffinity(0)),
            "quota": quota_in(text_of(Path("/sys/fs/cgroup/cpu.max"))),
            "SLURM_CPUS_PER_TASK": self.environ.get("SLURM_CPUS_PER_TASK"),
            "processes_here": self.world.here,
            "threads_each": self.recipe.train.cpu_threads or runtime.cpu_share(share),
            "decoding_threads_each": self.threads,
        }

    def memory(self) -> Facts:
        shm = shutil.disk_usage("/dev/shm")
        return {
            "available_gb": forecast.available_bytes() / 1e9,
            "/dev/shm_gb": shm.total / 1e9,
            "/dev/shm_free_gb": shm.free / 1e9,
        }

    # ---- the data

    def data(self) -> Facts:
        root = self.recipe.data.root
        try:
            self.splits += train.open_data(self.recipe.data)
        except OSError as error:
            raise config.ConfigError(
                f"[data] root = {root}: cannot be read ({error}); mend that, or name another "
                "folder with --set data.root=..."
            ) from None
        train_set, val_set = self.splits
        return {
            "folder": str(root),
            "stored_as": train_set.store,
            "train_images": train_set.num_samples,
            "val_images": val_set.num_samples,
            "classes": len(train_set.classes),
            "tars": len(train_set.shard_paths) + len(val_set.shard_paths),
            "size_gb": num_bytes(self.splits) / 1e9,
        }

    def storage(self) -> Facts:
        """How fast the folder is, by reading from it for some seconds; and `data.stage`."""
        data, train_set = self.recipe.data, self.splits[0]
        kind = attempt(staging.file_system_of, train_set.root)
        facts: Facts = {"file_system": kind, "over_a_network": kind.startswith(NETWORK)}
        try:
            facts |= read_in_order(train_set) | read_at_random(train_set, data.read_threads)
        except OSError as error:
            self.fault(f"{train_set.root} cannot be read ({error}): mend that or copy it anew")
        if data.stage:
            facts |= self.stage(data.stage)
        return facts | {"advice": advice(kind, data, num_bytes(self.splits))}

    def stage(self, stage: Path) -> Facts:
        """The folder that the shards are copied into, and whether they have room there."""
        folder = staging.folder_of(self.splits[0].root, stage)
        part, (train_set, val_set) = self.recipe.data.stage_part, self.splits
        wanted = part * num_bytes([train_set]) + num_bytes([val_set])
        wanted -= sum(path.stat().st_size for path in folder.glob("*.tar"))
        free = staging.free_bytes(existing(folder))
        if message := cannot_write(folder):
            self.fault(f"[data] stage = {stage}: cannot be written ({message}); name another")
        elif wanted > free:
            self.fault(
                f"[data] stage = {stage}: {wanted / 1e9:,.1f} GB are to be copied, and "
                f"{free / 1e9:,.1f} GB are free; make room, name another folder, or copy a part: "
                "--set data.stage_part=..."
            )
        return {
            "stage": str(folder),
            "stage_to_copy_gb": max(0.0, wanted / 1e9),
            "stage_free_gb": free / 1e9,
        }

    # ---- trials

    def choose_decoder(self) -> None:
        """As train.py does."""
        settings = self.recipe.data
        if self.recipe.train.deterministic and settings.decode == "auto":
            settings = settings.model_copy(update={"decode": "cpu"})

        def unknown(why: str) -> None:
            self.why_decode = f"unknown ({why})"

        with self.told(unknown):
            for split in self.splits[:1]:
                self.decode, self.why_decode = decoding.choose(
                    split, settings, self.num_gpus > 0, self.threads, self.environ
                )

    def try_step(self, plan: Plan) -> Facts:
        """Some updates on random pixels, by a process apart: one that lacks memory may crash."""
        import steps

        job = steps.StepJob(
            name="fasttrain",
            arch=self.recipe.model.arch,
            width=self.recipe.model.width,
            batch=plan.micro_batch_size,
            px=schedule.largest_crop_px(self.recipe.data.crop_px),
            precision=self.recipe.train.precision,
            execution="eager",
            layout="channels_last",
            device="cuda",
            threads=1,
            seconds=0.5,
        )
        facts = attempt(run_step, job.model_dump_json(), alone(self.environ))
        if isinstance(facts, str):
            return {"step": facts}
        if message := facts.get("failed"):
            remedy = "see versions and gpus above"
            if "out of memory" in message.lower():
                smaller = smaller_batch(plan)
                remedy = (
                    f"--set train.micro_batch_size={smaller}" if smaller else "use a larger GPU"
                )
            self.fault(f"a training step of {job.batch} images on this GPU: {message}: {remedy}")
        return facts

    def join(self) -> None:
        """Becomes one of the processes of the launch; sets `process` unless it cannot."""
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        from fasttrain import runtime

        if self.environ.get("WORLD_SIZE", "1") != "1":
            faults = [*launch_faults(self.environ, self.num_gpus, interfaces())]
            for fault in faults:
                self.fault(fault)
            if faults or not self.environ.get("MASTER_ADDR"):  # it would wait for ever
                return
        where = "see network above"
        with self.told(lambda why: self.fault(f"the processes cannot join ({why}): {where}")):
            limit = InitProcessGroupKwargs(timeout=timedelta(seconds=JOIN_S))
            self.accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[limit])
            self.process = runtime.start(
                self.accelerator, self.recipe.train, self.recipe.data, self.environ
            )

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes that joined, in order."""
        if self.process is None or self.process.world_size == 1:
            return [value]
        from accelerate.utils import gather_object

        try:
            return list(gather_object([value]))
        except Exception as error:
            self.fault(f"the processes cannot exchange data ({reason(error)}): see network above")
            self.process = None  # and so alone from here on
            return [value]

    def input(self) -> Facts:
        """What the input delivers, what the step asks for, and whether that is enough."""
        self.decode = decoding.agree(self.gather(self.decode))
        rates = self.gather(attempt(self.measure))
        facts: Facts = {"decode": self.decode, "why": self.why_decode.removeprefix("decode: ")}
        known = [rate for rate in rates if isinstance(rate, float)]
        if len(known) < len(rates):
            return {**facts, "input": next(r for r in rates if r not in known), **self.step}
        train_set, size = self.splits[0], self.world.size
        delivers = sum(known) / len(known) * size
        facts["input_images_per_s"] = delivers
        if len(known) < size:
            facts["measured"] = f"in {len(known)} of {size} processes, and taken {size} times"
        decode = "raw" if train_set.store == "raw" else self.decode
        facts["of"] = forecast.describe(train_set, decode, self.threads, size)
        facts |= self.step
        if asked := self.step.get("step_images_per_s", 0.0) * size:
            facts["verdict"] = f"the input is {delivers / asked:.1f} times as fast as the steps"
            if delivers < forecast.HEADROOM * asked:
                remedies = forecast.advice_for(train_set, decode, self.threads)
                facts["verdict"] += f", and limits them; {remedies['decode']}"
            facts["epoch_min"] = train_set.num_samples / min(asked, delivers) / 60
        return facts

    def measure(self) -> float:
        """Images/s of this process's input, with that of the others at the same time."""
        import torch

        from fasttrain import data

        if not self.splits:
            raise config.ConfigError("there are no images")
        train_set, plan, rank = self.splits[0], self.plan, self.process and self.process.rank
        if plan is None:  # then of any batches
            some = config.Train(global_batch_size=min(64, train_set.num_samples))
            plan, rank = schedule.make_plan(some, config.Optim(), train_set.num_samples, 1), 0
        device = self.process.device if self.process else torch.device("cpu")
        half = device.type == "cuda" and self.recipe.train.precision != "no"
        settings = self.recipe.data.model_copy(update={"decode": self.decode})
        place = data.Placement(device, half, self.threads)
        return data.measure(train_set, settings, plan, rank or 0, place, seconds=1.0)

    # ---- the run and the job

    def run(self) -> Facts:
        """The plan and the run folder."""
        recipe, plan, folder = self.recipe, self.plan, run_folder.run_dir(self.recipe)
        done = None
        with self.told():
            if config.number_in(self.environ, "SLURM_RESTART_COUNT", 0):  # as train.py does
                again = recipe.checkpoint.model_copy(update={"resume": "auto"})
                recipe = recipe.model_copy(update={"checkpoint": again})
            done = run_folder.check(recipe)
        if message := cannot_write(folder):
            self.fault(
                f'[log] run_dir = "{folder}": cannot be written ({message}); choose another with '
                "--set log.run_dir=..."
            )
        return {
            "network": f"MobileNetV3-{recipe.model.arch.capitalize()} {recipe.model.width:g}",
            "processes": self.world.size,
            "why_so_many": self.world.source,
            "global_batch": recipe.train.global_batch_size,
            "micro_batch": plan.micro_batch_size if plan else "unknown",
            "accumulation": plan.accumulation if plan else "unknown",
            "steps_per_epoch": plan.steps_per_epoch if plan and self.splits else "unknown",
            "total_steps": plan.total_steps if plan and self.splits else "unknown",
            "run_folder": f"{folder}{', where the run is done' if done else ''}",
            "run_folder_free_gb": shutil.disk_usage(existing(folder)).free / 1e9,
        }

    def job(self) -> Facts:
        """SLURM's, and all processes with the time it takes them to exchange gradients."""
        from fasttrain import runtime

        facts, process = slurm(self.environ, time.time()), self.process
        if process is None or process.world_size == 1:
            return facts
        about = {
            "rank": process.rank,
            "host": platform.node(),
            "device": runtime.device_name(process.device),
            "cpus": len(os.sched_getaffinity(0)),
            "threads": process.cpu_threads,
        }
        speeds = {**self.found.get("storage", {}), **self.step}
        of_all = ("in_order_mb_per_s", "at_random_images_per_s", "step_images_per_s")
        about |= {name: speeds[name] for name in of_all if name in speeds}
        facts["processes"] = self.gather(about)
        digests = [split.digest for split in self.splits]
        found = self.gather(runtime.facts(process, self.recipe, digests))
        with self.told():
            runtime.check_alike(found)
        classes = len(self.splits[0].classes) if self.splits else 1000
        exchange = attempt(time_exchange, self.recipe, classes, process.device)
        return facts | (exchange if isinstance(exchange, dict) else {"all_reduce": exchange})


# --------------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------------


def rows(facts: Facts) -> Iterator[tuple[str, str]]:
    """A label and a text for each line of a section."""
    for name, value in facts.items():
        ending = next((ending for ending in UNITS if name.endswith(ending)), "")
        label = name.removesuffix(ending)
        label = label.replace("_", " ") if label.islower() else label  # or an environment variable
        for each in (value or [None]) if isinstance(value, list) else [value]:
            none = "not set" if label.isupper() else "none"
            yield label, none if each is None else shown(each, UNITS.get(ending, ""))
            label = ""


def shown(value: Any, unit: str = "") -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(" ".join(row) for row in rows(value))
    if isinstance(value, int | float):
        whole = isinstance(value, int) or value >= 100
        return f"{value:,.0f} {unit}".strip() if whole else f"{value:.3g} {unit}".strip()
    return str(value) or "empty"


def reason(error: Exception) -> str:
    said = str(error).strip().splitlines() or ["nothing said"]
    return said[0] if isinstance(error, config.Fault) else f"{type(error).__name__}: {said[0]}"


def attempt(probe: Callable[..., Any], *arguments: Any) -> Any:
    """What a probe finds, or `unknown (...)`."""
    try:
        return probe(*arguments)
    except Exception as error:
        return f"unknown ({reason(error)})"


def text_of(path: Path) -> str:
    """What a small file says, or unknown."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return "unknown"


# --------------------------------------------------------------------------------------------------
# The node and its job
# --------------------------------------------------------------------------------------------------


def smi(*arguments: str) -> str:
    """What nvidia-smi says; empty where there is none or it fails."""
    command = ["nvidia-smi", *arguments]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SMI_S)
        return done.stdout
    return ""


def torch_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def major(version: str) -> int:
    """13 of `13.0`; 0 of no version."""
    found = re.match(r"\d+", version)
    return int(found[0]) if found else 0


def agree(torch_cuda: str, dali_cuda: str = "") -> bool | str:
    """Whether torch and DALI are built for the same CUDA."""
    if not major(torch_cuda) or not major(dali_cuda):
        return "unknown (one of them is built without CUDA)"
    return major(torch_cuda) == major(dali_cuda)


def cuda_faults(built: Mapping[str, str], driver: str) -> list[str]:
    """What was built for a newer CUDA than the driver has."""
    return [
        f"{name} is built for CUDA {version}, but the driver has CUDA {driver}: update the driver, "
        'or install what suits it (README.md, "CUDA 12")'
        for name, version in built.items()
        if major(version) > major(driver)
    ]


def link_counts(text: str) -> list[str]:
    """`["28 x NV18, NVLink"]`: kinds of links between two GPUs, of `nvidia-smi topo -m`."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()  # the heading is underlined
    table = [line.split() for line in lines if re.match(r"GPU\d+\s", line)]
    kinds = Counter(row[1 + column] for n, row in enumerate(table) for column in range(n))
    return [
        f"{count} x {kind}, {'NVLink' if kind.startswith('NV') else 'PCIe'}"
        for kind, count in kinds.most_common()
    ]


def interfaces(root: Path = Path("/sys/class/net")) -> dict[str, str]:
    """`{"eth0": "up, 25,000 Mbit/s"}`, without the loopback."""
    found = {}
    for path in sorted(root.glob("*/operstate")):
        if (name := path.parent.name) != "lo":
            speed = text_of(path.with_name("speed"))  # -1 where unknown
            text = f"{int(speed):,} Mbit/s" if speed.isdecimal() else "speed unknown"
            found[name] = f"{text_of(path)}, {text}"
    return found


def infiniband(root: Path = Path("/sys/class/infiniband")) -> list[str]:
    """`["mlx5_0 port 1: ACTIVE, 400 Gb/sec (4X NDR)"]`."""
    return [
        f"{port.parent.parent.name} port {port.name}: "
        f"{text_of(port / 'state').rpartition(': ')[2]}, {text_of(port / 'rate')}"
        for port in sorted(root.glob("*/ports/*"))
    ]


def quota_in(text: str) -> float | None:
    """CPUs that a container's quota amounts to, of `cpu.max`; None without one."""
    quota, _, period = text.partition(" ")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def world_of(environ: Mapping[str, str], gpus: int) -> World:
    """How many processes the run has.

    Args:
        gpus: that this process may use.
    Raises:
        ConfigError: the environment has something else than numbers.
    """

    def number(name: str, default: int) -> int:
        return config.number_in(environ, name, default)

    if "WORLD_SIZE" in environ or "ACCELERATE_MIXED_PRECISION" in environ:
        return World(number("WORLD_SIZE", 1), number("LOCAL_WORLD_SIZE", 1), "as launched")
    if "SLURM_NNODES" in environ:
        here = number("FT_PROCS_PER_NODE", 0) or number("SLURM_GPUS_ON_NODE", 0) or gpus or 1
        return World(number("SLURM_NNODES", 1) * here, here, "as train.sbatch would launch here")
    if gpus:
        return World(gpus, gpus, "one for each GPU of this node")
    return World(1, 1, "one, as there is no GPU")


def launch_faults(environ: Mapping[str, str], gpus: int, known: Mapping[str, str]) -> Iterator[str]:
    """Why processes could not join, of what can be told before they try."""
    here = environ.get("LOCAL_WORLD_SIZE", "")
    if here.isdecimal() and 0 < gpus < int(here):
        yield (
            f"{here} processes on this node, but {gpus} GPUs for them: launch {gpus} on each node, "
            "or ask for more GPUs"
        )
    wanted = environ.get("GLOO_SOCKET_IFNAME")
    if wanted and known and not set(wanted.split(",")) <= {*known, "lo"}:
        yield (
            f"GLOO_SOCKET_IFNAME = {wanted}: there is no such interface on this node, only "
            f"{', '.join(known)}; unset it, or name one that all nodes have"
        )


def slurm(environ: Mapping[str, str], now: float) -> Facts:
    """The job that this runs in; `now` in seconds since 1970."""
    if "SLURM_JOB_ID" not in environ:
        return {"slurm": None}
    end = environ.get("SLURM_JOB_END_TIME", "")
    left = (int(end) - now) / 60 if end.isdecimal() else "unknown"
    return {f"SLURM_{name}": environ.get(f"SLURM_{name}") for name in OF_JOBS} | {
        "time_left_min": left
    }


def time_exchange(recipe: config.Recipe, classes: int, device: Any) -> Facts:
    """Medians of adding up all gradients over the processes, in float32, and a single number."""
    import torch

    from fasttrain.model import build_model

    network = build_model(**recipe.model.model_dump(), num_classes=classes)
    numbers = sum(parameter.numel() for parameter in network.parameters())
    medians = []
    for count in (1, numbers):
        values = torch.zeros(count, device=device)
        seconds = []
        for _ in range(15):
            begun = time.perf_counter()
            torch.distributed.all_reduce(values)
            float(values[0])  # waits for the device
            seconds.append(time.perf_counter() - begun)
        medians.append(statistics.median(seconds[5:]))
    return {
        "gradients_mb": 4 * numbers / 1e6,
        "all_reduce_ms": 1e3 * medians[1],
        "all_reduce_rate_gb_per_s": 4 * numbers / 1e9 / medians[1],
        "all_reduce_of_one_ms": 1e3 * medians[0],
    }


# --------------------------------------------------------------------------------------------------
# Storage
# --------------------------------------------------------------------------------------------------


def num_bytes(splits: Sequence[Split]) -> int:
    return sum(sum(split.shard_bytes) for split in splits)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def cannot_write(folder: Path) -> str:
    """Why a folder cannot be made or written in; empty if it can."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)):
            return ""
    except OSError as error:
        return str(error.strerror)


def advice(kind: str, data: config.Data, size: int) -> list[str]:
    """What makes reading over a network faster or safer; `size` in bytes, of all shards."""
    if not kind.startswith(NETWORK) or data.stage:
        return []
    fits = size < min(shutil.disk_usage("/dev/shm").free, forecast.available_bytes()) / 2
    place = "/dev/shm/fasttrain" if fits else "/a/local/disk"
    found = [
        f"--set data.stage={place} copies the {size / 1e9:,.1f} GB to each node before it runs"
    ]
    if data.shuffle == "full":
        found.append("without a copy, --set data.shuffle=blocks reads in large pieces")
    if data.read == "mmap":
        found.append("without a copy, --set data.read=pread survives files that change")
    return found


def forget(file: int, offset: int, size: int) -> None:
    """Drops a range of a file from the page cache, where nothing holds it there."""
    first = offset - offset % FOLIO_BYTES
    end = -(-(offset + size) // FOLIO_BYTES) * FOLIO_BYTES
    os.posix_fadvise(file, first, end - first, os.POSIX_FADV_DONTNEED)


def read_in_order(split: Split) -> Facts:
    """Opens tars, taken at random, and reads each in large pieces."""
    done, reading_s, opening_s = 0, 0.0, []
    for path in random.sample(split.shard_paths, min(TARS, len(split.shard_paths))):
        begun = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            size = min(os.fstat(file.fileno()).st_size, IN_ORDER_BYTES - done)
            opening_s.append(time.perf_counter() - begun)
            forget(file.fileno(), 0, size)
            begun = time.perf_counter()
            while size > 0 and reading_s + time.perf_counter() - begun < READ_S:
                piece = len(file.read(min(PIECE_BYTES, size)))
                done, size = done + piece, size - piece if piece else 0
            reading_s += time.perf_counter() - begun
        if reading_s >= READ_S or done >= IN_ORDER_BYTES:
            break
    return {
        "opening_a_tar_ms": 1e3 * statistics.median(opening_s),
        "in_order_mb_per_s": done / 1e6 / reading_s,
    }


def read_at_random(split: Split, threads: int) -> Facts:
    """Reads single images, by as many threads as the loader has."""
    tars = random.sample(range(len(split.shard_paths)), min(TARS, len(split.shard_paths)))
    there = np.flatnonzero(np.isin(split.shard, tars)).tolist()
    samples = random.sample(there, min(1024, len(there)))
    at_most = max(1, AT_RANDOM_BYTES // int(split.size[samples].mean()))
    cached: list[bool] = []
    taken: list[float] = []
    with contextlib.ExitStack() as stack:
        files: dict[int, int] = {}
        ranges = []
        for sample in samples[:at_most]:
            shard = int(split.shard[sample])
            if shard not in files:
                opened = stack.enter_context(split.shard_paths[shard].open("rb", buffering=0))
                files[shard] = opened.fileno()
                os.posix_fadvise(files[shard], 0, 0, os.POSIX_FADV_RANDOM)  # what is not asked for
            ranges.append((files[shard], int(split.offset[sample]), int(split.size[sample])))
            forget(*ranges[-1])

        def read(place: tuple[int, int, int]) -> None:
            file, offset, size = place
            start = time.perf_counter()
            if start - begun < READ_S:
                if (at_once := is_cached(file, offset)) is not None:
                    cached.append(at_once)
                os.pread(file, size, offset)
                taken.append(time.perf_counter() - start)

        begun = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, ranges))
        seconds = time.perf_counter() - begun
    return {
        "at_random_images_per_s": len(taken) / seconds,
        "one_at_random_ms": 1e3 * statistics.median(taken),
        "at_random_by_threads": threads,
        "of_that_in_page_cache": f"{statistics.mean(cached):.0%}" if cached else "unknown",
    }


def is_cached(file: int, offset: int) -> bool | None:
    """Whether a byte of a file is in the page cache; None where the file system does not tell."""
    try:
        return os.preadv(file, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError:
        return None


# --------------------------------------------------------------------------------------------------
# Training steps
# --------------------------------------------------------------------------------------------------


def alone(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is no part of the launch, but has this one's GPU."""
    here = int(environ.get("LOCAL_RANK", "0"))
    visible = (environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(here + 1)))).split(
        ","
    )
    kept = {key: value for key, value in environ.items() if not key.startswith(OF_LAUNCHERS)}
    return kept | {"CUDA_VISIBLE_DEVICES": visible[min(here, len(visible) - 1)]}


def run_step(job: str, environ: Mapping[str, str]) -> Facts:
    """Speed and memory of updates as `benchmark.py` measures them; or `failed`, and why."""
    script = str(Path(__file__).with_name("benchmark.py"))
    command = [sys.executable, script, "measure", "step", job]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=STEP_S, env=dict(environ)
        )
    except subprocess.TimeoutExpired:
        return {"step": f"unknown (no answer in {STEP_S} s)"}
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": said[-1][:300]}
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "step_images_per_s": found["images_per_s"],
        "step_ms": found["step_ms"],
        "step_peak_memory_gb": found["peak_gib"] * 2**30 / 1e9,
    }


def smaller_batch(plan: Plan) -> int:
    """The largest micro-batch, of at most half the images, that divides evenly; 0 for none."""
    images = plan.micro_batch_size * plan.accumulation
    return max((n for n in range(1, plan.micro_batch_size // 2 + 1) if images % n == 0), default=0)


if __name__ == "__main__":
    main()
