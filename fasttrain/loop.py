"""The loop: forward, backward, accumulate, update; log, evaluate, save, stop.

Works on built objects and any iterable of batches, so a list trains it in a test. The host waits
for the device only where a line is logged, at evaluations and at checkpoints.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from fasttrain import checkpoint, config, runtime, sampling, schedule
from fasttrain.batch import Batch
from fasttrain.display import TrainDisplay
from fasttrain.execution import Evaluator, Updater
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
    max_failures: int = 1  # saves in a row that may fail
    metrics: JsonLines | None = None
    samples: JsonLines | None = None
    forecast: Forecast | None = None
    keys_of: Callable[[int], list[str]] | None = None  # places of the samples of an update

    def write(self, record: dict[str, Any]) -> None:
        if self.metrics:
            self.metrics.write(record)


class NonFiniteLoss(config.Fault, RuntimeError):
    """Loss or gradient were not finite in more updates than may be skipped."""

    of_all = True


class Unsaved(config.Fault, RuntimeError):
    """The run cannot be saved, so it does not go on."""

    of_all = True


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
        stop_requested: asked once a step and once a batch of an evaluation, equally often by all
            processes; not 0 where all should stop.
        updater: carries out the learner's updates.
        mix: mixes the images and labels of a micro-batch, drawing from torch's generator.
    Returns:
        The closing record when the run is complete, None when it was stopped; saved either way.
    Raises:
        NonFiniteLoss: at the first log point, evaluation or save after one update too many was
            skipped; nothing has changed since.
        Unsaved: saving failed once too often, or at the end.
    """
    state, guard = learner.state, updater.guard
    if accelerator.is_main_process:
        guard.loss_sum += state.loss_sum
    clock = Clock(accelerator.device)
    begun = time.perf_counter()
    saved_step, failures = state.step, 0

    def evaluate_if_due() -> bool:
        """Whether the evaluation was cut short, as all should stop."""
        if not plan.eval_due(state.step) or state.last_eval.get("step", -1) + 1 >= state.step:
            return False
        _look_at_skipped(accelerator, learner, updater, plan, outputs)
        with clock.paused():
            return not _evaluate_and_log(
                accelerator, learner, updater.evaluators, eval_batches, num_eval_samples, plan,
                outputs, stop_requested,
            )  # fmt: skip

    # The run may have been stopped between an update and its evaluation.
    stopped = stop_requested() or evaluate_if_due()
    batches = train_batches(state.step)
    while state.step < plan.total_steps and not stopped:
        lr = _update(accelerator, learner, updater, batches, plan, outputs, clock, mix)
        at_end = state.step == plan.total_steps
        if state.step % outputs.log_every_steps == 0 or at_end:
            _log_train(accelerator, learner, updater, plan, outputs, clock, lr, num_eval_samples)
        if outputs.forecast and (state.step % plan.steps_per_epoch == 0 or at_end):
            _log_limit(outputs, clock, plan, state.step)
        stopped = stop_requested() or evaluate_if_due()
        if state.step % outputs.save_every_steps == 0 or at_end or stopped:
            with clock.paused():
                _look_at_skipped(accelerator, learner, updater, plan, outputs)
                state.loss_sum = _total(accelerator, guard.loss_sum)
                fault = _save(accelerator, learner, outputs)
            failures = failures + 1 if fault else 0
            saved_step = saved_step if fault else state.step
            if fault and (at_end or stopped or failures >= outputs.max_failures):
                raise Unsaved(
                    f"the run stops, as it cannot be saved: {fault}\nthe newest state that was "
                    f"saved is that of update {saved_step}; mend this, and the same command goes on"
                )
    if state.step < plan.total_steps or stopped:
        return None
    done = {
        **state.last_eval,
        "event": "done",
        "schedule_steps": plan.schedule_steps,
        "images_per_s": round(clock.lap("run")[0], 1),
        "seconds": round(time.perf_counter() - begun, 2),
    }
    if state.skipped_steps:
        done["skipped_steps"] = state.skipped_steps
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
    evaluators: Sequence[Evaluator],
    batches: Iterable[Batch],
    num_samples: int,
    stop_requested: Callable[[], int] = lambda: 0,
    most_batches: int = 0,
    progress: Callable[[int], object] = lambda seen: None,
) -> list[dict[str, Any]]:
    """`top1`, `top5` (percent), `loss` and `seen` of each network over all processes' batches.

    Each network is in evaluation mode meanwhile.

    Processes may have different numbers of batches, at most `most_batches`: sums are exchanged at
    the end alone, and `stop_requested` is asked equally often by all. Where it does not say 0,
    nothing is returned. `progress` is told after each batch how many images this process has seen.
    The loss is cross-entropy without smoothing, None where it is not finite.

    Raises:
        RuntimeError: not every one of `num_samples` images was seen exactly once.
    """
    sums = [EvalSums(accelerator.device) for _ in evaluators]
    modules = [evaluator.module for evaluator in evaluators]
    was_training = [module.training for module in modules]
    for module in modules:
        module.eval()
    seen = 0
    try:
        for batch, _ in itertools.zip_longest(batches, range(most_batches)):
            for evaluator, total in zip(evaluators, sums, strict=True) if batch else ():
                with accelerator.autocast():
                    logits = evaluator(batch.images)
                total.add(logits, batch.labels)
            seen += len(batch.labels) if batch else 0
            progress(seen)
            if stop_requested():
                return []
    finally:
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
    evaluators: Sequence[Evaluator],
    batches: Iterable[Batch],
    num_samples: int,
    plan: Plan,
    outputs: Outputs,
    stop_requested: Callable[[], int],
) -> bool:
    """Whether it was carried out; not, where all should stop."""
    start = time.perf_counter()
    most = sampling.num_eval_batches(num_samples, plan.micro_batch_size, 0, plan.world_size)

    def progress(seen: int) -> None:
        outputs.display.evaluating(min(seen * plan.world_size, num_samples), num_samples)

    results = evaluate(
        accelerator, evaluators, batches, num_samples, stop_requested, most, progress
    )
    if not results:
        return False
    step = learner.state.step - 1
    record = {"event": "eval", "step": step, "epoch": plan.epoch_of(step), **results[0]}
    if learner.ema:
        record |= {f"ema_{key}": results[1][key] for key in ("top1", "top5", "loss")}
    record["eval_s"] = round(time.perf_counter() - start, 2)
    learner.state.last_eval = record
    outputs.write(record)
    outputs.display.eval_line(record)
    if any(result["loss"] is None for result in results):
        outputs.display.say(
            f"WARNING: after update {step} the loss of the evaluation is not finite, so its "
            "accuracy means nothing: weights or BatchNorm's statistics have grown too large; lower "
            "[optim] lr, or raise train.micro_batch_size"
        )
    return True


