"""Where the time of an update goes on a GPU: its kernels by time, and the bytes that they move.

The times come from the GPU's own records, by way of torch.profiler, which has the kernels of a CUDA
graph one by one. Bytes are known for compiled kernels and for the convolutions together; for other
kernels they are left out. They follow from the sizes of the tensors in the compiler's code. Each
tensor counts once: a kernel that reads it twice moves more, and one that reads a part moves less.
"""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

from benchmarks import plans, profiles, steps
from benchmarks.output import rounded
from benchmarks.own_process import Result
from fasttrain import execution

UPDATES = 3  # to profile
SLOWEST = 12  # kernels to list
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of the profiler's trace

# Kinds of kernels by their names; the first pattern that matches counts.
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


def profile(job: steps.StepJob) -> Result:
    """The time of an update, and as `rows` its slowest kernels, all kinds, and the bookkeeping.

    Raises:
        RuntimeError: the profiler recorded no kernel.
    """
    steps.start(job)
    _, learner, updater = steps.built(job, steps.plan_of(job, 1))
    update = steps.update_with(job, learner, updater)
    code: list[str] = []
    if job.compiles:
        from torch._inductor.utils import run_and_get_code  # its import takes seconds

        _, code = run_and_get_code(update)
    steps.timed(update, job, 5)
    step_s = min(steps.timed(update, job, 10) / 10 for _ in range(3))
    kernels = kernels_of(update, UPDATES)
    if not kernels:
        raise RuntimeError("the profiler recorded no kernel; check that CUPTI is installed")
    copied = profiles.copy_bandwidth(job.device)
    setting = plans.Setting(job.arch, job.width, job.px, job.batch, job.precision)
    rows = [*rows_of(kernels, Bytes(code), copied), *bookkeeping_rows(bookkeeping(job, updater))]
    return {
        "step_ms": 1e3 * step_s,
        # This is more than the step if kernels run at the same time.
        "busy_ms": sum(kernel.ms for kernel in kernels),
        "launches": sum(kernel.launches for kernel in kernels),
        "copy_gb_per_s": copied / 1e9,
        "moved_gb": plans.moved(plans.plan_of(job.execution), setting) / 1e9,
        "rows": [rounded(row) for row in rows],
    }


def kernels_of(function: Any, number: int) -> list[Kernel]:
    """The kernels that a call of the function launches, the slowest first."""
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]):
        function()  # the first use of the profiler takes a second and loses records
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
    """The kernels after the gradients: guard, norm, BatchNorm's averages, optimizer and EMA.

    Here these kernels run alone and without a CUDA graph. A graph launches the same kernels.
    """
    if isinstance(updater, execution.Graphed):
        return kernels_of(updater._step, UPDATES)
    images, labels = steps.resident_batch(job)
    updater.micro(images, labels, is_last=True)
    gradients = [p.grad for p in updater.learner.module.parameters()]

    def follow() -> None:
        for parameter, gradient in zip(updater.learner.module.parameters(), gradients, strict=True):
            parameter.grad = gradient
        updater.update(0.1)

    return kernels_of(follow, UPDATES)


def rows_of(kernels: Sequence[Kernel], moved: "Bytes", copied: float) -> list[Result]:
    """The slowest kernels, then all kinds; `copied` is the speed of a copy in bytes/s."""
    slowest = [
        {"kernel": each.name[:120], **totals([each], moved.of_kernel(each.name), copied)}
        for each in kernels[:SLOWEST]
    ]
    return [*slowest, *kinds(kernels, moved, copied)]


def bookkeeping_rows(kernels: Sequence[Kernel]) -> list[Result]:
    """The bookkeeping as one kind, then each of its kernels."""
    each = [{"bookkeeping": kernel.name[:120], **totals([kernel])} for kernel in kernels]
    return [{"kind": "bookkeeping", **totals(kernels)}, *each]


def totals(kernels: Sequence[Kernel], num_bytes: int = 0, copied: float = 0.0) -> Result:
    """The time and launches of some kernels; with their bytes, the share of a copy's speed too."""
    ms = sum(kernel.ms for kernel in kernels)
    found: Result = {"ms": ms, "launches": sum(kernel.launches for kernel in kernels)}
    if num_bytes and ms:
        found["mb"] = num_bytes / 1e6
        found["of_copy"] = num_bytes / (ms / 1e3) / copied
    return found


