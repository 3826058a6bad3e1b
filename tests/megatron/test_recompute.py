"""Activation recompute, Megatron's and ours: losses and gradients equal those without it, bit for bit, with dropout."""

import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import random

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig, UserError
from megatron_fc.connections import eager
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.kinds import is_connection_key
from support import tiny

DFC, SFC = FracConfig(rate=4), FracConfig(rate=4, dynamic=False)
DHC, MHC = HyperConfig(slots=4), ManifoldConfig(slots=4)
OURS: dict[ConnectionConfig, ConnectionConfig] = {frac: replace(frac, recompute=True) for frac in (DFC, SFC)}
OURS |= {wide: replace(wide, stream_layers=2) for wide in (DHC, MHC)}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


def full(method: str, layers: int) -> dict[str, Any]:
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}


# `moe_act` needs Transformer Engine's grouped experts: tests/gpu/test_memory_features.py.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "uniform": full("uniform", 1),
    "uniform-2": full("uniform", 2),
    "block": full("block", 1),
    "core_attn": selective("core_attn"),
    "moe": selective("moe"),
    "mlp": selective("mlp"),
    "layernorm": selective("layernorm"),
    "all-selective": selective("core_attn", "moe", "mlp", "layernorm"),
}


def hands_over(options: dict[str, Any]) -> bool:
    return "layernorm" not in options.get("recompute_modules", [])


def recomputes(*names: str) -> pytest.MarkDecorator:
    """Of these names, or none or ours; slow are those for which Megatron compiles an extension first."""
    slow = {name for name, options in RECOMPUTE.items() if not hands_over(options)}
    return pytest.mark.parametrize(
        "recompute", [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in names]
    )


KINDS = pytest.mark.parametrize("connection", [DFC, SFC, DHC, MHC], ids=["dfc", "sfc", "dhc", "mhc"])


@cache
def share_storage_fails() -> str | None:
    """None, or why the C++ extension that Megatron's `layernorm` recompute needs does not compile."""
    try:
        random._get_share_storage()
    except Exception as error:  # whatever ninja, the compiler or the linker say
        return str(error).splitlines()[0]
    return None


def skip_without_compiler(options: dict[str, Any]) -> None:
    if not hands_over(options) and (why := share_storage_fails()) is not None:
        pytest.skip(f"selective layernorm recompute compiles a C++ extension: {why}")


def gradients(
    kind: str, connection: ConnectionConfig, hand_over: bool = True, **options: Any
) -> dict[str, torch.Tensor]:
    """Loss, under that name, and every parameter's gradient, of a model with random connections and fixed dropout.

    Without `hand_over` the depth connection looks at h by itself, as it has to with Megatron's `layernorm` recompute.
    """
    model = (tiny.build if hand_over else tiny.build_without_hand_over)(kind, connection, **options)
    tiny.randomise_connections(model)
    tiny.seed_dropout(3)
    loss = tiny.loss(model, tiny.tokens())
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture(scope="module")
def undisturbed() -> dict[tuple[ConnectionConfig, bool], dict[str, torch.Tensor]]:
    """A dense layer before a MoE layer, with dropout, without recompute; by connection and hand-over."""
    return {
        (connection, hand_over): gradients("mixed", connection, hand_over, **DROPOUT)
        for connection in OURS
        for hand_over in (True, False)
    }


@KINDS
@recomputes("none", *RECOMPUTE)
def test_exact(recompute: str, connection: ConnectionConfig, undisturbed: Any) -> None:
    options = RECOMPUTE.get(recompute, {})
    skip_without_compiler(options)
    found = gradients("mixed", connection, **DROPOUT, **options)
    assert not different(found, undisturbed[connection, hands_over(options)])


@KINDS
@recomputes("none", *RECOMPUTE)
def test_ours_is_exact(recompute: str, connection: ConnectionConfig, undisturbed: Any) -> None:
    options = RECOMPUTE.get(recompute, {})
    skip_without_compiler(options)
    if connection.is_wide and (options.get("recompute_granularity") == "full" or not hands_over(options)):
        with pytest.raises(UserError, match="stream_layers=2"):
            gradients("mixed", OURS[connection], **DROPOUT, **options)
        return
    found = gradients("mixed", OURS[connection], **DROPOUT, **options)
    assert not different(found, undisturbed[connection, hands_over(options)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mla", "mtp", "hybrid", "shared"])
def test_exact_in_other_models(kind: str) -> None:
    for name in ("uniform", "layernorm"):
        options = RECOMPUTE[name]
        skip_without_compiler(options)
        for connection in (DFC, DHC):
            plain = gradients(kind, connection, hands_over(options), **DROPOUT)
            found = gradients(kind, connection, **DROPOUT, **options)
            assert not different(found, plain), (name, connection.label)
    assert not different(gradients(kind, OURS[DFC], **DROPOUT), gradients(kind, DFC, **DROPOUT))


@KINDS
def test_with_and_without_hand_over(connection: ConnectionConfig, undisturbed: Any) -> None:
    """The same up to the order in which the two parts of a gradient are summed: fp32 rounding."""
    one, other = undisturbed[connection, True], undisturbed[connection, False]
    assert torch.equal(one["loss"], other["loss"])
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


def test_ours_is_exact_in_bf16() -> None:
    bf16 = {**DROPOUT, "bf16": True, "params_dtype": torch.bfloat16}
    assert not different(gradients("mixed", OURS[DFC], **bf16), gradients("mixed", DFC, **bf16))


@recomputes("uniform", "layernorm", "ours")
def test_an_error_in_what_is_recomputed_is_noticed(
    recompute: str, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: the mixing is off by 1e-6 once the forward pass is over."""
    options = RECOMPUTE.get(recompute, {})
    skip_without_compiler(options)
    mix, calls, in_forward = eager._mix, itertools.count(1), 8  # two at each of four sites

    def drifting(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return mix(weights, rows) * (1 if next(calls) <= in_forward else 1 + 1e-6)

    monkeypatch.setattr(eager, "_mix", drifting)
    found = gradients("mixed", OURS[DFC] if recompute == "ours" else DFC, **DROPOUT, **options)
    expected = undisturbed[DFC, hands_over(options)]
    assert torch.equal(found["loss"], expected["loss"]), "the forward pass itself was disturbed"
    assert len(different(found, expected)) > len(found) // 2


def accumulations(frac: FracConfig, **options: Any) -> set[int]:
    """How often one backward pass accumulates into a connection's parameter."""
    model = tiny.build("mixed", frac, **options)
    times = {name: 0 for name, _ in model.named_parameters() if is_connection_key(name)}
    for name, parameter in model.named_parameters():
        if name in times:
            parameter.register_post_accumulate_grad_hook(lambda _, n=name: times.update({n: times[n] + 1}))
    tiny.loss(model, tiny.tokens()).backward()
    return set(times.values())


@pytest.mark.slow
def test_only_megatrons_layernorm_recompute_accumulates_a_gradient_twice() -> None:
    """Width and depth share parameters: sharded gradients that are reduced at the first time would lose the second."""
    assert accumulations(DFC) == accumulations(DFC, **RECOMPUTE["uniform"]) == accumulations(OURS[DFC]) == {1}
    skip_without_compiler(RECOMPUTE["layernorm"])
    assert accumulations(SFC, **RECOMPUTE["layernorm"]) == {2}
    assert accumulations(DFC, **RECOMPUTE["layernorm"]) == {2}
