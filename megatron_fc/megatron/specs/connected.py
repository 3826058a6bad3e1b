"""connect: any Megatron layer, block or stack spec -> the same with connections of any kind."""

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
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.errors import UserError
from megatron_fc.megatron.hybrid import LayerOfTransformerEngine
from megatron_fc.megatron.input_norm import take_norm_out
from megatron_fc.megatron.norm_after import NormedAdd
from megatron_fc.megatron.slots import AddSlot, NormSlot, Pairing
from megatron_fc.megatron.stack_ends import ConnectedHybridStack, LeavingNorm, refuse_no_end

_TRANSFORMER_SITES = (("input_layernorm", "self_attn_bda"), ("pre_mlp_layernorm", "mlp_bda"))
_MAMBA_SITES = (("norm", "mamba_bda"),)
# The slots of a layer's sub-layers, in order: norm, and bias-dropout-add.
SITES: dict[type, tuple[tuple[str, str], ...]] = {
    TransformerLayer: _TRANSFORMER_SITES,
    MoETransformerLayer: _TRANSFORMER_SITES,
    MLPLayer: _TRANSFORMER_SITES,
    MambaLayer: _MAMBA_SITES,
}


def connect[Spec](spec: Spec, config: ConnectionConfig, *, exchanges_shapes: bool = False) -> Spec:
    """Return a copy of a Megatron spec whose residual connections are those of `config`.

    Args:
        spec: a layer spec (transformer, MoE, MLA, MLP or Mamba layer), the submodules of a decoder block
            (`get_gpt_decoder_block_spec`) or of a multi-token-prediction block (`get_gpt_mtp_block_spec`, made of the
            plain layers), or a spec of a block or of a hybrid stack. It is left untouched. Where the stream is wider
            than the model it needs an end: pass a block or a stack then.
        config: options of the connections, of any kind; every site gets parameters of its own.
        exchanges_shapes: for scripts in which nobody calls `megatron_fc.megatron.stream.widen`: pipeline stages
            exchange the shape of a wider stream, at a synchronisation per message.

    Raises:
        UserError: nothing to connect, a layer that is connected already, a layer class that this release does not
            know, or `config` is no configuration.
    """
    if not isinstance(config, ConnectionConfig):
        raise UserError(
            f"connect takes a spec and a FracConfig, HyperConfig or ManifoldConfig, not {config!r:.60}: e.g. "
            f"connect(spec, FracConfig(rate=4))"
        )
    if config.is_wide and _is_layer(spec):
        raise refuse_no_end(_name(spec), config)
    connected, sites = _Connecting(config, exchanges_shapes).connect(spec)
    if sites == 0 and getattr(spec, "layer_specs", None) != []:  # a pipeline stage may hold no layer at all
        raise UserError(f"{_name(spec)} has no residual connection to replace: pass a layer, block or stack spec")
    return connected


