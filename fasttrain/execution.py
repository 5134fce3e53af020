"""How an update is carried out: `train.execution`. Same results by each, but for rounding.

eager    PyTorch's own: forward, backward with DistributedDataParallel, optimizer, averages
compile  the same with forward, loss and backward compiled by torch.compile
graph    all of an update recorded once as a CUDA graph and replayed, so that the host launches one
         thing instead of a thousand; exchanges one flat gradient instead of DDP's buckets
compile_graph  the graph of the compiled update

`choose` tries them on made-up images, and leaves no trace in what is trained.
"""

import copy
import math
import re
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DDPCommunicationHookType, gather_object
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain import config, runtime, schedule
from fasttrain.guard import Guard
from fasttrain.optim import Learner, WeightAverage, build_optimizer
from fasttrain.rng import Stream
from fasttrain.schedule import Plan

Loss = Callable[[Tensor, Tensor], Tensor]  # of images and labels


class ExecutionError(config.Fault, RuntimeError):
    """An update cannot be carried out as the recipe asks."""


class Eager:
    """Carries out updates, compiled or not: `micro` for each micro-batch, then `update`."""

    def __init__(
        self,
        accelerator: Accelerator,
        learner: Learner,
        plan: Plan,
        train: config.Train,
        compile_it: bool = False,
    ) -> None:
        self.accelerator = accelerator
        self.learner = learner
        self.accumulation = plan.accumulation
        self.guard = _guard(learner, plan, train)
        self.loss_of = loss_function(learner.model, train, compile_it)

    def micro(self, images: Tensor, labels: Tensor, is_last: bool) -> None:
        """Adds the gradients of a micro-batch; only with the `is_last` are they exchanged.

        Args:
            images: float `(B, 3, S, S)`, channels-last.
            labels: int64 `(B,)`, or probabilities `(B, C)`.
        """
        learner = self.learner
        with nullcontext() if is_last else self.accelerator.no_sync(learner.model):
            with self.accelerator.autocast():
                loss = self.loss_of(images, labels)
            self.accelerator.backward(loss / self.accumulation)
        self.guard.add(loss, len(labels))

    def update(self, lr: float) -> None:
        """Moves weights, BatchNorm's statistics and the average of the weights, if it counts."""
        learner = self.learner
        for group in learner.optimizer.param_groups:
            group["lr"] = lr
        gradients = [p.grad for p in learner.module.parameters() if p.grad is not None]
        self.guard.decide(nn.utils.get_total_norm(gradients, foreach=True))
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        learner.state.step += 1
        if learner.ema:
            weight = self.guard.kept(learner.ema.weight(learner.state.step))
            learner.ema.update(learner.module, weight)


def _guard(learner: Learner, plan: Plan, train: config.Train) -> Guard:
    state = learner.state
    return Guard(
        learner.module, learner.optimizer, learner.scaler, plan.world_size,
        train.max_skipped_steps, state.step, state.skipped_steps,
    )  # fmt: skip


def loss_function(model: nn.Module, train: config.Train, compile_it: bool) -> Loss:
    """Compiled, it is for fixed shapes, with dropout drawn as eager draws it."""

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels, label_smoothing=train.label_smoothing)

    if compile_it:
        compiled: Loss = torch.compile(loss_of, dynamic=False, options={"fallback_random": True})
        return compiled
    return loss_of


class Recorder:
    """Runs functions of no arguments on a CUDA device as graphs, recorded when first called.

    Source: CUDA graphs as PyTorch has them, pytorch.org/docs/stable/notes/cuda.html.
    """

    WARM_UPS = 3  # before recording: kernels are chosen and compiled, memory is found

    def __init__(self, touched: Callable[[], list[Tensor]]) -> None:
        self.touched = touched  # the tensors that functions change in place
        self.graphs: dict[Any, Any] = {}
        self.pool: Any = None

    def __call__(self, key: Any, function: Callable[[], None]) -> None:
        """Runs `function`; `key` tells it from others, and its shapes from other shapes."""
        if key not in self.graphs:
            self.graphs[key] = self._record(function)
        self.graphs[key].replay()

    def _record(self, function: Callable[[], None]) -> Any:
        # Warming up changes weights and draws numbers; both are put back.
        tensors, drawn = self.touched(), torch.cuda.get_rng_state()
        kept = [tensor.clone() for tensor in tensors]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            torch._foreach_copy_(tensors, kept)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # The loader's thread may allocate meanwhile, which another mode would call a fault.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            function()
        torch.cuda.set_rng_state(drawn)
        self.pool = self.pool or graph.pool()
        return graph


