"""Chooses the way to carry out updates (`train.execution`) by trials before the run, and starts it.

Trials train copies of the network: they change nothing of the run itself.
"""

import copy
import gc
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain import (
    config,
    determinism,
    distilling,
    execution,
    kernel_build,
    layer_trials,
    measured,
    runtime,
    schedule,
)
from fasttrain.batch import half_images
from fasttrain.compiling import compiler_options
from fasttrain.digests import code_digest
from fasttrain.execution import DEPTHWISE, KERNELS, Batch, Updater, without_kernels
from fasttrain.faults import Fault
from fasttrain.fused_block import Own
from fasttrain.learner import Learner
from fasttrain.model import use_kernels
from fasttrain.rng import Stream
from fasttrain.schedule import Plan
from fasttrain.trials import fastest

LOSS_TOLERANCE = 0.01  # relative difference of a mode's mean loss from eager's
COMPILE_S = 120  # duration of compiling on a CPU: 111 s measured for Small 0.75
KERNELS_GAIN = 1.03  # speed at which the fused kernels are used: less may be noise
GAIN = 0.1  # part of the time that compiling saves on a CPU: -8 to 20 % measured
TOO_SLOW = 2 / 3  # bfloat16 below this part of float32's speed on a CPU is an error
LOOK_PX = 128  # image side in the first, short measurement of bfloat16
LOOK_RATIO = 0.5  # bfloat16 below this part of float32's speed there is not measured further
CPU_IMAGES = 32  # largest micro-batch in trials on a CPU


class ExecutionError(Fault, RuntimeError):
    """Updates cannot be carried out as the recipe says."""

    raised_on_every_rank = True


@dataclass(frozen=True, slots=True)
class Setup:
    """The network to train, the recipe and the device."""

    accelerator: Accelerator
    module: nn.Module  # on its device, channels-last
    recipe: config.Recipe
    plan: Plan
    num_classes: int

    @property
    def on_cpu(self) -> bool:
        return self.accelerator.device.type == "cpu"

    def images(self, size: int, px: int) -> Tensor:
        """Made-up images `(size, 3, px, px)`, with the dtype and layout of the loader's images."""
        half = half_images(not self.on_cpu, self.recipe.train.precision)
        device = self.accelerator.device
        generator = torch.Generator(device).manual_seed(0)
        images = torch.randn(size, 3, px, px, generator=generator, device=device)
        return images.to(
            torch.float16 if half else torch.float32, memory_format=torch.channels_last
        )

    def batch(self, size: int, px: int) -> Batch:
        """Made-up images, and labels in the form in which updates will get them.

        Their shape is `(size,)`; `(size, C)` with MixUp or CutMix; `(size, 2 C)` with a teacher.
        """
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(self.num_classes, (size,), generator=generator)
        if self.recipe.distill.on:
            rows = F.one_hot(labels, self.num_classes).float()
            labels = distilling.join(labels, rows)
        elif self.recipe.train.mixup_alpha or self.recipe.train.cutmix_alpha:
            labels = F.one_hot(labels, self.num_classes).float()
        return self.images(size, px), labels.to(self.accelerator.device)


class Earlier(NamedTuple):
    """How the run carried out updates before it was stopped, on this kind of device."""

    mode: str
    layers: Sequence[Sequence[int]] | None = None  # `layer_trials.chosen_in`


@dataclass(frozen=True, slots=True)
class ModeTrial:
    """The result of trying a mode."""

    mode: str
    images_per_s: float = 0.0  # of all ranks together
    loss: float = 0.0  # mean over the images of all updates
    fault: str = ""  # empty if the mode worked
    remark: str = ""

    def __str__(self) -> str:
        return f"{self.mode} {self.fault or f'{self.images_per_s:,.0f} images/s'}{self.remark}"


# --------------------------------------------------------------------------------------------------
# The choice
# --------------------------------------------------------------------------------------------------


def choose_execution(
    setup: Setup, earlier: Earlier | None, say: Callable[[str], object]
) -> tuple[str, str]:
    """Chooses the mode, and returns it with a line for each choice that gives the reason.

    Also chooses which layers of `setup.module` use kernels: see `layer_trials.apply`. All ranks
    choose the same. If no trial failed, later runs on such a machine reuse the result.

    Args:
        earlier: of a run that resumes.
        say: prints a line before something that takes long.
    Raises:
        ExecutionError: not even eager works; bfloat16 is far slower than float32 on this CPU; or
            the recipe forces kernels that this machine cannot run.
    """
    if setup.recipe.train.kernels == "force" and setup.on_cpu:
        raise ExecutionError(
            "[train] kernels = force: the fused kernels need a GPU; use auto or off"
        )
    previous = without_kernels(earlier.mode) if earlier else None
    known: dict[str, ModeTrial] = {}
    mode, why = _choose_mode(setup, previous, known, say)
    kernels, reason = _choose_kernels(setup, mode, earlier, known, say)
    return mode + kernels, "\n".join(filter(None, [why, reason]))


