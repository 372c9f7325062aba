"""Clipping and long sums against torch's own, and against float64."""

import pytest
import torch

from montessori_ray.influence.update import change_along, clip_scale, exact_norm


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
