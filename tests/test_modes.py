"""The mode of execution is chosen by trials, and a mode that fails is replaced by another."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from updates import Block, network, plan_for, recipe_for

from fasttrain import modes, runtime
from fasttrain.config import Data, Model
from fasttrain.fused_block import Own
from fasttrain.modes import ModeTrial


class Device:
    """Stands in for an accelerator of a kind."""

    is_main_process = True

    def __init__(self, kind: str) -> None:
        self.device = torch.device(kind)


LAYERS = [Own(0, 1, 2, 0, 2, 1)]


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers that use kernels, each time that they are set. Trials would choose LAYERS."""
    found: list[Any] = []
    monkeypatch.setattr(modes, "_choose_layers", lambda *_: (LAYERS, ""))
    monkeypatch.setattr(modes.layer_trials, "fault", lambda device: "")
    monkeypatch.setattr(modes.layer_trials, "apply", lambda module, layers: found.append(layers))
    return found


@pytest.fixture
def chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, applied: list[Any]
) -> Callable[..., tuple[str, str, list]]:
    """Chooses a mode by made-up trials; also returns which were made."""
    monkeypatch.setattr(runtime, "device_name", str)

    def choose(
        trials: dict[str, ModeTrial], kind: str = "cuda", before: str | None = None, **train: Any
    ) -> tuple[str, str, list[str]]:
        tried: list[str] = []

        def attempt(mode: str, setup: modes.Setup) -> ModeTrial:
            tried.append(mode)
            return trials[mode]

        monkeypatch.setattr(modes, "try_mode", attempt)
        cache = train.pop("cache", f"{len(list(tmp_path.iterdir()))}")
        (tmp_path / cache).mkdir(exist_ok=True)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        recipe = recipe_for(**{"precision": "bf16", "kernels": "off"} | train)
        accelerator: Any = Device(kind)
        setup = modes.Setup(accelerator, nn.Identity(), recipe, plan_for(recipe), 4)
        mode, why = modes.choose_execution(
            setup, modes.Earlier(before, LAYERS) if before else None, lambda text: None
        )
        return mode, why, tried

    return choose


GOOD = {
    "eager": ModeTrial("eager", 2000, 1.5),
    "graph": ModeTrial("graph", 4000, 1.5),
    "compile_graph_fuse": ModeTrial("compile_graph_fuse", 5000, 1.499),
}
Chosen = Callable[..., tuple[str, str, list[str]]]


def test_the_fastest_mode_that_agrees_is_chosen_and_remembered(chosen: Chosen) -> None:
    mode, why, tried = chosen(GOOD, cache="one")
    assert mode == "compile_graph_fuse" and tried == list(GOOD)
    said = (
        "compile_graph_fuse (eager 2,000 images/s; graph 4,000 images/s; "
        "compile_graph_fuse 5,000 images/s)"
    )
    assert why == f"execution: {said}"
    again = chosen({}, cache="one")
    assert again == (mode, f"execution: {said}, as measured in an earlier run", [])
    assert chosen(GOOD, cache="one", micro_batch_size=4)[2] == list(GOOD)


def test_a_mode_that_fails_or_disagrees_is_neither_chosen_nor_remembered(chosen: Chosen) -> None:
    wrong = ModeTrial("compile_graph", 5000, 1.6)
    broken = ModeTrial("graph", 0, 0.0, "failed: RuntimeError: no graphs here")
    nan = ModeTrial("compile_graph_fuse", 3000, float("nan"))
    trials = GOOD | {"graph": broken, "compile_graph_fuse": nan}
    trials |= {"compile_graph": wrong, "compile": ModeTrial("compile", 1000, 1.5)}
    mode, why, tried = chosen(trials, cache="one")
    assert mode == "eager" and tried == list(trials)
    assert chosen(GOOD, cache="one")[0] == "compile_graph_fuse"
    assert "compile_graph gave a wrong loss (1.6000, expected 1.5000)" in why
    assert "graph failed: RuntimeError: no graphs here" in why


def test_fp16_takes_no_graph(chosen: Chosen) -> None:
    trials = GOOD | {"compile": ModeTrial("compile", 3000, 1.5)}
    assert chosen(trials, precision="fp16")[2] == ["eager", "compile"]
    with pytest.raises(ValueError, match="a CUDA graph cannot skip updates"):
        recipe_for(precision="fp16", execution="graph")


def test_a_run_keeps_its_mode_and_the_recipe_rules(chosen: Chosen) -> None:
    assert chosen({}, before="compile") == ("compile", "execution: compile, as before the stop", [])
    mode, _, tried = chosen({}, before="compile", execution="eager")
    assert (mode, tried) == ("eager", [])


