"""Take a sub-layer's norm out of Transformer Engine's projection, so that the width connection can apply it.

TE's LayerNormLinear runs the norm as a kernel of its own before the product: it reads what the width connection has
just written. Applied by the width connection, that norm costs no pass over memory, and the projection becomes TE's
plain one.
"""

from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TENorm,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

# Norm slot -> the sub-layer behind it, and those of its projections that read the sub-layer's input.
_READERS = {
    "input_layernorm": ("self_attention", ("linear_qkv", "linear_qkv_down_proj", "in_proj")),
    "pre_mlp_layernorm": ("mlp", ("linear_fc1",)),
    "norm": ("mixer", ("in_proj",)),
}


def take_norm_out(submodules: Any, slot: str) -> str | None:
    """Give a norm slot the norm that the projection behind it applies; both are replaced in `submodules`.

    Args:
        submodules: of a layer spec, a copy: what hangs on it is left untouched.
        slot: name of the norm slot.

    Returns:
        The prefix of the norm's keys in the plain model's checkpoints, None if there was nothing to take out.
    """
    if getattr(submodules, slot) is not IdentityOp:
        return None
    name, projections = _READERS[slot]
    builder = getattr(submodules, name)
    inner = _submodules(builder)
    for projection in projections:
        if getattr(inner, projection, None) is TELayerNormColumnParallelLinear:
            setattr(submodules, name, _with_submodules(builder, replace(inner, **{projection: TEColumnParallelLinear})))
            setattr(submodules, slot, _norm)
            return f"{name}.{projection}.layer_norm_"
    return None


class _WithoutExtraState:
    """Keeps nothing in checkpoints but its weights, as the norm inside a projection."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


def _norm(config: TransformerConfig, hidden_size: int, eps: float) -> Any:
    norm: Any = TENorm(config=config, hidden_size=hidden_size, eps=eps)
    kind = type(norm)
    norm.__class__ = type(kind.__name__, (_WithoutExtraState, kind), {"__module__": kind.__module__})
    return norm


def _submodules(builder: Any) -> Any:
    """Of a ModuleSpec, or of the partial application that stands for an MLP."""
    if isinstance(builder, partial):
        # TE's op fuser builds its MLP in another way, norm included: it is left as it is.
        return builder.keywords.get("submodules") if builder.func == MLP.as_mlp_submodule else None
    return getattr(builder, "submodules", None)


def _with_submodules(builder: Any, submodules: Any) -> Any:
    if isinstance(builder, partial):
        return partial(builder.func, *builder.args, **{**builder.keywords, "submodules": submodules})
    builder = copy(builder)
    builder.submodules = submodules
    return builder
