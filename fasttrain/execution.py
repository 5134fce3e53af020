"""How an update is carried out: `train.execution`. Same results by each, but for rounding.

eager    PyTorch's own: forward, backward with DistributedDataParallel, optimizer, averages
compile  the same with forward, loss and backward compiled by torch.compile
graph    all of an update recorded once as a CUDA graph and replayed, so that the host launches one
         thing instead of a thousand; exchanges one flat gradient instead of DDP's buckets
compile_graph  the graph of the compiled update
..._fuse       the compiler computes cheap results again and stores none of them: compiling.FUSE

`modes` tries them on made-up images, and takes the fastest.
"""

import copy
import warnings
from collections.abc import Sequence
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
from fasttrain.optim import WeightAverage, build_optimizer
from fasttrain.schedule import Plan

Batch = tuple[Tensor, Tensor]  # images and labels


class Eager:
    """Carries out updates, compiled or not: `micro` for each micro-batch, then `update`."""

    def __init__(
        self,
        accelerator: Accelerator,
        learner: Learner,
        plan: Plan,
        train: config.Train,
        options: dict[str, Any] | None = None,
    ) -> None:
        """`options` are those of the compiler; None where nothing is compiled."""
        self.accelerator = accelerator
        self.learner = learner
        self.accumulation = plan.accumulation
        self.guard = Guard(learner, plan, train.max_skipped_steps)
        self.compiled = options is not None
        self.loss_of = loss_function(learner.model, train, options)
        self.evaluators = evaluators_of(learner, options, None)

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
            group["lr"] = lr * group.get("lr_factor", 1)
        gradients = [p.grad for p in learner.module.parameters() if p.grad is not None]
        self.guard.decide(nn.utils.get_total_norm(gradients, foreach=True))
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        learner.state.step += 1
        if learner.ema:
            weight = self.guard.kept(learner.ema.weight(learner.state.step))
            learner.ema.update(learner.flat, weight)

    def rehearse(self, training: Sequence[Batch], evaluation: Sequence[Tensor]) -> None:
        """Compiles for batches of these sizes. Changes nothing.

        Raises:
            Exception: what the compiler raises.
        """
        if not self.compiled:
            return
        learner = self.learner
        kept = [tensor.clone() for tensor in learner.flat]
        for images, labels in training:
            with self.accelerator.no_sync(learner.model), self.accelerator.autocast():
                loss = self.loss_of(images, labels)
            loss.backward()
        learner.optimizer.zero_grad()
        with torch.no_grad():
            for tensor, before in zip(learner.flat, kept, strict=True):
                tensor.copy_(before)
        rehearse_all(self.accelerator, self.evaluators, evaluation)

    def close(self) -> None:
        """Frees what only updates need."""
        for parameter in self.learner.module.parameters():
            parameter.grad = None


class ComputeCopy:
    """A network that forward and backward run in the place of another, for few kernels.

    It shares BatchNorm's parameters and statistics with the network. Its other parameters are
    copies in the type in which autocast multiplies: `refresh` makes them all at once, where
    autocast casts each weight, and backward each gradient, by a kernel of its own. Nor does it
    count BatchNorm's batches, which takes a kernel a layer.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        """`dtype` is autocast's; None where all is float32, and all parameters are shared."""
        layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        cast = [p for layer in layers for p in layer.parameters()] if dtype else []
        copies = [nn.Parameter(p.detach().to(dtype), p.requires_grad) for p in cast]
        memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
        memo |= {id(p): copied for p, copied in zip(cast, copies, strict=True)}
        self.module = copy.deepcopy(module, memo)
        for layer in self.module.modules():
            if isinstance(layer, _BatchNorm):
                layer.num_batches_tracked = None
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]  # not frozen
        self.copies = flat.lines([p.detach() for p in copies], cast)
        self.originals = flat.lines([p.detach() for p in cast], cast)

    def refresh(self) -> None:
        """Takes over the weights as they are now."""
        if self.copies:
            torch._foreach_copy_(self.copies, self.originals)


