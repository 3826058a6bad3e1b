"""Coefficients on a manifold (mHC, arXiv 2512.24880 section 4.2): their parameters and options. Loads no torch.

All are predicted from the whole stream, u = stream / rms: z = W u has a row for every value of gamma (n, m), called
pre, then of beta (n,), called post, then of alpha (n, n), called res. Tables are row-major, the row is the source slot.

::

    gamma = sigmoid(scale_pre z_pre + bias_pre) + eps
    beta  = 2 sigmoid(scale_post z_post + bias_post)
    alpha = Sinkhorn(scale_res z_res + bias_res)        doubly stochastic, up to eps

At a random W the streams of mHC, copies of each other at first, drift apart. With W and bias at 0 they would not: then
every stream is read, written and carried alike, gets the same gradient, and all stay equal for ever, one residual
network in n copies, while the loss falls as it should.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class OnManifold(Protocol):
    """A configuration of such a kind: n, m, the epsilons, and how the network closes."""

    @property
    def slots(self) -> int: ...
    @property
    def fractions(self) -> int: ...
    @property
    def label(self) -> str: ...
    @property
    def sinkhorn_eps(self) -> float: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def leave(self) -> str: ...


class ManifoldParameters(NamedTuple):
    """The parameters of one site.

    Shapes: mapping_weight (n*m + n + n*n, n*c) and mapping_bias (n*m + n + n*n,), rows pre, post, res; mapping_scale
    (3,), one for each.
    """

    mapping_weight: "Tensor"
    mapping_bias: "Tensor"
    mapping_scale: "Tensor"


PARAMETER_NAMES: tuple[str, ...] = ManifoldParameters._fields
LEAVE_NAMES = ("leave_weight", "leave_bias", "leave_scale")


def blocks(slots: int, fractions: int) -> tuple[int, int, int]:
    """Rows of W for gamma, beta and alpha."""
    return slots * fractions, slots, slots * slots


def parameter_shapes(config: OnManifold, stream_width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a site's parameters by name, in order.

    Bias and scales have one dimension and W has two, so that W alone decays under Megatron's rule.
    """
    rows = sum(blocks(config.slots, config.fractions))
    return {"mapping_weight": (rows, stream_width), "mapping_bias": (rows,), "mapping_scale": (3,)}


def leave_shapes(config: OnManifold, stream_width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a learned leave's parameters: a gamma of its own for one fraction."""
    return {"leave_weight": (config.slots, stream_width), "leave_bias": (config.slots,), "leave_scale": (1,)}


def residual_bias(slots: int) -> float:
    """The bias at which n equal streams are read as one of them, n sigmoid(bias) = 1."""
    return -math.log(slots - 1)


def is_identity(config: OnManifold, name: str, tensor: "Tensor") -> bool:
    """True of mHC if the scales are 0, which switches W off, and the bias makes beta 1 and gamma 1/n; of a leave alike.

    The streams are then equal for ever, and alpha, whatever it is, carries each to itself.
    """
    n = config.slots
    if name in ("mapping_scale", "leave_scale"):
        return not bool(tensor.any())
    if name in ("mapping_bias", "leave_bias"):
        pre, post = tensor[..., :n], tensor[..., n : 2 * n]
        return bool((pre - residual_bias(n)).abs().max() < 1e-6) and not bool(post.any())
    return True


def recognise[Kind: ConnectionConfig](kind: type[Kind], sizes: Mapping[str, int]) -> Kind | None:
    """`ConnectionConfig.recognise`: n and m from the number of rows, of which mHC's are the first guess."""
    rows, width = sizes.get("mapping_bias", 0), sizes.get("mapping_weight", 0)
    learned = "leave_weight" in sizes
    shapes = ((n, m) for n in range(1, rows) for m in (1, n) if sum(blocks(n, m)) == rows and width % n == 0)
    for n, m in shapes:
        options: dict[str, Any] = {"slots": n, "fractions": m, "leave": "learned" if learned and m < n else "mean"}
        config = kind(**options)
        if config.last_dimensions(width * m // n) == dict(sizes):
            return config
    return None


def check_options(config: OnManifold) -> None:
    """Check the shape, and that every epsilon is positive.

    Raises:
        UserError: names the option.
    """
    n, m = config.slots, config.fractions
    if m not in (1, n):
        raise UserError(f"fractions={m} is neither 1 (mHC) nor slots={n} (mFC): use one of the two")
    for name in ("sinkhorn_eps", "norm_eps"):
        value = getattr(config, name)
        if value <= 0:
            raise UserError(f"{name} must be greater than 0, not {value!r}: use 1e-6")
    if config.leave == "learned" and m == n:
        raise UserError(f"leave=learned has nothing to choose from in {config.label}, which is one stream: drop it")
