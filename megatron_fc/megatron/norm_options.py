"""Options of norms that Megatron does not have: over all heads of queries and keys, and behind the sub-layers."""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import dataclass
from typing import Any

from megatron_fc.errors import UserError

# Layers of a hybrid pattern that can norm what they return, and what stands between them.
_NORMED_AFTER = set("*-E|/")


@dataclass(frozen=True)
class NormOptions:
    """The flags of `add_norm_args`, under Megatron's way of naming.

    Attributes:
        qk_layernorm_over_heads: one norm over all heads of the queries and one of the keys, not one per head.
        norm_after: sub-layers norm what they return, h + norm(F(h)).
    """

    qk_layernorm_over_heads: bool = False
    norm_after: bool = False


# Megatron's own: per head, and before the sub-layers.
MEGATRON_NORMS = NormOptions()


def add_norm_args(parser: ArgumentParser) -> None:
    """Add a flag per field of `NormOptions`."""
    group = parser.add_argument_group(title="norms of OLMoE and OLMo2")
    texts = {
        "qk-layernorm-over-heads": "Norm queries and keys over all heads at once, with a weight for each of their "
        "values; without it --qk-layernorm norms every head by itself.",
        "norm-after": "Norm what a sub-layer returns, h + norm(F(h)), in place of what it is given.",
    }
    for flag, text in texts.items():
        group.add_argument(f"--{flag}", action=BooleanOptionalAction, default=False, help=text)


def norms_from_args(args: Namespace | None) -> NormOptions:
    """Return what Megatron's arguments ask for; those of a script or checkpoint without the flags ask for nothing.

    Raises:
        UserError: an option of Megatron does not go with them.
    """
    options = NormOptions(
        qk_layernorm_over_heads=bool(getattr(args, "qk_layernorm_over_heads", False)),
        norm_after=bool(getattr(args, "norm_after", False)),
    )
    if args is not None:
        _refuse(options, args)
    return options


def _refuse(options: NormOptions, args: Namespace) -> None:
    def value(name: str) -> Any:
        return getattr(args, name, None)

    if value("mtp_num_layers") and not value("hybrid_layer_pattern"):
        # Megatron's GPT builder makes these layers of a spec of its own, whatever that of the decoder is.
        for name in (name for name, is_set in vars(options).items() if is_set):
            raise UserError(
                f"{name} would not reach the multi-token-prediction layers of a GPTModel: set {name}=false, or "
                f"model.family=hybrid with a pattern like '*E*E/*E', whose MTP layers have it too"
            )
    if options.qk_layernorm_over_heads:
        if not value("qk_layernorm"):
            raise UserError("qk_layernorm_over_heads says how queries and keys are normed: set qk_layernorm too")
        if value("normalization") != "RMSNorm":
            raise UserError(
                f"qk_layernorm_over_heads is an RMSNorm, and normalization={value('normalization')}: set RMSNorm"
            )
        for name in ("multi_latent_attention", "qk_l2_norm", "qk_clip", "layernorm_zero_centered_gamma"):
            if value(name):
                raise UserError(f"qk_layernorm_over_heads does not go with {name}: drop one of the two")
    if options.norm_after:
        for name in ("inference_fuse_tp_communication", "fused_residual_rmsnorm", "heterogeneous_layers_config_path"):
            if value(name):
                raise UserError(f"norm_after stands behind the sub-layers, which {name} bypasses: drop one of the two")
        if others := sorted(set(value("hybrid_layer_pattern") or "") - _NORMED_AFTER):
            raise UserError(
                f"norm_after knows attention, MLP and MoE layers, and hybrid_layer_pattern has {others[0]}: drop one "
                f"of the two"
            )
