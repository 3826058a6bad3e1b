import pytest
import torch

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig, UserError
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.megatron.hybrid import gpt_key_to_hybrid, hybrid_pattern, hybrid_stack
from support import tiny


@pytest.mark.parametrize(
    ("layers", "frequency", "pattern"),
    [(2, None, "*-*-"), (2, 1, "*E*E"), (3, 2, "*E*-*E"), (3, [0, 1, 1], "*-*E*E")],
)
def test_pattern(layers: int, frequency: int | list[int] | None, pattern: str) -> None:
    assert hybrid_pattern(layers, frequency) == pattern


def test_pattern_of_another_length_is_refused() -> None:
    with pytest.raises(UserError, match="moe_layer_freq has 2 entries for num_layers=3"):
        hybrid_pattern(3, [0, 1])


@pytest.mark.parametrize(
    "frac",
    [
        None,
        FracConfig(rate=4),
        FracConfig(rate=2, dynamic=False),
        HyperConfig(slots=4),
        ManifoldConfig(slots=4, leave="learned"),
    ],
    ids=lambda frac: getattr(frac, "label", "residual"),
)
def test_same_weights_give_the_same_logits_as_gpt(frac: ConnectionConfig | None) -> None:
    """A dense and a MoE layer as GPTModel and as four layers of a HybridModel."""
    gpt, hybrid = tiny.build("mixed", frac, seed=1), tiny.build("hybrid", frac, seed=2)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    before = tiny.logits(hybrid, tiny.tokens())
    hybrid.load_state_dict({gpt_key_to_hybrid(key): value for key, value in gpt.state_dict().items()}, strict=True)
    expected, result = tiny.logits(gpt, tiny.tokens()), tiny.logits(hybrid, tiny.tokens())
    # The same operations in the same order: nothing but fp32 rounding could differ, and here even that does not.
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(before, expected, atol=1e-2)


def test_qk_layernorm_is_a_property_of_the_stack() -> None:
    for use_te in (True, False):
        plain, normed = (
            hybrid_stack(use_te, qk).submodules.attention_layer.submodules.self_attention.submodules
            for qk in (False, True)
        )
        assert normed.q_layernorm is normed.k_layernorm is not plain.q_layernorm
