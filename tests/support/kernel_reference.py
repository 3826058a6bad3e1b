"""Float64 autograd of `megatron_fc.connections.reference`, which the kernels are held against, and random cases."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fc import FracConfig, HyperConfig
from megatron_fc.connections import reference
from megatron_fc.connections.norm import NormWeights
from megatron_fc.connections.operands import Operands
from megatron_fc.connections.per_slot import PerSlotParameters


@dataclass(frozen=True)
class Case:
    """One site with random, dense, non-symmetric parameters of order one, its streams and incoming gradients."""

    config: FracConfig | HyperConfig
    p: PerSlotParameters
    norm: NormWeights | None
    h: Tensor
    o: Tensor
    g_x: Tensor
    g_mixed: Tensor
    g_beta: Tensor

    @property
    def operands(self) -> Operands:
        """The site as the operations take it."""
        return Operands.of(self.p, self.config)

    @property
    def coefficients(self) -> tuple[Tensor, Tensor]:
        """beta [T, n] and alpha [T, n*n], rounded to fp32 once."""
        f = reference.slots(self.h.double(), self.config.slots)
        p, tokens = PerSlotParameters._make(None if q is None else q.double() for q in self.p), len(self.h)
        beta = reference.beta(f, p, self.config).expand(tokens, -1)
        alpha = reference.alpha(f, p, self.config).expand(tokens, -1, -1).flatten(1)
        return beta.float().contiguous(), alpha.float().contiguous()


def make(
    config: FracConfig | HyperConfig,
    width: int,
    tokens: int,
    dtype: torch.dtype,
    kind: str | None,
    one_plus: bool = False,
) -> Case:
    """A site of sub-layers of this width, before whose input there is a norm of this kind."""
    generator = torch.Generator().manual_seed(width + tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shapes = config.parameter_shapes(width)
    p = PerSlotParameters(**{name: random(*shape) * 0.5 for name, shape in shapes.items()})
    if p.dynamic_weight is not None:  # of wide slots z would saturate tanh, and gradients be what is left of it
        p.dynamic_weight.mul_(min(1.0, 64 / p.dynamic_weight.shape[1]) ** 0.5)
    norm = None
    if kind is not None:
        bias = random(width).to(dtype) if kind == "layernorm" else None
        norm = NormWeights(
            "layernorm" if bias is not None else "rmsnorm", random(width).to(dtype), bias, 1e-5, one_plus
        )
    stream = config.stream_width(width)
    h, o, g_x, g_mixed = (random(tokens, size).to(dtype) for size in (stream, width, width, stream))
    return Case(config, p, norm, h, o, g_x, g_mixed, g_beta=random(tokens, config.slots))


class Terms(NamedTuple):
    """A sum whose terms may cancel: what is found is held against them."""

    values: Tensor


def width_and_gradients(case: Case) -> tuple[list[Tensor], list[Tensor | Terms]]:
    """x, beta, alpha; and the gradients of h, of the parameters and of the norm's, those that exist."""
    config, norm = case.config, case.norm
    h = case.h.double().requires_grad_()
    # A scale of its own for every slot of every token.
    scales = {name: getattr(case.p, name) for name in ("scale_beta", "scale_alpha")}
    each = {k: None if s is None else s.expand(len(h), config.slots, 1).clone() for k, s in scales.items()}
    p = PerSlotParameters._make(None if q is None else q.double().requires_grad_() for q in case.p._replace(**each))
    x, weights = _normed(reference.width(h, p, config), norm)
    f = reference.slots(h, config.slots)
    beta = reference.beta(f, p, config).expand(len(h), -1)
    alpha = reference.alpha(f, p, config).expand(len(h), -1, -1)
    mixed = torch.einsum("tij,tic->tjc", alpha, f).flatten(-2)
    inputs = [h, *(q for q in p if q is not None), *weights]
    names = ["h", *(name for name, q in p._asdict().items() if q is not None), *["norm"] * len(weights)]
    incoming = [case.g_x.double(), case.g_beta.double(), case.g_mixed.double()]
    gradients = torch.autograd.grad([x, beta, mixed], inputs, incoming)
    expected = [Terms(g) if name in each else g for name, g in zip(names, gradients, strict=True)]
    return [x.detach(), beta.detach(), alpha.detach().flatten(1)], expected


def _normed(x: Tensor, norm: NormWeights | None) -> tuple[Tensor, list[Tensor]]:
    """norm(x), and weight and bias, those that exist, in fp64 with gradients."""
    if norm is None:
        return x, []
    weights = [w.double().requires_grad_() for w in (norm.weight, norm.bias) if w is not None]
    weight = weights[0] + 1 if norm.one_plus else weights[0]
    if norm.kind == "rmsnorm":
        return F.rms_norm(x, x.shape[-1:], weight, norm.eps), weights
    return F.layer_norm(x, x.shape[-1:], weight, weights[1], norm.eps), weights


def given_and_gradients(case: Case, gamma: Tensor, alpha: Tensor) -> tuple[Tensor, list[Tensor]]:
    """x with gamma [T, n*m] and alpha [T, n*n] that do not depend on h; gradients of h, gamma, alpha and the norm's."""
    n, m = case.config.slots, case.config.fractions
    inputs = h, gamma, alpha = [t.double().requires_grad_() for t in (case.h, gamma, alpha)]
    s = reference.slots(h, n)
    tables = gamma.unflatten(1, (n, m)), alpha.unflatten(1, (n, n))
    x, mixed = (torch.einsum("tij,tic->tjc", table, s).flatten(-2) for table in tables)
    x, weights = _normed(x, case.norm)
    incoming = [case.g_x.double(), case.g_mixed.double()]
    return x.detach(), list(torch.autograd.grad([x, mixed], [*inputs, *weights], incoming))


def depth(case: Case) -> Tensor:
    """The next stream."""
    beta, alpha = (c.double() for c in case.coefficients)
    n = case.config.slots
    s, o = (t.double().unflatten(-1, (count, -1)) for t, count in ((case.h, n), (case.o, case.config.fractions)))
    mixed = torch.einsum("tij,tic->tjc", alpha.unflatten(-1, (n, n)), s)
    return (beta.unsqueeze(-1) * o.repeat(1, _turns(case), 1) + mixed).flatten(-2)


def depth_gradients(case: Case) -> tuple[Tensor, Tensor]:
    """Of o and beta, where `g_mixed` is the gradient of the next stream."""
    m = case.config.fractions
    o = case.o.double().unflatten(-1, (m, -1)).repeat(1, _turns(case), 1)
    g = case.g_mixed.double().unflatten(-1, (case.config.slots, -1))
    weighted = case.coefficients[0].double().unsqueeze(-1) * g
    return weighted.unflatten(1, (-1, m)).sum(1).flatten(-2), (g * o).sum(-1)


def _turns(case: Case) -> int:
    """Slots that every fraction is written to."""
    return case.config.slots // case.config.fractions


def error(found: Tensor, expected: Tensor | Terms) -> float:
    """Norm of the difference relative to the norm of what is expected, or of the terms that it is the sum of."""
    if isinstance(expected, Terms):
        return float((found.double() - expected.values.sum()).norm() / expected.values.norm().clamp_min(1e-30))
    if not expected.numel():
        assert found.shape == expected.shape
        return 0.0
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))
