"""Coefficients predicted slot by slot, which Frac- and Hyper-Connections share: their parameters and options.

Row j of every table comes from slot j alone: beta_j, gamma_j1..jm and alpha_j1..jn are static values plus, if dynamic,
scale * tanh(norm(h_j) W), with one norm and one W for all slots (arXiv 2503.14125 eq. 9-14; 2409.19606 eq. 10-13).
beta may be dynamic by itself, or gamma and alpha together (2503.14125, Algorithm 2). Loads no torch.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_OF_THE_DYNAMIC_PART = ("norm", "norm_affine", "tanh", "scale", "initial_scale", "norm_eps")


class PerSlot(Protocol):
    """A configuration of such a kind.

    Attributes:
        slots, fractions: n and m.
        dynamic: coefficients are predicted per token, else static.
        dynamic_beta, dynamic_alpha: None as `dynamic` says; False keeps beta, or gamma and alpha, static.
        norm: of each slot before the prediction, or none.
        norm_affine: that norm has a weight.
        scale: the prediction is multiplied by learned scalars, one for beta, one for gamma and alpha.
    """

    @property
    def slots(self) -> int: ...
    @property
    def fractions(self) -> int: ...
    @property
    def dynamic(self) -> bool: ...
    @property
    def dynamic_beta(self) -> bool | None: ...
    @property
    def dynamic_alpha(self) -> bool | None: ...
    @property
    def norm(self) -> str: ...
    @property
    def norm_affine(self) -> bool: ...
    @property
    def scale(self) -> bool: ...


class PerSlotParameters(NamedTuple):
    """The parameters of one site, None for those that its configuration does not have.

    Shapes: static_beta (n,), static_gamma (n*m,) and static_alpha (n*n,) row-major, dynamic_weight (1+m+n, c) with
    rows beta, gamma_1..m, alpha_1..n of which static ones are left out, scale_beta and scale_alpha (1,), norm_weight
    (c,).
    """

    static_beta: "Tensor"
    static_gamma: "Tensor"
    static_alpha: "Tensor"
    dynamic_weight: "Tensor | None" = None
    scale_beta: "Tensor | None" = None
    scale_alpha: "Tensor | None" = None
    norm_weight: "Tensor | None" = None


PARAMETER_NAMES: tuple[str, ...] = PerSlotParameters._fields


def predicts_beta(config: PerSlot) -> bool:
    """Whether beta has a dynamic part."""
    return config.dynamic and config.dynamic_beta is not False


def predicts_alpha(config: PerSlot) -> bool:
    """Whether gamma and alpha have a dynamic part."""
    return config.dynamic and config.dynamic_alpha is not False


def parameter_shapes(config: PerSlot, slot_width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a site's parameters by name, in order.

    Statics, scales and the norm's weight have one dimension and W has two, which gives them the papers' weight decay
    under Megatron's rule.
    """
    n, m = config.slots, config.fractions
    shapes: dict[str, tuple[int, ...]] = {"static_beta": (n,), "static_gamma": (n * m,), "static_alpha": (n * n,)}
    if config.dynamic:
        beta, alpha = predicts_beta(config), predicts_alpha(config)
        shapes["dynamic_weight"] = (beta + alpha * (m + n), slot_width)
        if config.scale:
            shapes |= {"scale_beta": (1,)} if beta else {}
            shapes |= {"scale_alpha": (1,)} if alpha else {}
        if config.norm != "none" and config.norm_affine:
            shapes["norm_weight"] = (slot_width,)
    return shapes


def set_initial_values(p: PerSlotParameters, config: ConnectionConfig, sub_layer: int = 0) -> None:
    """Fill with beta = 1, alpha = I, W = 0, and every fraction read from one slot that stands for it.

    Fraction i is read from slot i; of whole streams every sub-layer reads the next, k mod n.
    """
    n, m = config.slots, config.fractions
    first = sub_layer % n if m == 1 else 0
    p.static_beta.fill_(1)
    p.static_gamma.fill_(0).view(n, m)[first : first + m].diagonal().fill_(1)
    p.static_alpha.fill_(0).view(n, n).diagonal().fill_(1)
    scale = config.to_dict()["initial_scale"]
    for tensor, value in ((p.dynamic_weight, 0), (p.scale_beta, scale), (p.scale_alpha, scale), (p.norm_weight, 1)):
        if tensor is not None:
            tensor.fill_(value)


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


def recognise[Kind: ConnectionConfig](
    kind: type[Kind], shape: Mapping[str, int], sizes: Mapping[str, int]
) -> Kind | None:
    """`ConnectionConfig.recognise` for a kind whose options `shape` set n and m."""
    options: dict[str, Any] = {**shape, "dynamic": "dynamic_weight" in sizes}
    if options["dynamic"]:
        scales = {name for name in ("scale_beta", "scale_alpha") if name in sizes}
        options |= {"scale": bool(scales), "norm": "rmsnorm" if "norm_weight" in sizes else "none"}
        if len(scales) == 1:
            options["dynamic_alpha" if "scale_beta" in scales else "dynamic_beta"] = False
    try:
        config = kind(**options)
    except UserError:  # no such shape
        return None
    hidden_size = config.fractions * sizes.get("dynamic_weight", 1)
    return config if config.last_dimensions(hidden_size) == dict(sizes) else None


def slots_and_fractions(sizes: Mapping[str, int]) -> tuple[int, int]:
    """n and m of a site whose parameters have these last dimensions; 0 and 0 if it is of another kind."""
    n = sizes.get("static_beta", 0)
    return n, sizes.get("static_gamma", 0) // n if n else 0


def description(config: PerSlot, label: str) -> str:
    """Such connections in words: the label, and which parts of the prediction are left out with their parameters."""
    parts = (
        ("dynamic beta", predicts_beta(config)),
        ("dynamic alpha", predicts_alpha(config)),
        ("scale", config.scale),
        ("norm", config.norm != "none"),
        ("a weight of the norm", config.norm == "none" or config.norm_affine),
    )
    lacks = [what for what, has in parts if not has]
    return f"{label} connections" + (f" without {' and '.join(lacks)}" if config.dynamic and lacks else "")


def check_options(config: ConnectionConfig) -> None:
    """Check that the norm's epsilon is positive, and that no option is set where it would do nothing.

    An option that only repeats `dynamic` is set to None, so that configurations which mean the same are equal.

    Raises:
        UserError: names the option.
    """
    values = config.to_dict()
    if values["norm_eps"] < 1e-30:  # too little for fp32
        raise UserError(f"norm_eps must be at least 1e-30, not {values['norm_eps']!r}: use 1e-5")
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
    if values["norm"] == "none" and not values["norm_affine"]:
        raise UserError("norm_affine=False has no effect with norm=none: drop one of the two")
    _check_switches(config, values)


def _check_switches(config: ConnectionConfig, values: Mapping[str, Any]) -> None:
    """`dynamic_beta` and `dynamic_alpha` go with `dynamic`, or one of them says otherwise."""
    switches = {"dynamic_beta": values["dynamic_beta"], "dynamic_alpha": values["dynamic_alpha"]}
    for name, value in switches.items():
        other = next(switch for switch in switches if switch != name)
        if value and not values["dynamic"]:
            raise UserError(f"{name}=True contradicts dynamic=false: set dynamic=true and {other}=false")
        if value == values["dynamic"]:
            object.__setattr__(config, name, None)
    if values["dynamic"] and set(switches.values()) == {False}:
        raise UserError("dynamic_beta=False and dynamic_alpha=False leave nothing dynamic: set dynamic=false instead")
