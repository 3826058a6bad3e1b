"""The registry of kinds of connections, and how their parameters are told from others, in models and in checkpoints."""

from collections.abc import Mapping

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.config import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.on_manifold import LEAVE_NAMES

# One stream of the whole width is both: it goes by the first name.
KINDS: dict[str, type[ConnectionConfig]] = {config.kind: config for config in (FracConfig, HyperConfig, ManifoldConfig)}
_NAMES = frozenset((*LEAVE_NAMES, *(name for kind in KINDS.values() for name in kind.parameter_names)))
_OWNER = "connection"  # the name that modules give the site they own


def is_connection_key(key: str) -> bool:
    """True for the name of a connection's parameter in a model, or of its tensor in a checkpoint.

    The optimizer's state of such a parameter is included.
    """
    owner, _, name = key.rpartition(".")
    return name in _NAMES and owner.rpartition(".")[2] == _OWNER


def recognise(sizes: Mapping[str, int]) -> ConnectionConfig | None:
    """Return the connection whose parameters have these last dimensions, None if no kind has them.

    Options that no parameter shows take their defaults.
    """
    members = (kind.recognise(sizes) for kind in KINDS.values())
    return next((member for member in members if member is not None), None)
