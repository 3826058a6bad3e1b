"""What autograd keeps for backward, counted on real Megatron layers (docs/memory.md has the table)."""

import pytest
import tiny
import torch
from saved_bytes import CONNECTIONS, DTYPES, Recompute, saved_bytes, saved_tensors, sublayer_output_bytes

FRACS = [name for name, frac in CONNECTIONS.items() if frac is not None]
OURS = Recompute(frac=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recompute_keeps_no_more_than_residual_and_sublayer_outputs(dtype: str, dropout: float) -> None:
    residual = saved_bytes(None, DTYPES[dtype], Recompute(), dropout)
    for name in FRACS:
        kept = saved_bytes(CONNECTIONS[name], DTYPES[dtype], OURS, dropout)
        assert kept <= residual + sublayer_output_bytes(DTYPES[dtype]), name


def test_without_recompute_or_with_megatrons_alone_it_is_more() -> None:
    """What the option is for, and that the count sees it."""
    target = saved_bytes(None, torch.bfloat16, Recompute()) + sublayer_output_bytes(torch.bfloat16)
    frac = CONNECTIONS["DFCx4"]
    assert saved_bytes(frac, torch.bfloat16, Recompute()) > 2 * target
    assert saved_bytes(frac, torch.bfloat16, Recompute(frac=True)) > target - 100


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