def _choose_mode(
    setup: Setup,
    previous_mode: str | None,
    known: dict[str, ModeTrial],
    say: Callable[[str], object],
) -> tuple[str, str]:
    """`choose_execution`, without the kernels. Adds the trials that it makes to `known`."""
    train = setup.recipe.train
    if train.execution != "auto":
        return train.execution, f"execution: {train.execution}, as the recipe says"
    if train.precision == "bf16" and (slower := _bf16_slowdown(setup, say)) > 1:
        return "eager", (
            f"WARNING: bfloat16 takes {slower:.1f} times as long as float32 on this CPU: use "
            "--set train.precision=no\nexecution: eager"
        )
    if previous_mode:
        return previous_mode, f"execution: {previous_mode}, as before the stop"
    if train.deterministic:
        return "eager", "execution: eager, as a deterministic run must not choose by speed"
    key = _key(setup)
    remembered = broadcast_object_list([measured.recall(key)])[0]
    if remembered:
        return remembered["mode"], f"execution: {remembered['why']}, as measured in an earlier run"
    return _choose_by_trials(setup, key, known, say)


def _choose_kernels(
    setup: Setup,
    mode: str,
    earlier: Earlier | None,
    known: Mapping[str, ModeTrial],
    say: Callable[[str], object],
) -> tuple[str, str]:
    """Chooses the fused kernels for `mode`.

    Args:
        earlier: of a run that resumes.
        known: trials that were made already, by mode.
    Returns:
        KERNELS, DEPTHWISE or "" for none; and a line with the reason. On a CPU, and if the recipe
        has none, the line is "".
    """
    train = setup.recipe.train
    if train.kernels == "force":
        return KERNELS, "fused kernels: on, as the recipe says"
    if train.kernels == "off" or setup.on_cpu:
        return "", ""
    if train.precision == "no":
        return "", "fused kernels: off, as they need half precision"
    if setup.recipe.model.drop_path:
        return "", "fused kernels: off, as they have no stochastic depth (model.drop_path)"
    if earlier:
        previous = earlier.mode.removeprefix(without_kernels(earlier.mode))
        layer_trials.apply(setup.module, earlier.layers)
        return previous, f"fused kernels: {_KERNELS_SAID[previous]}, as before the stop"
    if train.deterministic:
        return "", "fused kernels: off, as a deterministic run must not choose by speed"
    key = _key(setup, mode)
    remembered = broadcast_object_list([measured.recall(key)])[0]
    if remembered:
        why = remembered["why"]
        layer_trials.apply(setup.module, remembered["layers"])
        return remembered["kernels"], f"fused kernels: {why}, as measured in an earlier run"
    if fault := _first_fault(layer_trials.fault(setup.accelerator.device)):
        return "", f"fused kernels: off, as Triton does not run here ({fault})"
    say("timing updates with and without fused kernels, which can take minutes")
    return _compare_kernels(mode, setup, key, known, say)


_KERNELS_SAID = {"": "off", DEPTHWISE: "depthwise only", KERNELS: "on"}


def _compare_kernels(
    mode: str,
    setup: Setup,
    key: str,
    known: Mapping[str, ModeTrial],
    say: Callable[[str], object],
) -> tuple[str, str]:
    """The result of `_choose_kernels` by trials; stores it under `key` if no trial failed."""
    without = known.get(mode) or try_mode(mode, setup)
    layers, warning = _choose_layers(mode, setup)
    if warning:
        say(warning)
    layer_trials.apply(setup.module, layers)
    passes = [tile for own in layers for tile in own]
    wins = {
        DEPTHWISE: any(own.depthwise or own.depthwise_backward for own in layers),
        KERNELS: any(any(own[:4]) for own in layers),
    }
    trials = [
        _with_loss_check(try_mode(mode + kernels, setup), without.loss)
        for kernels in (DEPTHWISE, KERNELS)
        if wins[kernels]
    ]
    best = fastest(trials)
    gains = best and best.images_per_s >= KERNELS_GAIN * without.images_per_s
    chosen = best.mode.removeprefix(mode) if best and gains else ""
    used = f"; kernels are faster in {sum(map(bool, passes))} passes through layers"
    if seconds := passes.count(2):
        used += f", {seconds} of them with the second tile"
    why = f"{_KERNELS_SAID[chosen]} ({'; '.join(map(str, [without, *trials]))}{used})"
    failed = any(trial.fault for trial in (without, *trials))
    failed |= bool(warning) and not any(passes)  # as where other processes hold the memory
    if setup.accelerator.is_main_process and not failed:
        measured.remember(key, {"kernels": chosen, "why": why, "layers": layers})
    return chosen, f"fused kernels: {why}"


