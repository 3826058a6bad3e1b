"""Norms of OLMoE and OLMo2: over all heads against transformers, behind the sub-layers against the equations."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.checkpoints.changes import changes, refuse_changes
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.errors import UserError
from megatron_fc.megatron.norm_options import NormOptions, norms_from_args
from megatron_fc.megatron.norm_over_heads import NormOverHeads
from support import tiny
from support.layouts import OLMO2, OLMOE
from support.megatron_world import parallel_state as parallel_state
from support.megatron_world import seed as seed

AFTER = NormOptions(norm_after=True)
CONNECTIONS = [FracConfig(rate=4), HyperConfig(slots=4), HyperConfig(slots=4, fractions=2), ManifoldConfig(slots=4)]


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(("of", "heads"), [("queries", 4), ("keys", 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_over_heads_is_that_of_olmoe(of: Any, heads: int, dtype: torch.dtype) -> None:
    from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm

    norm = NormOverHeads(tiny.transformer_config("dense", num_query_groups=2), 16, 1e-3, of=of)
    theirs = OlmoeRMSNorm(heads * 16, eps=1e-3)
    randomise(nn.ModuleDict({"norm": norm}))
    theirs.load_state_dict(norm.state_dict())
    x = (2 * torch.randn(5, 3, heads, 16)).to(dtype)
    ours, other = x.clone().requires_grad_(), x.flatten(2).clone().requires_grad_()
    y, expected = norm(ours), theirs.to(dtype)(other)
    gradient = torch.randn(expected.shape).to(dtype)
    y.backward(gradient.view_as(y))
    expected.backward(gradient)
    # bf16: ours multiplies by the weight in fp32, and theirs rounds before it.
    rounding = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    assert y.dtype == dtype
    torch.testing.assert_close(y.flatten(2), expected, **rounding)
    torch.testing.assert_close(ours.grad.flatten(2), other.grad, **rounding)
    if dtype == torch.float32:
        torch.testing.assert_close(norm.weight.grad, theirs.weight.grad)


def test_gradients_of_the_norm_over_heads() -> None:
    norm = NormOverHeads(tiny.transformer_config("dense"), 3, 1e-3, of="queries").double()

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, x)

    inputs = torch.randn(2, 2, 4, 3).double().requires_grad_(), torch.randn(12).double().requires_grad_()
    # The root is fp32 in any case.
    assert torch.autograd.gradcheck(function, inputs, eps=1e-2, atol=1e-2, rtol=1e-2)


def test_norm_after_computes_what_it_says() -> None:
    """h + norm(F(h)), twice per layer, with what Megatron's own attention and MLP return."""
    model: Any = tiny.build("dense", None, norms=AFTER)
    randomise(model)
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in model.decoder.layers:
        for part in (layer.self_attention, layer.mlp):
            part.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output[0])))
    streams = []
    model.decoder.final_layernorm.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))
    tiny.logits(model, tiny.tokens())
    norms = [norm for layer in model.decoder.layers for norm in (layer.self_attn_bda, layer.mlp_bda)]
    results = [h + norm.norm_after(o) for (h, o), norm in zip(seen, norms, strict=True)]
    for result, following in zip(results, [*(h for h, _ in seen[1:]), streams[0]], strict=True):
        torch.testing.assert_close(result, following)


@pytest.mark.parametrize("norms", [OLMOE, AFTER, OLMO2], ids=["over heads", "after", "both"])
@pytest.mark.parametrize("kind", ["dense", "moe", "hybrid"])
def test_connections_at_their_start_change_nothing(kind: str, norms: NormOptions) -> None:
    options = {"qk_layernorm": norms.qk_layernorm_over_heads, "norms": norms}
    plain = tiny.build(kind, None, **options)
    randomise(plain)
    batch = tiny.tokens()
    expected = tiny.logits(plain, batch)
    assert not torch.equal(expected, tiny.logits(tiny.build(kind, None), batch))
    for connection in CONNECTIONS[:2]:
        model = tiny.build(kind, connection, **options)
        model.load_state_dict(plain.state_dict(), strict=False)
        assert torch.equal(tiny.logits(model, batch), expected), connection.label


