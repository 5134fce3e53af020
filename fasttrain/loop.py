"""The loop: forward, backward, accumulate, update; log, evaluate, save, stop.

The loop takes finished objects and any iterable of batches, so a test can train on a list. The host
waits for the device only at log lines, evaluations and checkpoints.
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

from fasttrain import checkpoint, config, determinism, files, pictures, sampling, schedule
from fasttrain.batch import Batch
from fasttrain.display import TrainDisplay
from fasttrain.distilling import Teach
from fasttrain.evaluator import Evaluator
from fasttrain.execution import Updater
from fasttrain.faults import Fault
from fasttrain.forecast import Forecast
from fasttrain.metrics import Clock, EvalSums, Meter, used_memory
from fasttrain.mixing import Mix, mix_at
from fasttrain.rng import Stream
from fasttrain.run_folder import JsonLines
from fasttrain.sampling import Draw
from fasttrain.schedule import Plan
from fasttrain.trackers import Trackers

PICTURED = 16  # images of the picture that trackers get


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run trains and evaluates on."""

    train_batches: Callable[[int], Iterator[Batch]]  # step -> this rank's micro-batches from it on
    eval_batches: Iterable[Batch]  # of this rank
    num_eval_samples: int  # of all ranks together
    mix: Mix | None = None  # mixes the images and labels of a micro-batch
    teach: Teach | None = None  # joins a teacher's labels with those of a micro-batch


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a run reports to. Only rank 0 has `metrics` and `trackers`."""

    checkpoints: Path
    about: dict[str, Any]  # stored in every checkpoint
    display: TrainDisplay
    metrics: JsonLines | None = None
    trackers: Trackers | None = None
    samples: JsonLines | None = None
    forecast: Forecast | None = None
    describe_samples: Callable[[int], list[str]] | None = None  # step -> its samples on all ranks

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record to the metrics, and sends it to the trackers."""
        if self.metrics:
            self.metrics.write(record)
        if self.trackers:
            self.trackers.log(record)

    def close(self) -> None:
        """Ends the trackers."""
        if self.trackers:
            self.trackers.close()


class NonFiniteLoss(Fault, RuntimeError):
    """Too many updates had a loss or gradient that is not finite. The recipe gives the limit."""

    raised_on_every_rank = True


class Unsaved(Fault, RuntimeError):
    """No checkpoint could be saved, so the run stops."""

    raised_on_every_rank = True


