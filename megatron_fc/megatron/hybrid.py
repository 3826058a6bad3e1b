"""HybridModel: the stack spec that fits this machine, and the map between GPT and hybrid weights.

Megatron's HybridModel builds one sub-layer per layer (`*` attention, `E` MoE, `-` MLP, `M` Mamba): the GPT layer l
becomes the hybrid layers 2l and 2l+1.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_fc.errors import UserError


class LayerOfTransformerEngine:
    """Stands in a stack of local layers for one that Megatron has of Transformer Engine only: an error to build.

    Args:
        layer: its name, with its symbol in the pattern.
    """

    def __init__(self, *_: Any, layer: str, **__: Any) -> None:
        raise UserError(
            f"the hybrid pattern asks for {layer}, which Megatron has of Transformer Engine only: install Transformer "
            f"Engine, or take a pattern of *, - and E"
        )


def hybrid_stack(use_te: bool = HAVE_TE, qk_layernorm: bool = False) -> ModuleSpec:
    """Return the stack spec of a HybridModel.

    Args:
        use_te: Megatron's Transformer Engine stack, else one of its local torch layers.
        qk_layernorm: norm the queries and keys. Megatron's own stack leaves `--qk-layernorm` unread, so it is a
            property of the spec here.
    """
    if not use_te:
        return _local_stack(qk_layernorm)
    return _with_qk_norm(hybrid_stack_spec) if qk_layernorm else hybrid_stack_spec


def _with_qk_norm(stack: ModuleSpec) -> ModuleSpec:
    layer = stack.submodules.attention_layer
    attention = layer.submodules.self_attention
    normed = replace(attention.submodules, q_layernorm=TENorm, k_layernorm=TENorm)
    layer = replace(layer, submodules=replace(layer.submodules, self_attention=replace(attention, submodules=normed)))
    return replace(stack, submodules=replace(stack.submodules, attention_layer=layer))


def _local_stack(qk_layernorm: bool) -> ModuleSpec:
    """Attention, dense MLP, MoE and multi-token prediction of Megatron's own torch layers.

    Megatron ships the TE stack only. A pattern that asks for its other layers fails when the model is built.
    """
    dense = get_gpt_layer_local_submodules(normalization="RMSNorm", qk_layernorm=qk_layernorm)
    # The number of experts itself is read from the config; here it only has to be there.
    moe = get_gpt_layer_local_submodules(normalization="RMSNorm", num_experts=1)
    attention_layer = TransformerLayerSubmodules(
        input_layernorm=dense.input_layernorm,
        self_attention=dense.self_attention,
        self_attn_bda=dense.self_attn_bda,
    )

    def mlp_layer(source: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
        return TransformerLayerSubmodules(
            pre_mlp_layernorm=source.pre_mlp_layernorm, mlp=source.mlp, mlp_bda=source.mlp_bda
        )

    def absent(layer: str) -> ModuleSpec:
        return ModuleSpec(LayerOfTransformerEngine, params={"layer": layer})

    # The layers of a prediction depth are built of this very stack, by the pattern.
    mtp_layer = MultiTokenPredictionLayerSubmodules(
        enorm=dense.input_layernorm,
        hnorm=dense.input_layernorm,
        eh_proj=ColumnParallelLinear,
        mtp_model_layer=None,
        layer_norm=dense.input_layernorm,
    )
    mtp_block = MultiTokenPredictionBlockSubmodules([ModuleSpec(MultiTokenPredictionLayer, submodules=mtp_layer)])
    return ModuleSpec(
        HybridStack,
        submodules=HybridStackSubmodules(
            mamba_layer=absent("a Mamba layer (M)"),
            gdn_layer=absent("a gated delta net (G)"),
            dsa_layer=absent("sparse attention (D)"),
            mla_layer=absent("multi-latent attention (+)"),
            mtp_block_spec=ModuleSpec(MultiTokenPredictionBlock, submodules=mtp_block),
            attention_layer=ModuleSpec(TransformerLayer, submodules=attention_layer),
            mlp_layer=ModuleSpec(MLPLayer, submodules=mlp_layer(dense)),
            moe_layer=ModuleSpec(MoETransformerLayer, submodules=mlp_layer(moe)),
        ),
    )


def hybrid_pattern(num_layers: int, moe_layer_freq: int | Iterable[int] | None) -> str:
    """Return the hybrid pattern of a GPT model, e.g. ``*E*E`` for two MoE layers.

    Args:
        num_layers: transformer layers of the GPT model.
        moe_layer_freq: Megatron's pattern, an integer n (every n-th layer is MoE) or a 0/1 list; None for a dense
            model.

    Raises:
        UserError: the list's length is not the number of layers.
    """
    if moe_layer_freq is None:
        is_moe = [False] * num_layers
    elif isinstance(moe_layer_freq, int):
        is_moe = [layer % moe_layer_freq == 0 for layer in range(num_layers)]
    else:
        is_moe = [bool(flag) for flag in moe_layer_freq]
    if len(is_moe) != num_layers:
        raise UserError(f"moe_layer_freq has {len(is_moe)} entries for num_layers={num_layers}: give one per layer")
    return "".join("*E" if moe else "*-" for moe in is_moe)


_GPT_KEY = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_ATTENTION_HALF = ("input_layernorm.", "self_attention.")


def gpt_key_to_hybrid(key: str) -> str:
    """Map a parameter name of a local-spec GPTModel to the HybridModel with `hybrid_pattern`."""
    match = _GPT_KEY.fullmatch(key)
    if match:
        layer, rest = int(match[1]), match[2]
        return f"decoder.layers.{2 * layer + (not rest.startswith(_ATTENTION_HALF))}.{rest}"
    return key.replace("decoder.final_layernorm.", "decoder.final_norm.")
