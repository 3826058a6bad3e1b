"""FracConfig as Megatron flags: `--frac-rate 4 --frac-norm rmsnorm ...`.

For people with an entry point of their own::

    args = parse_and_validate_args(extra_args_provider=add_frac_args)
    config = frac_config_from_args(args)      # None without --frac-rate: plain residuals
"""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import fields
from typing import Any, get_args

from megatron_fc.connections.config import Backend, FracConfig, InputNorm, Norm
from megatron_fc.megatron.refusals import refuse_unsupported_args

_HELP = {
    "rate": "Frac-rate m; without it the residual connections stay plain.",
    "dynamic": "Predict the weights per token (DFC); --no-frac-dynamic keeps them static (SFC).",
    "dynamic_beta": "--no-frac-dynamic-beta keeps beta static in DFC.",
    "dynamic_alpha": "--no-frac-dynamic-alpha keeps gamma and alpha static in DFC.",
    "norm": "Norm of each fraction before the prediction.",
    "norm_affine": "--no-frac-norm-affine leaves that norm's weight out.",
    "tanh": "Bound the predicted part by tanh.",
    "scale": "Multiply the predicted part by learned scalars.",
    "initial_scale": "Initial value of the learned scalars.",
    "norm_eps": "Epsilon of the norm.",
    "recompute": "Keep the residual stream and the sub-layer's output for backward, compute the rest again.",
    "backend": "Implementation: Triton's fused kernels, plain torch, or auto, which takes Triton where it can run.",
    "input_norm": "What applies a norm that Transformer Engine can fuse into a projection.",
}

_CHOICES = {"norm": get_args(Norm), "backend": get_args(Backend), "input_norm": get_args(InputNorm)}


def add_frac_args(parser: ArgumentParser) -> ArgumentParser:
    """Add one flag per field of FracConfig; pass it as Megatron's `extra_args_provider`."""
    group = parser.add_argument_group(title="frac-connections")
    for field in fields(FracConfig):
        flag = f"--frac-{field.name.replace('_', '-')}"
        options: dict[str, Any] = {"help": _HELP[field.name], "default": field.default}
        if field.name == "rate":
            options |= {"type": int, "default": None}
        elif field.type in (bool, bool | None):
            options["action"] = BooleanOptionalAction
        elif field.name in _CHOICES:
            options["choices"] = _CHOICES[field.name]
        else:
            options["type"] = field.type
        group.add_argument(flag, **options)
    group.add_argument(
        "--frac-from-residual",
        action="store_true",
        help="Start from the plain checkpoint in --load: exactly the Frac-Connections may be missing there.",
    )
    return parser


def frac_config_from_args(args: Namespace) -> FracConfig | None:
    """Return the configuration that the flags ask for, None for plain residuals.

    Raises:
        UserError: a wrong value, or a training option that does not go with Frac-Connections.
    """
    config = stored_frac_config(args)
    if config is not None:
        refuse_unsupported_args(args)
    return config


def stored_frac_config(args: Namespace) -> FracConfig | None:
    """Return what `args` say of the connections and nothing else, as the arguments kept in a checkpoint do.

    An older release may have written them: options that it did not have take their defaults.
    """
    if getattr(args, "frac_rate", None) is None:
        return None
    values: dict[str, Any] = {
        field.name: getattr(args, f"frac_{field.name}", field.default) for field in fields(FracConfig)
    }
    return FracConfig(**values)


def store_frac_config(args: Namespace, config: FracConfig | None) -> None:
    """Write into `args` what `stored_frac_config` reads, None for plain residuals."""
    for field in fields(FracConfig):
        default = None if field.name == "rate" else field.default
        setattr(args, f"frac_{field.name}", default if config is None else getattr(config, field.name))


def frac_flags(config: FracConfig) -> list[str]:
    """Return the flags that `frac_config_from_args` reads back, those at their default left out."""
    flags = ["--frac-rate", str(config.rate)]
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name == "rate" or value == field.default:
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--frac-{flag}" if value else f"--no-frac-{flag}")
        else:
            flags += [f"--frac-{flag}", str(value)]
    return flags