def test_a_fault_of_the_eager_mode_is_reported(chosen: Chosen) -> None:
    broken = {"eager": ModeTrial("eager", 0.0, 0.0, "failed: no memory")}
    for kind, precision in (("cpu", "no"), ("cuda", "bf16")):
        with pytest.raises(modes.ExecutionError, match="carried out: eager failed: no memory"):
            chosen(broken, kind, precision=precision)


def kernels_trials(depthwise: float, both: float, loss: float = 1.5) -> dict[str, ModeTrial]:
    """The trials of a GPU, with images/s of the depthwise kernels alone and of all kernels."""
    names = ("compile_graph_fuse+depthwise", "compile_graph_fuse+kernels")
    trials = zip(names, (depthwise, both), strict=True)
    return GOOD | {name: ModeTrial(name, rate, loss) for name, rate in trials}


@pytest.mark.parametrize(
    ("depthwise", "both", "loss", "end", "said"),
    [
        (5100, 5200, 1.5, "+kernels", "on"),
        (5300, 5200, 1.5, "+depthwise", "depthwise only"),
        (5100, 5100, 1.5, "", "off"),
        (9000, 9000, 1.6, "", "off"),
        (9000, 9000, float("nan"), "", "off"),
    ],
)
def test_kernels_are_kept_if_they_gain_three_percent_and_agree(
    chosen: Chosen, depthwise: float, both: float, loss: float, end: str, said: str
) -> None:
    trials = kernels_trials(depthwise, both, loss)
    mode, why, tried = chosen(trials, kernels="auto", cache="one")
    assert mode == f"compile_graph_fuse{end}"
    assert tried == list(trials)  # each mode once
    first, second = why.splitlines()
    assert first.startswith("execution: compile_graph_fuse (")
    assert second.startswith(f"fused kernels: {said} (compile_graph_fuse 5,000 ")
    if loss == 1.5:
        assert chosen({}, kernels="auto", cache="one")[2] == [], "the choice was not remembered"


