"""The ways to carry out an update: `train.execution`. Their results differ only by rounding.

eager    PyTorch as usual: forward, backward with DistributedDataParallel, optimizer, averages
compile  the same, but torch.compile compiles forward, loss and backward
graph    one CUDA graph holds the whole update, so that the host launches one graph instead of a
         thousand kernels. One all-reduce of a flat gradient replaces DDP's buckets
compile_graph  a CUDA graph of the compiled update
..._fuse       the compiler recomputes cheap results instead of storing them: compiling.FUSE
...+depthwise  any of these, with the blocks of `fused_block` and its depthwise kernels
...+kernels    the same, with its 1 x 1 kernels too: see `train.kernels`

`modes` tries them on made-up images and chooses the fastest.
"""

import copy
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DDPCommunicationHookType
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fasttrain import config, flat
from fasttrain.compiling import compiler_options, loss_function
from fasttrain.evaluator import Run, evaluators_of, rehearse_all
from fasttrain.graphs import Recorder
from fasttrain.guard import Guard
from fasttrain.learner import Learner
from fasttrain.model import use_kernels
from fasttrain.optim import WeightAverage, build_optimizer, set_capturable
from fasttrain.schedule import Plan

Batch = tuple[Tensor, Tensor]  # images and labels


class Eager:
    """Carries out updates, compiled or not.

    Call `micro` for each micro-batch of an update, then `update`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        learner: Learner,
        plan: Plan,
        recipe: config.Recipe,
        options: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            options: the compiler's options; None compiles nothing.
        """
        self.accelerator = accelerator
        self.learner = learner
        self.recipe = recipe
        self.accumulation = plan.accumulation
        self.guard = Guard(learner, plan, recipe.train.max_skipped_steps)
        set_capturable(learner.optimizer, False)
        self.compiled = options is not None
        self.loss_of = loss_function(learner.model, recipe, options)
        self.evaluators = evaluators_of(learner, options, None)

    def micro(self, images: Tensor, labels: Tensor, is_last: bool) -> None:
        """Adds the gradients of a micro-batch to those of the update.

        Args:
            images: float `(B, 3, S, S)`, channels-last.
            labels: int64 `(B,)`, or probabilities `(B, C)`; with a teacher those of
                `distilling.join`.
            is_last: this is the update's last micro-batch: all-reduce the gradients.
        """
        learner = self.learner
        with nullcontext() if is_last else self.accelerator.no_sync(learner.model):
            with self.accelerator.autocast():
                loss = self.loss_of(images, labels)
            self.accelerator.backward(loss / self.accumulation)
        self.guard.add(loss, len(labels))

    def update(self, lr: float) -> None:
        """Updates weights, BatchNorm's statistics and the weight average, if the guard accepts.

        Args:
            lr: learning rate, before each parameter group's `lr_factor`.
        """
        learner = self.learner
        for group in learner.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1)
        gradients = [p.grad for p in learner.module.parameters() if p.grad is not None]
        self.guard.decide(nn.utils.get_total_norm(gradients, foreach=True))
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        learner.state.step += 1
        if learner.ema:
            weight = self.guard.kept(learner.ema.weight(learner.state.step))
            learner.ema.update(learner.flat, weight)

    def rehearse(self, training: Iterable[Batch], evaluation: Sequence[Tensor]) -> None:
        """Prepares for batches of these shapes. Leaves weights and statistics unchanged.

        The compiler compiles for each shape. A GPU also chooses kernels for it and takes memory,
        which would make the first updates of each shape slow.

        Args:
            training: images and labels, as `micro` takes them.
            evaluation: images `(B, 3, S, S)`.
        Raises:
            Exception: what the compiler raises.
        """
        learner = self.learner
        kept = [tensor.clone() for tensor in learner.flat]
        for images, labels in training:
            if self.compiled:
                self._pass(images, labels)
            else:
                self._pass_of_module(images, labels)
        learner.optimizer.zero_grad()
        with torch.no_grad():
            for tensor, original in zip(learner.flat, kept, strict=True):
                tensor.copy_(original)
        rehearse_all(self.accelerator, self.evaluators, evaluation)

    def _pass(self, images: Tensor, labels: Tensor) -> None:
        """Compiles forward and backward for a batch, without an all-reduce."""
        with self.accelerator.no_sync(self.learner.model), self.accelerator.autocast():
            loss = self.loss_of(images, labels)
        loss.backward()

    def _pass_of_module(self, images: Tensor, labels: Tensor) -> None:
        """Forward and backward of the network itself.

        DistributedDataParallel takes no part: `no_sync` may not interrupt its static graph.
        """
        module = self.learner.module
        with self.accelerator.autocast():
            loss = loss_function(module, self.recipe, None)(images, labels)
        torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])

    def close(self) -> None:
        """Frees the gradients."""
        for parameter in self.learner.module.parameters():
            parameter.grad = None