def _choose_layers(mode: str, setup: Setup) -> tuple[list[Own], str]:
    """What `layer_trials.choose` returns, on rank 0. All ranks call it, and return the same.

    A pass is timed at the largest image size of the recipe, as modes are.
    """
    networks = layer_trials.candidates(setup.module)
    build_kernels(networks, mode, setup)
    found = None
    if setup.accelerator.is_main_process:
        images = setup.plan.micro_batch_size, schedule.largest_px(setup.recipe.data)
        dtype = block_dtype(setup.recipe.train)
        found = layer_trials.choose(networks[0], images, dtype, compiler_options(mode))
    layers, warning = broadcast_object_list([found])[0]
    return [Own(*own) for own in layers], warning


def _bf16_slowdown(setup: Setup, say: Callable[[str], object]) -> float:
    """Time of bfloat16 divided by that of float32; 0 on a GPU. All ranks return the same.

    Raises:
        ExecutionError: bfloat16 is far slower.
    """
    ratio = math.inf
    if setup.on_cpu:
        say("comparing the speed of bfloat16 with that of float32 on this CPU")
        ratio = bf16_ratio(setup.module, schedule.largest_px(setup.recipe.data))
    # All ranks use the slowest rank's ratio. If one rank decided differently, the others would wait
    # for it in a collective.
    ratio = min(gather_object([ratio]))
    if ratio < TOO_SLOW:
        raise ExecutionError(slow_bf16(ratio))
    return 1 / ratio


def _choose_by_trials(
    setup: Setup, key: str, known: dict[str, ModeTrial], say: Callable[[str], object]
) -> tuple[str, str]:
    """The result of `_choose_mode` by trials; stores it under `key` if no trial failed."""
    notice = (
        "trying several ways to carry out updates, which can take minutes; later runs reuse the "
        "result; --set train.execution=MODE skips the trials"
    )
    say("timing a few updates" if setup.on_cpu else notice)
    eager = try_mode("eager", setup)
    if eager.fault:
        raise ExecutionError(f"no update could be carried out: {eager}")
    if setup.on_cpu:
        images = setup.plan.total_steps * setup.plan.global_batch_size
        if images / eager.images_per_s * GAIN < COMPILE_S:
            return "eager", "execution: eager, as compiling would take longer than it could save"
        say(notice)
    trials = [eager, *_try_others(setup, eager.loss)]
    known |= {trial.mode: trial for trial in trials}
    best = fastest(trials)
    assert best  # eager worked
    why = f"{best.mode} ({'; '.join(map(str, trials))})"
    if setup.accelerator.is_main_process and not any(trial.fault for trial in trials):
        measured.remember(key, {"mode": best.mode, "why": why})
    return best.mode, f"execution: {why}"


def _try_others(setup: Setup, eager_loss: float) -> list[ModeTrial]:
    """Tries the modes other than eager, and the simpler forms of each mode that fails."""
    trials, modes = [], _candidates(setup)
    for mode in modes:
        trial = _with_loss_check(try_mode(mode, setup), eager_loss)
        trials.append(trial)
        if trial.fault:
            modes += [simpler for simpler in _simpler(mode)[:-1] if simpler not in modes]
    return trials


def _with_loss_check(trial: ModeTrial, expected: float) -> ModeTrial:
    """The trial, with a fault if its loss differs from the expected one by more than rounding."""
    if trial.fault or abs(trial.loss - expected) <= LOSS_TOLERANCE * expected:
        return trial
    return replace(trial, fault=f"gave a wrong loss ({trial.loss:.4f}, expected {expected:.4f})")


