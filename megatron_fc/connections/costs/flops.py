"""FLOPs of connections, at 2 per multiply-add: of one site, for one token in the forward pass.

n slots of width c, m fractions. A norm, tanh and the few values of a table are left out, as everywhere in planning.
"""

from math import prod

from megatron_fc.connections.base import ConnectionConfig


def width(config: ConnectionConfig, hidden_size: int) -> int:
    """Width connection: what predicts the coefficients, and m fractions read from n slots each, 2nmc."""
    read = 2 * config.slots * hidden_size  # m*c = d
    return projection(config, hidden_size) + read


def depth(config: ConnectionConfig, hidden_size: int) -> int:
    """Depth connection: n slots carried to n, 2nnc, and beta times o written to each, 2nc."""
    return 2 * (config.slots + 1) * config.stream_width(hidden_size)


def site(config: ConnectionConfig, hidden_size: int) -> int:
    """Both. For a Frac-Connection 2d(2m+1) if dynamic, 4md and 2d."""
    return width(config, hidden_size) + depth(config, hidden_size)


def projection(config: ConnectionConfig, hidden_size: int) -> int:
    """W [1+m+n, c] times every slot, 2nc(1+m+n); nothing where coefficients are static."""
    shape = config.parameter_shapes(hidden_size).get("dynamic_weight")
    return 2 * config.slots * prod(shape) if shape else 0
