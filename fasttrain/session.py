"""One start of a run, from the launched process to the objects that train. `train` reads as the
table of contents; these are its parts, in the order in which it builds them.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from fasttrain import (
    alike,
    checkpoint,
    config,
    decoding,
    display,
    forecast,
    gpus,
    heartbeat,
    loaders,
    makers,
    matching,
    measured,
    modes,
    run_folder,
    runtime,
    sampling,
    staging,
    stopping,
    weights,
)
from fasttrain.batch import Batch, Placement, half_images
from fasttrain.config import Recipe
from fasttrain.execution import Updater
from fasttrain.forecast import Forecast, Rate, Stages
from fasttrain.heartbeat import Heartbeat
from fasttrain.learner import Learner, TrainState
from fasttrain.loop import Inputs, Outputs
from fasttrain.mixing import build_mix
from fasttrain.model import MobileNetV3, build_model
from fasttrain.order import TrainingOrder
from fasttrain.run_folder import JsonLines
from fasttrain.schedule import Plan
from fasttrain.shards import DataSet, Split
from fasttrain.weights import Weights

MEASURED_S = 0.8  # of the input's speed, where no earlier run has measured it


# --------------------------------------------------------------------------------------------------
# What can be found wrong before anything takes long
# --------------------------------------------------------------------------------------------------


def read_weights(recipe: Recipe, classes: tuple[str, ...]) -> Weights | None:
    """Reads `model.weights` and compares them with the network; None where the run resumes.

    Raises:
        Fault: there are none, or they are of another network.
    """
    path = run_folder.weights_to_read(recipe)
    if path is None:
        return None
    found, _ = checkpoint.open_weights(path, False, lambda text: None)
    with torch.device("meta"):
        network = build_model(**recipe.model.network(), num_classes=len(classes))
    weights.check(found, network, any_classes=True)
    return found


def try_decoders(recipe: Recipe, plan: Plan, split: Split) -> tuple[config.Data, str]:
    """The loader's settings with the decoder that works best here, and one sentence on why.

    Processes of their own try the decoders, as a decoder may crash. So this process must not have
    touched the GPU yet.

    Raises:
        DecodeError: nothing decodes here.
    """
    gpu, threads = gpus.has_gpu(os.environ), runtime.data_threads(recipe.data, os.environ)
    half = half_images(gpu, recipe.train.precision)
    job = decoding.Job(gpu, threads, plan.micro_batch_size, half)
    return decoding.choose_decoder(split, recipe.data, job, os.environ)


# --------------------------------------------------------------------------------------------------
# The processes
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Session:
    """One start of a run on this rank: what all later parts share."""

    recipe: Recipe
    plan: Plan
    data_set: DataSet
    accelerator: Accelerator
    process: runtime.Process
    view: display.TrainDisplay
    stop: stopping.StopRequest

    @property
    def folder(self) -> Path:
        return run_folder.run_dir(self.recipe)

    @property
    def checkpoints(self) -> Path:
        return self.folder / run_folder.CHECKPOINTS

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def device_name(self) -> str:
        return runtime.device_name(self.process.device)

    @property
    def placement(self) -> Placement:
        device, threads = self.process.device, self.process.data_threads
        half = half_images(device.type == "cuda", self.recipe.train.precision)
        return Placement(device, half, threads)

    def about(self) -> dict[str, Any]:
        """What a checkpoint says of its run, except for the mode of execution."""
        train, val = self.data_set
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "classes": train.classes,
            "data": {"train": train.digest, "val": val.digest},
            "world_size": self.process.world_size,
            "cpu_threads": self.process.cpu_threads,
        }


def join(recipe: Recipe, plan: Plan, data_set: DataSet, start: Weights | None) -> Session:
    """Joins the ranks of the run, and compares them.

    Args:
        start: the weights that the run starts from, if any.
    Raises:
        LaunchError: the ranks do not fit together.
    """
    # Longer than the heartbeat's, which names the rank at fault.
    timeout = timedelta(seconds=heartbeat.START_S + recipe.train.hang_timeout_s)
    patience = stopping.Patience()
    accelerator = runtime.accelerator_for(recipe.train.precision, timeout)
    process = runtime.start(accelerator, recipe, os.environ, patience)
    accelerator.wait_for_everyone()  # as clocks are compared
    facts = alike.facts(process, recipe, [split.digest for split in data_set])
    if start:  # the files may differ, as may their paths
        facts["model.weights"] = start.digest()
    alike.check(gather_object([facts]))
    view = display.TrainDisplay(plan, accelerator.is_main_process)
    file = run_folder.run_dir(recipe) / run_folder.STOP if accelerator.is_main_process else None
    stop = stopping.StopRequest(process.world_size, file, timeout, patience, view)
    return Session(recipe, plan, data_set, accelerator, process, view, stop)


def agree_on_decoder(settings: config.Data, why: str) -> tuple[config.Data, str]:
    """The settings and the sentence of `try_decoders`, with one decoder for all ranks."""
    decode = decoding.surest(gather_object([settings.decode]))
    if decode == settings.decode:
        return settings, why
    why += f"; but {decode} for all, as that is what works everywhere"
    return settings.model_copy(update={"decode": decode}), why


@contextmanager
def staged(session: Session) -> Iterator[DataSet]:
    """The data set as this node reads it: with `data.stage`, from a copy that is made here.

    The copy is freed after the run.
    """
    data, copy = session.recipe.data, None
    if not data.stage:
        yield session.data_set
        return
    if session.accelerator.is_local_main_process:
        copy = staging.Staging(data.root, data)
    staging.wait(copy, lambda report: gather_object([report]), session.view.say)
    yield DataSet(*(staging.open_copy(split, data) for split in session.data_set))
    session.accelerator.wait_for_everyone()
    if copy:
        copy.release()


def watch(session: Session) -> Heartbeat:
    """Begins to watch over the ranks: a run that hangs is ended, and the rank at fault named."""
    return Heartbeat(
        session.process.rank,
        session.process.world_size,
        session.recipe.train.hang_timeout_s,
        partial(heartbeat.launcher_store, os.environ),
        partial(stopping.leave, heartbeat.STATUS),
    )


# --------------------------------------------------------------------------------------------------
# What is trained, and how
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resume:
    """Where the run was stopped, if it ran before."""

    folder: Path | None  # the checkpoint
    mode: str | None  # of execution, on this kind of device


def find_checkpoint(session: Session) -> Resume:
    """The checkpoint to resume from, the same for all ranks. Notes this start in the run folder.

    Raises:
        CheckpointError: it cannot be used.
    """
    folder, mode = None, None
    if session.is_main:
        resume = session.recipe.checkpoint.resume
        folder = checkpoint.choose_checkpoint(
            session.checkpoints, resume, session.about(), session.view.say
        )
        if folder:
            mode = checkpoint.read_state(folder).execution.get(session.device_name)
        run_folder.begin(session.recipe, runtime.environment(session.process))
    return Resume(*broadcast_object_list([folder, mode]))  # when the run folder is ready


def build_network(session: Session, start: Weights | None) -> MobileNetV3:
    """The network on its device, channels-last, with the weights that the run starts from.

    Says what is trained.
    """
    recipe, plan, process, train = (
        session.recipe, session.plan, session.process, session.data_set.train,
    )  # fmt: skip
    module = build_model(**recipe.model.network(), num_classes=len(train.classes))
    said = ""
    if start:
        rule = partial(matching.to_start_from, data=train.classes)
        more = weights.load(start, module, rule)
        said = "\n".join(filter(None, ["", f"starting from {start.path}", more]))
    module.freeze(recipe.optim.frozen_stages)
    module.to(process.device).to(memory_format=torch.channels_last)
    session.view.say(
        f"MobileNetV3-{recipe.model.arch.capitalize()} {recipe.model.width:g} on "
        f"{train.num_samples:,} images of {len(train.classes):,} classes from {recipe.data.root}\n"
        f"{process.world_size} x {process.device.type} with {process.cpu_threads} CPU threads, "
        f"precision {recipe.train.precision}; "
        f"{plan.global_batch_size:,} images an update, {plan.steps_per_epoch:,} updates an epoch, "
        f"{plan.total_steps:,} in all\nrun folder: {session.folder}{said}"
    )
    return module


def start_updates(session: Session, module: MobileNetV3, resume: Resume) -> tuple[str, Updater]:
    """The mode of execution, and what carries out the updates, restored from the checkpoint.

    Raises:
        ExecutionError: no mode works here, or not the one that the recipe names.
        CheckpointError: the checkpoint is damaged.
    """
    num_classes, say = len(session.data_set.train.classes), session.view.say
    setup = modes.Setup(session.accelerator, module, session.recipe, session.plan, num_classes)
    mode, why = modes.choose_execution(setup, resume.mode, say)
    say(why)

    def restore(learner: Learner) -> None:
        if resume.folder:
            checkpoint.restore(resume.folder, learner, session.about(), say)

    mode, _, updater = modes.start(mode, setup, restore, say)
    return mode, updater


# --------------------------------------------------------------------------------------------------
# What it is trained on
# --------------------------------------------------------------------------------------------------


class Input:
    """The batches of the run, and what is known of their speed."""

    def __init__(self, session: Session, data_set: DataSet, settings: config.Data) -> None:
        """`data_set` and `settings` are those of the loaders: staged, and with their decoder."""
        self.session, self.data_set, self.settings = session, data_set, settings
        self.stages = Stages()
        plan, process = session.plan, session.process
        self.eval_batches = loaders.eval_loader(
            data_set.val, settings, plan.micro_batch_size, process.rank, process.world_size,
            session.placement,
        )  # fmt: skip

    def train_batches(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches from update `step` on."""
        session = self.session
        rank = session.process.rank
        order = TrainingOrder(self.data_set.train, self.settings, session.plan, rank, step)
        return iter(loaders.Loader(order, session.placement, self.stages))

    def samples_of(self, step: int) -> list[str]:
        """Where the samples of update `step` of all ranks lie."""
        plan, train = self.session.plan, self.data_set.train
        epoch, step_of_epoch = divmod(step, plan.steps_per_epoch)
        order = sampling.epoch_order(plan.seed, epoch, train, sampling.block_size(self.settings))
        first = step_of_epoch * plan.global_batch_size
        return [train.describe(int(i)) for i in order[first : first + plan.global_batch_size]]

    def outlook(self) -> Forecast:
        """Measures the speed of the input, or recalls it, and says so."""
        process, train = self.session.process, self.data_set.train
        keys, placement = self._keys(), self.session.placement
        rate = forecast.recall_rate(keys["input"])  # of all ranks
        if not all(gather_object([rate is not None])):
            rate = self._measured(keys["input"])
        assert rate
        decoder = makers.decoder_of(train, self.settings, placement)
        outlook = Forecast(
            input=rate,
            step=forecast.recall_rate(keys["step"]),
            stages=self.stages,
            advice=forecast.advice_for(train, decoder, process.data_threads),
            say=self.session.view.say,
            remember=lambda what, images_per_s: forecast.remember_rate(keys[what], images_per_s),
        )
        threads, world_size = process.data_threads, process.world_size
        outlook.start(forecast.describe(train, decoder, threads, world_size))
        return outlook

    def _keys(self) -> dict[str, str]:
        """Under which the speeds of the input and of the updates are remembered."""
        process, recipe = self.session.process, self.session.recipe
        threads = process.data_threads, process.cpu_threads
        machine = (process.world_size, str(process.device), *threads)
        return {
            "input": forecast.input_key(self.data_set.train, self.settings, *machine),
            "step": measured.key_of(
                "updates", recipe.model, recipe.optim, recipe.train, self.settings.crop_px,
                self.session.plan.micro_batch_size, os.uname().nodename, *machine,
            ),
        }  # fmt: skip

    def _measured(self, key: str) -> Rate:
        session = self.session
        session.view.say("measuring the input")
        found = loaders.measure(
            self.data_set.train, self.settings, session.plan, session.process.rank,
            session.placement, MEASURED_S,
        )  # fmt: skip
        rates = gather_object([found])
        rate = Rate(sum(images_per_s for images_per_s, _ in rates))
        if all(steady for _, steady in rates):
            forecast.remember_rate(key, rate.images_per_s)
        return rate


