"""frac_connect: any Megatron layer, block or stack spec -> the same with Frac-Connections."""

import copy
from dataclasses import fields
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer

from megatron_fc.connections.config import FracConfig
from megatron_fc.errors import UserError
from megatron_fc.megatron.hybrid import LayerOfTransformerEngine
from megatron_fc.megatron.input_norm import take_norm_out
from megatron_fc.megatron.slots import FracAdd, FracNorm, Pairing

_TRANSFORMER_SITES = (("input_layernorm", "self_attn_bda"), ("pre_mlp_layernorm", "mlp_bda"))
_MAMBA_SITES = (("norm", "mamba_bda"),)
_SITES: dict[type, tuple[tuple[str, str], ...]] = {
    TransformerLayer: _TRANSFORMER_SITES,
    MoETransformerLayer: _TRANSFORMER_SITES,
    MLPLayer: _TRANSFORMER_SITES,
    MambaLayer: _MAMBA_SITES,
}


def frac_connect[Spec](spec: Spec, config: FracConfig) -> Spec:
    """Return a copy of a Megatron spec whose residual connections are Frac-Connections.

    Args:
        spec: a layer spec (transformer, MoE, MLA, MLP or Mamba layer), the submodules of a decoder block
            (`get_gpt_decoder_block_spec`) or of a multi-token-prediction block (`get_gpt_mtp_block_spec`), or a
            spec of a block or of a hybrid stack. It is left untouched.
        config: options of the connections; every site gets parameters of its own.

    Raises:
        UserError: nothing to connect, a layer that is connected already, or a layer class that this release does
            not know.
    """
    connected, sites = _connect(spec, config)
    if sites == 0 and getattr(spec, "layer_specs", None) != []:  # a pipeline stage may hold no layer at all
        raise UserError(f"{_name(spec)} has no residual connection to replace: pass a layer, block or stack spec")
    return connected


def _connect(spec: Any, config: FracConfig) -> tuple[Any, int]:
    """Return the connected copy of a spec and its number of sites, each distinct layer spec counted once."""
    if isinstance(spec, (TransformerBlockSubmodules, MultiTokenPredictionBlockSubmodules)):
        # A homogeneous block lists one object many times; connect it once to keep it that way.
        connected = {id(layer): _connect(layer, config) for layer in spec.layer_specs or []}
        block = copy.copy(spec)
        block.layer_specs = [connected[id(layer)][0] for layer in spec.layer_specs or []]
        return block, sum(sites for _, sites in connected.values())
    if isinstance(spec, HybridStackSubmodules):
        return _connect_fields(spec, [f.name for f in fields(spec) if f.name != "mtp_block_spec"], config)
    if isinstance(spec, ModuleSpec):
        if spec.module in _SITES:
            return _connect_layer(spec, _SITES[spec.module], config)
        if spec.module in (TransformerBlock, MultiTokenPredictionBlock, HybridStack):
            return _connect_fields(spec, ["submodules"], config)
        if spec.module is MultiTokenPredictionLayer:
            submodules, sites = _connect_fields(spec.submodules, ["mtp_model_layer"], config)
            layer = copy.copy(spec)
            layer.submodules = submodules
            return layer, sites
    raise UserError(f"{_name(spec)} is no layer, block or stack that frac_connect knows: {_known()}")


def _connect_fields(owner: Any, names: list[str], config: FracConfig) -> tuple[Any, int]:
    owner, total = copy.copy(owner), 0
    for name in names:
        value = getattr(owner, name)
        if value in (None, IdentityOp) or getattr(value, "module", None) is LayerOfTransformerEngine:
            continue
        connected, sites = _connect(value, config)
        setattr(owner, name, connected)
        total += sites
    return owner, total


def _connect_layer(spec: ModuleSpec, slots: tuple[tuple[str, str], ...], config: FracConfig) -> tuple[ModuleSpec, int]:
    layer, submodules, sites = copy.copy(spec), copy.copy(spec.submodules), 0
    keys_map = dict(submodules.sharded_state_dict_keys_map)
    if getattr(submodules, "cross_attn_bda", IdentityFuncOp) is not IdentityFuncOp:
        raise UserError(f"{_name(spec)} has cross-attention, which Frac-Connections do not cover: decoder layers only")
    pairing = None
    for norm_slot, add_slot in slots:
        norm, add = getattr(submodules, norm_slot), getattr(submodules, add_slot)
        if _is_connected(norm) or _is_connected(add):
            raise UserError(f"{_name(spec)} is connected already: call frac_connect once, on the plain spec")
        if add in (IdentityFuncOp, IdentityOp):
            continue
        if add is not get_bias_dropout_add:
            raise UserError(f"{add_slot} of {_name(spec)} is {_name(add)}, not Megatron's get_bias_dropout_add")
        taken = take_norm_out(submodules, norm_slot) if config.input_norm == "width" else None
        if taken:
            norm = getattr(submodules, norm_slot)
        # Mamba layers take one tensor from their norm slot.
        pairing = Pairing(norm_slot, before=pairing, returns_stream=spec.module is not MambaLayer)
        params = {"norm": norm, "frac": config, "pairing": pairing}
        setattr(submodules, norm_slot, ModuleSpec(FracNorm, params=params))
        setattr(submodules, add_slot, ModuleSpec(FracAdd, params={"pairing": pairing}))
        # The norm's weight keeps its name in checkpoints, which stay exchangeable with the plain model's.
        plain = taken or f"{norm_slot}."
        keys_map[f"{norm_slot}.norm."] = keys_map.pop(plain, plain)
        sites += 1
    submodules.sharded_state_dict_keys_map = keys_map
    layer.submodules = submodules
    return layer, sites


def _is_connected(slot: Any) -> bool:
    return isinstance(slot, ModuleSpec) and slot.module in (FracNorm, FracAdd)


def _name(spec: Any) -> str:
    subject = getattr(spec, "module", spec)
    return getattr(subject, "__name__", type(subject).__name__)


def _known() -> str:
    return ", ".join(layer.__name__ for layer in _SITES)
