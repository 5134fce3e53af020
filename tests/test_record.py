"""benchmark.py record writes each result at once, survives failures, and adds what is missing."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import benchmark
import pytest
from benchmarks import kernels
from benchmarks.record import command, gpu_tests, tables, updates
from benchmarks.record.journal import Record, Run

TINY = ("--arch", "small", "--width", "0.35", "--batch", "4", "--crop-px", "32", "--threads", "1",
        "--seconds", "0.2", "--device", "cpu")  # fmt: skip


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]


def test_a_record_may_be_made_in_two_parts(tmp_path: Path, measured_here: None) -> None:
    for part in (
        ("--stages", "machine,tests,step,traffic", "--rivals", "torchvision"),
        ("--stages", "imagenette"),
    ):
        benchmark.main(["record", "--out", str(tmp_path), "--minutes", "4", *part, *TINY])
        with (tmp_path / "record.jsonl").open("a") as file:
            file.write('{"stage": "step", "cut')  # by a kill
    lines = Record(tmp_path).lines
    ends = {line["stage"]: line["ended"] for line in lines if "ended" in line}
    assert ends == {
        "machine": "done", "tests": "skipped", "step": "done", "traffic": "done",
        "imagenette": "skipped",
    }  # fmt: skip
    (machine,) = (line for line in lines if "matrix_tflops" in line)
    assert machine["copy_gb_per_s"] > 0 and machine["write_mb_per_s"] > 0
    measured = {line["name"]: line for line in lines if "turn" in line}
    assert set(measured) == {"fasttrain", "torchvision"}
    assert all(line["images_per_s"] > 0 for line in measured.values())
    text = (tmp_path / "record.md").read_text()
    assert text.startswith("## Record of 20") and "| fasttrain | eager |" in text
    assert "| compile_fuse |" in text and "- eager reached " in text
    assert "imagenette: needs Imagenette's shards" in text


def test_a_failure_does_not_end_the_other_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = tmp_path / "python"
    crash.write_text("#!/bin/sh\necho 'last words' >&2\nkill -SEGV $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crash))
    out = tmp_path / "out"
    stages = "machine,step,profile,input,loop,train"
    benchmark.main(["record", "--out", str(out), "--minutes", "4", "--stages", stages, *TINY])
    lines = lines_of(out)
    assert [line["stage"] for line in lines if "ended" in line] == stages.split(",")
    failures = [line for line in lines if "failed" in line]
    assert {line["stage"] for line in failures} == set(stages.split(","))
    assert all("last words" in line["error"] for line in failures)
    assert "SIGSEGV" in (out / "record.md").read_text()


def test_stages_share_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, float] = {}

    def stage(run: Run, data: Any) -> None:
        given[run.stage] = run.left_s()

    monkeypatch.setattr(command, "STAGES", {
        name: command.Stage(stage, share) for name, (_, share) in command.STAGES.items()
    })  # fmt: skip
    benchmark.main(["record", "--out", str(tmp_path), "--stages", "step,loop", *TINY])
    assert given["step"] == pytest.approx(600 * 8 / 10, abs=5)
    assert given["loop"] == pytest.approx(600, abs=5)  # the first stage left its time


@pytest.mark.slow
def test_the_other_stages_are_measured(tmp_path: Path) -> None:
    options = ("--minutes", "5", "--stages", "profile,input,loop,train", "--updates", "64")
    benchmark.main(["record", "--out", str(tmp_path), *options, *TINY])
    lines = lines_of(tmp_path)
    assert all(line["ended"] == "done" for line in lines if "ended" in line)
    (trained,) = (line for line in lines if "stopping_s" in line)
    assert trained["steps"] == trained["of_steps"] and trained["resumed_s"] > 0
    assert any(line.get("over_bare_step", 0) > 0 for line in lines)


def test_bytes_of_compiled_kernels_are_counted() -> None:
    signature = "{'in_ptr0': '*bf16', 'in_out_ptr0': '*fp32', 'xnumel': 'i32'}"
    code = f"""