def test_the_layers_with_kernels_are_chosen_remembered_and_kept(
    chosen: Chosen, applied: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, why, _ = chosen(kernels_trials(5100, 5200), kernels="auto", cache="one")
    used = "; kernels are faster in 4 passes through layers, 2 of them with the second tile)"
    assert why.endswith(used) and applied == [LAYERS]
    chosen({}, kernels="auto", cache="one")
    assert applied[1:] == [[[0, 1, 2, 0, 2, 1]]]  # from the cache
    chosen({}, before="graph+kernels", kernels="auto")
    assert applied[2:] == [LAYERS]
    chosen({}, execution="graph", kernels="force")
    assert len(applied) == 3
    for number, (own, kinds) in enumerate(
        [
            (Own(0, 0, 0, 0, 1, 0), ["+depthwise"]),
            (Own(0, 2, 0, 0, 0, 0), ["+kernels"]),
            (Own(0, 0, 0, 0, 0, 0), []),
        ]
    ):
        monkeypatch.setattr(modes, "_choose_layers", lambda *_, own=own: ([own], ""))
        tried = chosen(kernels_trials(5300, 5300), kernels="auto", cache=f"other {number}")[2]
        assert [mode for mode in tried if "+" in mode] == [f"compile_graph_fuse{k}" for k in kinds]


def test_a_choice_without_any_kernel_that_ran_is_not_remembered(
    chosen: Chosen, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = [Own(0, 0, 0, 0, 0, 0)]
    for warning, again in (("WARNING: 6 trials failed", True), ("", False)):
        monkeypatch.setattr(modes, "_choose_layers", lambda *_, said=warning: (none, said))
        graph = {"execution": "graph", "kernels": "auto", "cache": f"kept {not again}"}
        assert chosen(GOOD, **graph)[2] == ["graph"]
        assert chosen(GOOD, **graph)[2] == (["graph"] if again else [])


def test_kernels_are_not_tried_where_triton_does_not_run(
    chosen: Chosen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modes.layer_trials, "fault", lambda device: "RuntimeError: no C compiler")
    assert chosen(GOOD, execution="graph", kernels="auto") == (
        "graph",
        "execution: graph, as the recipe says\nfused kernels: off, as Triton does not run here "
        "(RuntimeError: no C compiler)",
        [],
    )


def test_the_recipe_rules_over_kernels(chosen: Chosen) -> None:
    assert chosen(GOOD)[0] == "compile_graph_fuse"
    assert chosen({}, kernels="force", execution="graph") == (
        "graph+kernels",
        "execution: graph, as the recipe says\nfused kernels: on, as the recipe says",
        [],
    )
    for kernels, end in (("off", ""), ("auto", "+kernels"), ("force", "+kernels")):
        mode, _, tried = chosen({}, before="graph+kernels", kernels=kernels)
        assert (mode, tried) == (f"graph{end}", [])
    assert chosen({}, before="graph", kernels="auto")[0] == "graph"
    assert chosen({}, kernels="auto", deterministic=True)[0] == "eager"


def test_kernels_need_a_gpu_and_half_precision(chosen: Chosen) -> None:
    mode, why, _ = chosen(GOOD, kernels="auto", precision="no")
    assert "fused kernels: off, as they need half precision" in why and "+" not in mode
    cpu = {"eager": ModeTrial("eager", 1e9, 1.5)}
    assert "kernels" not in chosen(cpu, "cpu", kernels="auto", precision="no")[1]
    with pytest.raises(modes.ExecutionError, match=r"\[train\] kernels = force: .* need a GPU"):
        chosen(GOOD, "cpu", kernels="force")
    with pytest.raises(ValueError, match="kernels = force: the fused kernels need half precision"):
        recipe_for(kernels="force", precision="no")


def test_stochastic_depth_needs_pytorchs_layers() -> None:
    recipe = recipe_for(precision="bf16").model_copy(update={"model": Model(drop_path=0.1)})
    accelerator: Any = Device("cuda")
    setup = modes.Setup(accelerator, nn.Identity(), recipe, plan_for(recipe), 4)
    assert modes._choose_kernels(setup, "graph", None, {}, print) == (
        "",
        "fused kernels: off, as they have no stochastic depth (model.drop_path)",
    )


def test_a_short_run_on_a_cpu_is_not_compiled(chosen: Chosen) -> None:
    mode, why, tried = chosen(GOOD, "cpu", precision="no")
    assert (mode, tried) == ("eager", ["eager"])
    assert why == "execution: eager, as compiling would take longer than it could save"
    slow = {"eager": ModeTrial("eager", 0.1, 1.5), "compile": ModeTrial("compile", 0.2, 1.5)}
    assert chosen(slow, "cpu", precision="no")[0] == "compile"


def test_a_trial_leaves_no_trace() -> None:
    recipe = recipe_for()
    module = network()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    accelerator = Accelerator(cpu=True)
    setup = modes.Setup(accelerator, module, recipe, plan_for(recipe), 4)
    trial = modes.try_mode("eager", setup)
    assert not trial.fault and trial.images_per_s > 0 and 0.5 < trial.loss < 3
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


def test_lost_layouts_are_found_in_compiled_code() -> None:
    backward = "'torch.ops.aten.convolution_backward.default')"
    last, first = "(2048, 1, 256, 32)", "(2048, 64, 8, 1)"
    code = [
        f"assert_size_stride(buf6, (8, 32, 8, 8), {last}, {backward}",
        f"    assert_tensor_metadata(buf7, (8, 32, 8, 8), {first}, torch.float32, {backward}",
        f"assert_size_stride(buf8, (8, 32, 8, 8), {first}, 'torch.ops.aten.mm.default')",
        f"assert_size_stride(buf9, (32, 1, 3, 3), (9, 9, 3, 1), {backward}",  # of filters
    ]
    assert modes.lost_channels_last(code) == ["convolution_backward buf7"]


@pytest.mark.slow
def test_a_compiled_trial_looks_at_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def one_lost(code: list[str]) -> list[str]:
        seen.extend(code)
        return ["one"]

    monkeypatch.setattr(modes, "lost_channels_last", one_lost)
    recipe = recipe_for()
    torch.manual_seed(0)
    block = Block().to(memory_format=torch.channels_last)
    setup = modes.Setup(Accelerator(cpu=True), block, recipe, plan_for(recipe), 4)
    trial = modes.try_mode("compile", setup)
    assert not trial.fault and str(trial).endswith("images/s (1 convolutions lose channels-last)")
    assert any("convolution" in text for text in seen)


def test_a_slow_bf16_gives_a_warning(chosen: Chosen, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0.001 < modes.bf16_ratio(network(), 32) < 10
    trials = {"eager": ModeTrial("eager", 1e9, 1.0)}
    for ratio, said in (
        (0.8, "WARNING: bfloat16 takes 1.2 times as long as float32 on this CPU: use --set "),
        (1.5, "execution: eager, as compiling would take longer than it could save"),
    ):
        monkeypatch.setattr(modes, "bf16_ratio", lambda module, px, ratio=ratio: ratio)
        mode, why, _ = chosen(trials, "cpu")
        assert mode == "eager" and why.startswith(said)


def test_a_far_slower_bf16_is_refused(chosen: Chosen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "bf16_ratio", lambda module, px: 1 / 12)
    with pytest.raises(modes.ExecutionError, match=r"bf16: takes 12.0 times as long as float32 "):
        chosen({"eager": ModeTrial("eager", 1e9, 1.0)}, "cpu")


def test_the_measurement_of_a_slow_bf16_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    block = network()
    block.register_forward_pre_hook(lambda module, images: passes.append(len(images[0])))
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 60.0 if len(passes) > 3 else 1.0
        return now

    monkeypatch.setattr(modes.time, "perf_counter", clock)
    assert modes.bf16_ratio(block, 96) < 0.25 and passes == [2] * 6


def test_an_impossible_mode_is_a_fault_of_its_trial() -> None:
    recipe = recipe_for()
    setup = modes.Setup(Accelerator(cpu=True), network(), recipe, plan_for(recipe), 4)
    trial = modes.try_mode("graph", setup)
    assert trial.fault.startswith("failed: ") and trial.images_per_s == 0


def test_a_run_falls_back_on_a_mode_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a capture fails, or a resumed run finds no compiler any more."""
    tried: list[str] = []
    said: list[str] = []
    recipe = recipe_for()
    setup = modes.Setup(Accelerator(cpu=True), network(), recipe, plan_for(recipe), 4)

    class Updater:
        def __init__(self, mode: str, *_: object) -> None:
            self.mode = mode

        def rehearse(self, training: list, evaluation: list) -> None:
            assert [tuple(images.shape) for images, _ in training] == [(8, 3, 32, 32)]
            assert [tuple(images.shape) for images in evaluation] == [(8, 3, 224, 224)]
            tried.append(self.mode)
            if "compile" in self.mode:
                raise RuntimeError("no compiler here\nat all")

        def close(self) -> None:
            pass

    monkeypatch.setattr(modes.execution, "build", Updater)
    restored: list[Any] = []
    mode, learner, updater = modes.start("compile_graph_fuse", setup, restored.append, said.append)
    assert mode == "eager" and tried == ["compile_graph_fuse", "compile_graph", "compile"]
    assert restored[-1] is learner and len(restored) == 4 and isinstance(updater, Updater)
    assert updater.mode == "eager"
    assert said[0] == "preparing updates by compile_graph_fuse, which can take minutes"
    assert said[1] == (
        "WARNING: train.execution = compile_graph_fuse failed: RuntimeError: no compiler here; "
        "trying a simpler mode"
    )
    asked = recipe_for(execution="compile")
    setup = modes.Setup(Accelerator(cpu=True), network(), asked, plan_for(recipe), 4)
    with pytest.raises(modes.ExecutionError, match=r"execution = compile: .*no compiler here; use"):
        modes.start("compile", setup, restored.append, said.append)


@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        ({"scales_px": (32, 64, 48)}, [64, 48, 32]),
        ({"crop_px": ((0, 32), (2, 48), (99, 64))}, [48, 32]),  # the run ends before epoch 99
    ],
)
def test_every_image_size_is_prepared_before_the_run_the_largest_first(
    data: dict[str, Any], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[tuple[int, ...]] = []

    class Updater:
        def __init__(self, *_: object) -> None:
            pass

        def rehearse(self, training: Iterable[Any], evaluation: list[torch.Tensor]) -> None:
            prepared.extend(tuple(images.shape) for images, _ in training)

    monkeypatch.setattr(modes.execution, "build", Updater)
    recipe = recipe_for().model_copy(update={"data": Data(**data)})
    setup = modes.Setup(Accelerator(cpu=True), network(), recipe, plan_for(recipe), 4)
    modes.start("compile", setup, lambda learner: None, lambda text: None)
    assert prepared == [(8, 3, px, px) for px in sizes]


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_on_a_gpu_every_mode_can_be_tried(
    precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each agrees with eager, and gives back what it held; the scale of the run's loss stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = recipe_for(precision=precision)
    accelerator = Accelerator(mixed_precision=precision)
    torch.manual_seed(0)
    block = Block().to(accelerator.device).to(memory_format=torch.channels_last)
    setup = modes.Setup(accelerator, block, recipe, plan_for(recipe), 4)
    held = torch.cuda.memory_allocated()
    scale = accelerator.scaler.get_scale() if accelerator.scaler else None
    said: list[str] = []
    mode, why = modes.choose_execution(setup, None, said.append)
    assert "failed" not in why and "wrong loss" not in why, why
    assert torch.cuda.memory_allocated() <= held + 2**20
    assert scale == (accelerator.scaler.get_scale() if accelerator.scaler else None)
    assert modes.choose_execution(setup, None, said.append)[0] == mode
    assert all("take minutes" in text for text in said)
    _, _, updater = modes.start(mode, setup, lambda learner: None, said.append)
    updater.micro(*setup.batch(8, 32), is_last=True)
    updater.update(0.01)
    assert float(updater.guard.loss_sum) > 0
