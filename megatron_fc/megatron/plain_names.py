"""Module-level loading: a connected model takes the norms of a plain model's state dict by their plain names.

A norm slot keeps its own norm one level deeper than the plain layer does, `input_layernorm.norm.weight`, and may hold
one that Transformer Engine keeps in a projection, `self_attention.linear_qkv.layer_norm_weight`. Checkpoints have the
plain names in any case, by the layer's map of keys; `load_state_dict` knows no such map. With strict=False, as Megatron
loads `--ckpt-format torch` where keys are missing, it would leave these norms as they are, without a word.

`state_dict` keeps the names of the parameters: sharded optimizers and torch's distributed checkpoints compare the two.
"""

import warnings
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

NORM = "norm."


def take_plain_names(slot: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """`load_state_dict` pre-hook of a norm slot: what lies directly below it belongs to its norm."""
    _rename(state_dict, prefix, prefix + NORM)


def refuse_what_would_be_dropped(
    slot: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """`load_state_dict` pre-hook of a norm slot: a parameter that it does not have is an error, strict or not.

    torch fails in any case where a parameter has another shape. Here a whole one would be left out, the dynamic part of
    a DFC in an SFC model, and the model would compute another function than the one that was trained.
    """
    own = {name for name, _ in (*slot.named_parameters(), *slot.named_buffers())}
    found = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
    if dropped := sorted(name for name in found - own if not name.endswith("_extra_state")):
        label = slot.get_submodule("connection").config.label  # type: ignore[union-attr]
        errors.append(
            f"{prefix}{dropped[0]} and what else would be dropped ({len(dropped)} here): this model has {label}"
        )


def announce_plain_weights(slot: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """`load_state_dict` pre-hook of a norm slot: with strict=False a plain layer's weights leave its connection alone.

    At their start Frac- and Hyper-Connections make the plain network of them, mHC and mFC do not.
    """
    layer = prefix[: prefix.rstrip(".").rfind(".") + 1]
    is_plain = any(key.startswith(layer) for key in state_dict) and not any(
        key.startswith(f"{prefix}connection.") for key in state_dict
    )
    if not is_plain:
        return
    site: Any = slot.get_submodule("connection")
    if not all(p.is_meta or site.config.is_identity(name, p) for name, p in site.named_parameters()):
        warnings.warn(
            f"plain weights are loaded into a model whose {site.config.label} connections are no identities, so it "
            f"computes something else than the plain one: convert the checkpoint by `megatron-fc upcycle`, or call "
            f"start_as_residual() of every connection",
            stacklevel=2,
        )


def _take_fused_names(name: str, layer: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """`load_state_dict` pre-hook of a layer: the norm of one of its slots, where the plain layer has it elsewhere."""
    ours = f"{name}.{NORM}"
    plain = layer.submodules_config.sharded_state_dict_keys_map.get(ours)
    if plain is not None:
        _rename(state_dict, prefix + plain, prefix + ours)


def _rename(state_dict: dict[str, Any], plain: str, ours: str) -> None:
    """Give the keys directly below one prefix another one; those that are there already stay."""
    for key in [key for key in state_dict if key.startswith(plain) and "." not in key.removeprefix(plain)]:
        state_dict.setdefault(ours + key.removeprefix(plain), state_dict.pop(key))


class TakesPlainNames(nn.Module):
    """A norm slot: loads its norm by the plain names, those that only its layer can see included."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(take_plain_names)
        self.register_load_state_dict_pre_hook(refuse_what_would_be_dropped)
        self.register_load_state_dict_pre_hook(announce_plain_weights)

    def meet_layer(self, layer: nn.Module, name: str) -> None:
        """Called when a layer takes this slot as its child `name`: it hands to each child the keys below that name.

        So it is the layer where a norm's other name shows.
        """
        if hasattr(layer, "submodules_config"):
            layer.register_load_state_dict_pre_hook(partial(_take_fused_names, name))


def _meet_layer(layer: nn.Module, name: str, slot: nn.Module | None) -> None:
    if isinstance(slot, TakesPlainNames):
        slot.meet_layer(layer, name)


# A slot is built before its layer has it, and never sees the layer: torch tells when it is put there.
register_module_module_registration_hook(_meet_layer)
