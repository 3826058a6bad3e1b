"""The kernels for coefficients on a manifold as custom ops, for `mapping`, which has their gradients."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_fc.connections.on_manifold import blocks
from megatron_fc.connections.operands import Projected
from megatron_fc.connections.ops import contiguous, define

_PROJECTED = (
    "Tensor product, Tensor norm, Tensor bias, Tensor scale, int width, int slots, int fractions, int iterations, "
    "float eps, float norm_eps"
)


def _kernels() -> ModuleType:
    from megatron_fc.connections.kernels import manifold_launch

    return manifold_launch


def _halves_impl(matrix: Tensor) -> Tensor:
    made: Tensor = _kernels().halves(matrix.contiguous())
    return made


def _halves_fake(matrix: Tensor) -> Tensor:
    return matrix.new_empty(3 * matrix.shape[0], matrix.shape[1], dtype=torch.bfloat16)


def _in_memory(values: tuple[Any, ...]) -> Projected:
    """As the kernels take it, which read memory as it lies."""
    return Projected._make(value.contiguous() if isinstance(value, Tensor) else value for value in values)


def _tables_impl(*values: Any) -> tuple[Tensor, Tensor, Tensor]:
    made: tuple[Tensor, Tensor, Tensor] = _kernels().tables_forward(_in_memory(values))
    return made


def _tables_fake(*values: Any) -> tuple[Tensor, Tensor, Tensor]:
    p = Projected(*values)
    gamma, beta, alpha = (p.norm.new_empty(p.norm.shape[0], count) for count in blocks(p.slots, p.fractions))
    return beta, gamma, alpha


def _tables_backward_impl(g_beta: Any, g_gamma: Any, g_alpha: Any, *values: Any) -> tuple[Tensor, ...]:
    incoming = map(contiguous, (g_beta, g_gamma, g_alpha))
    made: tuple[Tensor, ...] = _kernels().tables_backward(*incoming, _in_memory(values))
    return made


def _tables_backward_fake(g_beta: Any, g_gamma: Any, g_alpha: Any, *values: Any) -> tuple[Tensor, ...]:
    p = Projected(*values)
    return p.product_gradient(), *map(torch.empty_like, (p.norm, p.bias, p.scale))


# Of fp32 in two of bf16: `kernels.manifold_launch.halves`, `tables_forward`, `tables_backward`.
halves = define("halves", "(Tensor matrix) -> Tensor", _halves_impl, _halves_fake)
tables = define("manifold_tables", f"({_PROJECTED}) -> (Tensor, Tensor, Tensor)", _tables_impl, _tables_fake)
tables_backward = define(
    "manifold_tables_backward",
    f"(Tensor? g_beta, Tensor? g_gamma, Tensor? g_alpha, {_PROJECTED}) -> (Tensor, Tensor, Tensor, Tensor)",
    _tables_backward_impl,
    _tables_backward_fake,
)
