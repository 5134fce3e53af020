"""Where the time of an update goes on a GPU: its kernels by time, with the bytes that they move.

Times are those of the GPU's own records, by way of torch.profiler; kernels in a CUDA graph are in
them one by one. Bytes are known of compiled kernels, from the sizes of the tensors that the
compiler's code hands to them (each read or written once: a kernel that reads a tensor twice, or a
part of it, moves more, or less), and of the convolutions together. Of others they are left out.
"""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import steps
import torch
from torch.profiler import ProfilerActivity

from fasttrain import execution

UPDATES = 3  # that are profiled
SLOWEST = 12  # kernels that are listed
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of the profiler's trace

# Kinds of kernels by their names; the first that fits counts.
KINDS = (
    ("compiled", r"^triton_"),
    ("depthwise convolutions", r"depthwise|dgrad2d_c1|wgrad2d_c1|conv2d_c1|grouped_direct"),
    ("convolutions", r"conv|gemm|xmma|cutlass|cudnn|wgrad|dgrad|fprop|nvjet|splitk"),
    ("BatchNorm", r"batch_?norm|bn_"),
    ("lists of tensors", r"multi_tensor|foreach"),
    ("copies and fills", r"^mem(cpy|set)"),
    ("others of torch", r""),
)


class Kernel(NamedTuple):
    """The launches of one kernel in an update."""

    name: str
    ms: float
    launches: float


def profile(job: steps.StepJob) -> dict[str, Any]:
    """The slowest kernels, kinds of kernels, and the bookkeeping of an update."""
    steps.start(job)
    _, learner, updater = steps.built(job, steps.plan_of(job, 1))
    update = steps.update_with(job, learner, updater)
    code: list[str] = []
    if job.compiles:
        from torch._inductor.utils import run_and_get_code  # takes seconds

        _, code = run_and_get_code(update)
    steps.timed(update, job, 5)
    step_s = min(steps.timed(update, job, 10) / 10 for _ in range(3))
    kernels = kernels_of(update, UPDATES)
    if not kernels:
        raise RuntimeError("the profiler has recorded no kernel; see whether CUPTI is installed")
    copied = steps.copy_bandwidth(job.device)
    moved = Bytes(code)
    rows = [row(kernel, moved.of_kernel(kernel.name), copied) for kernel in kernels[:SLOWEST]]
    rows += kinds(kernels, moved, copied)
    kept = bookkeeping(job, updater)
    rows.append({"kind": "bookkeeping", **totals(kept)})
    rows += [{"bookkeeping": kernel.name[:120], **totals([kernel])} for kernel in kept]
    busy = sum(kernel.ms for kernel in kernels)
    return {
        "step_ms": 1e3 * step_s,
        "busy_ms": busy,  # more than the step where kernels run side by side
        "launches": sum(kernel.launches for kernel in kernels),
        "copy_gb_per_s": copied / 1e9,
        "must_move_gb": steps.bytes_moved(job) / 1e9,
        "rows": [steps.rounded(each) for each in rows],
    }


def kernels_of(function: Any, number: int) -> list[Kernel]:
    """What the device did in a call of the function, the slowest first."""
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]):
        function()  # the first use of the profiler takes a second, and loses records
        torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(number):
            function()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = defaultdict[str, list[float]](list)
    for event in events:
        if event.get("cat") in ON_DEVICE:
            found[event["name"]].append(event["dur"] / 1e3)
    kernels = [Kernel(name, sum(each) / number, len(each) / number) for name, each in found.items()]
    return sorted(kernels, key=lambda kernel: -kernel.ms)


def bookkeeping(job: steps.StepJob, updater: execution.Updater) -> list[Kernel]:
    """The kernels of what follows the gradients: guard, norm, BatchNorm's averages, optimizer, EMA.

    They are carried out alone, without a graph: in one they are the same.
    """
    if isinstance(updater, execution.Graphed):
        return kernels_of(updater._move, UPDATES)
    images, labels = steps.resident_batch(job)
    updater.micro(images, labels, is_last=True)
    gradients = [p.grad for p in updater.learner.module.parameters()]

    def follow() -> None:
        for parameter, gradient in zip(updater.learner.module.parameters(), gradients, strict=True):
            parameter.grad = gradient
        updater.update(0.1)

    return kernels_of(follow, UPDATES)


def row(kernel: Kernel, num_bytes: int, copied: float) -> dict[str, Any]:
    return {"kernel": kernel.name[:120], **totals([kernel], num_bytes, copied)}


def totals(kernels: Sequence[Kernel], num_bytes: int = 0, copied: float = 0.0) -> dict[str, Any]:
    ms = sum(kernel.ms for kernel in kernels)
    found: dict[str, Any] = {"ms": ms, "launches": sum(kernel.launches for kernel in kernels)}
    if num_bytes and ms:
        found["mb"] = num_bytes / 1e6
        found["of_copy"] = num_bytes / (ms / 1e3) / copied
    return found


