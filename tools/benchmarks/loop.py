"""What the loop adds to the bare update: logging, stop requests and the input's bookkeeping."""

import itertools
import json
import math
import statistics
import tempfile
from pathlib import Path

from benchmarks import steps
from benchmarks.own_process import Result
from benchmarks.steps import StepJob
from fasttrain import config, loop
from fasttrain.batch import Batch
from fasttrain.display import TrainDisplay
from fasttrain.run_folder import JsonLines


def measure(job: StepJob) -> Result:
    """The speed of `Trainer.fit` on one batch that stays on the device: the median of log lines."""
    bare = steps.fasttrain_update(job)
    steps.timed(bare, job, 2)
    group = max(1, math.ceil(job.seconds / 8 / steps.timed(bare, job, 1)))
    group = min(group, config.Log().every_steps)  # updates per line, at most those of a run
    updates = max(10, 9 * group)
    plan = steps.plan_of(job, updates)
    _, _, updater = steps.built(job, plan)
    batch = Batch(*steps.resident_batch(job))
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"
        outputs = loop.Outputs(
            checkpoints=Path(folder),
            about={},
            display=TrainDisplay(plan, enabled=False),
            metrics=JsonLines(metrics),
        )
        inputs = loop.Inputs(lambda step: itertools.repeat(batch), [batch], job.batch)
        reports = config.Recipe(
            checkpoint=config.Checkpoint(every_steps=10**9), log=config.Log(every_steps=group)
        )
        done = loop.Trainer(updater, plan, inputs, outputs, reports).fit()
        assert done
        lines = map(json.loads, metrics.read_text().splitlines())
        speeds = [line["images_per_s"] for line in lines if line["event"] == "train"]
    images_per_s = statistics.median(speeds[1:])  # the first line holds the slow first updates
    return {
        "images_per_s": images_per_s,
        "step_ms": 1e3 * job.batch / images_per_s,
        "peak_gib": steps.peak_bytes(job) / 2**30,
        "loss": done["loss"],
    }
