"""place_norms: a plain Megatron layer, block or stack spec -> the same with the norms of OLMoE or OLMo2."""

import copy
from dataclasses import fields, replace
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_fc.megatron.input_norm import take_norm_out
from megatron_fc.megatron.norm_after import EmptyNormSlot, NormedAdd, NormPlace
from megatron_fc.megatron.norm_options import MEGATRON_NORMS, NormOptions
from megatron_fc.megatron.norm_over_heads import NormOverHeads

_SITES = (("input_layernorm", "self_attn_bda"), ("pre_mlp_layernorm", "mlp_bda"))


def place_norms[Spec](spec: Spec, options: NormOptions) -> Spec:
    """Return a copy of a plain spec with the norms of `options`; call `connect` afterwards.

    Args:
        spec: a layer spec, the submodules of a decoder block, or the spec of a hybrid stack; left untouched.
        options: which norms. Without any, `spec` itself is returned.
    """
    return spec if options == MEGATRON_NORMS else _placed(spec, options)


def plain_spec(options: NormOptions, model_config: Any, vp_stage: int | None = None) -> Any:
    """Return the spec that Megatron's GPT builder would take by itself, with the norms of `options`."""
    from megatron.training.models.gpt import default_layer_spec

    return place_norms(default_layer_spec(model_config, vp_stage), options)


def _placed(spec: Any, options: NormOptions) -> Any:
    if isinstance(spec, TransformerBlockSubmodules):
        # A homogeneous block lists one object many times, and stays so.
        layers = {id(layer): _placed(layer, options) for layer in spec.layer_specs or []}
        block = copy.copy(spec)
        block.layer_specs = [layers[id(layer)] for layer in spec.layer_specs or []]
        return block
    if isinstance(spec, HybridStackSubmodules):
        return replace(spec, **{field.name: _placed(getattr(spec, field.name), options) for field in fields(spec)})
    if isinstance(spec, TransformerLayerSubmodules):
        return _layer(copy.copy(spec), options)
    if isinstance(spec, ModuleSpec) and spec.submodules is not None:
        placed = copy.copy(spec)
        placed.submodules = _placed(spec.submodules, options)
        return placed
    return spec


def _layer(layer: TransformerLayerSubmodules, options: NormOptions) -> TransformerLayerSubmodules:
    attention = layer.self_attention
    if options.qk_layernorm_over_heads and getattr(attention, "module", None) is SelfAttention:
        queries, keys = (partial(NormOverHeads, of=name) for name in ("queries", "keys"))
        normed = replace(attention.submodules, q_layernorm=queries, k_layernorm=keys)
        layer.self_attention = replace(attention, submodules=normed)
    if options.norm_after:
        for norm_slot, add_slot in _SITES:
            if getattr(layer, add_slot) is get_bias_dropout_add:
                take_norm_out(layer, norm_slot)
                place = NormPlace()
                params = {"norm": getattr(layer, norm_slot), "place": place}
                setattr(layer, add_slot, ModuleSpec(NormedAdd, params=params))
                setattr(layer, norm_slot, partial(EmptyNormSlot, place=place))
    return layer
