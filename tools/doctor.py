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
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import probes
from probes import Facts

from fasttrain import (
    alike,
    caches,
    config,
    decoding,
    forecast,
    gpus,
    launch,
    reading,
    run_folder,
    schedule,
    settled,
    staging,
    train,
)
from fasttrain.batch import half_images
from fasttrain.faults import ConfigError, Fault, stop
from fasttrain.schedule import Plan
from fasttrain.shards import Split

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fasttrain.runtime import Process


UNITS = {
    "_images_per_s": "images/s",
    "_mb_per_s": "MB/s",
    "_gb_per_s": "GB/s",
    "_mb": "MB",
    "_gb": "GB",
    "_ms": "ms",
    "_min": "minutes",
}
JOIN_S = 300  # that processes wait for each other
SOCKETS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA")
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
    except ConfigError as error:
        stop(str(error))
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

    def __init__(self, recipe: config.Recipe, environ: MutableMapping[str, str]) -> None:
        self.recipe, self.environ = recipe, environ
        self.changes: list[str] = []  # of the recipe, as it is settled
        self.prints = environ.get("RANK", environ.get("SLURM_PROCID", "0")) == "0"
        self.found: dict[str, Facts] = {}
        self.faults: list[str] = []
        self.num_gpus = 0  # for this process
        self.world = World(1, 1, "unknown")
        self.splits: list[Split] = []  # train, val; none where they cannot be opened
        self.plan: Plan | None = None
        self.threads = 1  # that decode
        self.decode, self.why_decode = "cpu", "unknown"
        self.chosen = recipe.data
        self.step: Facts = {"step": "not tried without a GPU"}
        self.accelerator: Accelerator | None = None
        self.process: Process | None = None  # None where the processes cannot join

    def examine(self) -> None:
        """All processes do all of this, as they wait for each other."""
        with self.told():
            self.recipe, self.changes = settled.for_training(self.recipe, self.environ)
        self.look(self.launch)

        reading.raise_file_limit()
        self.num_gpus = probes.torch_gpus() if gpus.has_gpu(self.environ) else 0
        for probe in (self.versions, self.gpus, self.network):
            self.look(probe)
        with self.told():
            self.world = world_of(self.environ, self.num_gpus)
            gpus.check_launch(self.recipe, self.environ)
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
        if not self.num_gpus and self.recipe.train.precision == "bf16":
            self.look(self.precision)
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
        except Fault as fault:
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

    def launch(self) -> Facts:
        """What the launch asks of Accelerate; changes this process's environment as a run does."""
        # Tasks of srun or MPI may look at a node each; the run itself is launched by train.sbatch.
        tasks = ("SLURM_STEP_NUM_TASKS", *launch.MPI_SIZES)
        environ = {key: value for key, value in self.environ.items() if key not in tasks}
        try:
            remarks = launch.settle(environ, self.recipe.train.precision)
        finally:  # what is refused would be in the way of looking further
            for name in (set(self.environ) - set(environ) - set(tasks)) | set(launch.REFUSED):
                self.environ.pop(name, None)
            self.environ["USE_TORCH_XLA"] = "0"
        launch.check_processes(environ)
        return {"remarks": remarks + self.changes}

    def versions(self) -> Facts:
        import torch

        import fasttrain
        from fasttrain import runtime

        names = ["torch", "torchvision", "accelerate"]
        names += [d.name for d in metadata.distributions() if d.name.startswith("nvidia-dali-cuda")]
        built = {"torch": torch.version.cuda or "none"}
        if digits := re.search(r"cuda(\d+)0$", names[-1]):  # nvidia-dali-cuda130
            built["DALI"] = digits[1]
        drivers = probes.smi("--query-gpu=driver_version", "--format=csv,noheader").split()
        # Such as "CUDA Version: 13.0": what is built for that or an older one runs on it.
        newest = re.search(r"CUDA[\w ]* Version: *([\d.]+)", probes.smi())
        for message in probes.cuda_faults(built, newest[1]) if newest else ():
            self.fault(message)
        return {
            "fasttrain": f"{fasttrain.__version__}, commit {runtime.commit() or 'unknown'}",
            "python": platform.python_version(),
            **{name: attempt(metadata.version, name) for name in names},
            "driver": drivers[0] if drivers else None,
            "cuda": {**built, "driver": newest[1] if newest else None},
            "torch_and_dali_agree": probes.same_cuda(*built.values()),
        }

    def gpus(self) -> Facts:
        query = "--query-gpu=index,name,memory.total"
        # Such as "0, NVIDIA H100, 81559 MiB".
        found = probes.smi(query, "--format=csv,noheader").splitlines()
        seen, visible = probes.torch_gpus(), self.environ.get("CUDA_VISIBLE_DEVICES")
        on_cpu = launch.on_cpu(self.environ)
        if found and not seen and not on_cpu and visible not in ("", "-1", "NoDevFiles"):
            self.fault(
                f"torch finds none of the {len(found)} GPUs and would train on the CPU: install a "
                "torch with CUDA, update the driver, or say so with ACCELERATE_USE_CPU=1"
            )
        return {
            "found": found,
            "for_this_process": seen,
            "CUDA_VISIBLE_DEVICES": visible,
            "links": probes.link_counts(probes.smi("topo", "-m")),
        }

    def network(self) -> Facts:
        return {
            "interfaces": [f"{name}: {text}" for name, text in probes.interfaces().items()],
            "infiniband": probes.infiniband(),
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
            "quota": probes.quota_in(probes.text_of(Path("/sys/fs/cgroup/cpu.max"))),
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
            raise ConfigError(
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
            "size_gb": probes.num_bytes(self.splits) / 1e9,
        }

    def storage(self) -> Facts:
        """How fast the folder is, by reading from it for some seconds; and `data.stage`."""
        data, train_set = self.recipe.data, self.splits[0]
        kind = attempt(staging.file_system_of, train_set.root)
        facts: Facts = {"file_system": kind, "over_a_network": kind.startswith(probes.NETWORK)}
        try:
            facts |= probes.read_in_order(train_set)
            facts |= probes.read_at_random(train_set, data.read_threads)
        except OSError as error:
            self.fault(f"{train_set.root} cannot be read ({error}): mend that or copy it anew")
        if data.stage:
            facts |= self.stage(data.stage)
        return facts | {"advice": probes.advice(kind, data, probes.num_bytes(self.splits))}

    def stage(self, stage: Path) -> Facts:
        """The folder that the shards are copied into, and whether they have room there."""
        folder = staging.folder_of(self.splits[0].root, stage)
        wanted = staging.bytes_to_copy(self.splits[0].root, self.recipe.data)
        free = staging.free_bytes(probes.existing(folder))
        if message := probes.cannot_write(folder):
            self.fault(f"[data] stage = {stage}: cannot be written ({message}); name another")
        with self.told():
            staging.check_room(self.splits[0].root, self.recipe.data, wanted, free)
        return {
            "stage": str(folder),
            "stage_to_copy_gb": wanted / 1e9,
            "stage_free_gb": free / 1e9,
        }

    # ---- trials

    def choose_decoder(self) -> None:
        """As train.py does."""
        settings = self.recipe.data

        def unknown(why: str) -> None:
            self.why_decode = f"unknown ({why})"

        with self.told(unknown):
            for split in self.splits[:1]:
                gpu = self.num_gpus > 0
                half = half_images(gpu, self.recipe.train.precision)
                train = self.recipe.train
                micro = train.micro_batch_size or max(1, train.global_batch_size // self.world.size)
                job = decoding.Job(gpu, self.threads, micro, half)
                self.chosen, self.why_decode = decoding.choose_decoder(
                    split, settings, job, self.environ
                )
                self.decode = self.chosen.decode

    def precision(self) -> Facts:
        """Whether a CPU takes longer with bfloat16, by some passes."""
        import torch

        from fasttrain import modes
        from fasttrain.model import build_model

        torch.set_num_threads(self.threads)
        network = build_model(**self.recipe.model.network(), num_classes=1000)
        network.to(memory_format=torch.channels_last)
        px = schedule.largest_crop_px(self.recipe.data.crop_px)
        ratio = modes.bf16_ratio(network, px)
        if ratio < modes.TOO_SLOW:
            self.fault(modes.slow_bf16(ratio))
        return {"bf16": f"{ratio:.2g} times as fast as float32 on this CPU"}

    def try_step(self, plan: Plan) -> Facts:
        """Some updates on random pixels, by a process apart: one that lacks memory may crash."""
        from benchmarks import steps

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
        facts = attempt(probes.run_step, job.model_dump_json(), probes.on_own_gpu(self.environ))
        if isinstance(facts, str):
            return {"step": facts}
        if message := facts.get("failed"):
            remedy = "see versions and gpus above"
            if "out of memory" in message.lower():
                smaller = probes.smaller_batch(plan)
                remedy = (
                    f"--set train.micro_batch_size={smaller}" if smaller else "use a larger GPU"
                )
            self.fault(f"a training step of {job.batch} images on this GPU: {message}: {remedy}")
        return facts

    def join(self) -> None:
        """Becomes one of the processes of the launch; sets `process` unless it cannot."""
        from fasttrain import runtime

        if self.environ.get("WORLD_SIZE", "1") != "1":
            faults = [*launch_faults(self.environ, self.num_gpus, probes.interfaces())]
            for fault in faults:
                self.fault(fault)
            if faults or not self.environ.get("MASTER_ADDR"):  # it would wait for ever
                return
        where = "see network above"
        with self.told(lambda why: self.fault(f"the processes cannot join ({why}): {where}")):
            self.accelerator = runtime.accelerator_for("no", timedelta(seconds=JOIN_S))
            self.process = runtime.start(self.accelerator, self.recipe, self.environ)

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
        self.decode = decoding.surest(self.gather(self.decode))
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

        from fasttrain import loaders
        from fasttrain.batch import Placement

        if not self.splits:
            raise ConfigError("there are no images")
        train_set, plan, rank = self.splits[0], self.plan, self.process and self.process.rank
        if plan is None:  # then of any batches
            some = config.Train(global_batch_size=min(64, train_set.num_samples))
            plan, rank = schedule.make_plan(some, config.Optim(), train_set.num_samples, 1), 0
        device = self.process.device if self.process else torch.device("cpu")
        half = half_images(device.type == "cuda", self.recipe.train.precision)
        settings = self.chosen.model_copy(update={"decode": self.decode})
        place = Placement(device, half, self.threads)
        return loaders.measure(train_set, settings, plan, rank or 0, place, seconds=1.0)[0]

    # ---- the run and the job

    def run(self) -> Facts:
        """The plan and the run folder."""
        recipe, plan, folder = self.recipe, self.plan, run_folder.run_dir(self.recipe)
        done = None
        with self.told():
            done = run_folder.check(recipe)
        if message := probes.cannot_write(folder):
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
            "caches": caches.remarks() or str(caches.cache_dir()),
            "run_folder_free_gb": shutil.disk_usage(probes.existing(folder)).free / 1e9,
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
        found = self.gather(alike.facts(process, self.recipe, digests))
        with self.told():
            alike.check(found)
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
    return said[0] if isinstance(error, Fault) else f"{type(error).__name__}: {said[0]}"


def attempt(probe: Callable[..., Any], *arguments: Any) -> Any:
    """What a probe finds, or `unknown (...)`."""
    try:
        return probe(*arguments)
    except Exception as error:
        return f"unknown ({reason(error)})"


# --------------------------------------------------------------------------------------------------
# The job
# --------------------------------------------------------------------------------------------------


def world_of(environ: Mapping[str, str], gpus: int) -> World:
    """How many processes the run has.

    Args:
        gpus: that this process may use.
    Raises:
        ConfigError: the environment has something else than numbers.
    """

    def number(name: str, default: int) -> int:
        return launch.number_in(environ, name, default)

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
    from fasttrain.model import build_model

    network = build_model(**recipe.model.network(), num_classes=classes)
    numbers = sum(parameter.numel() for parameter in network.parameters())
    of_one_s, of_all_s = (probes.all_reduce_s(count, device, times=10) for count in (1, numbers))
    return {
        "gradients_mb": 4 * numbers / 1e6,
        "all_reduce_ms": 1e3 * of_all_s,
        "all_reduce_rate_gb_per_s": 4 * numbers / 1e9 / of_all_s,
        "all_reduce_of_one_ms": 1e3 * of_one_s,
    }


if __name__ == "__main__":
    main()