triton_poi_a_0 = async_compile.triton('triton_poi_a_0', '''
    triton_meta={{'signature': {signature}, 'device': 0}},
''', device_str='cuda')
    def call(self, args):
        assert_size_stride(x, (2, 3, 4), (12, 4, 1), 'input')
        buf0 = empty_strided_cuda((24, ), (1, ), torch.float32)
        triton_poi_a_0.run(x, buf0, 24, stream=stream0)
        buf1 = buf0; del buf0  # reuse
        triton_poi_a_0.run(reinterpret_tensor(x, (2, 6), (12, 1), 6), buf1, 12, stream=stream0)
        buf2 = extern_kernels.convolution(x, w, stride=(1, 1))
        assert_size_stride(buf2, (2, 10), (10, 1), 'torch.ops.aten.convolution.default')
        buf3 = torch.ops.aten.convolution_backward.default(buf2, x, w, [True, True, False])
"""
    moved = kernels.Bytes([code])
    assert moved.of_kernel("triton_poi_a_0") == 2 * 24 + 2 * 4 * 24 + 2 * 12 + 2 * 4 * 24
    assert moved.convolutions == 2 * (24 + 20) + 2 * 2 * (20 + 24)


def test_a_profile_lists_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def made_up(function: Any, number: int) -> list[kernels.Kernel]:
        function()
        names = ("triton_poi_a_0", "sm90_xmma_dgrad", "Memcpy HtoD", "void elementwise")
        return [kernels.Kernel(name, 4.0 - place, 2.0) for place, name in enumerate(names)]

    monkeypatch.setattr(kernels, "kernels_of", made_up)
    job = updates.step_job(run_of(), "fasttrain", "eager", "small", 2)
    found = kernels.profile(job)
    assert found["busy_ms"] == 10 and found["launches"] == 8 and found["moved_gb"] > 0
    kinds = {row["kind"]: row["ms"] for row in found["rows"] if "kind" in row}
    assert kinds == {
        "all convolutions": 3, "compiled": 4, "convolutions": 3, "copies and fills": 2,
        "others of torch": 1, "bookkeeping": 10,
    }  # fmt: skip
    line = {"stage": "profile", **updates.told(job), **found}
    rows = [{"stage": "profile", **row} for row in line.pop("rows")]
    text = tables.markdown([line, *rows])
    assert "| triton_poi_a_0 | 4 | 2 |" in text and "| bookkeeping | 10 | 8 |" in text


def run_of() -> Run:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = parser.parse_args(["--out", "unused", *TINY])
    command.settle(arguments)
    return Run(arguments, None, 0.0)  # type: ignore[arg-type]


def test_kernels_are_read_from_the_trace_of_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [
        {"cat": "kernel", "name": "a", "dur": 300.0}, {"cat": "kernel", "name": "a", "dur": 300.0},
        {"cat": "gpu_memset", "name": "b", "dur": 30.0}, {"cat": "cpu_op", "name": "c", "dur": 9},
        {"name": "d"},
    ]  # fmt: skip

    class Profiler:
        def __init__(self, activities: Any) -> None: ...
        def __enter__(self) -> "Profiler":
            return self

        def __exit__(self, *_: object) -> None: ...
        def export_chrome_trace(self, path: str) -> None:
            Path(path).write_text(json.dumps({"traceEvents": events}))

    monkeypatch.setattr(kernels.torch.profiler, "profile", Profiler)
    monkeypatch.setattr(kernels.torch.cuda, "synchronize", lambda: None)
    calls: list[int] = []
    found = kernels.kernels_of(lambda: calls.append(1), 2)
    assert found == [kernels.Kernel("a", 0.3, 1.0), kernels.Kernel("b", 0.015, 0.5)]
    assert len(calls) == 3


def test_an_empty_record_has_a_title() -> None:
    assert tables.markdown([]).startswith("## Record of unknown")


def test_what_pytest_printed_becomes_counts_and_failures(tmp_path: Path) -> None:
    text = (
        "tests/test_a.py::test_x[a b] PASSED [ 50%]\ntests/test_a.py::test_y FAILED [100%]\n"
        "FAILED tests/test_a.py::test_y - AssertionError: 1 == 2\n"
    )
    run = Run(run_of().arguments, Record(tmp_path), 0.0, stage="tests")
    gpu_tests.report(run, text, {"tests/test_a.py::test_x[a b]": "passed"}, ended=True)
    counts, failure = lines_of(tmp_path)
    assert (counts["passed"], counts["failed"], counts["in_time"]) == (1, 0, True)
    assert failure["test"] == "tests/test_a.py::test_y"
    assert failure["failed"] == "AssertionError: 1 == 2"
