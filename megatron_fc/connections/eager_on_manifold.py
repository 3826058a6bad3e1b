"""Coefficients on a manifold, forward and backward by hand.

The small tables come with the tokens last, [.., T]: sums over rows and columns then run along whole vectors. Sinkhorn's
backward is written out, not left to autograd, which would keep and touch some 300 tables of this size where this takes
four passes per normalisation, and which torch.compile could not trace inside a backward function.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fc.connections.on_manifold import ManifoldParameters, blocks
from megatron_fc.connections.operands import ManifoldOperands


class Tables(NamedTuple):
    """What backward needs of the coefficients, of which all but the stream is small."""

    z: Tensor  # [K, T], rows pre, post, res: r <W, stream>
    r: Tensor  # [T], 1 / the stream's root mean square
    gamma: Tensor  # [n, m, T], without eps
    beta: Tensor  # [n, T]
    softmax: Tensor  # [n, n, T], alpha before Sinkhorn's eps
    alpha: Tensor  # [n, n, T]
    sums: list[Tensor]  # what Sinkhorn divided by, in order: of columns [1, n, T], of rows [n, 1, T], of columns ...

    def side_by_side(self, eps: float) -> Tensor:
        """Laid out as [k, T, source], rows beta, gamma_1..m, alpha_1..n."""
        beta, gamma, alpha = self.beta.t(), (self.gamma + eps).permute(1, 2, 0), self.alpha.permute(1, 2, 0)
        return torch.cat((beta.unsqueeze(0), gamma, alpha))


class Mapping(NamedTuple):
    """The same with the stream [T, n*c] in fp32."""

    stream: Tensor
    tables: Tables


class TableGradients(NamedTuple):
    """What the coefficients pass on: to <W, stream> [K, T], through r a multiple of each token's stream [T]."""

    product: Tensor
    pull: Tensor
    bias: Tensor
    scale: Tensor


def coefficients(s: Tensor, p: ManifoldOperands) -> tuple[Tensor, Mapping]:
    """All coefficients of slots [T, n, c], laid out as [k, T, source], rows beta, gamma_1..m, alpha_1..n."""
    stream = s.flatten(1)
    made = tables(p.mapping_weight @ stream.t(), torch.linalg.vector_norm(stream, dim=-1), p)
    return made.side_by_side(p.sinkhorn_eps), Mapping(stream, made)


def tables(product: Tensor, norm: Tensor, p: ManifoldOperands) -> Tables:
    """The coefficients from <W, stream> [K, T], which is overwritten, and from the stream's norm [T]."""
    n, m, eps = p.slots, p.fractions, p.sinkhorn_eps
    r = norm.square_().div_(p.mapping_weight.shape[1]).add_(p.norm_eps).rsqrt_()
    z = product.mul_(r)
    pre, post, res = torch.addcmul(p.mapping_bias.unsqueeze(1), z, _scales(p)).split(blocks(n, m))
    gamma, beta = pre.sigmoid().view(n, m, -1), post.sigmoid().mul_(2)
    softmax = torch.softmax(res.reshape(n, n, -1), 1)
    alpha, sums = _sinkhorn(softmax + eps, p.sinkhorn_iterations, eps)
    return Tables(z, r, gamma, beta, softmax, alpha, sums)


def coefficients_backward(
    g_beta: Tensor, products: Tensor, g_h: Tensor, mapping: Mapping, p: ManifoldOperands
) -> ManifoldParameters:
    """Gradients of the parameters; adds what the slots get through the coefficients to g_h [T*n, c].

    Args:
        g_beta: [T, n].
        products: gradients of gamma and alpha side by side, [T, n, m+n].
        g_h: gradient of the slots.
        mapping: of `coefficients`, whose alpha is overwritten.
        p: the site.
    """
    stream = mapping.stream
    g = tables_backward(g_beta, products, mapping.tables, p)
    g_stream = g_h.view(stream.shape)
    g_stream.addcmul_(stream, g.pull.unsqueeze(1))
    g_stream.addmm_(g.product.t(), p.mapping_weight)
    return ManifoldParameters(g.product @ stream, g.bias, g.scale)


def tables_backward(g_beta: Tensor, products: Tensor, made: Tables, p: ManifoldOperands) -> TableGradients:
    """From the gradients of the coefficients, as in `coefficients_backward`, to those of what they came from."""
    n, m = p.slots, p.fractions
    z, r, gamma, beta, softmax, alpha, sums = made
    g_gamma, g_alpha = (g.permute(1, 2, 0) for g in products.split((m, n), 2))
    pre = g_gamma * gamma * (1 - gamma)
    post = g_beta.t() * beta * (1 - beta / 2)
    g_softmax = _sinkhorn_backward(g_alpha.contiguous(), alpha, sums)
    pull = g_softmax * softmax
    res = torch.addcmul(pull, softmax, pull.sum(1, keepdim=True), value=-1)
    g = torch.cat((pre.flatten(0, 1), post, res.flatten(0, 1)))  # of the logits, [K, T]

    bias = g.sum(1)
    scale = torch.stack([part.sum() for part in (g * z).split(blocks(n, m))])
    g *= _scales(p)
    # Through r: dr/dh = -r^3 h / (n*c), and sum_k g <W, h> is known from z.
    pull = (g * z).sum(0).mul_(r).mul_(r).div_(-p.mapping_weight.shape[1])
    g *= r
    return TableGradients(g, pull, bias, scale)


def _sinkhorn(table: Tensor, iterations: int, eps: float) -> tuple[Tensor, list[Tensor]]:
    """Normalise columns, then rows and columns in turn, in place; also what was divided by."""
    sums = []
    for turn in range(2 * iterations - 1):
        total = table.sum(turn % 2, keepdim=True).add_(eps)
        table /= total
        sums.append(total)
    return table, sums


def _sinkhorn_backward(g: Tensor, table: Tensor, sums: list[Tensor]) -> Tensor:
    """Gradient of what `_sinkhorn` was given from that of its result, in place; the table goes back step by step."""
    for turn in reversed(range(len(sums))):
        total = sums[turn]
        g -= (g * table).sum(turn % 2, keepdim=True)
        g /= total
        table *= total
    return g


def _scales(p: ManifoldOperands) -> Tensor:
    """Of every row, [K, 1]."""
    parts = zip(p.mapping_scale.split(1), blocks(p.slots, p.fractions), strict=True)
    return torch.cat([scale.expand(rows) for scale, rows in parts]).unsqueeze(1)
