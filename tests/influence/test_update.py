"""The written-out AdamW step against torch's own optimizer, in float64."""

import pytest
import torch

from montessori_ray.influence.update import AdamW, adamw_change, change_along, clip_scale, exact_norm, null_step_change

STEPS = 7


def settings(**changes: object) -> AdamW:
    values = {"step": STEPS, "learning_rate": 1e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0}
    return AdamW(**{**values, "max_grad_norm": 0.0, **changes})  # type: ignore[arg-type]


def warmed(rule: AdamW) -> tuple[list[torch.nn.Parameter], torch.optim.AdamW]:
    """Two weights whose moments hold `rule.step` steps of random gradients."""
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator)) for shape in ((4, 3), (5,))
    ]
    optimizer = torch.optim.AdamW(
        weights, lr=rule.learning_rate, betas=rule.betas, eps=rule.eps, weight_decay=rule.weight_decay
    )
    for _ in range(rule.step):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, dtype=torch.float64, generator=generator)
        optimizer.step()
    return weights, optimizer


def moments(optimizer: torch.optim.AdamW, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    state = optimizer.state[weight]
    return state["exp_avg"].clone(), state["exp_avg_sq"].clone()


@pytest.mark.parametrize("rule", [settings(), settings(weight_decay=0.3), settings(max_grad_norm=0.5)])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_change_equals_torch(rule: AdamW, scale: float) -> None:
    weights, optimizer = warmed(rule)
    gradients = [scale * torch.ones_like(weight) for weight in weights]
    factor = clip_scale(gradients, rule.max_grad_norm)
    before = [weight.detach().clone() for weight in weights]
    changes = [
        adamw_change(weight.detach(), factor * gradient, *moments(optimizer, weight), rule)
        for weight, gradient in zip(weights, gradients, strict=True)
    ]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    if rule.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(weights, rule.max_grad_norm)
    optimizer.step()
    for weight, old, change in zip(weights, before, changes, strict=True):
        torch.testing.assert_close(old + change, weight.detach(), rtol=0, atol=1e-14)


def test_momentum_moves_weights_without_a_gradient() -> None:
    rule = settings()
    weights, optimizer = warmed(rule)
    change = null_step_change(weights[0].detach(), *moments(optimizer, weights[0]), rule)
    assert change.abs().min() > 0
    zeros = torch.zeros_like(weights[0])
    assert null_step_change(weights[0].detach(), zeros, zeros, settings(step=0)).abs().max() == 0


@pytest.mark.parametrize("size", [1, 2**19 + 1, 6_000_001])
def test_the_inner_product_of_long_buffers_keeps_its_digits(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    before, slopes = (torch.rand(size, generator=generator) for _ in range(2))
    after = before + torch.rand(size, generator=generator)
    expected = torch.dot((after - before).double(), slopes.double())
    assert change_along(after, before, slopes).item() == pytest.approx(expected.item(), rel=2e-6)


@pytest.mark.parametrize("size", [1, 4095, 4096, 3_000_001])
def test_the_norm_of_a_long_buffer_is_that_of_float64(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(size, generator=generator) * torch.randn(size, generator=generator).mul(2).exp()
    assert exact_norm(flat).item() == pytest.approx(flat.double().norm().item(), rel=5e-7)
