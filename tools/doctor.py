"""Checks whether this node and this job can train a recipe, and reports what they have.

    python tools/doctor.py RECIPE [--set SECTION.KEY=VALUE ...]
    accelerate launch --multi_gpu --num_processes 8 tools/doctor.py RECIPE

Checks versions, GPUs, network, CPUs, memory, storage, decoding, the plan and the run folder. This
usually takes less than a minute. If it is launched like train.py, it checks every process and times
the all-reduce of the gradients. It trains nothing and does not change the run folder.

A line that begins with FAULT: names something that would stop the run, and the remedy. A value that
cannot be found out is "unknown", with the reason. The last line on standard output is one JSON
object. The exit code is 0; 1 if there are faults; 2 if the command line or the recipe is wrong.
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
from dataclasses import replace
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
    decoder,
    decoding,
    forecast,
    gpus,
    launch,
    reading,
    run_folder,
    schedule,
    settled,
    staging,
    teacher_labels,
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
JOIN_S = 300  # time limit of joining, and of each collective
SOCKETS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA")
SLURM_VARIABLES = (
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
    except Exception as error:  # a bug of the doctor; still prints what was found before
        doctor.fault(f"the doctor failed, please report this: {reason(error)}")
    raise SystemExit(doctor.finish())


class World(NamedTuple):
    """The processes of the run."""

    size: int
    here: int  # the number of processes on this node
    source: str  # where these numbers come from


class Doctor:
    """Runs one probe after the other. Only rank 0 prints."""

    def __init__(self, recipe: config.Recipe, environ: MutableMapping[str, str]) -> None:
        self.recipe, self.environ = recipe, environ
        self.changes: list[str] = []  # sentences about how the recipe was settled
        self.prints = environ.get("RANK", environ.get("SLURM_PROCID", "0")) == "0"
        self.found: dict[str, Facts] = {}
        self.faults: list[str] = []
        self.num_gpus = 0  # that this process may use
        self.world = World(1, 1, "unknown")
        self.splits: list[Split] = []  # train and val; empty if they cannot be opened
        self.plan: Plan | None = None
        self.threads = 1  # for decoding
        self.decoder = replace(decoder.as_recipe_says(recipe.data), strategy="cpu")
        self.why_decode = "unknown"
        self.step: Facts = {"step": "not tried without a GPU"}
        self.accelerator: Accelerator | None = None
        self.process: Process | None = None  # None if the processes cannot join

    def examine(self) -> None:
        """Runs all probes. Every rank must call this, because it contains collectives."""
        with self.collect_faults():
            self.recipe, self.changes = settled.for_training(self.recipe, self.environ)
        self.look(self.launch)

        reading.raise_file_limit()
        self.num_gpus = probes.torch_gpus() if gpus.has_gpu(self.environ) else 0
        for probe in (self.versions, self.gpus, self.network):
            self.look(probe)
        with self.collect_faults():
            self.world = world_of(self.environ, self.num_gpus)
            gpus.check_launch(self.recipe, self.environ)
        for probe in (self.cpus, self.memory, self.data):
            self.look(probe)
        with self.collect_faults():
            train_images = self.splits[0].num_samples if self.splits else None
            batch = self.recipe.train.global_batch_size
            self.plan = schedule.make_plan(
                self.recipe.train, self.recipe.optim, train_images or batch, self.world.size,
                self.recipe.distill,
            )  # fmt: skip
            if self.splits:
                teacher_labels.open_for(self.recipe, self.plan, self.splits[0], check=False)
        self.choose_decoder()
        if self.plan and self.num_gpus:
            self.step = self.try_step(self.plan)  # before this process touches the GPU
        if not self.num_gpus and self.recipe.train.precision == "bf16":
            self.look(self.precision)
        self.join()
        self.look(self.input)
        if self.splits and self.environ.get("LOCAL_RANK", "0") == "0":
            self.look(self.storage)  # after the input, because it drops images from the page cache
        for probe in (self.run, self.job):
            self.look(probe)
        rank = self.process.rank if self.process else 0
        for name, faults in self.gather((f"rank {rank} on {platform.node()}", self.faults)):
            for fault in faults:
                if fault not in self.faults:
                    self.fault(f"{name}: {fault}")
        if self.accelerator:
            attempt(self.accelerator.end_training)

    # ---- reporting

    def say(self, line: str) -> None:
        if self.prints:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    def look(self, probe: Callable[[], Facts]) -> None:
        """Runs a probe. Prints and keeps what it finds, or why it finds nothing."""
        facts: Facts = {"unknown": "because of a fault, see below"}
        with self.collect_faults(lambda why: facts.update(unknown=why)):
            facts = probe()
        self.found[probe.__name__] = facts
        self.say(f"\n{probe.__name__}")
        for label, text in rows(facts):
            self.say(f"  {label:<24}{text}")

    def fault(self, message: str) -> None:
        """Records a fault and its remedy, as one line."""
        line = " ".join(part.strip() for part in message.splitlines())
        if line not in self.faults:
            self.faults.append(line)

    @contextlib.contextmanager
    def collect_faults(self, on_error: Callable[[str], None] | None = None) -> Iterator[None]:
        """Records a `Fault` that is raised within.

        Args:
            on_error: gets the reason of any other error; None: the error is raised.
        """
        try:
            yield
        except Fault as fault:
            self.fault(str(fault))
        except Exception as error:
            if on_error is None:
                raise
            on_error(reason(error))

    def finish(self) -> int:
        """Prints the faults and the JSON object. Returns the exit code."""
        self.say("" if self.faults else "\nno fault was found")
        for fault in self.faults:
            self.say(f"FAULT: {fault}")
            if not self.prints and "RANK" not in self.environ:  # an srun task outside a launch
                sys.stderr.write(f"{platform.node()}: FAULT: {fault}\n")
        self.say(json.dumps({**self.found, "faults": self.faults}, default=str))
        return 1 if self.faults else 0

    # ---- the node

    def launch(self) -> Facts:
        """Checks what the launch asks of Accelerate. Changes the environment as a run does."""
        # Each task of srun or MPI may examine its own node. train.sbatch launches the run itself.
        tasks = ("SLURM_STEP_NUM_TASKS", *launch.MPI_SIZES)
        environ = {key: value for key, value in self.environ.items() if key not in tasks}
        try:
            remarks = launch.settle(environ, self.recipe.train.precision)
        finally:  # refused variables would make the next probes fail
            for name in (set(self.environ) - set(environ) - set(tasks)) | set(launch.REFUSED):
                self.environ.pop(name, None)
            self.environ["USE_TORCH_XLA"] = "0"
        launch.check_processes(environ)
        return {"remarks": remarks + self.changes}

    def versions(self) -> Facts:
        """Reports the versions of packages and of the driver. Faults a driver that is too old."""
        import torch

        import fasttrain
        from fasttrain import runtime

        names = ["torch", "torchvision", "accelerate"]
        names += [d.name for d in metadata.distributions() if d.name.startswith("nvidia-dali-cuda")]
        built = {"torch": torch.version.cuda or "none"}
        if digits := re.search(r"cuda(\d+)0$", names[-1]):  # nvidia-dali-cuda130
            built["DALI"] = digits[1]
        drivers = probes.smi("--query-gpu=driver_version", "--format=csv,noheader").split()
        # Such as "CUDA Version: 13.0". The driver runs what is built for that CUDA or an older one.
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
        """Reports the GPUs of the node, those of this process, and the links between them."""
        query = "--query-gpu=index,name,memory.total"
        # A line is such as "0, NVIDIA H100, 81559 MiB".
        found = probes.smi(query, "--format=csv,noheader").splitlines()
        seen, visible = probes.torch_gpus(), self.environ.get("CUDA_VISIBLE_DEVICES")
        on_cpu = launch.on_cpu(self.environ)
        if found and not seen and not on_cpu and visible not in ("", "-1", "NoDevFiles"):
            self.fault(
                f"torch finds none of the {len(found)} GPUs and would train on the CPU: install a "
                "torch with CUDA, update the driver, or set ACCELERATE_USE_CPU=1 to use the CPU"
            )
        return {
            "found": found,
            "for_this_process": seen,
            "CUDA_VISIBLE_DEVICES": visible,
            "links": probes.link_counts(probes.smi("topo", "-m")),
        }

    def network(self) -> Facts:
        """Reports network interfaces, InfiniBand ports and the variables that choose among them."""
        return {
            "interfaces": [f"{name}: {text}" for name, text in probes.interfaces().items()],
            "infiniband": probes.infiniband(),
            **{name: self.environ.get(name) for name in SOCKETS},
        }

    def cpus(self) -> Facts:
        """Reports the CPUs and their share per process. Sets `threads`."""
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
        """Reports the free memory and the size of /dev/shm."""
        shm = shutil.disk_usage("/dev/shm")
        return {
            "available_gb": forecast.available_bytes() / 1e9,
            "/dev/shm_gb": shm.total / 1e9,
            "/dev/shm_free_gb": shm.free / 1e9,
        }

    # ---- the data

    def data(self) -> Facts:
        """Opens the data set and reports its size. Sets `splits`."""
        root = self.recipe.data.root
        try:
            self.splits += train.open_data(self.recipe.data)
        except OSError as error:
            raise ConfigError(
                f"[data] root = {root}: cannot be read ({error}); repair that, or name another "
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
        """Reads from the folder for some seconds, and reports its speed. Checks `data.stage`."""
        data, train_set = self.recipe.data, self.splits[0]
        kind = attempt(staging.file_system_of, train_set.root)
        facts: Facts = {"file_system": kind, "over_a_network": kind.startswith(probes.NETWORK)}
        try:
            facts |= probes.read_in_order(train_set)
            facts |= probes.read_at_random(train_set, data.read_threads)
        except OSError as error:
            self.fault(f"{train_set.root} cannot be read ({error}): repair that or copy it again")
        if data.stage:
            facts |= self.stage(data.stage)
        return facts | {"advice": probes.advice(kind, data, probes.num_bytes(self.splits))}

    def stage(self, stage: Path) -> Facts:
        """Checks that the shards can be copied into the stage, and that they have room there."""
        folder = staging.folder_of(self.splits[0].root, stage)
        to_copy = staging.bytes_to_copy(self.splits[0].root, self.recipe.data)
        free = staging.free_bytes(probes.existing(folder))
        if message := probes.cannot_write(folder):
            self.fault(f"[data] stage = {stage}: cannot be written ({message}); name another")
        with self.collect_faults():
            staging.check_room(self.splits[0].root, self.recipe.data, to_copy, free)
        return {
            "stage": str(folder),
            "stage_to_copy_gb": to_copy / 1e9,
            "stage_free_gb": free / 1e9,
        }

    # ---- trials

    def choose_decoder(self) -> None:
        """Chooses the decoder with the function that train.py uses."""
        settings = self.recipe.data

        def unknown(why: str) -> None:
            self.why_decode = f"unknown ({why})"

        with self.collect_faults(unknown):
            for split in self.splits[:1]:
                gpu = self.num_gpus > 0
                half = half_images(gpu, self.recipe.train.precision)
                train = self.recipe.train
                micro = train.micro_batch_size or max(1, train.global_batch_size // self.world.size)
                job = decoding.Job(gpu, self.threads, micro, half)
                self.decoder, self.why_decode = decoding.choose_decoder(
                    split, settings, job, self.environ
                )

    def precision(self) -> Facts:
        """Times some passes in bfloat16 and in float32. Faults a CPU that is slow in bfloat16."""
        import torch

        from fasttrain import modes
        from fasttrain.model import build_model

        torch.set_num_threads(self.threads)
        network = build_model(**self.recipe.model.network(), num_classes=1000)
        network.to(memory_format=torch.channels_last)
        px = schedule.largest_px(self.recipe.data)
        ratio = modes.bf16_ratio(network, px)
        if ratio < modes.TOO_SLOW:
            self.fault(modes.slow_bf16(ratio))
        return {"bf16": f"{ratio:.2g} times as fast as float32 on this CPU"}

    def try_step(self, plan: Plan) -> Facts:
        """Times some updates on random pixels, in its own process, which may run out of memory."""
        from benchmarks import steps

        job = steps.StepJob(
            name="fasttrain",
            arch=self.recipe.model.arch,
            width=self.recipe.model.width,
            batch=plan.micro_batch_size,
            px=schedule.largest_px(self.recipe.data),
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
        """Joins the other processes of the launch. Sets `process`, or records why it cannot."""
        from fasttrain import runtime

        if self.environ.get("WORLD_SIZE", "1") != "1":
            faults = [*launch_faults(self.environ, self.num_gpus, probes.interfaces())]
            for fault in faults:
                self.fault(fault)
            if faults or not self.environ.get("MASTER_ADDR"):  # joining would wait forever
                return

        def on_error(why: str) -> None:
            self.fault(f"the processes cannot join ({why}): see network above")

        with self.collect_faults(on_error):
            self.accelerator = runtime.accelerator_for("no", timedelta(seconds=JOIN_S))
            self.process = runtime.start(self.accelerator, self.recipe, self.environ)

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes that joined, by rank."""
        if self.process is None or self.process.world_size == 1:
            return [value]
        from accelerate.utils import gather_object

        try:
            return list(gather_object([value]))
        except Exception as error:
            self.fault(f"the processes cannot exchange data ({reason(error)}): see network above")
            self.process = None  # continue without the others
            return [value]

    def input(self) -> Facts:
        """Measures the input and compares its rate with that of the training steps."""
        decode = decoder.surest(self.gather(self.decoder.strategy))
        self.decoder = replace(self.decoder, strategy=decode)
        rates = self.gather(attempt(self.measure))
        facts: Facts = {"decode": decode, "why": self.why_decode.removeprefix("decode: ")}
        known = [rate for rate in rates if isinstance(rate, float)]
        if len(known) < len(rates):
            return {**facts, "input": next(r for r in rates if r not in known), **self.step}
        train_set, size = self.splits[0], self.world.size
        input_rate = sum(known) / len(known) * size
        facts["input_images_per_s"] = input_rate
        if len(known) < size:
            facts["measured"] = f"in {len(known)} of {size} processes; the total is extrapolated"
        decode = "raw" if train_set.store == "raw" else decode
        facts["of"] = forecast.describe(train_set, decode, self.threads, size)
        facts |= self.step
        if step_rate := self.step.get("step_images_per_s", 0.0) * size:
            ratio = input_rate / step_rate
            facts["verdict"] = f"the input is {ratio:.1f} times as fast as the steps"
            if input_rate < forecast.HEADROOM * step_rate:
                remedies = forecast.advice_for(train_set, decode, self.threads)
                facts["verdict"] += f", and limits them; {remedies['decode']}"
            facts["epoch_min"] = train_set.num_samples / min(step_rate, input_rate) / 60
        return facts

    def measure(self) -> float:
        """Measures this process's input in images/s, while all other processes measure theirs.

        Raises:
            ConfigError: there are no images.
        """
        import torch

        from fasttrain import loaders
        from fasttrain.batch import Placement

        if not self.splits:
            raise ConfigError("there are no images")
        train_set, plan, rank = self.splits[0], self.plan, self.process and self.process.rank
        if plan is None:  # any batch size gives an estimate
            some = config.Train(global_batch_size=min(64, train_set.num_samples))
            plan, rank = schedule.make_plan(some, config.Optim(), train_set.num_samples, 1), 0
        device = self.process.device if self.process else torch.device("cpu")
        half = half_images(device.type == "cuda", self.recipe.train.precision)
        placement = Placement(device, half, self.threads, self.decoder)
        data = self.recipe.data
        return loaders.measure(train_set, data, plan, rank or 0, placement, seconds=1.0)[0]

    # ---- the run and the job

    def run(self) -> Facts:
        """Reports the plan, and checks the run folder."""
        recipe, plan, folder = self.recipe, self.plan, run_folder.run_dir(self.recipe)
        done = None
        with self.collect_faults():
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
        """Reports SLURM's job, all processes, and the time of an all-reduce of the gradients."""
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
        compared = ("in_order_mb_per_s", "at_random_images_per_s", "step_images_per_s")
        about |= {name: speeds[name] for name in compared if name in speeds}
        facts["processes"] = self.gather(about)
        digests = [split.digest for split in self.splits]
        found = self.gather(alike.facts(process, self.recipe, digests))
        with self.collect_faults():
            alike.check(found)
        classes = len(self.splits[0].classes) if self.splits else 1000
        exchange = attempt(time_exchange, self.recipe, classes, process.device)
        return facts | (exchange if isinstance(exchange, dict) else {"all_reduce": exchange})


