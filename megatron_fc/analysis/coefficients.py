"""`megatron-fc analyze coefficients`: alpha, beta and gamma of every site, and the gain of the residual path."""

from typing import Any

import torch
from torch import Tensor

from megatron_fc.analysis.observed import Observed, observe
from megatron_fc.analysis.source import Source
from megatron_fc.analysis.values import facts_of, rows
from megatron_fc.connections.gain import gains
from megatron_fc.errors import UserError

_GAIN_TOKENS = 512  # whose products of alphas are made


def analyze_coefficients(source: Source) -> dict[str, Any] | None:
    """Return every site's coefficients over data; every rank calls it, on others than the first None is returned.

    Raises:
        UserError: residuals are plain, or as `observe`.
    """
    if source.recipe.connection is None:
        raise UserError(
            f"{source.checkpoint} has plain residuals, and so no coefficients: give a checkpoint with connections, or "
            f"run `analyze similarity` or `analyze gradients` on it"
        )
    observed = observe(source)
    if observed is None:
        return None
    found = gains(_thinned(torch.stack([site.alpha for site in observed.coefficients], 0)))
    return {
        **facts_of(source, observed.tokens),
        "loss": observed.loss,
        "sites": [_site(observed, number) for number in range(len(observed.coefficients))],
        "gain": {name: rows(table) for name, table in found._asdict().items()},
        "largest_gain": found.largest,
    }


def _site(observed: Observed, number: int) -> dict[str, Any]:
    """One site: a table's start, mean over tokens and standard deviation, the spread of the part that data decide."""
    layer, name = observed.names[number]
    found = observed.coefficients[number]
    beta, alpha = found.beta, found.alpha
    slots = alpha.shape[-1]
    identity = torch.eye(slots)
    return {
        "layer": layer,
        "sub_layer": name,
        **{
            key: {"start": rows(start[0]), "mean": rows(table.mean(0)), "spread": rows(_deviation(table))}
            for key, start, table in zip(found._fields, observed.starts[number], found, strict=True)
        },
        # Frobenius norms of what separates them from a plain residual connection, per slot.
        "from_identity": {
            "alpha": float((alpha - identity).square().sum((-2, -1)).mean().sqrt() / slots**0.5),
            "beta": float((beta - 1).square().sum(-1).mean().sqrt() / slots**0.5),
        },
    }


def _deviation(table: Tensor) -> Tensor:
    return table.std(0) if len(table) > 1 else torch.zeros_like(table[0])


def _thinned(alphas: Tensor) -> Tensor:
    every = max(1, alphas.shape[1] // _GAIN_TOKENS)
    return alphas[:, ::every]
