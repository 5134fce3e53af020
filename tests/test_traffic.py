"""Bytes of an update are those that one counts by hand, and those that PyTorch moves and keeps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark
import pytest
import torch
from benchmarks import layers, memory, plans, profiles, steps, traffic
from benchmarks.plans import Plan, Setting
from torch import Tensor

from fasttrain.model import MobileNetV3, build_model, count_macs, use_kernels

SMALL = Setting("small", 0.35, 64, 2, "bf16")
LARGE = Setting("large", 1.0, 224, 8, "bf16")

# --------------------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------------------


def test_layers_are_those_of_the_network() -> None:
    network = LARGE.network
    model = build_model("large", 1.0, layers.NUM_CLASSES, 0.0)
    assert network.parameters == sum(p.numel() for p in model.parameters())
    for layer in network.layers:
        assert layer.weights == model.get_parameter(f"{layer.name}.weight").numel()
    each = {layer.name: layer for layer in network.layers}
    assert each["features.4.conv.3"] == layers.Layer(
        "features.4.conv.3", "depthwise", 5, 2, (72, 56), (72, 28), 72 * 25, "relu", "before",
        begins_shortcut=False, ends_shortcut=False,
    )  # fmt: skip
    assert [layer.kind for layer in network.layers[:4]] == [
        "stem", "depthwise", "project", "expand",
    ]  # fmt: skip
    assert each["features.1.conv.0"].begins_shortcut and each["features.1.conv.4"].ends_shortcut
    assert not each["features.2.conv.0"].begins_shortcut
    assert each["conv.0"].kind == "head" and each["conv.0"].act == "hardswish"
    assert SMALL.network.layers[1].gate == "after"


def test_layers_do_the_work_of_the_network() -> None:
    model = build_model("small", 0.35, layers.NUM_CLASSES, 0.0)
    gates = [p for name, p in model.named_parameters() if ".fc." in name and p.ndim > 1]
    multiply_adds = sum(each.outputs[1] ** 2 * each.weights for each in SMALL.network.layers)
    assert multiply_adds + sum(p.numel() for p in gates) == count_macs(model, 64)


# --------------------------------------------------------------------------------------------------
# Bytes, counted by hand
# --------------------------------------------------------------------------------------------------

# How often one block's tensors are read or written, forward and backward: z is the narrow tensor
# before and after the block, e the wide tensor within it. features.3: 24 > 72 > 24 channels of
# 56 x 56, 3 x 3, ReLU, shortcut.
BY_HAND: dict[Plan, tuple[tuple[int, int], tuple[int, int]]] = {
    "eager": ((8, 14), (12, 24)),
    "compile": ((6, 10), (11, 22)),
    "compile_fuse": ((6, 10), (11, 22)),
    "depthwise": ((6, 7), (12, 16)),
    "project": ((5, 5), (9, 11)),
    "expand": ((5, 4), (7, 8)),
}


def moved(plan: Plan, setting: Setting, block: str, forward: bool) -> int:
    return sum(
        each.moved
        for each in plans.passes(plan, setting)
        if each.layer.startswith(block) and each.forward == forward
    )


@pytest.mark.parametrize("plan", plans.PLANS)
def test_a_block_with_a_shortcut_counted_by_hand(plan: Plan) -> None:
    z, e = (2 * LARGE.batch * channels * 56 * 56 for channels in (24, 72))
    weights = 24 * 72 + 72 * 9 + 72 * 24
    number = len(plans.OURS.get(plan, ()))
    ours = (0, 72 * 9, 72 * 9 + 72 * 24, weights)[number]  # weights of our kernels
    for forward, (narrow, wide) in zip((True, False), BY_HAND[plan], strict=True):
        # Forward: cast from float32 (4 + 2 bytes), read (2). Backward: read, gradient written and
        # cast to float32 (2 + 2 + 2 + 4); our kernels write it in float32 (2 + 4).
        expected = 8 * weights if forward else 10 * (weights - ours) + 6 * ours
        expected += narrow * z + wide * e
        assert moved(plan, LARGE, "features.3.", forward) == expected


# features.11: 80 > 480 > 112 channels of 14 x 14, 3 x 3, squeeze-excite, hard-swish. x is its input
# and p its output.
GATED: dict[Plan, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "compile": ((1, 14, 4), (2, 31, 7)),
    "compile_fuse": ((1, 12, 4), (2, 23, 7)),
    "depthwise": ((1, 7, 4), (2, 16, 7)),
    "project": ((1, 5, 3), (2, 11, 4)),
    "expand": ((1, 4, 3), (2, 10, 4)),  # backward of the expansion: two kernels read 2 e each
}


@pytest.mark.parametrize("plan", GATED)
def test_a_block_with_squeeze_excite_counted_by_hand(plan: Plan) -> None:
    setting = LARGE._replace(batch=1024)
    x, e, p = (2 * setting.batch * channels * 14 * 14 for channels in (80, 480, 112))
    rows = 4 * setting.batch * 480 if plan in plans.OURS else 0  # a float32 per image and channel
    for forward, (first, wide, last) in zip((True, False), GATED[plan], strict=True):
        expected = first * x + wide * e + last * p + (10 if forward else 14) * rows
        found = moved(plan, setting, "features.11.", forward)
        assert found == pytest.approx(expected, rel=5e-3) and found > expected  # weights


def test_float32_needs_no_casts_and_twice_the_bytes() -> None:
    single = LARGE._replace(precision="no")
    z, e = (4 * LARGE.batch * channels * 56 * 56 for channels in (24, 72))
    weights = 4 * (24 * 72 + 72 * 9 + 72 * 24)
    assert moved("eager", single, "features.3.", True) == 8 * z + 14 * e + weights


def test_plans_move_less_and_less() -> None:
    setting = LARGE._replace(batch=1024)
    mb = [plans.moved(plan, setting) / setting.batch / 1e6 for plan in plans.PLANS]
    assert mb == sorted(mb, reverse=True)
    assert mb == pytest.approx([183.0, 162.1, 142.8, 107.6, 83.6, 67.0], abs=0.1)
    kept = [plans.kept(plan, setting) for plan in plans.PLANS]
    assert kept == sorted(kept, reverse=True)


def test_the_plan_of_a_mode() -> None:
    modes = ("graph", "compile_graph", "compile_graph_fuse", "compile_fuse+depthwise", "project")
    found = [plans.plan_of(mode) for mode in modes]
    assert found == ["eager", "compile", "compile_fuse", "depthwise", "project"]


def test_small_s_first_block_reads_more_for_its_gate() -> None:
    """Its squeeze-excite follows ReLU: one more pass forward and two backward, counted by hand."""
    setting = SMALL._replace(px=224, batch=1024)
    with_gate = setting.network.layers[1]
    assert with_gate.gate == "after"
    y = 2 * setting.batch * with_gate.written
    x = 2 * setting.batch * with_gate.read
    forward = moved("expand", setting, with_gate.name, True)
    assert forward == pytest.approx(x + 2 * y, rel=0.02) and forward > x + 2 * y
    backward = moved("expand", setting, with_gate.name, False)
    assert backward == pytest.approx(2 * x + 7 * y, rel=0.02) and backward > 2 * x + 7 * y


def test_the_last_pass_is_the_optimizer() -> None:
    last = plans.passes("expand", LARGE)[-1]
    assert last.moved == 9 * 4 * 5_483_032  # norm 1, SGD 3 + 2, average 2 + 1


# --------------------------------------------------------------------------------------------------
# Against PyTorch
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> MobileNetV3:
    return build_model(SMALL.arch, SMALL.width, layers.NUM_CLASSES, 0.0)


@pytest.fixture
def loss(model: MobileNetV3) -> Callable[[], Tensor]:
    """The forward pass of SMALL."""
    images = torch.randn(SMALL.batch, 3, SMALL.px, SMALL.px)
    images = images.to(memory_format=torch.channels_last)

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(images).sum()

    return forward


def holds_images(tensor: Tensor) -> bool:
    """False for weights, and for gates, which have one position."""
    return tensor.ndim == 4 and len(tensor) == SMALL.batch and tensor.shape[2] > 1


@pytest.mark.parametrize("kernels", [False, True])
def test_what_is_kept_is_what_pytorch_saves_for_the_backward_pass(
    model: MobileNetV3, loss: Callable[[], Tensor], kernels: bool
) -> None:
    use_kernels(model, kernels)
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if holds_images(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss()
    expected = plans.kept("expand" if kernels else "eager", SMALL)
    if kernels:  # stem and head run eagerly here, and keep what enters hard-swish
        stem, *_, head = (plans.Sizes(layer, SMALL).y for layer in SMALL.network.convolutions)
        expected += stem + head
    assert sum(tensor.nbytes for tensor in saved.values()) == expected


@pytest.mark.slow
def test_compile_keeps_what_the_compiler_saves_for_the_backward_pass(
    loss: Callable[[], Tensor],
) -> None:
    """The compiler decides what is kept before it knows the device, so that a CPU shows it."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.compilers import nop
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    kept: list[int] = []

    def see(module: Any, inputs: Any) -> Any:
        results = module.graph.output_node().args[0]
        tensors = [each.meta["val"] for each in results if each is not None]
        kept.append(sum(each.nbytes for each in tensors if holds_images(each)))
        return nop(module, inputs)

    backend = aot_autograd(
        fw_compiler=see,
        bw_compiler=nop,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch.compile(loss, backend=backend, dynamic=False, fullgraph=True)()
    assert kept == [plans.kept("compile", SMALL)] == [plans.kept("compile_fuse", SMALL)]


def test_eager_moves_what_pytorch_gives_to_its_operations(loss: Callable[[], Tensor]) -> None:
    moves = profiles.Traffic()
    with moves:
        loss().backward()
    convolutions = SMALL.network.convolutions
    sizes = [plans.Sizes(layer, SMALL) for layer in convolutions]
    names = {layer.name for layer in convolutions}
    found = [
        each
        for each in plans.passes("eager", SMALL)
        if each.layer in names and each.kind != "elementwise"
    ]
    assert moves.bytes["aten::convolution"] == sum(each.moved for each in found if each.forward)
    # PyTorch has one operation for both gradients, and gives it the gradient of y once. That of the
    # stem is given the weights, too.
    backward = sum(each.moved for each in found if not each.forward)
    backward += sizes[0].weight - sum(size.y for size in sizes[1:])
    assert moves.bytes["aten::convolution_backward"] == backward
    activated = sum(
        size.y for size, layer in zip(sizes, convolutions, strict=True) if layer.act == "hardswish"
    )
    classifier = 2 * 2 * SMALL.batch * SMALL.network.layers[-2].outputs[0]  # it has one, too
    assert moves.bytes["aten::hardswish"] == 2 * activated + classifier
    assert moves.bytes["aten::hardswish_backward"] == 3 * activated + classifier * 3 / 2


# --------------------------------------------------------------------------------------------------
# What a run reached
# --------------------------------------------------------------------------------------------------

HEAD = {
    "stage": "profile", "name": "fasttrain", "arch": "large", "batch": 1024, "px": 224,
    "precision": "bf16", "execution": "compile_graph_fuse", "step_ms": 60.0,
    "copy_gb_per_s": 4000.0,
}  # fmt: skip
ROWS = [
    {"kind": "all convolutions", "ms": 32.0}, {"kind": "compiled", "ms": 27.0},
    {"kind": "depthwise convolutions", "ms": 20.0}, {"kind": "convolutions", "ms": 12.0},
    {"kind": "others of torch", "ms": 1.0}, {"kind": "bookkeeping", "ms": 0.5},
]  # fmt: skip


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """A record with a profile, between other lines."""
    lines = [
        {"stage": "machine"}, HEAD | {"batch": 8, "step_ms": 1.0}, HEAD,
        *({"stage": "profile"} | row for row in ROWS),
        {"stage": "loop", "kind": "compiled", "ms": 9},
    ]  # fmt: skip
    path = tmp_path / "record.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_a_profile_is_read(profile: Path) -> None:
    found = traffic.read_profile(profile, LARGE._replace(batch=1024))
    assert found.mode == "compile_graph_fuse" and found.bandwidth == 4e12
    assert found.images_per_s == pytest.approx(1024 / 0.060)
    assert found.kernel_ms == {"elementwise": 28.0, "depthwise": 20.0, "convolution": 12.0}
    assert traffic.read_profile(profile, LARGE).kernel_ms == {}


def test_what_a_run_reached_and_what_plans_then_give(profile: Path) -> None:
    setting = LARGE._replace(batch=1024)
    measured = traffic.read_profile(profile, setting)
    line = traffic.reached(setting, measured)
    kinds = plans.by_kind(plans.passes("compile_fuse", setting))
    assert line["of_bound"] == pytest.approx(sum(kinds.values()) / 0.060 / 4e12, rel=1e-3)
    assert line["of_copy_by_kind"]["depthwise"] == pytest.approx(
        kinds["depthwise"] / 0.020 / 4e12, rel=1e-3
    )
    same = traffic.expected("compile_fuse", setting, 4e12, measured)
    assert same["same_share_ms"] == pytest.approx(60.0)
    assert same["by_kind_ms"] == pytest.approx(60.0)
    # Our kernels at the pace of Inductor's, on a GPU of half the bandwidth.
    slower = traffic.expected("depthwise", setting, 2e12, measured)
    ours = plans.by_kind(plans.passes("depthwise", setting))
    pace = 28.0 / kinds["elementwise"]
    ms = 12.0 + pace * (ours["elementwise"] + ours["ours"])
    assert slower["by_kind_ms"] == pytest.approx(2 * ms)
    assert slower["same_share_ms"] == pytest.approx(
        120.0 * sum(ours.values()) / sum(kinds.values())
    )


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------

Command = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `benchmark.py traffic` and returns the lines it printed."""

    def command(*words: Any) -> list[dict[str, Any]]:
        benchmark.main(["traffic", *(str(word) for word in words)])
        out, command.text = capsys.readouterr()  # type: ignore[attr-defined]
        return [json.loads(line) for line in out.splitlines()]

    return command


def test_command(printed: Command) -> None:
    machine, *lines = printed("--bandwidth", "3.0e12", "--rate", "compile:9550")
    assert machine["torch"] and machine["copy_gb_per_s"] == 3000
    each = {line["name"]: line for line in lines if "name" in line}
    assert [*each] == [*plans.PLANS]
    for plan, line in each.items():
        assert line["forward_mb"] + line["backward_mb"] == pytest.approx(
            line["mb_per_image"], rel=1e-3
        )
        assert sum(line["mb_by_kind"].values()) == pytest.approx(line["mb_per_image"], rel=1e-3)
        assert line["bound_images_per_s"] == pytest.approx(3e6 / line["mb_per_image"], rel=1e-3)
        by_layer = [x for x in lines if "layer" in x]
        total = sum(x["forward_mb"][plan] for x in by_layer)
        assert total == pytest.approx(line["forward_mb"], rel=1e-3)
    assert each["compile"]["same_share_images_per_s"] == 9550
    assert lines[-1]["run"] == "compile" and lines[-1]["of_bound"] == pytest.approx(0.51, abs=0.01)
    text = printed.text  # type: ignore[attr-defined]
    assert "features.15.conv.0" in text and "expand 1/1" in text and "160 > 960" in text
    assert "compile reached 52% of the bound: 9,550 images/s" in text


def test_command_with_a_profile(printed: Command, profile: Path) -> None:
    *_, line, share = printed("--profile", profile)
    assert line["name"] == "expand" and share["copy_gb_per_s"] == 4000
    assert line["by_kind_images_per_s"] > line["same_share_images_per_s"] > 30_000
    assert "Over the speed of a copy: depthwise 2" in printed.text  # type: ignore[attr-defined]


def test_command_without_a_bandwidth(printed: Command) -> None:
    *_, line = printed("--arch", "small", "--width", "0.75")
    assert line["mb_per_image"] > 0 and "bound_ms" not in line
    assert "No bound: there is no GPU here" in printed.text  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "compile:9000"], "--rate: no GPU here whose copy could be measured; add --ba"),
        (["--rate", "fast:9"], "fast: not among eager, compile"),
        (["--bandwidth", "0"], "'0' is not a number above 0"),
        (["--profile", "nowhere"], "No such file or directory: 'nowhere'; name DIR/record.jsonl"),
        (["--batch", "7"], "it has no profile of large, batch 7, 224 px, bf16; it has large, 8, "),
    ],
)
def test_bad_options(
    words: list[str], message: str, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if words[0] == "--batch":
        words = [*words, "--profile", str(profile)]
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["traffic", *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_memory_of_a_process() -> None:
    job = steps.StepJob(
        name="fasttrain", arch="large", width=1.0, batch=2, px=224, precision="bf16",
        execution="compile", layout="channels_last", device="cpu", threads=1, seconds=1,
    )  # fmt: skip
    convolutions = LARGE.network.convolutions
    numbers = sum(layer.read + layer.written for layer in convolutions)
    assert 8.0e6 < numbers < 10.0e6
    held = memory.bytes_held(job) - memory.MIB_OF_A_PROCESS * 2**20
    assert held == round(1.4 * 2 * 2 * numbers)
