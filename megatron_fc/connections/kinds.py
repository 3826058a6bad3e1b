"""The registry of kinds of connections, their members' names, and how parameters are told from others."""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.config import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.on_manifold import LEAVE_NAMES
from megatron_fc.errors import UserError, unknown

# One stream of the whole width is both: it goes by the first name.
KINDS: dict[str, type[ConnectionConfig]] = {config.kind: config for config in (FracConfig, HyperConfig, ManifoldConfig)}
_PARAMETERS = frozenset((*LEAVE_NAMES, *(name for kind in KINDS.values() for name in kind.parameter_names)))
_OWNER = "connection"  # the name that modules give the site they own

# The papers' short names, with what each of them fixes beside its rate.
MEMBERS: dict[str, tuple[type[ConnectionConfig], dict[str, Any]]] = {
    "sfc": (FracConfig, {"dynamic": False}),
    "dfc": (FracConfig, {"dynamic": True}),
    "shc": (HyperConfig, {"dynamic": False}),
    "dhc": (HyperConfig, {"dynamic": True}),
    "mhc": (ManifoldConfig, {"fractions": 1}),
    "mfc": (ManifoldConfig, {}),
}
_NAMED = ("connection", "rate", "fractions")  # settings of which a label is made
_LABEL = re.compile(rf"(?P<name>{'|'.join(MEMBERS)})_x(?P<rate>[1-9]\d*)(?:_m(?P<fractions>[1-9]\d*))?")


def member(name: str, rate: Any = 4, fractions: Any = None, options: Mapping[str, Any] | None = None) -> Any:
    """Return the configuration that a short name stands for.

    Args:
        name: one of MEMBERS.
        rate: m of Frac-Connections, n of all others.
        fractions: m between Hyper- and Frac-Connections.
        options: other fields of the kind's configuration.

    Raises:
        UserError: an unknown name or option, or a wrong value.
    """
    if name not in MEMBERS:
        raise UserError(unknown("connection", name, tuple(MEMBERS)))
    config, fixed = MEMBERS[name]
    if isinstance(rate, bool) or not isinstance(rate, int) or rate < 1:
        raise UserError(f"rate must be a whole number of at least 1, not {rate!r}: use 4")
    fixed = {config.slots_option: rate, **fixed}
    if name == "mfc":
        fixed["fractions"] = rate
    if fractions is not None:
        if config is not HyperConfig:
            raise UserError(f"fractions={fractions} is an option of shc and dhc: {name}_x{rate} has its own, drop it")
        if isinstance(fractions, int) and fractions > 0 and rate % fractions:
            over = rate + -rate % fractions
            raise UserError(f"rate={rate} is no multiple of fractions={fractions}: use rate={over}")
        fixed["fractions"] = fractions
    return config.from_dict({**(options or {}), **fixed})


def from_label(label: str) -> ConnectionConfig | None:
    """Return the configuration with this label, None if it is none: ``dfc_x4``, ``dhc_x4_m2``."""
    match = _LABEL.fullmatch(label)
    if match is None:
        return None
    config: ConnectionConfig = member(
        match["name"], int(match["rate"]), int(match["fractions"]) if match["fractions"] else None
    )
    return config


def overrides(config: ConnectionConfig | None, other: ConnectionConfig | None) -> list[str]:
    """Return the settings that turn a config file's connections into others, e.g. ``connection=dhc``.

    Args:
        config: the connections that are wanted, None for plain residuals.
        other: those of the file.
    """
    if config is None:
        return [] if other is None else ["connection=residual"]
    usual = from_label(config.label)
    if usual is None or usual.fractions != config.fractions:  # only flags make it
        return []
    there = {name: value for name, value in _settings(usual).items() if name not in _NAMED} | {"fractions": 1}
    if other is not None:
        theirs, defaults = _settings(other), _settings(from_label(other.label))
        # A default is not in the file, and each kind has its own.
        there |= {name: value for name, value in theirs.items() if name in _NAMED or defaults.get(name) != value}
    words = {name: value for name, value in _settings(config).items() if name not in there or there[name] != value}
    words |= _taken_back(config, other)
    return [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in words.items()]


def _taken_back(config: ConnectionConfig, other: ConnectionConfig | None) -> dict[str, Any]:
    """What a kind refuses in the file of another one; options of the prediction it does without."""
    if other is None or config.kind == other.kind:
        return {}
    known = {field.name for field in fields(config)}
    lacking = (field for field in fields(other) if not field.compare and field.name not in known)
    found = {field.name: field.default for field in lacking if getattr(other, field.name) != field.default}
    return found | ({"fractions": "null"} if isinstance(other, HyperConfig) and other.fractions > 1 else {})


def _settings(config: ConnectionConfig | None) -> dict[str, Any]:
    """A configuration as a config file has it, without what changes no result."""
    match = _LABEL.fullmatch(config.label) if config is not None else None
    if config is None or match is None:
        return {}
    named = {"connection": match["name"], "rate": config.slots}
    named |= {"fractions": config.fractions} if isinstance(config, HyperConfig) else {}
    fixed = {config.slots_option, config.fractions_option, *MEMBERS[match["name"]][1]}
    return named | {f.name: getattr(config, f.name) for f in fields(config) if f.compare and f.name not in fixed}


def is_connection_key(key: str) -> bool:
    """True for the name of a connection's parameter in a model, or of its tensor in a checkpoint.

    The optimizer's state of such a parameter is included.
    """
    owner, _, name = key.rpartition(".")
    return name in _PARAMETERS and owner.rpartition(".")[2] == _OWNER


def recognise(sizes: Mapping[str, int]) -> ConnectionConfig | None:
    """Return the connection whose parameters have these last dimensions, None if no kind has them.

    Options that no parameter shows take their defaults.
    """
    members = (kind.recognise(sizes) for kind in KINDS.values())
    return next((member for member in members if member is not None), None)
