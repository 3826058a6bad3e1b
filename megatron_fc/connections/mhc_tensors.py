"""Tensors of mHC as other implementations name them, under the names of ours.

`DeepseekV4HyperConnection` of transformers follows the same rules, to rounding. Megatron-LM's `dev` branch differs in
the norm, stream / (rms + 1e-6), which is another number where the stream is small, casts coefficients to the stream's
dtype and drops out every stream by itself. Its `main` branch (0.20) has the same names, but applies alpha with the
destination as its row, so that the res rows are transposed, adds no eps to gamma and clamps Sinkhorn's sums: these
functions are not for its tensors.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_fc.errors import UserError

_MEGATRON = {
    "mapping_weight": ("mapping_proj.weight",),
    "mapping_bias": ("bias",),
    "mapping_scale": ("alpha_pre", "alpha_post", "alpha_res"),
}
_MEGATRON_END = {"leave_weight": ("hc_head_fn",), "leave_bias": ("hc_head_base",), "leave_scale": ("hc_head_scale",)}
_TRANSFORMERS = {"mapping_weight": ("fn",), "mapping_bias": ("base",), "mapping_scale": ("scale",)}
_TRANSFORMERS_END = {"leave_weight": ("hc_fn",), "leave_bias": ("hc_base",), "leave_scale": ("hc_scale",)}


def from_megatron(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a `HyperConnectionModule` of Megatron-LM's `dev` branch, or of its learned contraction at the end.

    Raises:
        UserError: one is missing, or is none of theirs.
    """
    return _renamed(tensors, _MEGATRON_END if "hc_head_fn" in tensors else _MEGATRON)


def from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a `DeepseekV4HyperConnection`, or of a `DeepseekV4HyperHead`.

    Raises:
        UserError: one is missing, or is none of theirs.
    """
    return _renamed(tensors, _TRANSFORMERS_END if "hc_fn" in tensors else _TRANSFORMERS)


def _renamed(tensors: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    theirs = [name for parts in names.values() for name in parts]
    if set(theirs) != set(tensors):
        raise UserError(f"these are not the tensors of mHC: found {sorted(tensors)}, expected {sorted(theirs)}")
    return {name: torch.cat([tensors[part] for part in parts]) for name, parts in names.items()}