class Graphed:
    """Carries out updates as CUDA graphs: one, or with accumulation two, for each size of image.

    Whatever changes from update to update lies in tensors that stay where they are: images, labels,
    learning rate, the weight of the average. All gradients are views of one flat tensor.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        learner: Learner,
        plan: Plan,
        train: config.Train,
        compile_it: bool = False,
        run: Callable[[Any, Callable[[], None]], None] | None = None,
    ) -> None:
        """`run` runs a function under a key; by default as a CUDA graph."""
        self.accelerator = accelerator
        self.learner = learner
        self.world_size = plan.world_size
        self.accumulation = plan.accumulation
        self.guard = _guard(learner, plan, train)
        device = accelerator.device
        self.lr = torch.zeros((), device=device)
        self.ema_weight = torch.zeros((), device=device)
        self.inputs: dict[Any, tuple[Tensor, Tensor]] = {}
        self.pending: Any = None  # the key of the last micro-batch's inputs
        self.exchange_bf16 = train.gradient_exchange == "bf16"
        for group in learner.optimizer.param_groups:
            group["lr"] = self.lr
        self.gradients = _flat_gradients(learner.module)
        self.run = run or Recorder(self._touched)
        self.loss_of = loss_function(learner.module, train, compile_it)

    def micro(self, images: Tensor, labels: Tensor, is_last: bool) -> None:
        """As of `Eager`; the last one is carried out with the update."""
        key = (images.shape, images.dtype, labels.shape, labels.dtype)
        if key not in self.inputs:
            self.inputs[key] = torch.empty_like(images), torch.empty_like(labels)
        static = self.inputs[key]
        for target, given in zip(static, (images, labels), strict=True):
            target.copy_(given, non_blocking=True)
        if is_last:
            self.pending = key
        else:
            self.run(("micro", key), lambda: self._backward(*static))

    def update(self, lr: float) -> None:
        learner = self.learner
        assert self.pending, "no micro-batch was the last"
        key, self.pending = self.pending, None
        learner.state.step += 1
        self.lr.fill_(lr)
        if learner.ema:
            self.ema_weight.fill_(learner.ema.weight(learner.state.step))

        def whole() -> None:
            self._backward(*self.inputs[key])
            self._move()

        self.run(("update", key), whole)

    def _backward(self, images: Tensor, labels: Tensor) -> None:
        with self.accelerator.autocast():
            loss = self.loss_of(images, labels)
        # Gradients are added over processes, where DDP takes their mean.
        (loss / (self.accumulation * self.world_size)).backward()
        self.guard.add(loss, len(labels))

    @torch.no_grad()
    def _move(self) -> None:
        learner = self.learner
        if self.world_size > 1:
            if self.exchange_bf16:
                short = self.gradients.bfloat16()
                torch.distributed.all_reduce(short)
                self.gradients.copy_(short)
            else:
                torch.distributed.all_reduce(self.gradients)
        self.guard.decide(self.gradients.norm())
        learner.optimizer.step()
        self.gradients.zero_()
        if learner.ema:
            learner.ema.update(learner.module, self.guard.kept(self.ema_weight))

    def _touched(self) -> list[Tensor]:
        learner = self.learner
        modules = [learner.module, *([learner.ema.module] if learner.ema else [])]
        momenta = [
            state["momentum_buffer"]
            for state in learner.optimizer.state.values()
            if state.get("momentum_buffer") is not None
        ]
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        return [*(t.detach() for t in tensors), *momenta, self.gradients, *self.guard.tensors()]


def _flat_gradients(module: nn.Module) -> Tensor:
    """One tensor of zeros that the gradients of all parameters are views of, strides and all."""
    parameters = list(module.parameters())
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    start = 0
    for parameter in parameters:
        view = flat[start : start + parameter.numel()]
        parameter.grad = view.as_strided(parameter.shape, parameter.stride(), start)
        start += parameter.numel()
    return flat


Updater = Eager | Graphed


def prepare(
    mode: str, accelerator: Accelerator, module: nn.Module, recipe: config.Recipe, plan: Plan
) -> Learner:
    """All that training changes, on the device, with the network wrapped as `mode` needs it."""
    average = WeightAverage(module, recipe.optim.ema_decay) if recipe.optim.ema_decay else None
    optimizer: Any = build_optimizer(module, recipe.optim)
    model = module
    if "graph" not in mode:
        hooks = {"fp32": DDPCommunicationHookType.NO, "bf16": DDPCommunicationHookType.BF16}
        accelerator.ddp_handler = DistributedDataParallelKwargs(
            broadcast_buffers=False,  # BatchNorm's statistics are averaged: guard.Guard
            gradient_as_bucket_view=True,
            static_graph=mode == "eager" and plan.accumulation == 1,
            comm_hook=hooks[recipe.train.gradient_exchange],
        )
        with warnings.catch_warnings():  # torch 2.14 has another name, which Accelerate has not
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            model, optimizer = accelerator.prepare(module, optimizer)
        if accelerator.num_processes > 1:
            _settle_buckets(accelerator, model)
    return Learner(model, module, optimizer, average, accelerator.scaler)


def _settle_buckets(accelerator: Accelerator, model: nn.Module) -> None:
    """Has DistributedDataParallel arrange its buckets before the first update.

    It does so anew when it has seen one pass, or two of a static graph. Their layout is the order
    in which gradients of three processes and more are added up: with another one in the first
    updates after a restart, a run would not end bit for bit equal.
    """
    model.eval()  # changes no statistics and draws nothing
    image = torch.zeros(1, 3, 32, 32, device=accelerator.device)
    for _ in range(3):
        with accelerator.autocast():
            logits = model(image.to(memory_format=torch.channels_last))
        logits.float().sum().backward()
        model.zero_grad()
    model.train()


def build(
    mode: str, accelerator: Accelerator, learner: Learner, plan: Plan, train: config.Train
) -> Updater:
    """What carries out the updates of a learner that `prepare` made for `mode`."""
    kind = Graphed if "graph" in mode else Eager
    return kind(accelerator, learner, plan, train, compile_it="compile" in mode)


# --------------------------------------------------------------------------------------------------
# Which mode
# --------------------------------------------------------------------------------------------------

AGREES = 0.01  # relative difference of the mean loss from eager's
COMPILE_S = 120  # what compiling takes on a CPU: 111 s measured for Small 0.75
GAIN = 0.1  # of the time, about, by compiling on a CPU: -8 to 20 % measured
CPU_IMAGES = 32  # of a micro-batch, at most, in trials on a CPU


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of an attempt at a mode: `fault` is empty where it worked."""

    mode: str
    images_per_s: float = 0.0  # of all processes
    loss: float = 0.0
    fault: str = ""
    remark: str = ""

    def __str__(self) -> str:
        return f"{self.mode} {self.fault or f'{self.images_per_s:,.0f} images/s'}{self.remark}"