class Trainer:
    """Trains from the learner's step to the end of the plan. Evaluates and saves on the way.

    The updater counts the steps in `learner.state`. The guard sums the loss on the device. The
    trainer copies this sum to log lines and checkpoints, and counts the skipped updates.
    """

    def __init__(
        self,
        updater: Updater,
        plan: Plan,
        inputs: Inputs,
        outputs: Outputs,
        recipe: config.Recipe,
        stop_requested: Callable[[], int] = lambda: 0,
    ) -> None:
        """
        Args:
            updater: performs the updates of its learner.
            recipe: says when to log and when to save.
            stop_requested: is called once before the first update, after each update and after
                each evaluation batch, equally often on every rank. Returns 0 to continue. To stop,
                returns the exit status, which is the same on every rank.
        """
        self.updater, self.plan = updater, plan
        self.inputs, self.outputs, self.recipe = inputs, outputs, recipe
        self.stop_requested = stop_requested
        self.accelerator, self.learner = updater.accelerator, updater.learner
        self.state = self.learner.state
        self.clock = Clock(self.accelerator.device)
        self.lr = 0.0  # of the last update
        self.checked_step = self.state.step  # skipped updates before this step are reported
        self.saved_step, self.failed_saves = self.state.step, 0
        self.new_best = False  # the last evaluation was the best so far, and is not saved
        self.meter = Meter(self.accelerator.device)
        self.earlier = self.state.seconds, self.state.joules  # of the starts before this one

    def fit(self) -> dict[str, Any] | None:
        """Trains to the end of the plan, or until a stop is requested. Saves in both cases.

        Returns:
            The closing record if the run is complete; None if it was stopped.
        Raises:
            NonFiniteLoss: more updates were skipped than the recipe allows. It is raised at the
                next log line, evaluation or save. The weights are those from before the update
                that exceeded the limit.
            Unsaved: saving failed too often, or the last save failed.
        """
        self.outputs.display.resumed(self.state.last_eval, self.state.best)
        if self.accelerator.is_main_process:
            self.updater.guard.loss_sum += self.state.loss_sum
        # The run may have been stopped between an update and its evaluation.
        stopped = self.stop_requested() or not self._evaluate_if_due()
        batches = self.inputs.train_batches(self.state.step)
        while not stopped and not self._at_end:
            self._update(batches)
            if self._every(self.recipe.log.every_steps):
                self._log_train()
            if self.outputs.forecast and self._every(self.plan.steps_per_epoch):
                self._log_limit(self.outputs.forecast)
            stopped = self.stop_requested() or not self._evaluate_if_due()
            if stopped or self.new_best or self._every(self.recipe.checkpoint.every_steps):
                self._save(is_last=bool(stopped) or self._at_end)
        return self._close() if not stopped and self._at_end else None

    @property
    def _at_end(self) -> bool:
        return self.state.step >= self.plan.total_steps

    def _every(self, steps: int) -> bool:
        """True after every `steps` updates, and after the last update."""
        return self.state.step % steps == 0 or self._at_end

    # ---- an update

    def _update(self, batches: Iterator[Batch]) -> None:
        """Performs one update on one global batch."""
        plan, step, rank = self.plan, self.state.step, self.accelerator.process_index
        self.lr = schedule.lr_at(step, plan)
        draws = []
        for micro in range(plan.accumulation):
            with self.clock.waiting():
                batch = next(batches)
            draws.append(batch.draw)
            images, labels = batch.images, batch.labels
            if step == micro == 0 and self.outputs.trackers:
                self._picture(self.outputs.trackers, batch)
            group = micro * plan.world_size + rank  # index of the micro-batch in the global batch
            if self.inputs.teach:
                labels = self.inputs.teach(batch)
            if self.inputs.mix:
                place = plan.seed, step, group
                images, labels = mix_at(self.inputs.mix, images, labels, place)
            determinism.seed_torch(plan.seed, Stream.TORCH, step, group)  # dropout
            self.updater.micro(images, labels, is_last=micro + 1 == plan.accumulation)
        if self.outputs.samples:
            self.outputs.samples.write(_sample_record(draws, step))
        self.updater.update(self.lr)
        self.state.loss_images += plan.global_batch_size
        self.clock.step(plan.global_batch_size)
        self.outputs.display.step(self.state.step)

    def _picture(self, trackers: Trackers, batch: Batch) -> None:
        """Sends a picture of the run's first images."""
        classes = self.outputs.about["classes"]
        names = [classes[label] for label in batch.labels[:PICTURED].tolist()]
        trackers.image("images", pictures.grid(batch.images[:PICTURED], names))

    def _report_skipped(self) -> None:
        """Reports the updates that were skipped since the last call. Waits for the device.

        Raises:
            NonFiniteLoss: more updates were skipped than the recipe allows.
        """
        state, begin, self.checked_step = self.state, self.checked_step, self.state.step
        skipped = self.updater.guard.read()  # equal on all ranks, except for the loss
        if not skipped:
            return
        state.skipped_steps += skipped.number
        state.loss_images -= skipped.number * self.plan.global_batch_size
        step = begin + skipped.offset
        record: dict[str, Any] = {
            "event": "skipped",
            "step": step,
            "epoch": self.plan.epoch_of(step),
            "number": skipped.number,
            "lr": schedule.lr_at(step, self.plan),
            "loss": [str(loss) for loss in gather_object([skipped.loss])],  # JSON has no nan
            "gradient_norm": str(skipped.gradient_norm),
            "weight_norm": float(nn.utils.get_total_norm(list(self.learner.module.parameters()))),
        }
        self.outputs.write(record)
        what = (
            f"update {step} has loss {', '.join(record['loss'])} and gradient norm "
            f"{record['gradient_norm']} (lr {record['lr']:.4g}); its samples are in "
            f"{self._list_samples(record)}"
        )
        if state.skipped_steps > self.updater.guard.max_skipped:
            raise NonFiniteLoss(
                f"{what}\nneither this update nor a later one changed the weights, and the "
                "newest checkpoint is older. Lower [optim] lr, lengthen warmup_epochs, or use bf16 "
                "instead of fp16; or skip such updates: --set train.max_skipped_steps=10"
            )
        self.outputs.display.say(
            f"SKIPPED {skipped.number} updates, {state.skipped_steps} in total: {what}"
        )

    def _list_samples(self, record: dict[str, Any]) -> Path:
        """Writes the record of a skipped update and its samples to a file. Returns the file."""
        step, describe = record["step"], self.outputs.describe_samples
        path = self.outputs.checkpoints.parent / f"skipped_step_{step:08d}.json"
        if self.accelerator.is_main_process:
            samples = describe(step) if describe else []
            with contextlib.suppress(OSError):  # the metrics hold the record too
                text = json.dumps(record | {"samples": samples}, indent=1)
                files.write_text(path, f"{text}\n")
        return path

    # ---- evaluation

    def _evaluate_if_due(self) -> bool:
        """Evaluates if the plan says so. Returns False if a stop request cut it short."""
        state = self.state
        if not self.plan.eval_due(state.step) or state.last_eval.get("step", -1) + 1 >= state.step:
            return True
        self._report_skipped()
        with self.clock.paused():
            return self._evaluate()

    def _evaluate(self) -> bool:
        """Evaluates and logs the result. Returns False if a stop request cut it short."""
        start, plan, total = time.perf_counter(), self.plan, self.inputs.num_eval_samples

        def stop_after(seen: int) -> bool:
            self.outputs.display.evaluating(min(seen * plan.world_size, total), total)
            return bool(self.stop_requested())

        results = evaluate(
            self.accelerator, self.updater.evaluators, self.inputs.eval_batches, total,
            sampling.num_eval_batches(total, plan.micro_batch_size, 0, plan.world_size),
            stop_after,
        )  # fmt: skip
        if not results:
            return False
        step = self.state.step - 1
        record = {"event": "eval", "step": step, "epoch": plan.epoch_of(step), **results[0]}
        if self.learner.ema:
            record |= {f"ema_{key}": results[1][key] for key in ("top1", "top5", "loss")}
        record["eval_s"] = round(time.perf_counter() - start, 2)
        record["time"] = round(time.time(), 2)
        self.state.last_eval = record
        self.outputs.write(record)
        if best := self.state.better(record):
            self.state.best = best
            self.new_best = self.recipe.checkpoint.keep_best
            self.outputs.write(best if self.new_best else _without_checkpoint(best))
        self.outputs.display.eval_line(record, self.state.best)
        if any(result["loss"] is None for result in results):
            self.outputs.display.say(
                f"WARNING: the evaluation after update {step} has a loss that is not finite, so "
                "its accuracy means nothing. The weights or the BatchNorm statistics are too "
                "large: lower [optim] lr, or raise train.micro_batch_size"
            )
        return True

    # ---- records

    def _log_train(self) -> None:
        """Writes a train line with the mean loss since the last one. Waits for the device."""
        state, plan, loss_sum = self.state, self.plan, self.updater.guard.loss_sum
        self._report_skipped()
        images_per_s, data_wait = self.clock.lap("log")
        if not state.loss_images:  # all updates were skipped
            return
        loss = self._total(loss_sum) / state.loss_images
        loss_sum.zero_()
        state.loss_images = 0
        step = state.step - 1
        record = {
            "event": "train",
            "step": step,
            "epoch": plan.epoch_of(step),
            "loss": loss,
            "lr": self.lr,
            "crop_px": schedule.image_px(step, plan, self.recipe.data),
            "images_per_s": round(images_per_s, 1),
            "data_wait": round(data_wait, 4),
            "memory_gib": round(used_memory(self.accelerator.device).used_gib, 2),
            "time": round(time.time(), 2),
        }
        self.outputs.write(record)
        self.outputs.display.train_line(record, self.clock.mean(), self._seconds_left())
        if self.outputs.forecast:
            self.outputs.forecast.lap(images_per_s, data_wait)

    def _seconds_left(self) -> float | None:
        """Time of the remaining updates and evaluations; None while the speed is not known."""
        images_per_s, plan, step = self.clock.mean(), self.plan, self.state.step
        if not images_per_s:
            return None
        # Until an evaluation was timed, assume that a forward pass takes a third of an update.
        images = self.inputs.num_eval_samples * (2 if self.learner.ema else 1)
        eval_s = float(self.state.last_eval.get("eval_s", images / (3 * images_per_s)))
        updates_s = (plan.total_steps - step) * plan.global_batch_size / images_per_s
        return updates_s + plan.evals_left(step - 1) * eval_s

    def _log_limit(self, forecast: Forecast) -> None:
        """Writes what limited the speed of the epoch that has just ended."""
        step = self.state.step - 1
        epoch = self.plan.epoch_of(step)
        found = forecast.epoch(epoch, *self.clock.lap("epoch"))
        self.outputs.write({"event": "limit", "step": step, "epoch": epoch, **found})

    def _save(self, is_last: bool) -> None:
        """Saves a checkpoint.

        Raises:
            Unsaved: the last save failed, or too many saves in a row have failed.
        """
        with self.clock.paused():
            self._report_skipped()
            self.state.loss_sum = self._total(self.updater.guard.loss_sum)
            self._count_cost()
            fault = self._try_to_save()
        self.new_best = False  # if the save failed, the next one has other weights
        if not fault:
            self.saved_step, self.failed_saves = self.state.step, 0
            return
        self.outputs.display.say(f"NOT SAVED at update {self.state.step}: {fault}")
        self.failed_saves += 1
        if is_last or self.failed_saves >= self.recipe.checkpoint.max_failures:
            raise Unsaved(
                f"the run stops because it cannot be saved: {fault}\nthe newest checkpoint is "
                f"from update {self.saved_step}; correct the fault, and the same command resumes "
                "there"
            )

    def _try_to_save(self) -> str:
        """Saves the checkpoint, and the lines that a full disk has held back.

        Returns:
            The fault of the first rank that has one; "" if every rank succeeded.
        """
        outputs, fault = self.outputs, ""
        try:
            for file in (outputs.metrics, outputs.samples):
                if file:
                    file.flush()
            if self.accelerator.is_main_process:
                keep = self.recipe.checkpoint
                checkpoint.save(
                    outputs.checkpoints, self.learner, outputs.about, keep.keep, keep.keep_best
                )
        except OSError as error:
            fault = str(error)
        return next(filter(None, gather_object([fault])), "")

    def _count_cost(self) -> None:
        """Adds up time and energy of all starts. Every rank must call this."""
        seconds, joules = self.earlier
        self.state.seconds = seconds + self.meter.seconds()
        self.state.joules = joules + sum(gather_object([self.meter.joules()]))

    def _close(self) -> dict[str, Any]:
        """Writes the closing record and returns it."""
        self._count_cost()
        state = self.state
        done = {
            **self.state.last_eval,
            "event": "done",
            "schedule_steps": self.plan.schedule_steps,
            "images_per_s": round(self.clock.lap("run")[0], 1),
            "seconds": round(state.seconds, 2),
            "best": {
                key: state.best[key]
                for key in ("step", "epoch", "top1", "ema")
                if key in state.best
            },
            "time": round(time.time(), 2),
        }
        if state.joules:
            done["kwh"] = round(state.joules / 3.6e6, 4)
        if state.skipped_steps:
            done["skipped_steps"] = state.skipped_steps
        self.outputs.write(done)
        return done

    def _total(self, value: Tensor) -> float:
        """Returns the sum of a 0-d tensor over all ranks. Waits for the device."""
        total: Tensor = self.accelerator.reduce(value.clone(), reduction="sum")
        return float(total)


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    evaluators: Sequence[Evaluator],
    batches: Iterable[Batch],
    num_samples: int,
    max_batches: int = 0,
    stop_after: Callable[[int], bool] = lambda seen: False,
) -> list[dict[str, Any]]:
    """Evaluates networks on the batches of all ranks, in evaluation mode.

    Args:
        batches: this rank's batches. Ranks may have different numbers of them, because the sums
            are reduced once, at the end.
        num_samples: the number of images that all ranks together must see.
        max_batches: the largest number of batches that any rank has.
        stop_after: is called after each batch, equally often on every rank, with the number of
            images that this rank has seen. If it returns True, the evaluation ends.
    Returns:
        For each network `top1` and `top5` (percent), `loss` (cross-entropy without smoothing; None
        if it is not finite) and `seen` (images). The list is empty if `stop_after` returned True.
    Raises:
        RuntimeError: the number of images seen is not `num_samples`.
    """
    sums = [EvalSums(accelerator.device) for _ in evaluators]
    modules = [evaluator.module for evaluator in evaluators]
    was_training = [module.training for module in modules]
    for module in modules:
        module.eval()
    seen = 0
    try:
        for batch, _ in itertools.zip_longest(batches, range(max_batches)):
            for evaluator, total in zip(evaluators, sums, strict=True) if batch else ():
                with accelerator.autocast():
                    logits = evaluator(batch.images)
                total.add(logits, batch.labels)
                if evaluator.record:
                    evaluator.record(batch, logits)
            seen += len(batch.labels) if batch else 0
            if stop_after(seen):
                return []
    finally:
        for module, training in zip(modules, was_training, strict=True):
            module.train(training)
    results = [total.result() for total in sums]
    if results[0]["seen"] != num_samples:
        raise RuntimeError(f"evaluated {results[0]['seen']:,} of {num_samples:,} images")
    return results


def _without_checkpoint(best: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in best.items() if key != "checkpoint"}


def _sample_record(draws: Sequence[Draw | None], step: int) -> dict[str, Any]:
    """The record of the samples that this rank saw in an update, in the order of micro-batches."""
    columns = zip(*(draw[:3] for draw in draws if draw), strict=True)
    ids, windows, flips = (np.concatenate(column).tolist() for column in columns)
    return {"event": "samples", "step": step, "ids": ids, "windows": windows, "flips": flips}
