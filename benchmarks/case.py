"""What contestants share: random tensors of one width and configuration, and the shape of what they run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fc import FracConfig, FracConnection
from megatron_fc.megatron.norms import hand_out_weights

EPS = 1e-5


class Absent(Exception):
    """A contestant cannot run here; the message says why."""


@dataclass(frozen=True)
class Program:
    """A forward pass, what is differentiated, and the gradients that come in for its outputs."""

    forward: Callable[[], Sequence[Tensor]]
    inputs: Sequence[Tensor]
    incoming: Sequence[Tensor]

    def both(self) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """Forward and backward: the outputs and the gradients of the inputs."""
        outputs = self.forward()
        # The reference's width and depth connection each use only some of a site's parameters.
        return outputs, torch.autograd.grad(outputs, self.inputs, self.incoming, allow_unused=True)


class Case:
    """Random streams, gradients, sites and norms of one width and configuration, which all contestants share."""

    def __init__(self, config: FracConfig, width: int, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.width, self.tokens, self.dtype, self.device = config, width, tokens, dtype, device
        generator = torch.Generator(device).manual_seed(1)

        def random(*shape: int, grad: bool) -> Tensor:
            tensor = torch.randn(*shape, generator=generator, dtype=dtype, device=device)
            return tensor.requires_grad_(grad)

        self.h, *self.o = (random(tokens, width, grad=True) for _ in range(3))
        self.g_x, self.g_x2, self.g_h = (random(tokens, width, grad=False) for _ in range(3))
        self.g_beta = torch.randn(tokens, config.rate, generator=generator, device=device)
        self.sites = [FracConnection(width, config).to(device) for _ in range(2)]
        for parameter in (p for site in self.sites for p in site.parameters()):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, device=device)
        self.norms = [nn.Parameter(random(width, grad=False)) for _ in range(2)]

    def norm(self, number: int) -> nn.Module:
        """A norm whose weights a kernel can apply."""
        norm = nn.RMSNorm(self.width, EPS)
        norm.weight = self.norms[number]
        return hand_out_weights(norm)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def difference(program: Program, reference: Program) -> float:
    """Largest relative difference of the streams among outputs and gradients, which come in the same order."""

    def streams(p: Program) -> list[Tensor]:
        tensors = (tensor for group in p.both() for tensor in group)
        return [t.detach().float() for t in tensors if t is not None and t.shape == p.incoming[0].shape]

    pairs = zip(streams(program), streams(reference), strict=True)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
