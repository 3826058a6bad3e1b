"""Connections as Megatron flags: `--frac-rate 4 --frac-tanh ...`, `--hyper-slots 4 ...`, `--manifold-slots 4 ...`.

For people with an entry point of their own::

    args = parse_and_validate_args(extra_args_provider=add_connection_args)
    config = connection_from_args(args)      # None without any of the three: plain residuals
"""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Iterator
from dataclasses import Field, fields
from typing import Any, Literal, get_args, get_origin

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.kinds import KINDS
from megatron_fc.errors import UserError
from megatron_fc.megatron.norm_options import add_norm_args
from megatron_fc.megatron.refusals import refuse_with_connection

_HELP = {
    "rate": "Frac-rate m; without it the residual connections stay plain.",
    "slots": "Expansion rate n; without it the residual connections stay plain.",
    "fractions": "Parts m of a sub-layer's input and output, each with slots of its own.",
    "dynamic": "Predict the coefficients per token; its --no- form keeps them static.",
    "dynamic_beta": "The --no- form keeps beta static in a dynamic connection.",
    "dynamic_alpha": "The --no- form keeps gamma and alpha static in a dynamic connection.",
    "norm": "Norm of each slot before the prediction.",
    "norm_affine": "The --no- form leaves that norm's weight out.",
    "tanh": "Bound the predicted part by tanh.",
    "scale": "Multiply the predicted part by learned scalars.",
    "initial_scale": "Initial value of the learned scalars.",
    "norm_eps": "Epsilon of the norm.",
    "recompute": "Keep the residual stream and the sub-layer's output for backward, compute the rest again.",
    "scale_output_init": "The --no- form leaves a fresh model's output projections at the plain model's size.",
    "stream_layers": "Layers that keep the stream once together for backward, and compute the rest of it again.",
    "backend": "Implementation: Triton's fused kernels, plain torch, or auto, which takes Triton where it can run.",
    "input_norm": "What applies a norm that Transformer Engine can fuse into a projection.",
    "sinkhorn_iterations": "Normalisations of alpha's columns.",
    "sinkhorn_eps": "Epsilon of the coefficients.",
    "leave": "How the streams become one behind the last layer: their mean, or a learned sum.",
}


def add_connection_args(parser: ArgumentParser) -> ArgumentParser:
    """Add a flag per field of every kind's configuration, and those of the norms.

    Pass it as Megatron's `extra_args_provider`.
    """
    add_norm_args(parser)
    group = parser.add_argument_group(title="connections")
    for kind, config in KINDS.items():
        for field in fields(config):
            chooses = field.name == config.slots_option
            options: dict[str, Any] = {"help": _HELP[field.name], "default": None if chooses else field.default}
            if field.type in (bool, bool | None):
                options["action"] = BooleanOptionalAction
            elif get_origin(field.type) is Literal:
                options["choices"] = get_args(field.type)
            else:
                options["type"] = field.type
            group.add_argument(f"--{kind}-{_dashed(field.name)}", **options)
    group.add_argument(
        "--from-residual",
        action="store_true",
        help="Start from the plain checkpoint in --load: exactly the connections may be missing there.",
    )
    return parser


def connection_from_args(args: Namespace) -> ConnectionConfig | None:
    """Return the configuration that the flags ask for, None for plain residuals.

    Raises:
        UserError: a wrong value, two kinds at once, flags of a kind that none chooses, or a training option that does
            not go with connections.
    """
    config = stored_connection(args)
    chosen = None if config is None else config.kind
    for kind, other in KINDS.items():
        if kind != chosen and (given := next(_given(args, other), None)):
            flag = f"--{kind}-{_dashed(given)}"
            if config is not None:
                raise UserError(f"{flag} is an option of another kind of connections than {config.label}: drop it")
            raise UserError(f"{flag} has no effect without --{kind}-{other.slots_option}: set that, or drop it")
    if config is not None:
        refuse_with_connection(args, config)
    return config


def refuse_flags_beside(args: Namespace, connection: ConnectionConfig, named: str) -> None:
    """Check that no flag of a script asks for another connection than what it names beside them.

    Raises:
        UserError: one does; the checkpoints would say that they were trained with it.
    """
    if hasattr(args, "from_residual") and (asked := connection_from_args(args)) not in (None, connection):
        flag = f"--{asked.kind}-{_dashed(asked.slots_option)}" if asked is not None else ""
        raise UserError(
            f"{flag} and what goes with it ask for {asked}, beside {named}: drop the flags, or take "
            f"--spec megatron_fc.megatron.specs from_args"
        )


def stored_connection(args: Namespace) -> ConnectionConfig | None:
    """Return what `args` say of the connections and nothing else, as the arguments kept in a checkpoint do.

    An older release may have written them: options that it did not have take their defaults.

    Raises:
        UserError: they name two kinds.
    """
    chosen = [
        config for kind, config in KINDS.items() if getattr(args, f"{kind}_{config.slots_option}", None) is not None
    ]
    if len(chosen) > 1:
        named = " and ".join(f"--{config.kind}-{config.slots_option}" for config in chosen)
        raise UserError(f"{named} choose two kinds of connections: keep one")
    if not chosen:
        return None
    [config] = chosen
    return config(**{f.name: getattr(args, f"{config.kind}_{f.name}", f.default) for f in fields(config)})


def store_connection(args: Namespace, connection: ConnectionConfig | None) -> None:
    """Write into `args` what `stored_connection` reads, None for plain residuals."""
    for kind, config in KINDS.items():
        for field in fields(config):
            value = None if field.name == config.slots_option else field.default
            setattr(args, f"{kind}_{field.name}", getattr(connection, field.name) if _is(connection, kind) else value)


def connection_flags(connection: ConnectionConfig) -> list[str]:
    """Return the flags that `connection_from_args` reads back, those at their default left out."""
    flags = []
    for field in fields(connection):
        value = getattr(connection, field.name)
        if value == field.default and field.name != connection.slots_option:
            continue
        flag = f"{connection.kind}-{_dashed(field.name)}"
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def is_connection_argument(name: str) -> bool:
    """True for the name of one of these arguments, or of its flag with underscores."""
    return name == "from_residual" or name.removeprefix("no_").startswith(tuple(f"{kind}_" for kind in KINDS))


def _given(args: Namespace, config: type[ConnectionConfig]) -> Iterator[str]:
    """Options of a kind that differ from their defaults."""

    def default(field: Field[Any]) -> Any:
        return None if field.name == config.slots_option else field.default

    names = (f.name for f in fields(config) if getattr(args, f"{config.kind}_{f.name}", default(f)) != default(f))
    return iter(names)


def _is(connection: ConnectionConfig | None, kind: str) -> bool:
    return connection is not None and connection.kind == kind


def _dashed(name: str) -> str:
    return name.replace("_", "-")
