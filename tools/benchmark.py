"""Measures fasttrain and other software on one machine, in one run.

    python tools/benchmark.py shards SOURCE [--repeats 5]
    python tools/benchmark.py input SHARDS [--folder IMAGEFOLDER] [--repeats 3]
    python tools/benchmark.py step [--arch large] [--batch 256,1024] [--profile]
    python tools/benchmark.py loop [--arch large]
    python tools/benchmark.py traffic [--arch large] [--bandwidth 3.0e12] [--profile FILE]
    python tools/benchmark.py operators [--arch large] [--batch 1024]
    python tools/benchmark.py scaling [--arch large] [--step-ms 1024:60,128:9]
    python tools/benchmark.py record --out DIR [--minutes 10] [--data SHARDS ...] [--stages step]

Each contestant runs in its own process, and the contestants take turns. Each prints one JSON line.
It has the median and spread of the repeats, and the ratio of the speed to that of a reference. A
table for people follows on standard error. `benchmark.py NAME --help` describes a benchmark and its
options.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import output

from fasttrain.faults import Fault, stop

# For each benchmark: its module, which is imported only when it is needed, and what it measures.
BENCHMARKS = {
    "shards": ("benchmarks.shards", "making shards"),
    "input": ("benchmarks.input", "batches for training"),
    "step": ("benchmarks.step", "updates without the input"),
    "loop": ("benchmarks.step", "the loop, compared with the bare updates"),
    "traffic": ("benchmarks.traffic", "bytes that an update moves, counted"),
    "operators": ("benchmarks.operators", "fused kernels, layer by layer"),
    "scaling": ("benchmarks.scaling", "predictions for many devices"),
    "record": ("benchmarks.record.command", "all of these, within a time limit"),
}
PARTS = (
    "input",
    "packed",
    "step",
    "warm",
    "profile",
    "machine",
    "operators",
)  # of `benchmark.py measure`


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark that the command line names."""
    words = [*(sys.argv[1:] if argv is None else argv)]
    arguments = parse(words)
    if arguments.part == "measure":
        output.write(measured(arguments.kind, arguments.job))
        return
    output.written.clear()
    try:
        importlib.import_module(BENCHMARKS[arguments.part][0]).run(arguments)
    except Fault as fault:
        stop(str(fault))
    finally:
        if arguments.part != "record":  # `record` writes its tables to a file
            output.show(output.written)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments; imports only the module of the benchmark that is named."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    for name, (module, text) in BENCHMARKS.items():
        part = parts.add_parser(name, help=text, formatter_class=raw)
        if words[:1] == [name]:
            benchmark = importlib.import_module(module)
            part.description = benchmark.__doc__
            benchmark.add_arguments(part)
    part = parts.add_parser("measure")  # one contestant, in its own process
    part.add_argument("kind", choices=PARTS)
    part.add_argument("job")
    return parser.parse_args(words)


def measured(kind: str, job: str) -> dict[str, Any]:
    """The result of one contestant, in the process that `own_process.measure` started.

    Args:
        kind: one of PARTS.
        job: the contestant's job as JSON.
    """
    if kind in ("input", "packed"):
        from benchmarks import input as inputs
        from benchmarks.pipelines import InputJob

        if kind == "input":
            return inputs.measure(InputJob.model_validate_json(job))
        from benchmarks.record import packed

        return packed.measure(InputJob.model_validate_json(job))
    if kind == "machine":
        from benchmarks.record import machine

        return machine.measure(machine.MachineJob.model_validate_json(job))
    if kind == "operators":
        from benchmarks import operators

        return operators.measure(operators.OperatorsJob.model_validate_json(job))
    from benchmarks import contestants, steps

    by_kind = {"step": contestants.measure, "warm": steps.warm, "profile": contestants.profile}
    return by_kind[kind](steps.StepJob.model_validate_json(job))


if __name__ == "__main__":
    main()
