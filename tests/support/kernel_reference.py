"""Float64 autograd of `megatron_fc.connections.reference`, which the kernels are held against, and random cases."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fc import FracConfig, FracConnection
from megatron_fc.connections import reference
from megatron_fc.connections.norm import NormWeights
from megatron_fc.connections.operands import Operands
from megatron_fc.connections.per_slot import PerSlotParameters


@dataclass(frozen=True)
class Case:
    """One site with random, dense, non-symmetric parameters of order one, its streams and incoming gradients."""

    config: FracConfig
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
        """beta [T, m] and alpha [T, m*m], rounded to fp32 once."""
        f = reference.slots(self.h.double(), self.config.rate)
        p, tokens = PerSlotParameters._make(None if q is None else q.double() for q in self.p), len(self.h)
        beta = reference.beta(f, p, self.config).expand(tokens, -1)
        alpha = reference.alpha(f, p, self.config).expand(tokens, -1, -1).flatten(1)
        return beta.float().contiguous(), alpha.float().contiguous()


def make(
    config: FracConfig, width: int, tokens: int, dtype: torch.dtype, kind: str | None, one_plus: bool = False
) -> Case:
    generator = torch.Generator().manual_seed(width + tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    site = FracConnection(width, config)
    p = PerSlotParameters._make(None if q is None else random(*q.shape) * 0.5 for q in site.site_parameters())
    norm = None
    if kind is not None:
        bias = random(width).to(dtype) if kind == "layernorm" else None
        norm = NormWeights(
            "layernorm" if bias is not None else "rmsnorm", random(width).to(dtype), bias, 1e-5, one_plus
        )
    streams = [random(tokens, width).to(dtype) for _ in range(4)]
    return Case(config, p, norm, *streams, g_beta=random(tokens, config.rate))


def width_and_gradients(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """x, beta, alpha; and the gradients of h, of the parameters and of the norm's, those that exist."""
    config, norm = case.config, case.norm
    h = case.h.double().requires_grad_()
    p = PerSlotParameters._make(None if q is None else q.double().requires_grad_() for q in case.p)
    x, weights = reference.width(h, p, config), []
    if norm is not None:
        weights = [w.double().requires_grad_() for w in (norm.weight, norm.bias) if w is not None]
        weight = weights[0] + 1 if norm.one_plus else weights[0]
        if norm.kind == "rmsnorm":
            x = F.rms_norm(x, x.shape[-1:], weight, norm.eps)
        else:
            x = F.layer_norm(x, x.shape[-1:], weight, weights[1], norm.eps)
    f = reference.slots(h, config.rate)
    beta = reference.beta(f, p, config).expand(len(h), -1)
    alpha = reference.alpha(f, p, config).expand(len(h), -1, -1)
    mixed = torch.einsum("tij,tic->tjc", alpha, f).flatten(-2)
    inputs = [h, *(q for q in p if q is not None), *weights]
    incoming = [case.g_x.double(), case.g_beta.double(), case.g_mixed.double()]
    gradients = torch.autograd.grad([x, beta, mixed], inputs, incoming)
    return [x.detach(), beta.detach(), alpha.detach().flatten(1)], list(gradients)


def depth(case: Case) -> Tensor:
    beta, alpha = (c.double() for c in case.coefficients)
    m = case.config.rate
    f, o = (reference.slots(t.double(), m) for t in (case.h, case.o))
    return (beta.unsqueeze(-1) * o + torch.einsum("tij,tic->tjc", alpha.unflatten(-1, (m, m)), f)).flatten(-2)


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to the norm of what is expected."""
    if not expected.numel():
        assert found.shape == expected.shape
        return 0.0
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))