# --------------------------------------------------------------------------------------------------
# The loop
# --------------------------------------------------------------------------------------------------


def inputs_for(session: Session, given: Input, beat: Heartbeat) -> Inputs:
    """What the loop is fed with. Each batch counts as a sign of life."""
    return Inputs(
        train_batches=lambda step: beat.counted(given.train_batches(step)),
        eval_batches=given.eval_batches,
        num_eval_samples=given.data_set.val.num_samples,
        mix=build_mix(session.recipe.train, len(given.data_set.train.classes)),
    )


def outputs_for(
    session: Session, given: Input, mode: str, learner: Learner, resume: Resume
) -> Outputs:
    """Where the loop reports to. Cuts lines that were written after the checkpoint."""
    folder, state = session.folder, learner.state
    outlook = given.outlook()
    if resume.folder:
        session.view.say(f"going on from {resume.folder}")
    if session.is_main:
        run_folder.cut_lines(folder, state.step, state.last_eval.get("step", -1))
    session.accelerator.wait_for_everyone()
    samples = folder / run_folder.samples_file(session.process.rank)
    return Outputs(
        checkpoints=session.checkpoints,
        about=session.about() | {"execution": {session.device_name: mode}},
        display=session.view,
        metrics=JsonLines(folder / run_folder.METRICS) if session.is_main else None,
        samples=JsonLines(samples) if session.recipe.log.samples else None,
        forecast=outlook,
        keys_of=given.samples_of,
    )


