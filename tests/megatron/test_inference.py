"""Greedy decoding with a key-value cache by Megatron's static engine: the tokens and logits of the full forward pass.

The dynamic engine, which needs flash_attn, has `tests/gpu/test_dynamic_inference.py`. MLA is left out: its core
attention is Transformer Engine's.
"""

import pytest
import torch

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.base import ConnectionConfig
from saved_bytes import saved_tensors
from support import tiny
from support.decoding import generate
from support.prompts import PROMPTS

# A cached step multiplies matrices of other shapes, hence in another order, than the full pass.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def build(kind: str, frac: ConnectionConfig | None) -> torch.nn.Module:
    return tiny.build(kind, frac).eval()


def full_forward(model: torch.nn.Module, sequence: list[int]) -> torch.Tensor:
    """Logits [length, vocabulary] without a cache."""
    with torch.no_grad():
        return tiny.logits(model, torch.tensor([[*sequence, 0]]))[0]


FRACS = (FracConfig(rate=4), FracConfig(rate=4, dynamic=False), FracConfig(rate=4, recompute=True))
DHC, MHC, MFC = HyperConfig(slots=4), ManifoldConfig(slots=4), ManifoldConfig(slots=4, fractions=4)
LEARNED = ManifoldConfig(slots=4, leave="learned")
KINDS = ("dense", "moe", "mixed", "shared", "hybrid")


@pytest.mark.parametrize(
    ("kind", "frac"),
    [
        *((kind, frac) for kind in KINDS for frac in FRACS),
        ("mixed", DHC),
        ("hybrid", DHC),
        ("mixed", MHC),
        ("hybrid", LEARNED),
        ("dense", MFC),
        ("dense", HyperConfig(slots=2, dynamic=False)),
    ],
    ids=lambda value: getattr(value, "label", value),
)
def test_cached_decoding_equals_the_full_forward_pass(kind: str, frac: ConnectionConfig) -> None:
    model = build(kind, frac)
    tiny.randomise_connections(model)
    generated, steps = generate(model)
    for row, (prompt, new) in enumerate(zip(PROMPTS, generated, strict=True)):
        logits = full_forward(model, prompt + new)[:-1]
        assert new == logits[len(prompt) - 1 :].argmax(-1).tolist()
        torch.testing.assert_close(steps[row, : len(logits)], logits, **CLOSE)
        # The tolerance is narrow enough to see the connections.
        assert not torch.allclose(full_forward(build(kind, frac), prompt + new)[:-1], logits, rtol=1e-2, atol=1e-2)


def test_tokens_at_initialisation_are_the_residual_models() -> None:
    tokens, logits = generate(build("mixed", None))
    for connection in (FracConfig(rate=4), DHC):
        with_connections, same_logits = generate(build("mixed", connection))
        assert with_connections == tokens
        assert torch.equal(same_logits, logits)


@pytest.mark.parametrize(
    ("kind", "connection"),
    [*((kind, FRACS[0]) for kind in ("dense", "mixed", "mla", "mtp", "hybrid")), ("mtp", DHC), ("hybrid", LEARNED)],
    ids=lambda value: getattr(value, "label", value),
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_nothing_is_kept_without_gradients(kind: str, connection: ConnectionConfig, training: bool) -> None:
    """Megatron enables gradients around the depth connection: under no_grad it must record no graph all the same."""
    model = tiny.build(kind, connection).train(training)
    with torch.no_grad(), saved_tensors() as saved:
        loss = tiny.loss(model, tiny.tokens())
    assert not saved
    assert not loss.requires_grad