@pytest.mark.parametrize("connection", CONNECTIONS, ids=lambda connection: connection.label)
def test_norm_after_is_written_by_the_depth_connection(connection: ConnectionConfig) -> None:
    """x is the width connection's, not normed; o is normed, then written."""
    model: Any = tiny.build("dense", connection, norms=AFTER)
    randomise(model)
    tiny.randomise_connections(model)
    layer = model.decoder.layers[0]
    seen: dict[str, Any] = {}
    layer.self_attention.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], o=output[0]))
    layer.mlp.register_forward_hook(lambda _, inputs, output: seen.update(x2=inputs[0]))
    embedding = []
    model.embedding.register_forward_hook(lambda _, inputs, output: embedding.append(output))
    tiny.logits(model, tiny.tokens())
    first, second = layer.input_layernorm.connection, layer.pre_mlp_layernorm.connection
    h = first.enter(embedding[0])
    torch.testing.assert_close(seen["x"], first(h))
    following = first.depth(layer.self_attn_bda.norm_after(seen["o"]), h)
    torch.testing.assert_close(seen["x2"], second(following), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("connection", [None, FracConfig(rate=4)], ids=["residual", "dfc"])
def test_an_evaluation_keeps_no_graph(connection: ConnectionConfig | None) -> None:
    model = tiny.build("dense", connection, norms=OLMO2, qk_layernorm=True)
    with torch.no_grad():
        assert not tiny.logits(model, tiny.tokens()).requires_grad
    recomputed = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    gradients = []
    for options in ({}, recomputed):
        model = tiny.build("dense", connection, norms=OLMO2, qk_layernorm=True, **options)
        randomise(model)
        tiny.loss(model, tiny.tokens()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"qk_layernorm_over_heads": True}, "says how queries and keys are normed: set qk_layernorm too"),
        (
            {"qk_layernorm_over_heads": True, "qk_layernorm": True, "normalization": "LayerNorm"},
            "normalization=LayerNorm: set RMSNorm",
        ),
        (
            {"qk_layernorm_over_heads": True, "qk_layernorm": True, "multi_latent_attention": True},
            "does not go with multi_latent_attention",
        ),
        ({"norm_after": True, "hybrid_layer_pattern": "M*-"}, "hybrid_layer_pattern has M: drop one"),
        ({"norm_after": True, "mtp_num_layers": 1}, "norm_after would not reach the multi-token-prediction layers"),
        (
            {"qk_layernorm_over_heads": True, "qk_layernorm": True, "mtp_num_layers": 1},
            "set qk_layernorm_over_heads=false, or model.family=hybrid",
        ),
        ({"norm_after": True, "fused_residual_rmsnorm": True}, "which fused_residual_rmsnorm bypasses"),
    ],
)
def test_what_does_not_go_with_the_norms_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        norms_from_args(Namespace(**{"normalization": "RMSNorm", **options}))


@pytest.mark.parametrize("name", ["qk_layernorm_over_heads", "norm_after"])
def test_a_checkpoint_of_an_earlier_release_goes_on_with_megatrons_norms(name: str, tmp_path: Path) -> None:
    """Its arguments do not know the options."""
    stored = Namespace(qk_layernorm=True)
    without = {"qk_layernorm": True, "qk_layernorm_over_heads": False, "norm_after": False}
    assert changes(stored, Namespace(**without)) == {}
    changed = changes(stored, Namespace(**without | {name: True}))
    with pytest.raises(
        UserError, match=f"^{name}: False in .*, True here, which makes another model: give what it was"
    ):
        refuse_changes(tmp_path, changed, fresh_optimizer=False)
