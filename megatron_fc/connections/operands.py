"""A site as the arguments of an operation, tensors and plain values, which is all that torch.compile passes on."""

from functools import cache
from typing import Any

from megatron_fc.connections.config import FracConfig
from megatron_fc.connections.reference import FracParameters

N_PARAMETERS = len(FracParameters._fields)
N_SITE = N_PARAMETERS + 4


def site_words(p: FracParameters, config: FracConfig) -> tuple[Any, ...]:
    """The parameters, rate, norm, tanh and norm_eps."""
    return (*p, config.rate, config.norm, config.tanh, config.norm_eps)


def site_of(words: tuple[Any, ...]) -> tuple[FracParameters, FracConfig]:
    """The reverse of `site_words`; of the configuration, what an operation needs."""
    p = FracParameters(*words[:N_PARAMETERS])
    return p, _config(p.dynamic_weight is not None, p.scale_beta is not None, *words[N_PARAMETERS:])


@cache
def _config(dynamic: bool, scale: bool, rate: int, norm: Any, tanh: bool, norm_eps: float) -> FracConfig:
    if not dynamic:
        return FracConfig(rate=rate, dynamic=False)
    return FracConfig(rate=rate, norm=norm, tanh=tanh, scale=scale, norm_eps=norm_eps)