def _candidates(setup: Setup) -> list[str]:
    """The modes to try in addition to eager."""
    if setup.on_cpu or setup.recipe.train.precision == "fp16":
        return ["compile"]  # no graph for fp16: the host decides there whether to update
    # `_fuse` makes updates 1.07 times as fast (Large, batch 1024, H200). Each compiled mode takes
    # minutes to try, so the modes without `_fuse` are tried only if those with it fail.
    found = ["graph", "compile_graph_fuse"]
    # Without a graph, DDP all-reduces gradients while others are still being computed. A single
    # rank has no all-reduce, so it gains nothing by launching what a graph could replay.
    return found if setup.plan.world_size == 1 else [*found, "compile_fuse"]


def _key(setup: Setup, kernels_in: str = "") -> str:
    """The key that stores the choice. It covers all that decides which mode is the fastest.

    Args:
        kernels_in: the mode in which kernels are compared; "" for the choice of the mode.
    """
    device = setup.accelerator.device
    recipe, plan = setup.recipe, setup.plan
    choice = "execution"
    if kernels_in:  # other kernels, another speed
        digest = code_digest(modules=(*kernel_build.SOURCES, "layer_trials"))
        choice = f"kernels {digest} in {kernels_in}"
    return measured.key_of(
        choice, runtime.device_name(device), torch.__version__, torch.version.cuda,
        recipe.model, recipe.optim.name, recipe.train.precision, recipe.train.gradient_exchange,
        bool(recipe.optim.ema_decay), recipe.data.crop_px, recipe.data.scales_px,
        setup.num_classes, plan.micro_batch_size, plan.accumulation, plan.world_size,
        torch.get_num_threads(),
    )  # fmt: skip


def slow_bf16(ratio: float) -> str:
    """The error message if bfloat16 reaches only `ratio` of float32's speed."""
    return (
        f"[train] precision = bf16: takes {1 / ratio:.1f} times as long as float32 on this CPU: "
        "use --set train.precision=no\n(--set train.execution=eager uses bf16 in spite of this; to "
        "resume a bf16 run in float32, add --set checkpoint.resume=force)"
    )


def bf16_ratio(module: nn.Module, px: int, backward: bool = True) -> float:
    """Speed of bfloat16 divided by that of float32, for a pass on this CPU.

    Two small images are measured first. If oneDNN has no bfloat16 kernels, a pass of 8 images of
    224 px takes 9 times as long as in float32, and a minute on a CPU with other work (Large, AVX2,
    torch 2.14.1).

    Args:
        px: side of the images.
        backward: measure forward and backward, not forward alone.
    """
    network = copy.deepcopy(module)

    def ratio(number: int, side: int, passes: int) -> float:
        images = torch.randn(number, 3, side, side).contiguous(memory_format=torch.channels_last)

        def seconds(bf16: bool) -> float:
            found = []
            for _ in range(passes):
                begun = time.perf_counter()
                with (
                    torch.autocast("cpu", torch.bfloat16, enabled=bf16),
                    torch.set_grad_enabled(backward),
                ):
                    loss = network(images).float().square().mean()
                if backward:
                    loss.backward()
                found.append(time.perf_counter() - begun)
            return min(found[1:])

        return seconds(bf16=False) / seconds(bf16=True)

    look = ratio(2, min(px, LOOK_PX), 3)
    return look if look < LOOK_RATIO else ratio(8, px, 4)


# --------------------------------------------------------------------------------------------------
# A trial
# --------------------------------------------------------------------------------------------------


