"""The loop: forward, backward, accumulate, update; log, evaluate, save, stop.

Works on built objects and any iterable of batches, so a list trains it in a test. The host waits
for the device only where a line is logged, at evaluations and at checkpoints.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fasttrain import checkpoint, config, runtime, schedule
from fasttrain.data import Batch
from fasttrain.display import TrainDisplay
from fasttrain.execution import Updater
from fasttrain.forecast import Forecast
from fasttrain.metrics import Clock, EvalSums
from fasttrain.mixing import Mix
from fasttrain.optim import Learner
from fasttrain.rng import Stream
from fasttrain.run_folder import JsonLines
from fasttrain.sampling import Draw
from fasttrain.schedule import Plan


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a run reports to, and how often. Of several processes, rank 0 alone has `metrics`."""

    checkpoints: Path
    about: dict[str, Any]  # stored in every checkpoint
    save_every_steps: int
    keep: int
    log_every_steps: int
    display: TrainDisplay
    metrics: JsonLines | None = None
    samples: JsonLines | None = None
    forecast: Forecast | None = None

    def write(self, record: dict[str, Any]) -> None:
        if self.metrics:
            self.metrics.write(record)


class NonFiniteLoss(config.Fault, RuntimeError):
    """The loss is no longer a number; the newest checkpoint is from before it was noticed."""


def fit(
    accelerator: Accelerator,
    learner: Learner,
    train_batches: Callable[[int], Iterator[Batch]],
    eval_batches: Iterable[Batch],
    num_eval_samples: int,
    plan: Plan,
    outputs: Outputs,
    stop_requested: Callable[[], int],
    updater: Updater,
    mix: Mix | None = None,
) -> dict[str, Any] | None:
    """Trains from the learner's step to the plan's end, evaluating and saving on the way.

    Args:
        train_batches: gives the micro-batches of this process from an update on.
        num_eval_samples: how many images all processes together must see in an evaluation.
        stop_requested: asked once a step; a signal's number where all processes should stop.
        updater: carries out the learner's updates.
        mix: mixes the images and labels of a micro-batch, drawing from torch's generator.
    Returns:
        The closing record when the run is complete, None when it was stopped; saved either way.
    Raises:
        NonFiniteLoss: at the first log point after the loss ceased to be finite.
    """
    state = learner.state
    loss_sum = updater.loss_sum
    if accelerator.is_main_process:
        loss_sum += state.loss_sum
    clock = Clock(accelerator.device)
    begun, first_step = time.perf_counter(), state.step

    def evaluate_if_due() -> None:
        if plan.eval_due(state.step) and state.last_eval.get("step", -1) + 1 < state.step:
            with clock.paused():
                _evaluate_and_log(
                    accelerator, learner, eval_batches, num_eval_samples, plan, outputs
                )

    evaluate_if_due()  # the run may have been stopped between an update and its evaluation
    batches = train_batches(state.step)
    stopped = 0
    while state.step < plan.total_steps and not stopped:
        lr = _update(accelerator, learner, updater, batches, plan, outputs, clock, mix)
        at_end = state.step == plan.total_steps
        if state.step % outputs.log_every_steps == 0 or at_end:
            left_s = (plan.total_steps - state.step) / (state.step - first_step)
            left_s *= time.perf_counter() - begun
            _log_train(accelerator, learner, plan, outputs, clock, loss_sum, lr, left_s)
        if outputs.forecast and (state.step % plan.steps_per_epoch == 0 or at_end):
            _log_limit(outputs, clock, plan, state.step)
        stopped = stop_requested()
        evaluate_if_due()
        if state.step % outputs.save_every_steps == 0 or at_end or stopped:
            with clock.paused():
                state.loss_sum = _total(accelerator, loss_sum)
                if accelerator.is_main_process:
                    checkpoint.save(outputs.checkpoints, learner, outputs.about, outputs.keep)
                accelerator.wait_for_everyone()
    if state.step < plan.total_steps:
        return None
    done = {
        **state.last_eval,
        "event": "done",
        "schedule_steps": plan.schedule_steps,
        "images_per_s": round(clock.lap("run")[0], 1),
        "seconds": round(time.perf_counter() - begun, 2),
    }
    outputs.write(done)
    return done