def stop_requested(session: Session, beat: Heartbeat, state: TrainState) -> Callable[[], int]:
    """A function for the loop. It counts a step, and returns 0 or the exit status to stop with."""
    first_step = state.step

    def stops() -> int:
        beat.step(f"update {state.step}")
        return session.stop.agreed(unsaved=state.step > first_step)

    return stops


def finish(session: Session, done: dict[str, Any] | None, step: int) -> None:
    """Marks the run as done, and says what a user can do next.

    Args:
        done: the closing record, None if the run was stopped.
        step: the number of updates that are done.
    """
    folder, say = session.folder, session.view.say
    if done and session.is_main:
        run_folder.write_done(folder, done)
    if done:
        model = session.checkpoints / f"step_{step:08d}" / checkpoint.MODEL
        say(
            f"done: {display.result(done)}\nweights: {model}\n"
            f"to evaluate them: python tools/evaluate.py {folder} --data "
            f"{session.recipe.data.root}\n{json.dumps(done)}"
        )
    elif session.is_main:
        saved = next(iter(checkpoint.find(session.checkpoints)), None)
        where = f"and saved as {saved}" if saved else "before the first update"
        say(f"stopped {where}; the same command goes on from there")
    if session.is_main:
        (folder / run_folder.STOP).unlink(missing_ok=True)