def kinds(kernels: Sequence[Kernel], moved: "Bytes", copied: float) -> Iterator[Result]:
    """The totals of each kind of kernels; bytes for compiled kernels and for all convolutions."""
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
# Bytes, read from the compiler's code
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
_VIEW_NAMED = re.compile(r"^(\w+) = (reinterpret_tensor\(.*)")
_RENAMED = re.compile(r"^(\w+) = (\w+)(?:;|$)")
_CALLED = re.compile(r"^(\w+)\.run\((.*), stream=")
_CONVOLVED = re.compile(r"^(\w+) = extern_kernels\.convolution\((\w+), (\w+)")
_CONVOLVED_BACK = re.compile(
    r"^\w+ = torch\.ops\.aten\.convolution_backward\.default\((\w+), (\w+)"
)
_MASK = re.compile(r"\[(True|False), (True|False), (True|False)\]")


class Bytes:
    """The bytes that kernels read and write in an update, from the code that the compiler wrote."""

    def __init__(self, code: Sequence[str]) -> None:
        self.kernels = defaultdict[str, int](int)  # bytes of all launches, by kernel
        self.convolutions = 0  # bytes of all convolutions
        for text in code:
            self._read(text)

    def of_kernel(self, name: str) -> int:
        """Bytes of all launches of a compiled kernel in an update; 0 where they are unknown."""
        return self.kernels.get(name, 0)

    def _read(self, text: str) -> None:
        """Adds the bytes of one file of code, line by line."""
        self.arguments = {  # of each kernel, in their order: name, and type if it is a pointer
            name: [(word, dict(_POINTER.findall(signature)).get(word))
                   for word in re.findall(r"'(\w+)': '", signature)]
            for name, _, signature in _KERNEL.findall(text)
        }  # fmt: skip
        self.values: dict[str, int] = {}  # how many numbers each tensor has
        self.convolved: list[str] = []  # results whose size is in a later line
        for line in map(str.strip, text.splitlines()):
            if found := _MADE.match(line) or _CHECKED.match(line):
                self._tensor(found[1], number(found[2]))
            elif found := _CALLED.match(line):
                self._launch(found[1], split(found[2]))
            elif found := _CONVOLVED.match(line):
                self.convolutions += 2 * self.values.get(found[2], 0)  # numbers of two bytes
                self.convolved.append(found[1])
            elif found := _CONVOLVED_BACK.match(line):
                self._convolution_backward(line, found[1], found[2])
            elif (found := _RENAMED.match(line)) and found[2] in self.values:
                self.values[found[1]] = self.values[found[2]]
            elif found := _VIEW_NAMED.match(line):
                self.values[found[1]] = size_of(found[2], self.values)

    def _tensor(self, name: str, size: int) -> None:
        """Stores the size of a tensor, which a convolution may have written."""
        self.values[name] = size
        if name in self.convolved:
            self.convolved.remove(name)
            self.convolutions += 2 * size

    def _launch(self, kernel: str, given: Sequence[str]) -> None:
        """Adds the tensors that a kernel is given; one that it also writes counts twice."""
        for (name, dtype), tensor in zip(self.arguments.get(kernel, ()), given, strict=False):
            if dtype:
                times = 2 if name.startswith("in_out") else 1
                self.kernels[kernel] += times * SIZES.get(dtype, 0) * size_of(tensor, self.values)

    def _convolution_backward(self, line: str, gradient: str, given: str) -> None:
        """Adds a convolution's backward pass.

        The gradient of its input and that of its weights each move both tensors.
        """
        mask = _MASK.findall(line)
        wanted = sum(word == "True" for word in mask[-1][:2]) if mask else 2
        both = self.values.get(gradient, 0) + self.values.get(given, 0)
        self.convolutions += 2 * wanted * both


def number(shape: str) -> int:
    """The product of a shape such as `2, 3, 4`."""
    return prod(int(word) for word in shape.split(",") if word.strip())


def size_of(argument: str, values: dict[str, int]) -> int:
    """The number of values in the tensor that an argument names or views; 0 if it is unknown."""
    if found := _VIEWED.match(argument):
        return number(found[2])
    return values.get(argument, 0)


def split(arguments: str) -> list[str]:
    """Splits `a, f(b, c), d` at its outer commas."""
    return re.findall(r"(?:[^,(]|\((?:[^()]|\([^()]*\))*\))+", arguments.replace(", ", ","))