def kinds(kernels: Sequence[Kernel], moved: "Bytes", copied: float) -> Iterator[dict[str, Any]]:
    """Kernels by kind, with the bytes of the compiled ones and of all convolutions."""
    groups: dict[str, list[Kernel]] = {kind: [] for kind, _ in KINDS}
    for kernel in kernels:
        kind = next(kind for kind, text in KINDS if re.search(text, kernel.name, re.IGNORECASE))
        groups[kind].append(kernel)
    convolved = [*groups["depthwise convolutions"], *groups["convolutions"]]
    yield {"kind": "all convolutions", **totals(convolved, moved.convolutions, copied)}
    for kind, group in groups.items():
        num_bytes = sum(map(moved.of_kernel, (kernel.name for kernel in group)))
        if group:
            yield {"kind": kind, **totals(group, num_bytes, copied)}


# --------------------------------------------------------------------------------------------------
# Bytes, from the compiler's code
# --------------------------------------------------------------------------------------------------

SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8, "i64": 8, "i32": 4, "i8": 1, "u8": 1, "i1": 1}

_SHAPE = r"\(((?:\d+, ?)*\d*)\)"
_KERNEL = re.compile(
    r"^(\w+) = async_compile\.triton\('(\w+)'.*?'signature': \{(.*?)\}", re.M | re.S
)
_POINTER = re.compile(r"'(\w+)': '\*(\w+)'")
_MADE = re.compile(rf"^(\w+) = empty_strided\w*\({_SHAPE}")
_CHECKED = re.compile(rf"^assert_size_stride\((\w+), {_SHAPE}")
_VIEWED = re.compile(rf"^reinterpret_tensor\((\w+), ?{_SHAPE}")
_RENAMED = re.compile(r"^(\w+) = (\w+)(?:;|$)")
_CALLED = re.compile(r"^(\w+)\.run\((.*), stream=")
_CONVOLVED = re.compile(r"^(\w+) = extern_kernels\.convolution\((\w+), (\w+)")
_CONVOLVED_BACK = re.compile(
    r"^\w+ = torch\.ops\.aten\.convolution_backward\.default\((\w+), (\w+)"
)
_MASK = re.compile(r"\[(True|False), (True|False), (True|False)\]")


class Bytes:
    """What kernels read and write in an update, by the code that the compiler wrote for it."""

    def __init__(self, code: Sequence[str]) -> None:
        self.kernels = defaultdict[str, int](int)
        self.convolutions = 0
        for text in code:
            self._read(text)

    def of_kernel(self, name: str) -> int:
        """Bytes of all launches of a compiled kernel in an update; 0 where not known."""
        return self.kernels.get(name, 0)

    def _read(self, text: str) -> None:
        pointers = {
            name: dict(_POINTER.findall(signature)) for name, _, signature in _KERNEL.findall(text)
        }
        order = {
            name: re.findall(r"'(\w+)': '", signature)
            for name, _, signature in _KERNEL.findall(text)
        }
        values: dict[str, int] = {}  # numbers in each tensor
        convolved: list[str] = []  # results whose size is said later
        for line in map(str.strip, text.splitlines()):
            if found := _MADE.match(line) or _CHECKED.match(line):
                values[found[1]] = number(found[2])
                if found[1] in convolved:
                    convolved.remove(found[1])
                    self.convolutions += 2 * values[found[1]]
            elif found := _CALLED.match(line):
                given = split(found[2])
                for place, argument in zip(order.get(found[1], ()), given, strict=False):
                    if dtype := pointers[found[1]].get(place):
                        times = 2 if place.startswith("in_out") else 1
                        self.kernels[found[1]] += (
                            times * SIZES.get(dtype, 0) * size_of(argument, values)
                        )
            elif found := _CONVOLVED.match(line):
                self.convolutions += 2 * values.get(found[2], 0)  # in a type of two bytes
                convolved.append(found[1])
            elif found := _CONVOLVED_BACK.match(line):
                mask = _MASK.findall(line)
                wanted = sum(word == "True" for word in mask[-1][:2]) if mask else 2
                # The gradient of the input, and that of the weights, each take both tensors.
                self.convolutions += (
                    2 * wanted * sum(values.get(found[place], 0) for place in (1, 2))
                )
            elif (found := _RENAMED.match(line)) and found[2] in values:
                values[found[1]] = values[found[2]]
            elif found := re.match(r"^(\w+) = (reinterpret_tensor\(.*)", line):
                values[found[1]] = size_of(found[2], values)


def number(shape: str) -> int:
    return prod(int(word) for word in shape.split(",") if word.strip())


def size_of(argument: str, values: dict[str, int]) -> int:
    """Numbers in a tensor that code names, or makes a view of."""
    if found := _VIEWED.match(argument):
        return number(found[2])
    return values.get(argument, 0)


def split(arguments: str) -> list[str]:
    """`a, f(b, c), d` at its outer commas."""
    return re.findall(r"(?:[^,(]|\((?:[^()]|\([^()]*\))*\))+", arguments.replace(", ", ","))
