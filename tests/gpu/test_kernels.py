"""The kernels on a card, where their products are the tensor cores' and not the interpreter's.

Values and gradients against float64 autograd, as in `tests/connections/kernels` on the CPU; and what only a card shows:
equal bits from run to run, CUDA graphs, torch.compile, autocast. None of these has been run yet.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fc import FracConfig, FracConnection
from support import kernel_reference
from support.kernel_cases import CONFIGS, HALF, UNBOUNDED, check, name
from support.kernel_reference import Case

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
TOKENS = 1000  # more tiles than programs, and a last one that is not full
# Gradients that are one number, like a scale's, nearly cancel: what 16 bits lose on the way shows there most.
HALF_TOLERANCE = 4 * HALF[torch.bfloat16]


def on_card(case: Case) -> Case:
    """The same case with its tensors on the device."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(DEVICE)
        if isinstance(value, tuple):
            items = [moved(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return value

    return replace(case, **{field.name: moved(getattr(case, field.name)) for field in fields(case)})


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_every_option_in_fp32(config: FracConfig) -> None:
    """Products are three of TF32 there, whose error is some 2^-21 of each term."""
    kind = "rmsnorm" if config.rate > 1 else None
    check(on_card(kernel_reference.make(config, 48 * config.rate, TOKENS, torch.float32, kind)), UNBOUNDED)


@pytest.mark.parametrize("kind", [None, "rmsnorm", "layernorm"])
@pytest.mark.parametrize("rate", [2, 4, 8])
@pytest.mark.parametrize("width", [2048, 4096, 7168])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_widths_of_real_models(dtype: torch.dtype, width: int, rate: int, kind: str | None) -> None:
    check(on_card(kernel_reference.make(FracConfig(rate=rate), width, 300, dtype, kind)), HALF_TOLERANCE)


@pytest.fixture
def site() -> FracConnection:
    torch.manual_seed(0)
    site = FracConnection(512, FracConfig(rate=4, backend="triton")).to(DEVICE)
    with torch.no_grad():
        for parameter in site.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return site


@pytest.fixture
def streams() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    h, o = (torch.randn(TOKENS, 512, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(2))
    return h.requires_grad_(), o.requires_grad_()


def gradients(step: Callable[[Tensor, Tensor], Tensor], site: FracConnection, h: Tensor, o: Tensor) -> list[Tensor]:
    out = step(h, o)
    return [out, *torch.autograd.grad(out.float().square().sum(), [h, o, *site.parameters()])]


def step_of(site: FracConnection) -> Callable[[Tensor, Tensor], Tensor]:
    """A site around a sub-layer that is simple enough to have no kernel of its own."""
    return lambda h, o: site.depth(site(h) * o, h)


def test_the_same_bits_from_run_to_run(site: FracConnection, streams: tuple[Tensor, Tensor]) -> None:
    one, other = (gradients(step_of(site), site, *streams) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_as_the_torch_backend(site: FracConnection, streams: tuple[Tensor, Tensor]) -> None:
    found = gradients(step_of(site), site, *streams)
    site.config = replace(site.config, backend="torch")
    for one, expected in zip(found, gradients(step_of(site), site, *streams), strict=True):
        # Both round to bf16 on the way, not at the same places.
        assert kernel_reference.error(one, expected.double()) < HALF_TOLERANCE


def test_a_cuda_graph_replays_it(site: FracConnection, streams: tuple[Tensor, Tensor]) -> None:
    """No wait for the device and no allocation that a graph could not keep, forward and backward."""
    h, o = streams
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            gradients(step_of(site), site, h, o)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(step_of(site), site, h, o)
    with torch.no_grad():
        h.mul_(0.5)
        o.add_(1.0)
    graph.replay()
    torch.cuda.synchronize()
    for one, expected in zip(captured, gradients(step_of(site), site, h, o), strict=True):
        assert torch.equal(one, expected)


def test_torch_compile_keeps_it_whole(site: FracConnection, streams: tuple[Tensor, Tensor]) -> None:
    compiled = torch.compile(step_of(site), fullgraph=True)
    expected = gradients(step_of(site), site, *streams)
    for one, other in zip(gradients(compiled, site, *streams), expected, strict=True):
        assert kernel_reference.error(one, other.double()) < HALF_TOLERANCE


def test_autocast_does_not_reach_inside(site: FracConnection, streams: tuple[Tensor, Tensor]) -> None:
    h, o = (t.detach().float().requires_grad_() for t in streams)
    expected = gradients(step_of(site), site, h, o)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = gradients(step_of(site), site, h, o)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
