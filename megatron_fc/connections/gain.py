"""Gain of the residual path: how much a product of alphas can amplify what it carries, which mHC bounds.

A stream passes sites i..j by P = alpha_i alpha_(i+1) ... alpha_j, [source, destination]. mHC (arXiv 2512.24880, section
3.1) measures the largest absolute sum of a destination (forward: the signal) and of a source (backward: the gradient);
both are 1 where every alpha is doubly stochastic, and bound the largest singular value: sigma^2 <= forward * backward.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Gains(NamedTuple):
    """Mean gains over tokens from site i to site j, [sites, sites]; NaN where j < i."""

    forward: Tensor
    backward: Tensor
    singular: Tensor

    @property
    def largest(self) -> float:
        """Of the sums, in both directions."""
        return max(float(table.nan_to_num(0).max()) for table in (self.forward, self.backward))


def gains(alphas: Tensor) -> Gains:
    """Return the gains of all stretches of sites.

    Args:
        alphas: [sites, T, n, n], row the source slot, column the destination.
    """
    sites = alphas.shape[0]
    forward, backward, singular = (torch.full((sites, sites), torch.nan) for _ in range(3))
    for first in range(sites):
        product = alphas[first]
        for last in range(first, sites):
            product = product if last == first else product @ alphas[last]
            sizes = product.abs()
            forward[first, last] = sizes.sum(-2).amax(-1).mean()
            backward[first, last] = sizes.sum(-1).amax(-1).mean()
            singular[first, last] = torch.linalg.matrix_norm(product, ord=2).mean()
    return Gains(forward, backward, singular)
