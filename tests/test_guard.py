"""An update that is not finite changes nothing, however updates are carried out."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from updates import everything, run_at_once

from fasttrain import execution
from fasttrain.config import Optim, Recipe, Train
from fasttrain.execution import Graphed, Updater
from fasttrain.flat import flatten
from fasttrain.guard import Guard
from fasttrain.learner import Learner
from fasttrain.model import mobilenetv3_small
from fasttrain.optim import build_optimizer
from fasttrain.schedule import Plan, make_plan


def built(mode: str, max_skipped: int = 100, micro: int = 8) -> tuple[Learner, Updater]:
    recipe = Recipe(
        optim=Optim(ema_decay=0.9, warmup_epochs=1),
        train=Train(
            precision="no",
            global_batch_size=8,
            micro_batch_size=micro,
            epochs=9,
            max_skipped_steps=max_skipped,
        ),
    )
    plan = make_plan(recipe.train, recipe.optim, 64, 1)
    torch.manual_seed(0)
    module = mobilenetv3_small(0.35, num_classes=4, dropout=0.2)
    accelerator = Accelerator(cpu=True)
    learner = execution.prepare(mode, accelerator, module, recipe, plan)
    if mode == "graph":  # what would be recorded, without a GPU
        return learner, Graphed(accelerator, learner, plan, recipe, run=run_at_once)
    return learner, execution.build(mode, accelerator, learner, plan, recipe)


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    return images, torch.randint(4, (size,), generator=generator)


def learner_of(module: nn.Module, scaler: torch.amp.GradScaler | None = None) -> Learner:
    flat = flatten(module)
    return Learner(module, module, flat, build_optimizer(module, Optim()), None, scaler)


def plan_of(images: int, world_size: int = 1) -> Plan:
    train = Train(epochs=9, global_batch_size=images * world_size)
    return make_plan(train, Optim(), 64, world_size)


def carry_out(updater: Updater, step: int, spoil: Callable[[Tensor], object] | None = None) -> None:
    images, labels = batch(step)
    if spoil:
        spoil(images)
    torch.manual_seed(step)
    updater.micro(images, labels, is_last=True)
    updater.update(0.05)


SPOILS: list[Callable[[Tensor], object]] = [
    lambda images: images.fill_(math.inf),
    lambda images: images[3, 0, 5].fill_(math.nan),
    lambda images: images.mul_(1e38),
]


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("first", [0, 3])
def test_a_bad_update_leaves_no_trace(
    mode: str, spoil: Callable[[Tensor], object], first: int
) -> None:
    """The run continues as if the bad update had not been there."""
    learner, updater = built(mode)
    for step in range(first):
        carry_out(updater, step)
    before = {name: value.clone() for name, value in everything(learner)}
    carry_out(updater, first, spoil)
    for name, value in everything(learner):
        assert torch.equal(value, before[name]), name
    assert updater.guard.loss_sum.isfinite()
    carry_out(updater, first + 1)
    assert all(value.isfinite().all() for _, value in everything(learner))
    assert not torch.equal(dict(everything(learner))["momentum 0"], before["momentum 0"])
    skipped = updater.guard.read()
    assert skipped and (skipped.number, skipped.offset) == (1, first)
    assert not (math.isfinite(skipped.loss) and math.isfinite(skipped.gradient_norm))
    assert updater.guard.read() is None


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_after_too_many_bad_updates_nothing_changes(mode: str) -> None:
    learner, updater = built(mode, max_skipped=1)
    carry_out(updater, 0)
    carry_out(updater, 1, SPOILS[0])
    carry_out(updater, 2)
    before = {name: value.clone() for name, value in everything(learner)}
    carry_out(updater, 3, SPOILS[0])
    carry_out(updater, 4)  # a good one
    for name, value in everything(learner):
        assert torch.equal(value, before[name]), name
    skipped = updater.guard.read()
    assert skipped and (skipped.number, skipped.offset) == (3, 1)


def test_one_bad_micro_batch_makes_the_whole_update_bad() -> None:
    learner, updater = built("eager", micro=4)
    before = {name: value.clone() for name, value in everything(learner)}
    for micro in range(2):
        images, labels = batch(micro, 4)
        updater.micro(images * (math.nan if micro == 0 else 1), labels, is_last=micro == 1)
    updater.update(0.05)
    for name, value in everything(learner):
        assert torch.equal(value, before[name]), name


def test_a_loss_that_is_not_finite_is_enough_for_a_bad_update() -> None:
    """The gradient stays finite if softmax gives the true class the probability 0."""
    learner = learner_of(nn.Linear(2, 2))
    module, optimizer = learner.module, learner.optimizer
    guard = Guard(learner, plan_of(4), max_skipped=9)
    before = copy.deepcopy(module.state_dict())
    for loss in (math.inf, 1.0):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        guard.add(torch.tensor(loss), 4)
        guard.decide(torch.tensor(1.0))
        optimizer.step()
        same = [torch.equal(value, before[name]) for name, value in module.state_dict().items()]
        assert all(same) if loss == math.inf else not any(same)
    assert guard.loss_sum == 4


def test_with_a_scaler_the_guard_judges_the_loss_alone() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    learner = learner_of(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), scaler)
    module, optimizer = learner.module, learner.optimizer
    guard = Guard(learner, plan_of(4), max_skipped=9)
    weight = next(module.parameters())
    seen = []
    for loss, gradient in ((1.0, 2.0), (1.0, math.inf), (math.nan, 2.0), (1.0, 2.0)):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        scaler.scale(torch.ones(1))  # begins its work
        before = weight.detach().clone()
        guard.add(torch.tensor(loss), 4)
        guard.decide(torch.tensor(gradient))
        scaler.step(optimizer)
        scaler.update()
        seen.append((torch.equal(weight, before), scaler.get_scale()))
    assert seen == [(False, 4.0), (True, 2.0), (True, 1.0), (False, 1.0)]
    skipped = guard.read()
    assert skipped and (skipped.number, skipped.offset) == (1, 2)


def test_statistics_are_averaged_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """BatchNorm updates views of them. An update that is bad on one rank is bad on all ranks."""
    torch.manual_seed(0)
    model = mobilenetv3_small(0.35, num_classes=4).train()
    alone = copy.deepcopy(model)
    guard = Guard(learner_of(model), plan_of(4, world_size=2), max_skipped=9)
    # Another process with the same statistics: their average is unchanged.
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.mul_(2))
    images = torch.randn(4, 3, 32, 32)
    for network in (model, alone):
        network(images)
    guard.decide(torch.tensor(1.0))
    assert guard.read() is None
    for name, found in model.state_dict().items():
        assert torch.equal(found, alone.state_dict()[name])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.fill_(math.nan))
    guard.decide(torch.tensor(1.0))
    assert guard.read()
    for name, found in model.state_dict().items():
        assert torch.equal(found, alone.state_dict()[name])


def settled_by(compile_it: bool) -> tuple[list[Tensor], list[str]]:
    """The state of a guard after 4 updates, of which the second and the third are bad."""
    torch.manual_seed(0)
    learner = learner_of(mobilenetv3_small(0.35, num_classes=4).train())
    guard = Guard(learner, plan_of(4), max_skipped=9, compile_it=compile_it)
    read = []
    for loss, gradient in ((1.0, 2.0), (math.inf, 2.0), (1.0, math.nan), (3.0, 2.0)):
        learner.module(torch.randn(4, 3, 32, 32))
        guard.add(torch.tensor(loss), 4)
        guard.decide(torch.tensor(gradient))
        read.append(str(guard.read()))
    return [*learner.flat, *guard.tensors()], read


def test_a_compiled_guard_decides_as_an_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_compile, compiled = torch.compile, []

    def fast_compile(function: Callable[..., object], dynamic: bool) -> Callable[..., object]:
        compiled.append(function)
        return torch_compile(function, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", fast_compile)
    plain, found = settled_by(compile_it=False), settled_by(compile_it=True)
    assert len(compiled) == 1 and plain[1] == found[1]
    for expected, value in zip(plain[0], found[0], strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)


def test_a_guard_that_cannot_be_compiled_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_nothing(function: Callable[..., object], dynamic: bool) -> Callable[..., object]:
        def run(*args: object) -> None:
            function(*args)  # may have changed something before it failed
            raise RuntimeError("Failed to find C compiler")

        return run

    monkeypatch.setattr(torch, "compile", compile_nothing)
    plain, found = settled_by(compile_it=False), settled_by(compile_it=True)
    assert plain[1] == found[1]
    for expected, value in zip(plain[0], found[0], strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)