# --------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------


def rows(facts: Facts) -> Iterator[tuple[str, str]]:
    """Yields the label and the text of each line of a section."""
    for name, value in facts.items():
        ending = next((ending for ending in UNITS if name.endswith(ending)), "")
        label = name.removesuffix(ending)
        label = label.replace("_", " ") if label.islower() else label  # keeps names of variables
        for each in (value or [None]) if isinstance(value, list) else [value]:
            none = "not set" if label.isupper() else "none"
            yield label, none if each is None else shown(each, UNITS.get(ending, ""))
            label = ""


def shown(value: Any, unit: str = "") -> str:
    """Formats a value for the user."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(" ".join(row) for row in rows(value))
    if isinstance(value, int | float):
        whole = isinstance(value, int) or value >= 100
        return f"{value:,.0f} {unit}".strip() if whole else f"{value:.3g} {unit}".strip()
    return str(value) or "empty"


def reason(error: Exception) -> str:
    """Returns the first line of an error's message, and its type unless it is a `Fault`."""
    lines = str(error).strip().splitlines() or ["no message"]
    return lines[0] if isinstance(error, Fault) else f"{type(error).__name__}: {lines[0]}"


def attempt(probe: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what a probe returns, or `unknown (...)` if it raises an error."""
    try:
        return probe(*arguments)
    except Exception as error:
        return f"unknown ({reason(error)})"


# --------------------------------------------------------------------------------------------------
# The job
# --------------------------------------------------------------------------------------------------


def world_of(environ: Mapping[str, str], gpus: int) -> World:
    """Finds out how many processes the run has.

    Args:
        gpus: the number of GPUs that this process may use.
    Raises:
        ConfigError: a variable of the environment is not a number.
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
    return World(1, 1, "one, because there is no GPU")


def launch_faults(environ: Mapping[str, str], gpus: int, known: Mapping[str, str]) -> Iterator[str]:
    """Yields reasons why the processes cannot join, as far as they show before joining.

    Args:
        gpus: the number of GPUs that this process may use.
        known: the network interfaces of this node.
    """
    here = environ.get("LOCAL_WORLD_SIZE", "")
    if here.isdecimal() and 0 < gpus < int(here):
        yield (
            f"{here} processes on this node, but {gpus} GPUs for them: launch {gpus} processes on "
            "each node, or ask for more GPUs"
        )
    wanted = environ.get("GLOO_SOCKET_IFNAME")
    if wanted and known and not set(wanted.split(",")) <= {*known, "lo"}:
        yield (
            f"GLOO_SOCKET_IFNAME = {wanted}: there is no such interface on this node, only "
            f"{', '.join(known)}; unset it, or name one that all nodes have"
        )


def slurm(environ: Mapping[str, str], now: float) -> Facts:
    """Reports the SLURM job of this process.

    Args:
        now: seconds since 1970.
    """
    if "SLURM_JOB_ID" not in environ:
        return {"slurm": None}
    end = environ.get("SLURM_JOB_END_TIME", "")
    left = (int(end) - now) / 60 if end.isdecimal() else "unknown"
    return {f"SLURM_{name}": environ.get(f"SLURM_{name}") for name in SLURM_VARIABLES} | {
        "time_left_min": left
    }


def time_exchange(recipe: config.Recipe, classes: int, device: Any) -> Facts:
    """Times the all-reduce of all gradients in float32, and that of a single number.

    Returns:
        The medians in ms, the size of the gradients in MB, and the rate in GB/s.
    """
    from fasttrain.model import build_model

    network = build_model(**recipe.model.network(), num_classes=classes)
    numbers = sum(parameter.numel() for parameter in network.parameters())
    one_s, gradients_s = (probes.all_reduce_s(count, device, times=10) for count in (1, numbers))
    return {
        "gradients_mb": 4 * numbers / 1e6,
        "all_reduce_ms": 1e3 * gradients_s,
        "all_reduce_rate_gb_per_s": 4 * numbers / 1e9 / gradients_s,
        "all_reduce_of_one_ms": 1e3 * one_s,
    }


if __name__ == "__main__":
    main()