def _is_frozen(layer: nn.Module) -> bool:
    return not any(p.requires_grad for p in layer.parameters())


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
        options: dict[str, Any] | None = None,
        run: Run | None = None,
    ) -> None:
        """`options` as of `Eager`. `run` runs a function; by default as a CUDA graph."""
        self.accelerator = accelerator
        self.learner = learner
        self.world_size = plan.world_size
        self.accumulation = plan.accumulation
        device = accelerator.device
        on_gpu = device.type == "cuda"
        self.guard = Guard(learner, plan, train.max_skipped_steps, compile_it=on_gpu)
        self.lrs: dict[float, Tensor] = {}  # of the groups, by their factor
        self.ema_weight = torch.zeros((), device=device)
        # Gradients are added up over processes and micro-batches, where DDP takes their mean.
        self.share = torch.ones((), device=device) / (plan.accumulation * plan.world_size)
        self.inputs: dict[Any, Batch] = {}
        self.pending: Any = None  # the key of the last micro-batch's inputs
        self.exchange_bf16 = train.gradient_exchange == "bf16"
        for group in learner.optimizer.param_groups:
            factor = group.get("lr_factor", 1)
            if factor not in self.lrs:
                self.lrs[factor] = torch.zeros((), device=device)
            group["lr"] = self.lrs[factor]
        self.dtype = torch.bfloat16 if train.precision == "bf16" else None
        self.compute = ComputeCopy(learner.module, self.dtype)
        parameters = list(learner.module.parameters())
        self.gradients = torch.zeros_like(learner.flat.weights)
        views = flat.views_of(self.gradients, parameters)
        for parameter, view in zip(parameters, views, strict=True):
            parameter.grad = view
        # Of one micro-batch: added to the others where there are several.
        self.fresh = torch.zeros_like(self.gradients) if plan.accumulation > 1 else self.gradients
        places = flat.views_of(self.fresh, parameters)  # of the gradients
        self.places = [v for v, p in zip(places, parameters, strict=True) if p.requires_grad]
        layers = [layer for layer in learner.module.modules() if isinstance(layer, _BatchNorm)]
        self.counted = torch.tensor([not _is_frozen(x) for x in layers], device=device).long()
        self.recorder = None if run else Recorder(self._touched())
        self.run: Run = run or self.recorder  # type: ignore[assignment]
        self.loss_of = loss_function(self.compute.module, train, options)
        self.evaluators = evaluators_of(learner, options, self.run)

    def micro(self, images: Tensor, labels: Tensor, is_last: bool) -> None:
        """As of `Eager`; the last one is carried out with the update."""
        key = self._take(images, labels)
        if is_last:
            self.pending = key
        else:
            self.run(("micro", key), lambda: self._backward(key))

    def update(self, lr: float) -> None:
        learner = self.learner
        assert self.pending, "no micro-batch was the last"
        key, self.pending = self.pending, None
        learner.state.step += 1
        for factor, place in self.lrs.items():
            place.fill_(lr * factor)
        if learner.ema:
            self.ema_weight.fill_(learner.ema.weight(learner.state.step))
        self.run(("update", key), lambda: self._whole(key))

    def rehearse(self, training: Sequence[Batch], evaluation: Sequence[Tensor]) -> None:
        """Records the graphs for batches of these sizes. Changes nothing.

        To be done before a loader starts: see `Recorder.record`.

        Raises:
            Exception: what the compiler or CUDA raise.
        """
        if self.recorder is None:
            return
        for images, labels in training:
            key = self._take(images, labels)
            if self.accumulation > 1:
                self.recorder.record(("micro", key), partial(self._backward, key))
            self.recorder.record(("update", key), partial(self._whole, key))
        rehearse_all(self.accelerator, self.evaluators, evaluation)

    def close(self) -> None:
        """Frees the graphs, and the memory that only they need."""
        if self.recorder:
            self.recorder.close()
        self.inputs.clear()
        for parameter in self.learner.module.parameters():
            parameter.grad = None

    def _take(self, images: Tensor, labels: Tensor) -> Any:
        """Copies a micro-batch to where the graphs look for it; returns its key."""
        key = (images.shape, labels.shape, labels.dtype)
        if key not in self.inputs:
            self.inputs[key] = torch.empty_like(images, dtype=self.dtype), torch.empty_like(labels)
        for target, given in zip(self.inputs[key], (images, labels), strict=True):
            target.copy_(given, non_blocking=True)
        return key

    def _backward(self, key: Any) -> None:
        """Adds the gradients of the micro-batch under `key`."""
        images, labels = self.inputs[key]
        with torch.no_grad():
            self.compute.refresh()
        with self.accelerator.autocast():
            loss = self.loss_of(images, labels)
        found = torch.autograd.grad(loss, self.compute.parameters, self.share)
        with torch.no_grad():
            targets, sources = flat.lines(self.places, self.places), flat.lines(found, self.places)
            for dtype in dict.fromkeys(source.dtype for source in sources):
                # Lists of one type are copied by few kernels.
                pairs = [(t, s) for t, s in zip(targets, sources, strict=True) if s.dtype == dtype]
                torch._foreach_copy_([t for t, _ in pairs], [s for _, s in pairs])
            if self.fresh is not self.gradients:
                self.gradients += self.fresh
            self.learner.flat.counts.add_(self.counted)
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
        if self.fresh is not self.gradients:
            self.gradients.zero_()
        if learner.ema:
            learner.ema.update(learner.flat, self.guard.kept(self.ema_weight))

    def _whole(self, key: Any) -> None:
        """An update, with its last micro-batch."""
        self._backward(key)
        self._move()

    def _touched(self) -> list[Tensor]:
        """All that an update changes, and that is there before and after it."""
        learner = self.learner
        momenta = [
            state["momentum_buffer"]
            for state in learner.optimizer.state.values()
            if state.get("momentum_buffer") is not None
        ]
        average = learner.ema.flat if learner.ema else ()
        return [*learner.flat, *average, *momenta, self.gradients, *self.guard.tensors()]


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
    # DistributedDataParallel would take the tensors apart again.
    flattened = flat.flatten(module)
    return Learner(model, module, flattened, optimizer, average, accelerator.scaler)


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
    """What carries out the updates of a learner that `prepare` made for `mode`.

    A checkpoint has to be restored before: graphs keep the places of the tensors.
    """
    kind = Graphed if "graph" in mode else Eager
    return kind(accelerator, learner, plan, train, compiler_options(mode))
