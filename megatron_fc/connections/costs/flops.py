"""FLOPs of connections, at 2 per multiply-add: of one site, for one token in the forward pass.

n slots of width c, m fractions. A norm, tanh and what is done to the few values of a table, 40 normalisations of
mHC's n*n included, are left out, as everywhere in planning.
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


def leave(config: ConnectionConfig, hidden_size: int) -> int:
    """End of the network: of a learned leave W [n, n*d] times the stream and the sum of n streams; a mean has none."""
    shapes = config.leave_shapes(hidden_size)
    return 2 * prod(shapes["leave_weight"]) + 2 * config.stream_width(hidden_size) if shapes else 0


def projection(config: ConnectionConfig, hidden_size: int) -> int:
    """Per slot, W [1+m+n, c] times every slot, 2nc(1+m+n); on a manifold, W [nm+n+nn, nc] times the stream.

    Nothing where coefficients are static.
    """
    shapes = config.parameter_shapes(hidden_size)
    if "mapping_weight" in shapes:
        return 2 * prod(shapes["mapping_weight"])
    return 2 * config.slots * prod(shapes["dynamic_weight"]) if "dynamic_weight" in shapes else 0
