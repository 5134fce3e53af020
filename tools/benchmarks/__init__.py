"""What `tools/benchmark.py` measures: one file per benchmark, and the files that they share.

A benchmark's module has two functions: `add_arguments(parser)` and `run(arguments)`.

    shards.py       making shards           scaling.py   predictions for many devices
    input.py        batches for training    plot.py      the drawing of these predictions
    pipelines.py    the input pipelines     record/      everything, within a time limit
    step.py         updates; the loop       steps.py     the training steps that are compared
    loop.py         the loop's own cost     profiles.py, kernels.py   where an update's time goes
    traffic.py      bytes that an update moves, layers.py and plans.py   from which they follow
    operators.py    fused kernels by layer  memory.py    the memory of a GPU

Shared: own_process.py runs a contestant in its own process, output.py prints lines and the table,
options.py holds the types of the command line.
"""
