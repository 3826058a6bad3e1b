"""What autograd keeps for backward, counted on real Megatron layers (docs/memory.md has the table)."""

import pytest
import torch

from saved_bytes import CONNECTIONS, DTYPES, WIDTH, Recompute, saved_bytes, saved_tensors, sublayer_output_bytes
from support import tiny

FRACS = [name for name, frac in CONNECTIONS.items() if frac is not None]
OURS = Recompute(frac=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recompute_keeps_no_more_than_residual_and_sublayer_outputs(dtype: str, dropout: float) -> None:
    residual = saved_bytes(None, DTYPES[dtype], Recompute(), dropout)
    for name in FRACS:
        kept = saved_bytes(CONNECTIONS[name], DTYPES[dtype], OURS, dropout)
        assert kept <= residual + sublayer_output_bytes(DTYPES[dtype]) + beta_bytes(name), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_recompute_it_is_the_inputs_of_the_norms_more(dtype: str) -> None:
    """What the option is for, and that the count sees it."""
    frac = CONNECTIONS["DFCx4"]
    more = saved_bytes(frac, DTYPES[dtype], Recompute()) - saved_bytes(frac, DTYPES[dtype], OURS)
    inputs = 2 * WIDTH * DTYPES[dtype].itemsize
    assert inputs <= more < 1.02 * inputs


def beta_bytes(name: str) -> int:
    """beta of both sites, in fp32."""
    frac = CONNECTIONS[name]
    assert frac is not None
    return 2 * frac.rate * torch.float32.itemsize


@pytest.mark.parametrize("name", FRACS)
def test_full_recompute_keeps_what_it_keeps_of_the_residual_model(name: str) -> None:
    """Its first pass runs without gradients, but for the bias-dropout-add slots, where Megatron enables them."""
    options = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
    counts = []
    for frac in (None, CONNECTIONS[name]):
        model = tiny.build("mixed", frac, **options)
        with saved_tensors() as saved:
            tiny.loss(model, tiny.tokens())
        counts.append(sum(tensor.numel() for tensor in saved))
    assert counts[0] == counts[1]
