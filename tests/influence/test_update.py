"""Clipping and long sums against torch's own, and against float64."""

import pytest
import torch

from montessori_ray.influence import update
from montessori_ray.influence.update import AdamW, change_along, clip_scale, exact_norm, write_by_formula, write_step


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0])
def test_clipping_equals_torch(limit: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((4, 3), (5,))]
    gradients = [torch.randn(weight.shape, generator=generator) for weight in weights]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.clone()
    if limit:
        torch.nn.utils.clip_grad_norm_(weights, limit)
    for weight, gradient in zip(weights, gradients, strict=True):
        torch.testing.assert_close(weight.grad, clip_scale(gradients, limit) * gradient)


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


@pytest.mark.parametrize("way", ["torch", "formula", pytest.param("compiled", marks=pytest.mark.slow)])
def test_the_written_step_is_that_of_torch_in_float64(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = AdamW(step=5, learning_rate=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)
    generator = torch.Generator().manual_seed(0)
    weights, gradient, exp_avg, exp_avg_sq = (torch.randn(10_001, generator=generator) for _ in range(4))
    exp_avg_sq = exp_avg_sq.square() * 1e-2
    parameter = torch.nn.Parameter(weights.double())
    parameter.grad = gradient.double() * 0.3
    optimizer = torch.optim.AdamW([parameter], lr=rule.learning_rate, betas=rule.betas, eps=rule.eps, weight_decay=0.1)
    moments = {"exp_avg": exp_avg.double(), "exp_avg_sq": exp_avg_sq.double()}
    optimizer.state[parameter] = {"step": torch.tensor(5.0), **moments}
    optimizer.step()

    kept, stepped, scale = [tensor.clone() for tensor in (weights, exp_avg, exp_avg_sq)], weights + 9, torch.tensor(0.3)
    monkeypatch.setitem(update.CHUNK, "cpu", 4096)
    if way != "torch":
        write = update._compiled(write_by_formula) if way == "compiled" else write_by_formula
        monkeypatch.setattr(update, "_write_by_torch", write)
        monkeypatch.setattr(update, "_along_by_torch", update._along_by_formula)
    slopes, step = torch.randn(10_001, generator=generator), (weights, gradient, exp_avg, exp_avg_sq, scale, rule)
    along = update.step_along(slopes, *step).item()
    assert along == pytest.approx(torch.dot(slopes.double(), parameter.detach() - weights).item(), rel=1e-5, abs=2e-6)
    write_step(stepped, *step)
    assert along == pytest.approx(change_along(stepped, weights, slopes).item(), rel=1e-5, abs=2e-6)
    torch.testing.assert_close((stepped - weights).double(), parameter.detach() - weights, rtol=1e-5, atol=5e-7)
    assert all(map(torch.equal, (weights, exp_avg, exp_avg_sq), kept))
    assert not gradient.any()