def choose(
    accelerator: Accelerator,
    module: nn.Module,
    recipe: config.Recipe,
    plan: Plan,
    num_classes: int,
    before: str | None,
    attempt: Callable[[str], Trial] | None = None,
) -> tuple[str, str]:
    """The mode to use, and one sentence on why; the same in all processes. Changes nothing.

    Args:
        before: the mode that the run had before it was stopped, if any, here.
        attempt: tries a mode; by default on made-up images.
    Raises:
        ExecutionError: not even eager works.
    """
    train = recipe.train
    if train.execution != "auto":
        return train.execution, f"execution: {train.execution}, as the recipe says"
    on_cpu = accelerator.device.type == "cpu"
    ratio = math.inf
    if train.precision == "bf16" and on_cpu:
        ratio = bf16_ratio(module, schedule.largest_crop_px(recipe.data.crop_px))
    # All decide alike: those that go on exchange results, and must not wait for one that does not.
    if (ratio := min(gather_object([ratio]))) < 1:
        return "eager", (
            f"WARNING: bfloat16 takes {1 / ratio:.1f} times as long as float32 on this CPU: use "
            "--set train.precision=no\nexecution: eager"
        )
    if before:
        return before, f"execution: {before}, as before the stop"
    if train.deterministic:
        return "eager", "execution: eager, as a choice by speed may differ from run to run"

    def trial(mode: str) -> Trial:
        return try_mode(mode, accelerator, module, recipe, plan, num_classes)

    attempt = attempt or trial
    eager = attempt("eager")
    if eager.fault:
        raise ExecutionError(f"no update could be carried out: {eager}")
    if on_cpu:
        left_s = plan.total_steps * plan.global_batch_size / eager.images_per_s
        if left_s * GAIN < COMPILE_S:
            return "eager", "execution: eager, as compiling would take longer than it could save"
        modes = ["compile"]
    elif train.precision == "fp16":
        modes = ["compile"]  # a scaled loss decides on the host whether to update
    else:
        modes = ["compile", "graph", "compile_graph"]
    trials = [eager]
    for other in map(attempt, modes):
        if not other.fault and not abs(other.loss - eager.loss) <= AGREES * eager.loss:
            fault = f"has another loss ({other.loss:.4f}, eager {eager.loss:.4f})"
            other = replace(other, fault=fault)
        trials.append(other)
    best = max((t for t in trials if not t.fault), key=lambda t: t.images_per_s)
    return best.mode, f"execution: {best.mode} ({'; '.join(map(str, trials))})"


