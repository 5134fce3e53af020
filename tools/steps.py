"""Training steps on a resident batch: fasttrain's, and those that it is held against."""

import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain import caches, config, execution, loop, runtime
from fasttrain.batch import Batch
from fasttrain.display import TrainDisplay
from fasttrain.model import build_model
from fasttrain.rng import Stream
from fasttrain.run_folder import JsonLines
from fasttrain.schedule import Plan, make_plan

NUM_CLASSES = 1000
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


class StepJob(BaseModel):
    """What is measured, and how."""

    model_config = ConfigDict(frozen=True)

    name: Literal[
        "fasttrain",
        "fasttrain deterministic",
        "fasttrain loop",
        "plain loop",
        "torchvision",
        "timm",
    ]
    arch: Literal["large", "small"]
    width: float
    batch: int
    px: int
    precision: str
    execution: str  # of rivals: eager or compile
    layout: Literal["channels_last", "contiguous"]
    device: str
    threads: int  # of torch, on a CPU
    seconds: float  # that are timed, at least
    profile: bool = False
    classes: int = NUM_CLASSES
    evaluates: bool = False  # compiles for evaluations as well, where it only compiles

    @property
    def gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def compiles(self) -> bool:
        return "compile" in self.execution


Update = Callable[[], Tensor]  # gives the loss, and does not wait for the device


def measure(job: StepJob) -> dict[str, Any]:
    """Medians over groups of steps, once the first ones are through."""
    begun = time.perf_counter()
    start(job)
    if job.name == "fasttrain loop":
        return measure_loop(job)
    update = update_of(job)
    first_loss = update().item()  # waits for the device
    first_step_s = time.perf_counter() - begun
    timed(update, job, 5 if job.gpu else 1)
    one = timed(update, job, 1)
    group = max(1, math.ceil(job.seconds / 8 / one))  # so that waiting for the device is rare
    seconds = [timed(update, job, group) / group for _ in range(8)]
    step_s = statistics.median(seconds)
    found: dict[str, Any] = {
        "images_per_s": job.batch / step_s,
        "step_ms": 1e3 * step_s,
        "first_step_s": first_step_s,
        "peak_gib": peak_bytes(job) / 2**30,
        "first_loss": first_loss,
        "loss": update().item(),
    }
    if job.profile:
        found["profile"] = profile(update, job)
    return found


def start(job: StepJob) -> None:
    """Settles threads, kernels and seeds of this process."""
    caches.keep_compiled()
    torch.set_num_threads(job.threads)
    if job.name.startswith("fasttrain") and not job.gpu:
        runtime.keep_memory()
    runtime.choose_kernels(deterministic=job.name == "fasttrain deterministic")
    runtime.seed_torch(0, Stream.INIT)


def update_of(job: StepJob) -> Update:
    return fasttrain_update(job) if job.name.startswith("fasttrain") else rival_update(job)


def warm(job: StepJob) -> dict[str, Any]:
    """Carries out one update, so that what is compiled for it is kept for later processes."""
    begun = time.perf_counter()
    start(job)
    # Its trials take time, and memory that others may need; what is compiled is the same.
    torch.backends.cudnn.benchmark = False
    if job.evaluates:
        _, learner, updater = built(job, plan_of(job, 1))
        timed(update_with(job, learner, updater), job, 1)
        updater.rehearse([], [resident_batch(job)[0]])
    else:
        timed(update_of(job), job, 1)
    return {"warm_s": time.perf_counter() - begun, "peak_gib": peak_bytes(job) / 2**30}