def try_mode(mode: str, setup: Setup) -> ModeTrial:
    """Times a few updates of a copy of the network, on made-up images of the recipe's largest size.

    All ranks must call it. They return the same speed, loss and fault.
    """
    size, plan = setup.plan.micro_batch_size, setup.plan
    size = min(size, CPU_IMAGES) if setup.on_cpu else size
    plan = replace(
        plan, micro_batch_size=size, accumulation=1, global_batch_size=size * plan.world_size
    )
    tried = replace(setup, plan=plan)
    compile_kernels(mode, tried)
    images, labels = tried.batch(size, schedule.largest_px(setup.recipe.data))
    # Each rank tries alone first. If it failed later, the others would wait in a collective.
    if plan.world_size > 1 and mode != "eager":
        if fault := _first_fault(_fault_alone(mode, tried, (images, labels))):
            return ModeTrial(mode, fault=fault)
    warm_up, timed = (1, 2) if setup.on_cpu else (5, 20)
    seconds, loss, fault, remark = math.inf, 0.0, "", ""
    scaler = setup.accelerator.scaler
    scaling = copy.deepcopy(scaler.__dict__) if scaler else {}
    updater: Updater | None = None
    try:
        recipe = setup.recipe
        learner = execution.prepare(
            mode, setup.accelerator, copy.deepcopy(setup.module), recipe, plan
        )
        updater = execution.build(mode, setup.accelerator, learner, plan, recipe)
        updates = _updates(updater, (images, labels), recipe.optim.warmup_lr)
        if "compile" in mode:
            from torch._inductor.utils import run_and_get_code  # takes seconds

            _, code = run_and_get_code(updates, warm_up)
            lost = lost_channels_last(code)
            remark = f" ({len(lost)} convolutions lose channels-last)" if lost else ""
        else:
            updates(warm_up)
        seconds = updates(timed)
        loss = float(updater.guard.loss_sum) / (size * (warm_up + timed))
    except Exception as error:  # from the compiler, or from a device that lacks a feature
        fault = _message(error)
    finally:
        learner = updates = None  # type: ignore[assignment]
        _free(mode, setup, updater)
        updater = None
        if scaler:  # the run uses the same object
            scaler.__dict__.update(scaling)
    results = gather_object([(seconds, loss, fault)])
    faults = [text for _, _, text in results if text]
    rate = timed * plan.global_batch_size / max(taken for taken, _, _ in results)
    mean = sum(found for _, found, _ in results) / len(results)
    return ModeTrial(mode, rate, mean, faults[0] if faults else "", remark)


def compile_kernels(mode: str, setup: Setup, sizes: Sequence[int] = ()) -> None:
    """Compiles the fused kernels of a mode side by side, once on a machine. All ranks call it.

    Args:
        sizes: as `build_kernels` takes them.
    """
    if "+" not in mode or setup.on_cpu:
        return
    network = copy.deepcopy(setup.module).train()
    use_kernels(network, True, pointwise=mode.endswith(KERNELS))
    build_kernels([network], mode, setup, sizes)


def block_dtype(train: config.Train) -> torch.dtype:
    """The dtype of images in fused blocks."""
    return torch.float16 if train.precision == "fp16" else torch.bfloat16


def build_kernels(
    networks: Sequence[nn.Module], mode: str, setup: Setup, sizes: Sequence[int] = ()
) -> None:
    """Compiles the kernels of networks side by side. All ranks call it.

    Args:
        networks: after `use_kernels`, in training mode.
        sizes: sides of the images in pixels; by default the largest one of the recipe.
    """
    accelerator = setup.accelerator
    if accelerator.is_local_main_process:
        images = block_dtype(setup.recipe.train)
        weights = images if "graph" in mode else torch.float32
        target = kernel_build.target_of(accelerator.device)
        for px in sizes or [schedule.largest_px(setup.recipe.data)]:
            size = setup.plan.micro_batch_size, px
            with suppress(Exception):  # the first launch compiles too, and says what is wrong
                kernel_build.build(networks, size, (images, weights), target)
    accelerator.wait_for_everyone()


def _updates(updater: Updater, batch: Batch, lr: float) -> Callable[[int], float]:
    """A function that carries out a given number of updates and returns the seconds they took."""

    def updates(number: int) -> float:
        begun = time.perf_counter()
        for _ in range(number):
            determinism.seed_torch(0, Stream.TORCH, updater.learner.state.step)
            updater.micro(*batch, is_last=True)
            updater.update(lr)
        updater.guard.loss_sum.item()  # waits for the device
        return time.perf_counter() - begun

    return updates


def _fault_alone(mode: str, setup: Setup, batch: Batch) -> str:
    """Compiles and records on this rank alone, without collectives; returns the fault, if any."""
    plan = replace(setup.plan, world_size=1)
    module, recipe = copy.deepcopy(setup.module), setup.recipe
    updater: Updater | None = None
    try:
        learner = execution.prepare("graph", setup.accelerator, module, recipe, plan)
        updater = execution.build(mode, setup.accelerator, learner, plan, recipe)
        updater.rehearse([batch], [])
    except Exception as error:
        return _message(error)
    finally:
        learner = None  # type: ignore[assignment]
        _free(mode, setup, updater)
    return ""


def _free(mode: str, setup: Setup, updater: Updater | None) -> None:
    """Frees the memory of a trial: about 25 GB at batch 1024, which the next trial needs."""
    if updater:
        updater.close()
    del updater
    setup.accelerator.free_memory()
    if mode != "eager":  # the other modes compile the network or the guard
        torch.compiler.reset()
    gc.collect()
    if not setup.on_cpu:
        torch._C._cuda_clearCublasWorkspaces()  # 32 MiB for each stream that used cuBLAS
        torch.cuda.empty_cache()