class ComputeCopy:
    """A copy of a network that runs forward and backward with fewer kernels than the original.

    It shares BatchNorm's parameters and statistics with the original. Its other parameters are
    copies in the dtype in which autocast multiplies. `refresh` casts all of them at once. Autocast
    would cast each weight, and backward each gradient, by a separate kernel. The copy does not
    count BatchNorm's batches either: that takes one kernel per layer.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        """
        Args:
            dtype: autocast's dtype; None if all is float32, and then all parameters are shared.
        """
        layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        cast = [p for layer in layers for p in layer.parameters()] if dtype else []
        copies = [nn.Parameter(p.detach().to(dtype), p.requires_grad) for p in cast]
        memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
        memo |= {id(p): copied for p, copied in zip(cast, copies, strict=True)}
        self.module = copy.deepcopy(module, memo)
        for layer in self.module.modules():
            if isinstance(layer, _BatchNorm):
                layer.num_batches_tracked = None
        self.trainable = [p for p in self.module.parameters() if p.requires_grad]
        self.copies = flat.to_1d([p.detach() for p in copies], cast)
        self.originals = flat.to_1d([p.detach() for p in cast], cast)

    def refresh(self) -> None:
        """Copies the original's current weights."""
        if self.copies:
            torch._foreach_copy_(self.copies, self.originals)


def _is_frozen(layer: nn.Module) -> bool:
    return not any(p.requires_grad for p in layer.parameters())


