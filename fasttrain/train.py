"""A recipe goes in, a trained network comes out; started again, it goes on where it stopped.

    accelerate launch fasttrain/train.py recipes/large.toml [--set train.epochs=90 ...]

What is wrong with the recipe, the data or the run folder is found before torch is imported.
"""

import contextlib
import json
import os
import sys
from collections.abc import Sequence

from fasttrain import caches, config, faults, launch, reading, run_folder, schedule, settled, shards
from fasttrain.config import Recipe
from fasttrain.faults import Fault
from fasttrain.schedule import Plan
from fasttrain.shards import DataSet


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
        _say(*remarks, *changes, *caches.remarks())
        data_set = open_data(recipe.data)
        world_size = launch.number_in(os.environ, "WORLD_SIZE", 1)
        num_samples = data_set.train.num_samples
        plan = schedule.make_plan(recipe.train, recipe.optim, num_samples, world_size)
        launch.check_processes(os.environ)
        with run_folder.locked(recipe) if is_main else contextlib.nullcontext():
            started = True
            train(recipe, plan, data_set)
    except Fault as fault:
        # Up to there all processes say the same.
        faults.stop(str(fault), everywhere=started and not fault.raised_on_every_rank)


def open_data(data: config.Data) -> DataSet:
    """Opens the training and validation splits.

    Raises:
        ShardError: there are none, or they are damaged.
        DataError: this process may not open as many files.
    """
    look = os.environ.get("LOCAL_RANK", "0") == "0"
    train_set = shards.open_split(data.root, "train", data.short_side, look)
    val_set = shards.open_split(data.root, "val", look_at_tars=look)
    reading.check_open_files(train_set, val_set)
    return DataSet(train_set, val_set)


def train(recipe: Recipe, plan: Plan, data_set: DataSet) -> None:
    """Builds everything, restores the newest checkpoint, trains, and marks the run as done.

    Raises:
        SystemExit: the run was asked to stop; with the status of the request.
    """
    # Seconds of imports, so only once the recipe is known to be right.
    _say("loading torch and DALI")
    from fasttrain import gpus, loop, session

    # ---- what can be found wrong before anything takes long
    gpus.check_launch(recipe, os.environ)
    _say(*gpus.idle_gpus(os.environ))
    start = session.read_weights(recipe, data_set.train.classes)
    settings, why_decoder = session.try_decoders(recipe, plan, data_set.train)

    # ---- the processes
    run = session.join(recipe, plan, data_set, start)
    settings, why_decoder = session.agree_on_decoder(settings, why_decoder)
    with session.staged(run) as staged_set:
        beat = session.watch(run)

        # ---- what is trained, and how
        resume = session.find_checkpoint(run)
        network = session.build_network(run, None if resume.folder else start)
        run.view.say(why_decoder)
        mode, updater = session.start_updates(run, network, resume)

        # ---- what it is trained on
        given = session.Input(run, staged_set, settings)
        inputs = session.inputs_for(run, given, beat)
        outputs = session.outputs_for(run, given, mode, updater.learner, resume)

        # ---- go
        stops = session.stop_requested(run, beat, updater.learner.state)
        with run.view:
            done = loop.Trainer(updater, plan, inputs, outputs, recipe, stops).fit()
        beat.close()
        session.finish(run, done, updater.learner.state.step)
    run.accelerator.end_training()
    if not done:
        raise SystemExit(run.stop.decision)


def _say(*lines: str) -> None:
    """Prints lines at once, before there is a display. Only rank 0 does."""
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
