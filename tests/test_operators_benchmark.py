"""`benchmark.py operators` times each layer of the blocks once, with the arguments that it has."""

import json

import benchmark
import pytest
from benchmarks import operators
from benchmarks.operators import OperatorsJob
from benchmarks.record import tables

JOB = OperatorsJob(
    name="operators", arch="small", width=0.35, px=32, batch=2, precision="no",
    kinds=["depthwise", "project", "expand"], device="cpu", launches=1,
)  # fmt: skip


def test_each_layer_is_measured_once_as_the_network_has_it() -> None:
    job = JOB.model_copy(update={"arch": "large", "width": 1.0, "px": 224})
    found = [case for case in operators.cases(job) if case.layer.kind == "depthwise"]
    shapes = {(c.layer.kernel, c.layer.stride, c.layer.inputs) for c in found}
    # features.5 and .6, .9 and .10, .14 and .15 have layers of equal shape.
    assert len(found) == 2 * len(shapes) == 2 * 12
    first, later = found[0], found[2]
    assert not first.normalised and first.act == 0, "the first block reads the stem's activations"
    assert later.normalised and later.act == operators.ACTS["relu"]
    gated = {c.layer.name: c.per_image for c in operators.cases(job) if c.layer.kind == "project"}
    assert gated["features.4.conv.7"] and not gated["features.2.conv.7"]


def test_every_operator_runs_with_the_arguments_of_its_layer() -> None:
    found = operators.measure(JOB)
    assert found["copy_gb_per_s"] > 0
    for row in found["rows"]:
        assert "failed" not in row, row
        assert row["ours_us"] > 0 and row["conv_us"] > 0 and 0 < row["of_copy"], row
    text = tables.markdown([{"stage": "operators", **row} for row in found["rows"]])
    assert text.count("| depthwise ") == sum(row["kind"] == "depthwise" for row in found["rows"])


def test_command(capsys: pytest.CaptureFixture[str], measured_here: None) -> None:
    words = "--arch small --width 0.35 --crop-px 32 --batch 1 --precision no --device cpu"
    benchmark.main(["operators", *words.split(), "--launches", "1", "--kinds", "depthwise"])
    out, err = capsys.readouterr()
    head, *rows = (json.loads(line) for line in out.splitlines())
    assert head["arch"] == "small" and {row["kind"] for row in rows} == {"depthwise"}
    assert "ours over compiled" in err
