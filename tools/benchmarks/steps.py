"""Training steps on a batch that stays on the device: fasttrain's and those of other software."""

import math
import resource
import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import own_process
from benchmarks.layers import NUM_CLASSES
from benchmarks.own_process import Result
from fasttrain import caches, config, determinism, execution, modes, runtime
from fasttrain.batch import half_images
from fasttrain.model import build_model
from fasttrain.rng import Stream
from fasttrain.schedule import Plan, make_plan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


class StepJob(own_process.Job, frozen=True):
    """A contestant, its network and batch, and how its updates are carried out."""

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
    execution: str  # one of config.Mode; for other libraries eager or compile
    layout: Literal["channels_last", "contiguous"]
    device: str
    threads: int  # of torch, on a CPU
    seconds: float  # to time at least
    profile: bool = False
    classes: int = NUM_CLASSES
    evaluates: bool = False  # `warm` compiles the evaluation too

    @property
    def label(self) -> str:
        """What a line of progress calls the job."""
        return f"{self.name} {self.execution}"

    @property
    def gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def compiles(self) -> bool:
        return "compile" in self.execution


Update = Callable[[], Tensor]  # returns the loss and does not wait for the device
Profile = Callable[[Update, StepJob], list[Result]]


def measure(job: StepJob, profile: Profile | None = None) -> Result:
    """Speed, peak memory and losses of a contestant's updates.

    The speed is a median over groups of updates, after the first ones. Each group ends with a wait
    for the device. `profile` is given the update afterwards.
    """
    begun = time.perf_counter()
    update = update_of(job)
    first_loss = update().item()  # waits for the device
    first_step_s = time.perf_counter() - begun
    timed(update, job, 5 if job.gpu else 1)
    one = timed(update, job, 1)
    group = max(1, math.ceil(job.seconds / 8 / one))  # updates between two waits
    seconds = [timed(update, job, group) / group for _ in range(8)]
    step_s = statistics.median(seconds)
    found: Result = {
        "images_per_s": job.batch / step_s,
        "step_ms": 1e3 * step_s,
        "first_step_s": first_step_s,
        "peak_gib": peak_bytes(job) / 2**30,
        "first_loss": first_loss,
        "loss": update().item(),
    }
    if profile:
        found["profile"] = profile(update, job)
    return found


def start(job: StepJob) -> None:
    """Sets the threads, kernels and seeds of this process."""
    caches.keep_compiled()
    torch.set_num_threads(job.threads)
    if job.name.startswith("fasttrain") and not job.gpu:
        runtime.keep_memory()
    determinism.choose_kernels(deterministic=job.name == "fasttrain deterministic")
    determinism.seed_torch(0, Stream.INIT)


def update_of(job: StepJob) -> Update:
    """The update of the contestant."""
    return fasttrain_update(job) if job.name.startswith("fasttrain") else rival_update(job)


def warm(job: StepJob) -> Result:
    """Carries out one update, so that later processes find its compiled code."""
    begun = time.perf_counter()
    start(job)
    # cuDNN's trials cost time, and memory that other processes need. They change no compiled code.
    torch.backends.cudnn.benchmark = False
    if job.evaluates:
        _, learner, updater = built(job, plan_of(job, 1))
        timed(update_with(job, learner, updater), job, 1)
        updater.rehearse([], [resident_batch(job)[0]])
    else:
        timed(update_of(job), job, 1)
    return {"warm_s": time.perf_counter() - begun, "peak_gib": peak_bytes(job) / 2**30}


def timed(update: Update, job: StepJob, number: int) -> float:
    """Seconds of `number` updates, with the wait for the device at the end."""
    start = time.perf_counter()
    for _ in range(number):
        update()
    if job.gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(job: StepJob) -> int:
    """Peak memory of this process: torch's on a GPU, the resident set size on a CPU."""
    if job.gpu:
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_batch(job: StepJob) -> tuple[Tensor, Tensor]:
    """Random images (B, 3, S, S) and int64 labels (B,) on the device.

    fasttrain gets images of the dtype that its loader makes; the others get float32.
    """
    generator = torch.Generator(job.device).manual_seed(0)
    shape = job.batch, 3, job.px, job.px
    images = torch.randn(shape, generator=generator, device=job.device)
    labels = torch.randint(job.classes, (job.batch,), generator=generator, device=job.device)
    half = job.name.startswith("fasttrain") and half_images(job.gpu, job.precision)
    dtype = torch.float16 if half else torch.float32
    return images.to(dtype, memory_format=layout(job)), labels


def layout(job: StepJob) -> torch.memory_format:
    """torch's name for the layout of the images."""
    return torch.channels_last if job.layout == "channels_last" else torch.contiguous_format


# --------------------------------------------------------------------------------------------------
# fasttrain
# --------------------------------------------------------------------------------------------------


def recipe_of(job: StepJob) -> config.Recipe:
    """The recipe of fasttrain's update."""
    return config.Recipe.model_validate(
        {
            "model": {"arch": job.arch, "width": job.width},
            "optim": {"ema_decay": 0.999},
            "train": {
                "global_batch_size": job.batch,
                "precision": job.precision,
                "execution": execution.without_kernels(job.execution),
                "label_smoothing": 0.1,
            },
            "data": {"crop_px": job.px},
        }
    )


def built(job: StepJob, plan: Plan) -> tuple[Accelerator, execution.Learner, execution.Updater]:
    """What fasttrain's update needs, built as in a run."""
    recipe = recipe_of(job)
    accelerator = runtime.accelerator_for(job.precision, cpu=not job.gpu)
    module = build_model(**recipe.model.network(), num_classes=job.classes)
    module.to(accelerator.device).to(memory_format=layout(job))
    setup = modes.Setup(accelerator, module, recipe, plan, job.classes)
    modes.compile_kernels(job.execution, setup)
    learner = execution.prepare(job.execution, accelerator, module, recipe, plan)
    updater = execution.build(job.execution, accelerator, learner, plan, recipe)
    return accelerator, learner, updater


def plan_of(job: StepJob, updates: int) -> Plan:
    """The plan of a run of `updates` updates."""
    recipe = recipe_of(job)
    return make_plan(
        recipe.train.model_copy(update={"epochs": 1}),
        recipe.optim.model_copy(update={"warmup_epochs": 0}),
        job.batch * updates,
        1,
    )


def fasttrain_update(job: StepJob) -> Update:
    """fasttrain's update on the resident batch."""
    _, learner, updater = built(job, plan_of(job, 1))
    return update_with(job, learner, updater)


def update_with(job: StepJob, learner: execution.Learner, updater: execution.Updater) -> Update:
    """The update as the loop carries it out, with its seeds, EMA and sum of losses."""
    images, labels = resident_batch(job)

    def update() -> Tensor:
        determinism.seed_torch(0, Stream.TORCH, learner.state.step, 0)
        updater.micro(images, labels, is_last=True)
        updater.update(0.1)
        loss = updater.guard.loss_sum / job.batch
        updater.guard.loss_sum.zero_()
        return loss

    return update


# --------------------------------------------------------------------------------------------------
# Other libraries
# --------------------------------------------------------------------------------------------------


def network_of(job: StepJob) -> nn.Module:
    """The network of the library that is compared."""
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
    """An update as textbooks and torchvision's reference scripts write it."""
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
