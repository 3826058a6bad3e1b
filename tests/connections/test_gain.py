"""Gains of products of alphas: by hand, and the bound that doubly stochastic tables keep."""

import torch

from megatron_fc.connections.gain import gains
from megatron_fc.connections.reference import sinkhorn


def test_gains_are_those_of_each_stretch_by_hand() -> None:
    alphas = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(1))
    found = gains(alphas)
    for first in range(4):
        for last in range(first, 4):
            sums, sources, singular = [], [], []
            for token in range(5):
                product = torch.eye(3)
                for site in range(first, last + 1):
                    product = product @ alphas[site, token]
                # What arrives at a destination is a sum over sources, h' = P^T h.
                sums.append(max(float(product[:, j].abs().sum()) for j in range(3)))
                sources.append(max(float(product[i].abs().sum()) for i in range(3)))
                singular.append(float(torch.linalg.svdvals(product)[0]))
            for table, values in zip(found, (sums, sources, singular), strict=True):
                torch.testing.assert_close(table[first, last], torch.tensor(values).mean())
    assert found.forward.isnan().sum() == 6
    assert found.largest == max(float(found.forward.nan_to_num().max()), float(found.backward.nan_to_num().max()))


def test_doubly_stochastic_tables_amplify_nothing() -> None:
    logits = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    found = gains(sinkhorn(logits, 40, 1e-9))
    assert found.largest < 1.001
    assert gains(torch.eye(4).expand(3, 2, 4, 4)).largest == 1
