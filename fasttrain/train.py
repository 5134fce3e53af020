"""Trains the network of a recipe. The same command resumes a run that was stopped.

    accelerate launch fasttrain/train.py recipes/large.toml [--set train.epochs=90 ...]

Faults of the recipe, the data and the run folder are found before torch is imported.
"""

import contextlib
import json
import os
import sys
from collections.abc import Sequence

from fasttrain import (
    caches,
    config,
    faults,
    launch,
    reading,
    run_folder,
    schedule,
    settled,
    shards,
    teacher_labels,
    trackers,
)
from fasttrain.config import Recipe
from fasttrain.faults import Fault
from fasttrain.schedule import Plan
from fasttrain.shards import DataSet
from fasttrain.teacher_labels import StoredLabels


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the recipe that the command line names."""
    recipe = config.load_or_exit(argv)
    started = False
    try:
        is_main = os.environ.get("RANK", "0") == "0"
        remarks = launch.settle(os.environ, recipe.train.precision)
        recipe, changes = settled.for_training(recipe, os.environ)
        done = run_folder.check(recipe)
        if done:
            folder = run_folder.run_dir(recipe)
            _say(f"{folder} is done, nothing to do", json.dumps(done))
            return
        trackers.check(recipe.log.trackers)
        _say(*remarks, *changes, *caches.remarks())
        data_set = open_data(recipe.data)
        world_size = launch.number_in(os.environ, "WORLD_SIZE", 1)
        num_samples = data_set.train.num_samples
        plan = schedule.make_plan(
            recipe.train, recipe.optim, num_samples, world_size, recipe.distill
        )
        look = os.environ.get("LOCAL_RANK", "0") == "0"
        stored = teacher_labels.open_for(recipe, plan, data_set.train, look)
        launch.check_processes(os.environ)
        with run_folder.locked(recipe) if is_main else contextlib.nullcontext():
            started = True
            train(recipe, plan, data_set, stored)
    except Fault as fault:
        # Before training starts, all ranks find the same faults.
        faults.stop(str(fault), everywhere=started and not fault.raised_on_every_rank)


def open_data(data: config.Data) -> DataSet:
    """Opens the training and validation splits.

    Raises:
        ShardError: a split is missing or damaged, or its tars changed after they were indexed.
        DataError: this process may not open enough files.
    """
    look = os.environ.get("LOCAL_RANK", "0") == "0"
    if look:
        shards.check_unchanged(data.root)
    train_set = shards.open_split(data.root, "train", data.short_side, look)
    val_set = shards.open_split(data.root, "val", check_tars=look)
    reading.check_open_files(train_set, val_set)
    return DataSet(train_set, val_set)


def train(recipe: Recipe, plan: Plan, data_set: DataSet, stored: StoredLabels | None) -> None:
    """Builds everything, restores the newest checkpoint, trains, and marks the run as done.

    Args:
        stored: a teacher's labels; None if the recipe names none.
    Raises:
        SystemExit: the run was asked to stop. The exit status is that of the request.
    """
    # These imports take seconds, so the recipe is checked first.
    _say("loading torch and DALI")
    from fasttrain import gpus, loop, session

    # ---- checks that take little time
    gpus.check_launch(recipe, os.environ)
    _say(*gpus.idle_gpus(os.environ))
    start = session.read_weights(recipe, data_set.train.classes)
    lesson = session.Lesson(stored, session.read_teacher(recipe, data_set.train.classes))
    decoder, why_decoder = session.try_decoders(recipe, plan, data_set.train)

    # ---- the processes
    run = session.join(recipe, plan, data_set, start, lesson)
    decoder, why_decoder = session.agree_on_decoder(decoder, why_decoder)
    with session.staged(run) as staged_set:
        heartbeat = session.watch(run)

        # ---- the network and its updates
        resume = session.find_checkpoint(run)
        network = session.build_network(run, None if resume.folder else start)
        run.view.say(why_decoder)
        mode, updater = session.start_updates(run, network, resume)

        # ---- the data
        run_input = session.Input(run, staged_set, run.placement(decoder))
        inputs = session.inputs_for(run, run_input, heartbeat)
        outputs = session.outputs_for(run, run_input, mode, updater.learner, resume)

        # ---- training
        stop_requested = session.stop_check(run, heartbeat, updater.learner.state)
        with run.view, contextlib.closing(outputs):
            done = loop.Trainer(updater, plan, inputs, outputs, recipe, stop_requested).fit()
        heartbeat.close()
        session.finish(run, done, updater.learner.state.step)
    run.accelerator.end_training()
    if not done:
        raise SystemExit(run.stop.decision)


def _say(*lines: str) -> None:
    """Prints lines on rank 0, for the time before there is a display."""
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