def block_spec(layer: Any, config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the block that Megatron makes of the spec of a layer, all alike; a block as it is.

    Args:
        layer: the plain spec.
        config: of the model.
        vp_stage: virtual pipeline stage whose layers these are.
    """
    if isinstance(layer, TransformerBlockSubmodules):
        return layer
    layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=LayerNormImpl)


def _is_layer(spec: Any) -> bool:
    return isinstance(spec, HybridStackSubmodules) or getattr(spec, "module", None) in SITES


class _Connecting:
    """One call of `connect`. Its methods return the connected copy of a spec with the number of sites in it.

    Each distinct layer spec is counted once.
    """

    def __init__(self, config: ConnectionConfig, exchanges_shapes: bool) -> None:
        self.config = config
        self.exchanges_shapes = exchanges_shapes

    def connect(self, spec: Any) -> tuple[Any, int]:
        if isinstance(spec, (TransformerBlockSubmodules, MultiTokenPredictionBlockSubmodules)):
            # A homogeneous block lists one object many times; connect it once to keep it that way.
            connected = {id(layer): self.connect(layer) for layer in spec.layer_specs or []}
            block = copy.copy(spec)
            block.layer_specs = [connected[id(layer)][0] for layer in spec.layer_specs or []]
            if isinstance(block, TransformerBlockSubmodules):
                self._end(block, _name(spec))
            return block, sum(sites for _, sites in connected.values())
        if isinstance(spec, HybridStackSubmodules):
            stack, sites = self._fields(spec, [f.name for f in fields(spec) if f.name != "mtp_block_spec"])
            if stack.mtp_block_spec is not None and self.config.is_wide:
                # Its layers are made of this very stack, by the pattern; they end in norms of their own.
                stack.mtp_block_spec, _ = self._fields(stack.mtp_block_spec, ["submodules"])
            return stack, sites
        if isinstance(spec, ModuleSpec):
            if spec.module in SITES:
                return self._layer(spec, SITES[spec.module])
            if spec.module is HybridStack and self.config.is_wide:
                stack, sites = self._fields(spec, ["submodules"])
                stack.module = ConnectedHybridStack
                ends = {"connection": self.config, "exchanges_shapes": self.exchanges_shapes}
                stack.params = {**(stack.params or {}), **ends}
                return stack, sites
            if spec.module in (TransformerBlock, MultiTokenPredictionBlock, HybridStack):
                return self._fields(spec, ["submodules"])
            if spec.module is MultiTokenPredictionLayer:
                layer = copy.copy(spec)
                layer.submodules, sites = self._fields(spec.submodules, ["mtp_model_layer"])
                self._end(layer.submodules, _name(spec))
                return layer, sites
        raise UserError(f"{_name(spec)} is no layer, block or stack that connect knows: {_known()}")

    def _fields(self, owner: Any, names: list[str]) -> tuple[Any, int]:
        owner, total = copy.copy(owner), 0
        for name in names:
            value = getattr(owner, name)
            if value in (None, IdentityOp) or getattr(value, "module", None) is LayerOfTransformerEngine:
                continue
            connected, sites = self.connect(value)
            setattr(owner, name, connected)
            total += sites
        return owner, total

    def _end(self, submodules: Any, name: str) -> None:
        """Let the final norm in the slot `layer_norm` leave a wider stream."""
        if not self.config.is_wide:
            return
        if submodules.layer_norm is None:
            raise refuse_no_end(name, self.config)
        submodules.layer_norm = LeavingNorm(submodules.layer_norm, self.config, self.exchanges_shapes)

    def _layer(self, spec: ModuleSpec, slots: tuple[tuple[str, str], ...]) -> tuple[ModuleSpec, int]:
        layer, submodules = copy.copy(spec), copy.copy(spec.submodules)
        keys_map = dict(submodules.sharded_state_dict_keys_map)
        if getattr(submodules, "cross_attn_bda", IdentityFuncOp) is not IdentityFuncOp:
            raise UserError(f"{_name(spec)} has cross-attention, which connections do not cover: decoder layers only")
        if any(_is_connected(getattr(submodules, name)) for pair in slots for name in pair):
            raise UserError(f"{_name(spec)} is connected already: call connect once, on the plain spec")
        slots = tuple(pair for pair in slots if getattr(submodules, pair[1]) not in (IdentityFuncOp, IdentityOp))
        pairing = None
        for place, (norm_slot, add_slot) in enumerate(slots):
            norm, add = getattr(submodules, norm_slot), getattr(submodules, add_slot)
            after = add.params["norm"] if isinstance(add, ModuleSpec) and add.module is NormedAdd else None
            if after is not None:
                norm = IdentityOp
            elif add is not get_bias_dropout_add:
                raise UserError(f"{add_slot} of {_name(spec)} is {_name(add)}, not Megatron's get_bias_dropout_add")
            taken = take_norm_out(submodules, norm_slot) if self.config.applies_norm else None
            if taken:
                norm = getattr(submodules, norm_slot)
            # Mamba layers take one tensor from their norm slot.
            pairing = Pairing(norm_slot, (place, len(slots)), pairing, returns_stream=spec.module is not MambaLayer)
            params = {"norm": norm, "connection": self.config, "pairing": pairing}
            params["exchanges_shapes"] = self.exchanges_shapes
            setattr(submodules, norm_slot, ModuleSpec(NormSlot, params=params))
            setattr(submodules, add_slot, ModuleSpec(AddSlot, params={"pairing": pairing, "norm_after": after}))
            # The norm's weight keeps its name in checkpoints, which stay exchangeable with the plain model's.
            plain = taken or f"{norm_slot}."
            keys_map[f"{norm_slot}.norm."] = keys_map.pop(plain, plain)
        submodules.sharded_state_dict_keys_map = keys_map
        layer.submodules = submodules
        return layer, len(slots)


def _is_connected(slot: Any) -> bool:
    return isinstance(slot, ModuleSpec) and slot.module in (NormSlot, AddSlot)


def _name(spec: Any) -> str:
    subject = getattr(spec, "module", spec)
    return getattr(subject, "__name__", type(subject).__name__)


def _known() -> str:
    return ", ".join(layer.__name__ for layer in SITES)