def try_mode(
    mode: str,
    accelerator: Accelerator,
    module: nn.Module,
    recipe: config.Recipe,
    plan: Plan,
    num_classes: int,
) -> Trial:
    """A few updates of a copy of the network, on made-up images of the recipe's largest size."""
    device = accelerator.device
    on_cpu = device.type == "cpu"
    size = min(plan.micro_batch_size, CPU_IMAGES) if on_cpu else plan.micro_batch_size
    some = replace(
        plan, micro_batch_size=size, accumulation=1, global_batch_size=size * plan.world_size
    )
    generator = torch.Generator().manual_seed(0)
    px = schedule.largest_crop_px(recipe.data.crop_px)
    half = not on_cpu and recipe.train.precision != "no"
    images = torch.randn(size, 3, px, px, generator=generator).to(
        device, torch.float16 if half else torch.float32, memory_format=torch.channels_last
    )
    labels = torch.randint(num_classes, (size,), generator=generator).to(device)
    warm_up, timed = (1, 2) if on_cpu else (5, 20)
    seconds, loss, fault, remark = math.inf, 0.0, "", ""
    try:
        learner = prepare(mode, accelerator, copy.deepcopy(module), recipe, some)
        updater = build(mode, accelerator, learner, some, recipe.train)

        def updates(number: int) -> float:
            begun = time.perf_counter()
            for _ in range(number):
                runtime.seed_torch(0, Stream.TORCH, learner.state.step)
                updater.micro(images, labels, is_last=True)
                updater.update(recipe.optim.warmup_lr)
            updater.guard.loss_sum.item()  # waits for the device
            return time.perf_counter() - begun

        if "compile" in mode:
            from torch._inductor.utils import run_and_get_code  # takes seconds

            _, code = run_and_get_code(updates, warm_up)
            lost = lost_channels_last(code)
            remark = f" ({len(lost)} convolutions lose channels-last)" if lost else ""
        else:
            updates(warm_up)
        seconds = updates(timed)
        loss = float(updater.guard.loss_sum) / (size * (warm_up + timed))
    except Exception as error:  # of a compiler, or of a device that lacks something
        said = str(error).strip().splitlines() or ["nothing said"]
        fault = f"failed: {type(error).__name__}: {said[0]}"
    finally:
        accelerator.free_memory()
        if "compile" in mode:  # which imports the compiler
            torch.compiler.reset()
    results = gather_object([(seconds, loss, fault)])
    faults = [text for _, _, text in results if text]
    rate = timed * some.global_batch_size / max(taken for taken, _, _ in results)
    mean = sum(found for _, found, _ in results) / len(results)
    return Trial(mode, rate, mean, faults[0] if faults else "", remark)


_CONVOLVED = re.compile(
    r"assert_\w+\((\w+), \((\d+), (\d+), (\d+), (\d+)\), \((\d+), (\d+), .*aten\.(convolution\w*)"
)


def lost_channels_last(code: Sequence[str]) -> list[str]:
    """The results of convolutions, forward and backward, that compiled code has in another layout.

    Inductor is reported to lose it in the backward of depthwise convolutions on a GPU, which is 20
    to 58 % slower.
    """
    lost = []
    for line in "\n".join(code).splitlines():
        if found := _CONVOLVED.search(line):
            channels, height, width = (int(n) for n in found.group(3, 4, 5))
            if channels > 1 and height * width > 1 and int(found[7]) != 1:
                lost.append(f"{found[8]} {found[1]}")
    return lost


def bf16_ratio(module: nn.Module, px: int) -> float:
    """Speed of forward and backward in bfloat16 over that in float32, on this CPU."""
    network = copy.deepcopy(module)
    images = torch.randn(8, 3, px, px).contiguous(memory_format=torch.channels_last)

    def seconds(bf16: bool) -> float:
        found = []
        for _ in range(4):
            begun = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = network(images).float().square().mean()
            loss.backward()
            found.append(time.perf_counter() - begun)
        return min(found[1:])

    return seconds(bf16=False) / seconds(bf16=True)