def rounded(found: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers to four digits."""
    return {
        key: float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in found.items()
    }


def timed(update: Update, job: StepJob, number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        update()
    if job.gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(job: StepJob) -> int:
    if job.gpu:
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_batch(job: StepJob) -> tuple[Tensor, Tensor]:
    """Random images `(B, 3, S, S)` and labels `(B,)` on the device; fp16 where the loader's are."""
    generator = torch.Generator(job.device).manual_seed(0)
    shape = job.batch, 3, job.px, job.px
    images = torch.randn(shape, generator=generator, device=job.device)
    labels = torch.randint(job.classes, (job.batch,), generator=generator, device=job.device)
    half = job.name.startswith("fasttrain") and job.gpu and job.precision != "no"
    dtype = torch.float16 if half else torch.float32
    return images.to(dtype, memory_format=layout(job)), labels


def layout(job: StepJob) -> torch.memory_format:
    return torch.channels_last if job.layout == "channels_last" else torch.contiguous_format


# --------------------------------------------------------------------------------------------------
# fasttrain
# --------------------------------------------------------------------------------------------------


def recipe_of(job: StepJob) -> config.Recipe:
    return config.Recipe.model_validate(
        {
            "model": {"arch": job.arch, "width": job.width},
            "optim": {"ema_decay": 0.999},
            "train": {
                "global_batch_size": job.batch,
                "precision": job.precision,
                "execution": job.execution,
                "label_smoothing": 0.1,
            },
            "data": {"crop_px": job.px},
        }
    )


def built(job: StepJob, plan: Plan) -> tuple[Accelerator, execution.Learner, execution.Updater]:
    recipe = recipe_of(job)
    accelerator = runtime.accelerator_for(job.precision, cpu=not job.gpu)
    module = build_model(**recipe.model.network(), num_classes=job.classes)
    module.to(accelerator.device).to(memory_format=layout(job))
    learner = execution.prepare(job.execution, accelerator, module, recipe, plan)
    updater = execution.build(job.execution, accelerator, learner, plan, recipe.train)
    return accelerator, learner, updater


def plan_of(job: StepJob, updates: int) -> Plan:
    recipe = recipe_of(job)
    return make_plan(
        recipe.train.model_copy(update={"epochs": 1}),
        recipe.optim.model_copy(update={"warmup_epochs": 0}),
        job.batch * updates,
        1,
    )


def fasttrain_update(job: StepJob) -> Update:
    _, learner, updater = built(job, plan_of(job, 1))
    return update_with(job, learner, updater)


def update_with(job: StepJob, learner: execution.Learner, updater: execution.Updater) -> Update:
    """The loop's update less the input: with its seeds, EMA and sum of the loss."""
    images, labels = resident_batch(job)

    def update() -> Tensor:
        runtime.seed_torch(0, Stream.TORCH, learner.state.step, 0)
        updater.micro(images, labels, is_last=True)
        updater.update(0.1)
        loss = updater.guard.loss_sum / job.batch
        updater.guard.loss_sum.zero_()
        return loss

    return update


def measure_loop(job: StepJob) -> dict[str, Any]:
    """images/s of the loop itself on one batch: the median of its log lines."""
    bare = fasttrain_update(job)
    timed(bare, job, 2)
    group = max(1, math.ceil(job.seconds / 8 / timed(bare, job, 1)))
    group = min(group, config.Log().every_steps)  # logs no more rarely than a run does
    updates = max(10, 9 * group)
    plan = plan_of(job, updates)
    _, _, updater = built(job, plan)
    batch = Batch(*resident_batch(job))
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"
        outputs = loop.Outputs(
            checkpoints=Path(folder),
            about={},
            display=TrainDisplay(plan, enabled=False),
            metrics=JsonLines(metrics),
        )
        inputs = loop.Inputs(lambda step: itertools.repeat(batch), [batch], job.batch)
        reports = config.Recipe(
            checkpoint=config.Checkpoint(every_steps=10**9), log=config.Log(every_steps=group)
        )
        done = loop.Trainer(updater, plan, inputs, outputs, reports).fit()
        assert done
        lines = map(json.loads, metrics.read_text().splitlines())
        speeds = [line["images_per_s"] for line in lines if line["event"] == "train"]
    images_per_s = statistics.median(speeds[1:])  # the first holds the first steps
    return {
        "images_per_s": images_per_s,
        "step_ms": 1e3 * job.batch / images_per_s,
        "peak_gib": peak_bytes(job) / 2**30,
        "loss": done["loss"],
    }


# --------------------------------------------------------------------------------------------------
# The others
# --------------------------------------------------------------------------------------------------


def network_of(job: StepJob) -> nn.Module:
    if job.name == "torchvision":
        from torchvision import models

        return getattr(models, f"mobilenet_v3_{job.arch}")(
            num_classes=job.classes, width_mult=job.width
        )
    if job.name == "timm":
        import timm

        return timm.create_model(
            f"mobilenetv3_{job.arch}_{round(100 * job.width):03}",
            num_classes=job.classes,
            drop_rate=0.2,
        )
    return build_model(job.arch, job.width, job.classes, 0.2)


def rival_update(job: StepJob) -> Update:
    """A step as textbooks and the references of torchvision write it."""
    model = network_of(job).to(job.device).to(memory_format=layout(job)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=4e-5)
    scaler = torch.amp.GradScaler(enabled=job.precision == "fp16")
    images, labels = resident_batch(job)
    forward = torch.compile(model) if job.execution == "compile" else model
    kind, dtype = torch.device(job.device).type, DTYPES[job.precision]

    def update() -> Tensor:
        with torch.autocast(kind, dtype, enabled=job.precision != "no"):
            loss = F.cross_entropy(forward(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return update


# --------------------------------------------------------------------------------------------------
# What an update must move
# --------------------------------------------------------------------------------------------------

MIB_OF_A_PROCESS = 1500  # what CUDA, its libraries and a little fragmentation take
HELD = 1.4  # memory of an update over that of each convolution's input and output, at most


def values_of(arch: Literal["large", "small"], width: float, px: int) -> tuple[int, int]:
    """Numbers that all convolutions together read and write for one image, without weights."""
    read = written = 0

    def add(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal read, written
        read, written = read + given[0].numel(), written + output.numel()

    with torch.device("meta"):
        network = build_model(arch, width, NUM_CLASSES, 0.0)
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(add)
        network(torch.zeros(2, 3, px, px))
    return read // 2, written // 2


def bytes_moved(job: StepJob) -> int:
    """Bytes that an update moves at the least, where convolutions are kernels of their own.

    Counted from the network: a convolution reads I numbers and writes O. Forward, its output is
    read for BatchNorm's statistics, read again to be normalised, and written as the activation:
    I + 4 O. Backward, BatchNorm reads the gradient and the convolution's output for its sums (2 O),
    and again to write the gradient of that output (3 O); the gradient of the input takes O + I,
    that of the weights O + I: 7 O + 2 I. Squeeze-excitation, additions, weights, optimizer and loss
    are left out, so no update of such kernels can move less.
    """
    read, written = values_of(job.arch, job.width, job.px)
    size = torch.finfo(DTYPES[job.precision]).bits // 8
    return job.batch * size * (3 * read + 11 * written)


def bytes_held(job: StepJob) -> int:
    """Memory that a process may need at the most for an update that is compiled."""
    read, written = values_of(job.arch, job.width, job.px)
    size = torch.finfo(DTYPES[job.precision]).bits // 8
    return round(HELD * job.batch * size * (read + written)) + MIB_OF_A_PROCESS * 2**20


@cache
def gpu_bytes() -> int:
    """Memory of the GPU. Asked of another process, so that this one holds none of it."""
    script = "import torch; print(torch.cuda.mem_get_info()[0])"
    return int(subprocess.check_output([sys.executable, "-c", script], text=True))


# --------------------------------------------------------------------------------------------------
# Where the time goes
# --------------------------------------------------------------------------------------------------


def profiled(job: StepJob) -> dict[str, Any]:
    """An update's operations by time, on a CPU."""
    start(job)
    update = update_of(job)
    timed(update, job, 2)
    step_ms = 1e3 * timed(update, job, 3) / 3
    copied, *rows = profile(update, job)
    named = [{"operation": row.pop("name"), "launches": row.pop("calls"), **row} for row in rows]
    return {"step_ms": step_ms, **copied, "rows": [rounded(row) for row in named[:12]]}


def profile(update: Update, job: StepJob, steps: int = 3) -> list[dict[str, Any]]:
    """Operations by their own time a step; of eager ones the bytes, and the share of what a copy
    moves in that time."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if job.gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        timed(update, job, steps)
    moved = Traffic()
    with moved:
        update()
    copied = copy_bandwidth(job.device)
    key = "self_device_time_total" if job.gpu else "self_cpu_time_total"
    rows = []
    for event in profiler.key_averages():
        ms = getattr(event, key) / 1e3 / steps
        num_bytes = moved.bytes.get(event.key, 0)
        row = {"name": event.key[:80], "ms": round(ms, 3), "calls": event.count / steps}
        if num_bytes and ms:
            row["mb"] = round(num_bytes / 1e6, 1)
            row["of_copy"] = round(num_bytes / (ms / 1e3) / copied, 3)
        rows.append(row)
    rows.sort(key=lambda row: -row["ms"])
    return [{"copy_gb_per_s": round(copied / 1e9, 1)}, *rows[:25]]


class Traffic(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes that each operation reads and writes at the least, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = itertools.chain(_tensors(args), _tensors(result))
            seen = {t.data_ptr(): t.nbytes for t in tensors}
            name = function.name().split(".")[0]
            self.bytes[name] = self.bytes.get(name, 0) + sum(seen.values())
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def copy_bandwidth(device: str) -> float:
    """Bytes/s, read and written, of copying 256 MiB on the device."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


def seconds_of(function: Callable[[], object], device: str) -> float:
    """Seconds that a function takes, at the least."""
    gpu = device != "cpu"
    number = 20 if gpu else 1  # so that launching and waiting do not count
    found = []
    for _ in range(8):
        begun = time.perf_counter()
        for _ in range(number):
            function()
        if gpu:
            torch.cuda.synchronize()
        found.append((time.perf_counter() - begun) / number)
    return min(found)
