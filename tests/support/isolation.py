"""A token that is not finite, and what it must not reach."""

from collections.abc import Callable
from dataclasses import replace

import torch

from megatron_fc.connections.norm import HandsOutWeights
from support.kernel_reference import Case

Streams = dict[str, torch.Tensor]


class RMSNorm(HandsOutWeights, torch.nn.RMSNorm): ...


class LayerNorm(HandsOutWeights, torch.nn.LayerNorm): ...


def stays_alone(case: Case, bad: float, backend: str) -> None:
    """`reaches_its_own_token` of a site under autograd, as a user calls it."""
    site = replace(case.config, backend=backend).build(case.o.shape[1])
    with torch.no_grad():
        for parameter, values in zip(site.parameters(), filter(None.__ne__, case.p), strict=True):
            parameter.copy_(values)
    kind = None if case.norm is None else {"rmsnorm": RMSNorm, "layernorm": LayerNorm}[case.norm.kind]
    norm = None if kind is None else kind(case.o.shape[1], eps=1e-5, dtype=case.h.dtype)

    def run(given: Streams) -> Streams:
        h, o = given["h"].requires_grad_(), given["o"].requires_grad_()
        x, handover = site(h, norm, hand_over=True)
        following = site.depth(o, h, handover)
        g_h, g_o = torch.autograd.grad([x, following], [h, o], [given["g_x"], given["g"]])
        return {"x": x, "following": following, "g_h": g_h, "g_o": g_o}

    reaches_its_own_token(case, bad, run)


def reaches_its_own_token(case: Case, bad: float, run: Callable[[Streams], Streams]) -> None:
    """Neither a value of a token's stream, nor one of its gradients, those of x and of the next stream, changes another
    token; and none becomes finite.

    `run` makes x, the following stream, g_h and g_o from h, o, g_x and g.
    """
    token, column = 1, 7

    def results(where: str | None) -> Streams:
        given = {"h": case.h.clone(), "o": case.o.clone(), "g_x": case.g_x.clone(), "g": case.g_mixed.clone()}
        if where is not None:
            given[where][token, column] = bad
        return run(given)

    clean = results(None)
    others = torch.arange(len(case.h)) != token
    for where, reached in {"h": ("x", "following"), "g_x": ("g_h",), "g": ("g_h", "g_o")}.items():
        for result, values in results(where).items():
            assert torch.equal(values[others], clean[result][others]), (where, result)
            assert result not in reached or not values[token].isfinite().all(), (where, result)