def _log_train(
    accelerator: Accelerator,
    learner: Learner,
    updater: Updater,
    plan: Plan,
    outputs: Outputs,
    clock: Clock,
    lr: float,
    num_eval_samples: int,
) -> None:
    state, loss_sum = learner.state, updater.guard.loss_sum
    _look_at_skipped(accelerator, learner, updater, plan, outputs)  # here the host waits
    images_per_s, data_wait = clock.lap("log")
    if not state.loss_images:  # all were skipped
        return
    loss = _total(accelerator, loss_sum) / state.loss_images
    loss_sum.zero_()
    state.loss_images = 0
    step = state.step - 1
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
    left_s = _seconds_left(learner, plan, clock.mean(), num_eval_samples)
    outputs.display.train_line(record, clock.mean(), left_s)
    if outputs.forecast:
        outputs.forecast.lap(images_per_s, data_wait)


def _seconds_left(
    learner: Learner, plan: Plan, images_per_s: float, num_eval_samples: int
) -> float | None:
    """Of the updates and evaluations to come; None where the updates' speed is not known yet."""
    if not images_per_s:
        return None
    step, evaluated = learner.state.step, learner.state.last_eval
    # Before the first: a forward pass takes about a third of an update.
    guess_s = num_eval_samples * (2 if learner.ema else 1) / (3 * images_per_s)
    updates_s = (plan.total_steps - step) * plan.global_batch_size / images_per_s
    return updates_s + plan.evals_left(step - 1) * float(evaluated.get("eval_s", guess_s))


def _look_at_skipped(
    accelerator: Accelerator, learner: Learner, updater: Updater, plan: Plan, outputs: Outputs
) -> None:
    """Reports updates that were skipped since the last time, and stops where they are too many."""
    state = learner.state
    skipped = updater.guard.read()  # alike in all processes, but for the loss
    if not skipped:
        return
    step = skipped.step
    losses = gather_object([skipped.loss])
    state.skipped_steps += skipped.number
    state.loss_images -= skipped.number * plan.global_batch_size
    record: dict[str, Any] = {
        "event": "skipped",
        "step": step,
        "epoch": plan.epoch_of(step),
        "number": skipped.number,
        "lr": schedule.lr_at(step, plan),
        "loss": [str(loss) for loss in losses],  # of each process; JSON has no nan
        "gradient_norm": str(skipped.gradient_norm),
        "weight_norm": float(nn.utils.get_total_norm(list(learner.module.parameters()))),
    }
    outputs.write(record)
    path = outputs.checkpoints.parent / f"skipped_step_{step:08d}.json"
    if accelerator.is_main_process:
        samples = outputs.keys_of(step) if outputs.keys_of else []
        with contextlib.suppress(OSError):  # the record says most of it
            path.write_text(json.dumps(record | {"samples": samples}, indent=1) + "\n")
    what = (
        f"update {step} has loss {', '.join(record['loss'])} and gradient norm "
        f"{record['gradient_norm']} (lr {record['lr']:.4g}); its samples are listed in {path}"
    )
    if state.skipped_steps > updater.guard.max_skipped:
        raise NonFiniteLoss(
            f"{what}\nneither it nor what came after it changed anything; the newest checkpoint "
            "is from before. Lower [optim] lr, lengthen warmup_epochs, or under fp16 try bf16; or "
            "leave such updates out: --set train.max_skipped_steps=10"
        )
    outputs.display.say(f"SKIPPED {skipped.number}, {state.skipped_steps} in all: {what}")


def _save(accelerator: Accelerator, learner: Learner, outputs: Outputs) -> str:
    """Saves, with all lines that a full disk has held back; returns what is wrong, if anything."""
    fault = ""
    try:
        for file in (outputs.metrics, outputs.samples):
            if file:
                file.flush()
        if accelerator.is_main_process:
            checkpoint.save(outputs.checkpoints, learner, outputs.about, outputs.keep)
    except OSError as error:
        fault = str(error)
    fault = next(filter(None, gather_object([fault])), "")
    if fault:
        outputs.display.say(f"NOT SAVED at update {learner.state.step}: {fault}")
    return fault


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
