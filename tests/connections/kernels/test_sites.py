"""One site whose coefficients lie on a manifold, on the kernels: as the torch backend, forward and every gradient.

Quick, for `make test-quick`; the other files of this folder have the rest.
"""

from dataclasses import replace

import torch

from laboratory.emulator.driver import Emulator
from megatron_fc import ManifoldConfig
from support.family import random_site

WIDTH, TOKENS = 64, 5


def results(config: ManifoldConfig) -> list[torch.Tensor]:
    site = random_site(config, WIDTH)
    generator = torch.Generator().manual_seed(1)
    h, o = (torch.randn(TOKENS, size, generator=generator) for size in (site.stream_width, WIDTH))
    x, handover = site(h.requires_grad_(), hand_over=True)
    following = site.depth(o + x, h, handover)
    weights = torch.randn(following.shape, generator=generator)
    return [x, following, *torch.autograd.grad((following * weights).sum(), [h, *site.parameters()])]


def test_coefficients_of_torch_mixed_by_kernels(emulator: Emulator) -> None:
    config = ManifoldConfig(slots=4, backend="triton")
    pairs = zip(results(config), results(replace(config, backend="torch")), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert {name for name, _ in emulator.launches} >= {"width_forward_kernel", "tables_forward_kernel"}


def test_a_gradient_that_is_absent(emulator: Emulator) -> None:
    """x that nobody uses."""
    site = random_site(ManifoldConfig(slots=4, backend="triton"), WIDTH)
    h, o = torch.randn(TOKENS, site.stream_width, requires_grad=True), torch.randn(TOKENS, WIDTH)
    [g] = torch.autograd.grad(site.depth(o, h, site(h, hand_over=True)[1]).sum(), h)
    site.config = replace(site.config, backend="torch")
    [expected] = torch.autograd.grad(site.depth(o, h).sum(), h)
    torch.testing.assert_close(g, expected, rtol=1e-4, atol=1e-5)
