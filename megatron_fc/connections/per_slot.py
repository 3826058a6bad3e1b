"""Coefficients predicted slot by slot, which Frac- and Hyper-Connections share: their parameters and options.

Row j of every table comes from slot j alone: beta_j, gamma_j1..jm and alpha_j1..jn are static values plus, if dynamic,
scale * tanh(norm(h_j) W), with one norm and one W for all slots (arXiv 2503.14125 eq. 9-14; 2409.19606 eq. 10-13).
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Protocol

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

PARAMETER_NAMES = (
    "static_beta",
    "static_gamma",
    "static_alpha",
    "dynamic_weight",
    "scale_beta",
    "scale_alpha",
    "norm_weight",
)
_OF_THE_DYNAMIC_PART = ("norm", "tanh", "scale", "initial_scale", "norm_eps")


class PerSlot(Protocol):
    """A configuration of such a kind.

    Attributes:
        slots, fractions: n and m.
        dynamic: coefficients are predicted per token, else static.
        norm: of each slot before the prediction, or none.
        scale: the prediction is multiplied by learned scalars, one for beta, one for gamma and alpha.
    """

    @property
    def slots(self) -> int: ...
    @property
    def fractions(self) -> int: ...
    @property
    def dynamic(self) -> bool: ...
    @property
    def norm(self) -> str: ...
    @property
    def scale(self) -> bool: ...


def parameter_shapes(config: PerSlot, slot_width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a site's parameters by name, in order.

    Statics, scales and the norm's weight have one dimension and W has two, which gives them the papers' weight decay
    under Megatron's rule. Tables are row-major; the rows of W are beta, gamma_1..m, alpha_1..n.
    """
    n, m = config.slots, config.fractions
    shapes: dict[str, tuple[int, ...]] = {"static_beta": (n,), "static_gamma": (n * m,), "static_alpha": (n * n,)}
    if config.dynamic:
        shapes["dynamic_weight"] = (1 + m + n, slot_width)
        if config.scale:
            shapes |= {"scale_beta": (1,), "scale_alpha": (1,)}
        if config.norm != "none":
            shapes["norm_weight"] = (slot_width,)
    return shapes


def is_identity(config: PerSlot, name: str, tensor: "Tensor") -> bool:
    """True if beta is 1, gamma takes every fraction from one slot that stands for it, alpha is I, or W is 0.

    The slots that stand for a fraction are then equal for ever, so it is the same from which of them gamma takes it.
    """
    n, m = config.slots, config.fractions
    if name == "static_beta":
        return bool((tensor == 1).all())
    if name == "static_gamma":
        return all(_selects(table, m) for table in tensor.reshape(-1, n, m).tolist())
    if name == "static_alpha":
        identity = [[float(i == j) for j in range(n)] for i in range(n)]
        return all(table == identity for table in tensor.reshape(-1, n, n).tolist())
    return name != "dynamic_weight" or not bool(tensor.any())


def _selects(table: list[list[float]], fractions: int) -> bool:
    """Whether column i of a table [n, m] is a single 1, in a row that is i modulo m."""
    columns = ([row[i] for row in table] for i in range(fractions))
    return all(
        sorted(column) == [0.0] * (len(table) - 1) + [1.0] and column.index(1.0) % fractions == i
        for i, column in enumerate(columns)
    )


def recognise[Kind: ConnectionConfig](kind: type[Kind], option: str, sizes: Mapping[str, int]) -> Kind | None:
    """`ConnectionConfig.recognise` for a kind whose field `option` sets n."""
    if "static_beta" not in sizes:
        return None
    options: dict[str, Any] = {option: sizes["static_beta"], "dynamic": "dynamic_weight" in sizes}
    if options["dynamic"]:
        options |= {"scale": "scale_beta" in sizes, "norm": "rmsnorm" if "norm_weight" in sizes else "none"}
    config = kind(**options)
    hidden_size = config.fractions * sizes.get("dynamic_weight", 1)
    return config if config.last_dimensions(hidden_size) == dict(sizes) else None


def description(config: PerSlot, label: str) -> str:
    """Such connections in words: the label, and which parts of the prediction are left out with their parameters."""
    lacks = [what for what, has in (("scale", config.scale), ("norm", config.norm != "none")) if not has]
    return f"{label} connections" + (f" without {' and '.join(lacks)}" if config.dynamic and lacks else "")


def check_options(config: ConnectionConfig) -> None:
    """Check that the norm's epsilon is positive, and that no option is set where it would do nothing.

    Raises:
        UserError: names the option.
    """
    values = config.to_dict()
    if values["norm_eps"] <= 0:
        raise UserError(f"norm_eps must be greater than 0, not {values['norm_eps']!r}: use 1e-5")
    for field in fields(config):
        value = values[field.name]
        if not values["dynamic"] and field.name in _OF_THE_DYNAMIC_PART and value != field.default:
            raise UserError(
                f"{field.name}={value!r} has no effect on static connections (dynamic=false): "
                f"drop it or set dynamic=true"
            )
    if not values["scale"] and values["initial_scale"] != 0.01:
        value = values["initial_scale"]
        raise UserError(f"initial_scale={value!r} has no effect with scale=false: drop one of the two")
