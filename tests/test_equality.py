"""Training updates equal those of an independent implementation in float64.

The reference reads the layers from `reference_model.plan`, and has its gradients from autograd. It
shares no code with fasttrain's network, loss, optimizer and moving average.
"""

import pytest
import reference_model as reference
import torch
from torch import Tensor
from torch.nn import functional as F
from updates import OPTIM, batches_for, carry_out, plan_for, recipe_for

from fasttrain.config import Optim
from fasttrain.model import build_model

Tensors = dict[str, Tensor]


def batch_norm(x: Tensor, name: str, state: Tensors) -> Tensor:
    """Normalises `(B, C, H, W)` with its own statistics, and moves the stored ones towards them."""
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    number = x.numel() / x.shape[1]
    with torch.no_grad():
        state[f"{name}.running_mean"].mul_(0.9).add_(0.1 * mean)
        state[f"{name}.running_var"].mul_(0.9).add_(0.1 * var * number / (number - 1))
        state[f"{name}.num_batches_tracked"] += 1
    x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def training_logits(arch: str, width: float, state: Tensors, images: Tensor) -> Tensor:
    """The logits of a batch in training, without dropout; changes the statistics in `state`."""
    x = saved = images

    def linear(values: Tensor, name: str) -> Tensor:
        return values @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for kind, *rest in reference.plan(arch, width, len(state["classifier.3.bias"])):
        if kind == "conv":
            name, _, _, k, stride, groups = rest
            x = F.conv2d(x, state[f"{name}.weight"], None, stride, (k - 1) // 2, 1, groups)
        elif kind == "bn":
            x = batch_norm(x, rest[0], state)
        elif kind == "hs":
            x = x * (x + 3).clamp(0, 6) / 6
        elif kind == "relu":
            x = x.clamp(min=0)
        elif kind == "se":
            squeezed = linear(x.mean((2, 3)), f"{rest[0]}.0").clamp(min=0)
            x = x * ((linear(squeezed, f"{rest[0]}.2") + 3).clamp(0, 6) / 6)[:, :, None, None]
        elif kind == "push":
            saved = x
        elif kind == "add":
            x = x + saved
        elif kind == "pool":
            x = x.mean((2, 3))
        else:
            x = linear(x, rest[0])
    return x


def starting_state(arch: str, width: float, num_classes: int) -> Tensors:
    """Values by formula, in float64."""
    shapes = reference.shapes(arch, width, num_classes)
    return {k: torch.as_tensor(reference.formula(k, s)) for k, s in shapes.items()}


def parameters(state: Tensors) -> Tensors:
    """The tensors of a state that learn."""
    return {k: v for k, v in state.items() if k.endswith((".weight", ".bias"))}


@pytest.mark.parametrize(("arch", "width"), [("large", 0.75), ("large", 1.0), ("small", 1.0)])
def test_training_logits_and_gradients_equal_the_reference(arch: str, width: float) -> None:
    state = starting_state(arch, width, 10)
    model = build_model(arch, width, 10, 0.0).double().train()  # type: ignore[arg-type]
    model.load_state_dict(state)
    model = model.to(memory_format=torch.channels_last)
    images = torch.as_tensor(reference.formula_images(4, 64))
    labels = torch.tensor([1, 9, 0, 4])
    for value in parameters(state).values():
        value.requires_grad_()
    expected = training_logits(arch, width, state, images)
    F.cross_entropy(expected, labels).backward()
    found = model(images.contiguous(memory_format=torch.channels_last))
    F.cross_entropy(found, labels).backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        theirs = state[name].grad
        assert theirs is not None
        torch.testing.assert_close(parameter.grad, theirs, rtol=1e-6, atol=1e-7)
        # A BatchNorm takes away what the bias of the one before has added: there it is 0.
        assert name.endswith(".bias") or theirs.abs().max() > 1e-4, name
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, state[name].to(buffer.dtype), msg=name)


def decays(name: str, value: Tensor) -> bool:
    """True for the weights of convolutions and linear layers."""
    return name.endswith(".weight") and value.ndim > 1


@pytest.mark.parametrize("nesterov", [False, True])
def test_updates_equal_sgd_on_the_reference(nesterov: bool) -> None:
    optim = Optim(**OPTIM.model_dump() | {"nesterov": nesterov, "weight_decay": 0.05})
    recipe = recipe_for().model_copy(update={"optim": optim})
    plan = plan_for(recipe)
    state = starting_state("small", 0.5, 4)
    module = build_model("small", 0.5, 4, 0.0)
    module.load_state_dict(state)
    batches = batches_for(plan, 3)
    losses, learner = carry_out(
        "eager", recipe, plan, batches, module.to(memory_format=torch.channels_last)
    )

    learnt = parameters(state)
    average = {name: value.clone() for name, value in state.items()}
    for value in learnt.values():
        value.requires_grad_()
    groups = [
        {"params": [v for k, v in learnt.items() if decays(k, v)], "weight_decay": 0.05},
        {"params": [v for k, v in learnt.items() if not decays(k, v)], "weight_decay": 0.0},
    ]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=nesterov)
    for step, (images, labels) in enumerate(batches):
        for group in sgd.param_groups:
            group["lr"] = 0.02 + 0.001 * step
        logits = training_logits("small", 0.5, state, images.double())
        target = F.one_hot(labels, 4).double() if labels.ndim == 1 else labels.double()
        target = 0.9 * target + 0.1 / 4
        loss = -(target * logits.log_softmax(1)).sum(1).mean()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        weight = 1 - min(0.9, (1 + step + 1) / (10 + step + 1))
        for name, value in average.items():
            value += (weight * (state[name].detach() - value)).to(value.dtype)
        assert losses[step] == pytest.approx(loss.item(), rel=1e-4)
    assert learner.ema
    for found, expected in ((learner.module, state), (learner.ema.module, average)):
        for name, value in found.state_dict().items():
            if value.is_floating_point():
                theirs = expected[name].detach().float()
                torch.testing.assert_close(value, theirs, rtol=1e-3, atol=1e-4, msg=name)