def _update(
    accelerator: Accelerator,
    learner: Learner,
    updater: Updater,
    batches: Iterator[Batch],
    plan: Plan,
    outputs: Outputs,
    clock: Clock,
    mix: Mix | None,
) -> float:
    """One update on one global batch; returns its learning rate."""
    step = learner.state.step
    lr = schedule.lr_at(step, plan)
    draws = []
    for micro in range(plan.accumulation):
        with clock.waiting():
            batch = next(batches)
        draws.append(batch.draw)
        images, labels = batch.images, batch.labels
        place = micro * plan.world_size + accelerator.process_index
        if mix:
            runtime.seed_torch(plan.seed, Stream.MIX, step, place)
            images, labels = mix(images, labels)
        runtime.seed_torch(plan.seed, Stream.TORCH, step, place)  # dropout
        updater.micro(images, labels, is_last=micro + 1 == plan.accumulation)
    if outputs.samples:
        outputs.samples.write(_sample_record(draws, step))
    updater.update(lr)
    learner.state.loss_images += plan.global_batch_size
    clock.step(plan.global_batch_size)
    outputs.display.step(learner.state.step)
    return lr


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    modules: Sequence[nn.Module],
    batches: Iterable[Batch],
    num_samples: int,
) -> list[dict[str, Any]]:
    """`top1`, `top5` (percent), `loss` and `seen` of each network over all processes' batches.

    Processes may have different numbers of batches: nothing is exchanged before the end. The loss
    is cross-entropy without smoothing.

    Raises:
        RuntimeError: not every one of `num_samples` images was seen exactly once.
    """
    sums = [EvalSums(accelerator.device) for _ in modules]
    was_training = [module.training for module in modules]
    for module in modules:
        module.eval()
    for batch in batches:
        for module, total in zip(modules, sums, strict=True):
            with accelerator.autocast():
                logits = module(batch.images)
            total.add(logits, batch.labels)
    for module, training in zip(modules, was_training, strict=True):
        module.train(training)
    results = [total.result() for total in sums]
    if results[0]["seen"] != num_samples:
        raise RuntimeError(f"evaluated {results[0]['seen']:,} of {num_samples:,} images")
    return results


# --------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------


def _evaluate_and_log(
    accelerator: Accelerator,
    learner: Learner,
    batches: Iterable[Batch],
    num_samples: int,
    plan: Plan,
    outputs: Outputs,
) -> None:
    start = time.perf_counter()
    modules = [learner.module, *([learner.ema.module] if learner.ema else [])]
    results = evaluate(accelerator, modules, batches, num_samples)
    step = learner.state.step - 1
    record = {"event": "eval", "step": step, "epoch": plan.epoch_of(step), **results[0]}
    if learner.ema:
        record |= {f"ema_{key}": results[1][key] for key in ("top1", "top5", "loss")}
    record["eval_s"] = round(time.perf_counter() - start, 2)
    learner.state.last_eval = record
    outputs.write(record)
    outputs.display.eval_line(record)


def _log_train(
    accelerator: Accelerator,
    learner: Learner,
    plan: Plan,
    outputs: Outputs,
    clock: Clock,
    loss_sum: Tensor,
    lr: float,
    left_s: float,
) -> None:
    state = learner.state
    loss = _total(accelerator, loss_sum) / state.loss_images  # here the host waits for the device
    loss_sum.zero_()
    state.loss_images = 0
    images_per_s, data_wait = clock.lap("log")
    step = state.step - 1
    if not math.isfinite(loss):
        raise NonFiniteLoss(
            f"the loss up to update {step} is {loss} (lr {lr:.4g}); the newest checkpoint is "
            "from before. Lower [optim] lr or lengthen warmup_epochs; under fp16, try bf16"
        )
    record = {
        "event": "train",
        "step": step,
        "epoch": plan.epoch_of(step),
        "loss": loss,
        "lr": lr,
        "images_per_s": round(images_per_s, 1),
        "data_wait": round(data_wait, 4),
    }
    outputs.write(record)
    outputs.display.train_line(record, left_s)
    if outputs.forecast:
        outputs.forecast.lap(images_per_s, data_wait)


def _log_limit(outputs: Outputs, clock: Clock, plan: Plan, num_done: int) -> None:
    """At the end of an epoch: what limited it."""
    assert outputs.forecast
    epoch = plan.epoch_of(num_done - 1)
    found = outputs.forecast.epoch(epoch, *clock.lap("epoch"))
    outputs.write({"event": "limit", "step": num_done - 1, "epoch": epoch, **found})


def _sample_record(draws: Sequence[Draw | None], step: int) -> dict[str, Any]:
    """What this process was fed in an update, its micro-batches one after the other."""
    columns = zip(*(draw[:3] for draw in draws if draw), strict=True)
    ids, windows, flips = (np.concatenate(column).tolist() for column in columns)
    return {"event": "samples", "step": step, "ids": ids, "windows": windows, "flips": flips}


def _total(accelerator: Accelerator, value: Tensor) -> float:
    """The sum of a 0-d tensor over all processes, as a float: waits for the device."""
    total: Tensor = accelerator.reduce(value.clone(), reduction="sum")
    return float(total)
