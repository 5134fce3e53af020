"""Parameter groups, the weights' moving average and BatchNorm's statistics are right."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fasttrain.config import Optim
from fasttrain.flat import flatten
from fasttrain.model import mobilenetv3_small
from fasttrain.optim import WeightAverage, build_optimizer


def test_each_parameter_is_in_one_group_and_only_weights_decay() -> None:
    model = mobilenetv3_small(0.5, num_classes=7)
    optimizer = build_optimizer(model, Optim(weight_decay=0.01))
    decay_of = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert len(decay_of) == len(list(model.parameters()))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay_of)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            decays = isinstance(module, nn.Conv2d | nn.Linear) and name == "weight"
            assert decay_of[id(parameter)] == (0.01 if decays else 0.0)


def test_all_but_the_last_layer_may_learn_more_slowly_and_frozen_stages_not_at_all() -> None:
    model = mobilenetv3_small(0.5, num_classes=7)
    model.freeze(2)
    optimizer = build_optimizer(model, Optim(weight_decay=0.01, backbone_lr_factor=0.25))
    found = {
        id(p): (group.get("lr_factor", 1), group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in found and name.startswith("features.")
        else:
            factor = 1 if name.startswith("classifier.3.") else 0.25
            assert found[id(parameter)] == (factor, 0.01 if parameter.ndim > 1 else 0)


def test_one_update_is_sgd_with_momentum() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    settings = Optim(momentum=0.9, weight_decay=0.1)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    momentum = {name: torch.zeros_like(p) for name, p in expected.items()}
    optimizer = build_optimizer(model, settings)
    for lr in (0.2, 0.1):
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = model(torch.randn(5, 3, dtype=torch.float64)).square().sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        for (name, p), grad in zip(model.named_parameters(), grads, strict=True):
            p.grad = grad
            if p.ndim > 1:
                grad = grad + 0.1 * expected[name]
            momentum[name] = 0.9 * momentum[name] + grad
            expected[name] = expected[name] - lr * momentum[name]
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name])


def test_an_update_by_adamw_is_that_of_the_paper_and_a_rejected_one_changes_nothing() -> None:
    """The formula is that of algorithm 2 in arXiv:1711.05101."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    settings = Optim(
        name="adamw", lr=0.1, warmup_lr=0, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1
    )
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    means = {name: torch.zeros_like(p) for name, p in expected.items()}
    squares = {name: torch.zeros_like(p) for name, p in expected.items()}
    optimizer: Any = build_optimizer(model, settings)
    optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())
    number = 0
    for lr, accepted in ((0.2, False), (0.2, True), (0.1, False), (0.1, True), (0.3, True)):
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = model(torch.randn(5, 3, dtype=torch.float64)).square().sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        number += accepted
        for (name, p), grad in zip(model.named_parameters(), grads, strict=True):
            p.grad = grad if accepted else torch.full_like(grad, torch.nan)
            if not accepted:
                continue
            means[name] = 0.8 * means[name] + 0.2 * grad
            squares[name] = 0.95 * squares[name] + 0.05 * grad**2
            mean, square = means[name] / (1 - 0.8**number), squares[name] / (1 - 0.95**number)
            if p.ndim > 1:
                expected[name] = expected[name] * (1 - lr * 0.1)
            expected[name] = expected[name] - lr * mean / (square.sqrt() + 1e-6)
        optimizer.found_inf.fill_(not accepted)
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name])
        assert optimizer.state[p]["step"].item() == 3


def test_the_state_of_adamw_is_what_torch_would_make_at_the_first_step() -> None:
    model = mobilenetv3_small(0.35, num_classes=4).to(memory_format=torch.channels_last)
    ours: Any = build_optimizer(model, Optim(name="adamw", lr=0.1, warmup_lr=0))
    torchs: Any = torch.optim.AdamW(model.parameters(), fused=True)
    found = {p: dict(ours.state[p]) for p in model.parameters()}
    for p in found:
        p.grad = torch.zeros_like(p)
    torchs.step()
    for p, state in torchs.state.items():
        assert found[p].keys() == state.keys()
        for name, value in state.items():
            one = found[p][name]
            assert (one.dtype, one.shape, one.stride()) == (
                value.dtype,
                value.shape,
                value.stride(),
            )
            assert not one.any()


def test_moving_average_equals_torchs() -> None:
    torch.manual_seed(0)
    model = mobilenetv3_small(0.35, num_classes=4).train()
    flat = flatten(model)
    ours = WeightAverage(model, decay=0.5)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    reference.update_parameters(model)  # its first call copies
    for number in range(20, 24):  # past the growing decay
        with torch.no_grad():
            model(torch.randn(2, 3, 32, 32))
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ours.update(flat, torch.tensor(ours.weight(number)))
        reference.update_parameters(model)
    expected = reference.module.state_dict()
    for name, found in ours.module.state_dict().items():
        if found.is_floating_point():
            torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-6)


def test_the_decay_grows_with_the_updates() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, decay=0.9)
    with torch.no_grad():
        average.module.weight.zero_()  # type: ignore[operator]
        model.weight.fill_(1.0)
    average.update(flatten(model), torch.tensor(average.weight(1)))
    assert average.module.weight.item() == pytest.approx(1 - 2 / 11)  # type: ignore[operator]
