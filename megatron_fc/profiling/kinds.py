"""Kinds of layers, by a module's path in a Megatron model."""

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from megatron_fc.planning.counts import DeviceCount, DeviceCounts, Phase

Kind = Literal[
    "residual stream", "attention", "Mamba", "MLP", "MoE", "embedding", "output and loss", "optimizer", "other"
]
KINDS: tuple[Kind, ...] = (
    "residual stream",
    "attention",
    "Mamba",
    "MLP",
    "MoE",
    "embedding",
    "output and loss",
    "optimizer",
    "other",
)


class KindKey(NamedTuple):
    """Where in the model, and when."""

    kind: Kind
    phase: Phase


KindCounts = dict[KindKey, DeviceCount]

_LAYER = re.compile(r"(?:^|\.)layers\.\d+(?:\.mtp_model_layer)?(?:\.(?P<slot>[^.]+))?")
_MOE = re.compile(r"(?P<mlp>.*\.mlp)\.(?:router|experts|shared_experts|token_dispatcher)(?:\.|$)")
_SLOTS: dict[str, Kind] = {
    "input_layernorm": "residual stream",
    "pre_mlp_layernorm": "residual stream",
    "norm": "residual stream",
    "self_attn_bda": "residual stream",
    "mlp_bda": "residual stream",
    "mamba_bda": "residual stream",
    "self_attention": "attention",
    "mixer": "Mamba",
    "mlp": "MLP",
}


class LayerKinds:
    """Tells the kind of a module.

    Args:
        paths: of all modules at hand: whether an `mlp` is a mixture of experts shows in what stands under it.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._experts = {found["mlp"] for path in paths if (found := _MOE.match(path))}

    def of(self, path: str) -> Kind:
        """Return the kind of the module at `path`.

        A stock bias-dropout-add is a function, not a module, so the layer itself stands for it. What is in no layer and
        no embedding belongs to the output, the last norm too.
        """
        found = _LAYER.search(path)
        if found is None:
            if "embedding" in path:
                return "embedding"
            return "output and loss"
        slot = found["slot"]
        kind: Kind = "residual stream" if slot is None else _SLOTS.get(slot, "other")
        if kind == "MLP" and path[: found.end()] in self._experts:
            return "MoE"
        return kind


def by_kind(counts: DeviceCounts) -> KindCounts:
    """Sum counts by kind and phase; what forward and backward do in no module is the loss."""
    kinds = LayerKinds({key.module for key in counts})
    sums: KindCounts = {}
    for key, count in counts.items():
        kind: Kind = "optimizer" if key.phase == "optimizer" else kinds.of(key.module)
        sums.setdefault(KindKey(kind, key.phase), DeviceCount()).add(count)
    return sums