def _message(error: Exception) -> str:
    said = str(error).strip().splitlines() or ["no message"]
    return f"failed: {type(error).__name__}: {said[0]}"


def _first_fault(fault: str) -> str:
    """Gathers the fault of every rank; returns the first one, or "" if there is none."""
    return next(filter(None, gather_object([fault])), "")


_CONVOLVED = re.compile(
    r"assert_\w+\((\w+), \((\d+), (\d+), (\d+), (\d+)\), \((\d+), (\d+), .*aten\.(convolution\w*)"
)


def lost_channels_last(code: Sequence[str]) -> list[str]:
    """Finds the convolutions, forward and backward, whose results are not channels-last.

    Inductor is reported to lose the layout in the backward of depthwise convolutions on a GPU,
    which is 20 to 58 % slower.

    Args:
        code: the sources that Inductor generated.
    """
    lost = []
    for line in "\n".join(code).splitlines():
        if found := _CONVOLVED.search(line):
            channels, height, width = (int(n) for n in found.group(3, 4, 5))
            if channels > 1 and height * width > 1 and int(found[7]) != 1:
                lost.append(f"{found[8]} {found[1]}")
    return lost


# --------------------------------------------------------------------------------------------------
# The start
# --------------------------------------------------------------------------------------------------


def start(
    mode: str, setup: Setup, restore: Callable[[Learner], object], say: Callable[[str], object]
) -> tuple[str, Learner, Updater]:
    """Builds learner and updater for `mode`, or for a simpler mode if that one fails.

    Call it before a loader starts: see `graphs.Recorder.record`.

    Args:
        restore: loads the checkpoint to resume from, if there is one.
        say: prints a line for each mode that takes long or fails.
    Returns:
        The mode that works, its learner and its updater.
    Raises:
        ExecutionError: the mode that the recipe names fails, or every mode fails.
    """
    recipe, plan = setup.recipe, setup.plan
    for attempt in _simpler(mode):
        compile_kernels(attempt, setup, _image_sizes(setup, 0))
        learner = execution.prepare(attempt, setup.accelerator, setup.module, recipe, plan)
        restore(learner)
        updater = execution.build(attempt, setup.accelerator, learner, plan, recipe)
        fault = ""
        try:
            sizes = _image_sizes(setup, learner.state.step)
            if attempt != "eager":
                say(f"preparing updates by {attempt}, which can take minutes")
            if attempt != "eager" or (len(sizes) > 1 and not setup.on_cpu):
                updater.rehearse(*_rehearsal_batches(setup, sizes))
        except Exception as error:
            fault = _message(error)
        if not (fault := _first_fault(fault)):
            return attempt, learner, updater
        del learner
        _free(attempt, setup, updater)
        del updater
        if "+" in attempt and recipe.train.kernels == "force":
            raise ExecutionError(f"[train] kernels = force: {fault}; use auto or off")
        if recipe.train.execution != "auto" and "+" not in attempt:
            raise ExecutionError(
                f"[train] execution = {attempt}: {fault}; use auto, which chooses a mode that works"
            )
        say(f"WARNING: train.execution = {attempt} {fault}; trying a simpler mode")
    raise ExecutionError("no update could be carried out in any mode; the warnings say why")


def _simpler(mode: str) -> list[str]:
    """The mode, then those to fall back on, in this order."""
    plain = without_kernels(mode)
    found = [mode, *([plain + DEPTHWISE] if mode.endswith(KERNELS) else []), plain]
    found += [plain.removesuffix("_fuse")]
    found += ["compile"] if "compile" in mode else []
    return [*dict.fromkeys([*found, "eager"])]


def _image_sizes(setup: Setup, step: int) -> list[int]:
    """Sides of the images in the updates from `step` on, in pixels, the largest first.

    CUDA graphs share a memory pool. A graph that is recorded later finds room in the memory of a
    larger one before it, but not of a smaller one.
    """
    return sorted(schedule.first_updates(step, setup.plan, setup.recipe.data), reverse=True)


def _rehearsal_batches(setup: Setup, sizes: Sequence[int]) -> tuple[Iterator[Batch], list[Tensor]]:
    """Made-up batches: one of each size for updates, one at a time in memory; one to evaluate."""
    size = setup.plan.micro_batch_size
    training = (setup.batch(size, px) for px in sizes)
    return training, [setup.images(size, setup.recipe.data.eval_crop_px)]