class Graphed:
    """Carries out updates as CUDA graphs: one per image size, or two with gradient accumulation.

    A graph reads and writes fixed addresses. So the values that change from update to update are in
    tensors that are never replaced. These are images, labels, learning rates, and the weight with
    which the network enters its moving average. All gradients are views of one flat tensor.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        learner: Learner,
        plan: Plan,
        recipe: config.Recipe,
        options: dict[str, Any] | None = None,
        run: Run | None = None,
    ) -> None:
        """
        Args:
            options: the compiler's options; None compiles nothing.
            run: runs a function under a key; by default as a CUDA graph.
        """
        self.accelerator = accelerator
        self.learner = learner
        self.world_size = plan.world_size
        self.accumulation = plan.accumulation
        device = accelerator.device
        on_gpu = device.type == "cuda"
        self.guard = Guard(learner, plan, recipe.train.max_skipped_steps, compile_it=on_gpu)
        set_capturable(learner.optimizer, True)
        self.lrs: dict[float, Tensor] = {}  # learning rate for each `lr_factor`
        self.ema_weight = torch.zeros((), device=device)
        # Gradients are summed over ranks and micro-batches. DDP would take the mean.
        self.loss_weight = torch.ones((), device=device) / (plan.accumulation * plan.world_size)
        self.inputs: dict[Any, Batch] = {}
        self.pending: Any = None  # input key of the update's last micro-batch, until `update` runs
        self.exchange_bf16 = recipe.train.gradient_exchange == "bf16"
        for group in learner.optimizer.param_groups:
            factor = group.get("lr_factor", 1)
            if factor not in self.lrs:
                self.lrs[factor] = torch.zeros((), device=device)
            group["lr"] = self.lrs[factor]
        dtype = torch.bfloat16 if recipe.train.precision == "bf16" else None
        # Of the images. The compiler casts them where they are first read.
        self.dtype = dtype if options is None else None
        self.compute = ComputeCopy(learner.module, dtype)
        parameters = list(learner.module.parameters())
        self.gradients = torch.zeros_like(learner.flat.weights)
        views = flat.views_of(self.gradients, parameters)
        for parameter, view in zip(parameters, views, strict=True):
            parameter.grad = view
        # Gradients of one micro-batch; with accumulation they are then added to `gradients`.
        self.fresh = torch.zeros_like(self.gradients) if plan.accumulation > 1 else self.gradients
        views = flat.views_of(self.fresh, parameters)
        self.fresh_views = [v for v, p in zip(views, parameters, strict=True) if p.requires_grad]
        layers = [layer for layer in learner.module.modules() if isinstance(layer, _BatchNorm)]
        self.counted = torch.tensor([not _is_frozen(x) for x in layers], device=device).long()
        self.recorder = None if run else Recorder(self._touched())
        self.run: Run = run or self.recorder  # type: ignore[assignment]
        self.loss_of = loss_function(self.compute.module, recipe, options)
        self.evaluators = evaluators_of(learner, options, self.run)

    def micro(self, images: Tensor, labels: Tensor, is_last: bool) -> None:
        """As `Eager.micro`, but `update` carries out the last micro-batch."""
        key = self._copy_inputs(images, labels)
        if is_last:
            self.pending = key
        else:
            self.run(("micro", key), lambda: self._backward(key))

    def update(self, lr: float) -> None:
        """As `Eager.update`, including the last micro-batch."""
        learner = self.learner
        assert self.pending, "call `micro` with is_last=True before `update`"
        key, self.pending = self.pending, None
        learner.state.step += 1
        for factor, group_lr in self.lrs.items():
            group_lr.fill_(lr * factor)
        if learner.ema:
            self.ema_weight.fill_(learner.ema.weight(learner.state.step))
        self.run(("update", key), lambda: self._last_micro_and_step(key))

    def rehearse(self, training: Iterable[Batch], evaluation: Sequence[Tensor]) -> None:
        """Records the graphs for batches of these shapes. Leaves weights and statistics unchanged.

        Call it before a loader starts: see `Recorder.record`.

        Args:
            training: images and labels, as `micro` takes them.
            evaluation: images `(B, 3, S, S)`.
        Raises:
            Exception: what the compiler or CUDA raises.
        """
        if self.recorder is None:
            return
        for images, labels in training:
            key = self._copy_inputs(images, labels)
            if self.accumulation > 1:
                self.recorder.record(("micro", key), partial(self._backward, key))
            self.recorder.record(("update", key), partial(self._last_micro_and_step, key))
        rehearse_all(self.accelerator, self.evaluators, evaluation)

    def close(self) -> None:
        """Frees the graphs, their inputs and the gradients."""
        if self.recorder:
            self.recorder.close()
        self.inputs.clear()
        for parameter in self.learner.module.parameters():
            parameter.grad = None

    def _copy_inputs(self, images: Tensor, labels: Tensor) -> Any:
        """Copies a micro-batch into the graphs' input tensors; returns the key of its shape."""
        key = (images.shape, labels.shape, labels.dtype)
        if key not in self.inputs:
            self.inputs[key] = torch.empty_like(images, dtype=self.dtype), torch.empty_like(labels)
        for target, given in zip(self.inputs[key], (images, labels), strict=True):
            target.copy_(given, non_blocking=True)
        return key

    def _backward(self, key: Any) -> None:
        """Adds the gradients of the micro-batch that `_copy_inputs` stored under `key`."""
        images, labels = self.inputs[key]
        with torch.no_grad():
            self.compute.refresh()
        with self.accelerator.autocast():
            loss = self.loss_of(images, labels)
        found = torch.autograd.grad(loss, self.compute.trainable, self.loss_weight)
        with torch.no_grad():
            views = self.fresh_views
            targets, sources = flat.to_1d(views, views), flat.to_1d(found, views)
            for dtype in dict.fromkeys(source.dtype for source in sources):
                # Few kernels copy a list of tensors if they all have one dtype.
                pairs = [(t, s) for t, s in zip(targets, sources, strict=True) if s.dtype == dtype]
                torch._foreach_copy_([t for t, _ in pairs], [s for _, s in pairs])
            if self.fresh is not self.gradients:
                self.gradients += self.fresh
            self.learner.flat.counts.add_(self.counted)
        self.guard.add(loss, len(labels))

    @torch.no_grad()
    def _step(self) -> None:
        """Reduces the gradients over the ranks. Updates the network, if the guard accepts."""
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
        if self.fresh is not self.gradients:
            self.gradients.zero_()
        if learner.ema:
            learner.ema.update(learner.flat, self.guard.kept(self.ema_weight))

    def _last_micro_and_step(self, key: Any) -> None:
        """Carries out the last micro-batch and the update, which form one graph."""
        self._backward(key)
        self._step()

    def _touched(self) -> list[Tensor]:
        """The tensors that an update changes and that outlive it."""
        learner = self.learner
        states = [
            value
            for state in learner.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        average = learner.ema.flat if learner.ema else ()
        return [*learner.flat, *average, *states, self.gradients, *self.guard.tensors()]


Updater = Eager | Graphed

DEPTHWISE, KERNELS = "+depthwise", "+kernels"  # the end of a mode's name


def without_kernels(mode: str) -> str:
    """The mode without DEPTHWISE or KERNELS: a value of `train.execution`."""
    return mode.partition("+")[0]


def prepare(
    mode: str, accelerator: Accelerator, module: nn.Module, recipe: config.Recipe, plan: Plan
) -> Learner:
    """Builds all that training changes, on the device, and wraps the network for `mode`.

    Args:
        mode: a value of `train.execution`, but not `auto`. DEPTHWISE or KERNELS may follow.
        module: the network, on its device, channels-last.
    """
    use_kernels(module, "+" in mode, pointwise=mode.endswith(KERNELS))
    average = WeightAverage(module, recipe.optim.ema_decay) if recipe.optim.ema_decay else None
    optimizer: Any = build_optimizer(module, recipe.optim)
    model = module
    if "graph" not in mode:
        hooks = {"fp32": DDPCommunicationHookType.NO, "bf16": DDPCommunicationHookType.BF16}
        accelerator.ddp_handler = DistributedDataParallelKwargs(
            broadcast_buffers=False,  # guard.Guard averages BatchNorm's statistics instead
            gradient_as_bucket_view=True,
            static_graph=mode == "eager" and plan.accumulation == 1,
            comm_hook=hooks[recipe.train.gradient_exchange],
        )
        with warnings.catch_warnings():  # torch 2.14 renamed the option; Accelerate did not
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            model, optimizer = accelerator.prepare(module, optimizer)
        if accelerator.num_processes > 1:
            _arrange_buckets(accelerator, model)
    # Flatten last: DistributedDataParallel would separate the tensors again.
    flattened = flat.flatten(module)
    return Learner(model, module, flattened, optimizer, average, accelerator.scaler)


def _arrange_buckets(accelerator: Accelerator, model: nn.Module) -> None:
    """Makes DistributedDataParallel arrange its buckets before the first update.

    DDP rearranges its buckets after the first pass, or after the second one of a static graph. With
    three or more ranks, the bucket layout decides in which order gradients are summed. If the first
    updates after a restart had another layout, the run would not end bit for bit equal.
    """
    model.eval()  # changes no statistics and draws no random numbers
    image = torch.zeros(1, 3, 32, 32, device=accelerator.device)
    for _ in range(3):
        with accelerator.autocast():
            logits = model(image.to(memory_format=torch.channels_last))
        logits.float().sum().backward()
        model.zero_grad()
    model.train()


def build(
    mode: str, accelerator: Accelerator, learner: Learner, plan: Plan, recipe: config.Recipe
) -> Updater:
    """Builds the updater for a learner that `prepare` made for the same `mode`.

    Restore a checkpoint first: graphs keep the addresses of the tensors.
    """
    kind = Graphed if "graph" in mode else Eager
    options = compiler_options(without_kernels(mode))
    return kind(accelerator, learner, plan, recipe, options)
