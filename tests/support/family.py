"""Members of the family of connections that tests go through, and sites without any symmetry."""

import itertools
from typing import Any

import torch
from torch import Tensor

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.reference import Config

_OPTIONS: list[dict[str, Any]] = [
    {"norm": norm, "tanh": tanh, "scale": scale}
    for norm, tanh, scale in itertools.product(("rmsnorm", "layernorm", "none"), (True, False), (True, False))
    if (norm, tanh, scale) != ("rmsnorm", True, True)
]
_PARTS: list[dict[str, Any]] = [
    {"dynamic_beta": False},
    {"dynamic_alpha": False},
    {"dynamic_alpha": False, "scale": False, "norm": "none"},
    {"dynamic_beta": False, "scale": False},
    {"norm_affine": False},
    {"norm": "layernorm", "norm_affine": False},
]
# n and m: Hyper-Connections, and the shapes between, in which cycles are not blocks.
_SHAPES = [(1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (6, 3), (8, 2)]

FRAC: list[Config] = [
    *(FracConfig(rate=rate, dynamic=dynamic) for rate, dynamic in itertools.product((1, 2, 3, 4, 8), (True, False))),
    *(FracConfig(rate=rate, **options) for rate in (2, 3) for options in _OPTIONS),
    *(FracConfig(rate=3, **options) for options in _PARTS),
]
HYPER: list[Config] = [
    *(HyperConfig(slots=n, fractions=m, dynamic=dynamic) for (n, m) in _SHAPES for dynamic in (True, False)),
    *(HyperConfig(slots=6, fractions=3, **options) for options in (_OPTIONS[0], *_PARTS)),
    HyperConfig(slots=4, norm="none", tanh=False, scale=False),
    HyperConfig(slots=2, norm="layernorm"),
]
MANIFOLD: list[Config] = [
    *(ManifoldConfig(slots=n) for n in (1, 2, 3, 4)),
    *(ManifoldConfig(slots=n, fractions=n) for n in (2, 3, 4)),
    ManifoldConfig(slots=3, sinkhorn_iterations=1, sinkhorn_eps=1e-2, norm_eps=0.3),
]
MEMBERS: list[Config] = [*FRAC, *HYPER, *MANIFOLD]


def name(config: Config) -> str:
    """For a test's id: the label and every option that is not at its default."""
    default = type(config)().to_dict()
    shape = ("rate", "slots", "fractions", "dynamic")
    options = [
        f"{key}={value}" for key, value in config.to_dict().items() if key not in shape and value != default[key]
    ]
    return "-".join([config.label, *options])


def random_parameters(config: Config, hidden_size: int) -> list[Tensor]:
    """A site's parameters without any symmetry, of order one, whose values fp32 holds: every precision sees the same.

    W is scaled down by the square root of its width, or wide ones would saturate tanh and sigmoids.
    """
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator) * (0.7 if len(shape) == 1 else shape[1] ** -0.5)
        for shape in config.parameter_shapes(hidden_size).values()
    ]


def random_site(config: Config, hidden_size: int) -> Any:
    """A site in float64 with `random_parameters`."""
    site: Any = config.build(hidden_size)
    site = site.double()
    with torch.no_grad():
        for parameter, values in zip(site.parameters(), random_parameters(config, hidden_size), strict=True):
            parameter.copy_(values)
    return site


def random_streams(config: Config, hidden_size: int, *leading: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """A stream h [..., n*c] and a sub-layer's output o [..., d] in float64, to be differentiated."""
    generator = torch.Generator().manual_seed(seed)
    widths = (config.stream_width(hidden_size), hidden_size)
    h, o = (torch.randn(*leading, width, generator=generator, dtype=torch.float64) for width in widths)
    return h.requires_grad_(), o.requires_grad_()
