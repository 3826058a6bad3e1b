"""The choice between main and general kernels: what the main ones do, and which run, said once."""

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from megatron_fc.connections.kernels.gluon.cuts import Direction, Main, first_of, planned, planned_depth
from megatron_fc.connections.kernels.tiles import Site
from megatron_fc.connections.norm import NormWeights
from megatron_fc.connections.operands import Operands

VERIFIED = "3.6."  # of Triton, whose Gluon is experimental


class Call(NamedTuple):
    """What of a call's tensors decides: dtypes of rows and of values, and what is there."""

    rows: frozenset[torch.dtype]
    values: frozenset[torch.dtype]
    all_there: bool
    aligned: bool
    plain: bool


def main_forward(
    site: Site, h: Tensor, x: Tensor | None, depth: Any, p: Operands, norm: NormWeights | None
) -> Main | None:
    """The main kernel for a forward pass that the general one would run as `site`, None if it cannot.

    depth: `DepthInputs`.
    """
    before = (depth.o, depth.h, depth.beta, depth.alpha) if depth.o is not None else ()
    return _main("forward", site, [h, x, *before[:2]], before[2:], depth, p, norm)


def main_backward(
    site: Site, h: Tensor, gradients: Sequence[Tensor | None], depth: Any, p: Operands, norm: NormWeights | None
) -> Main | None:
    """The main kernel for a backward pass that the general one would run as `site`, None if it cannot.

    gradients: of x, of the mixed residual and of beta; depth: `DepthInputs`.
    """
    *streams, g_beta = gradients
    before = (depth.o, depth.beta) if depth.o is not None else ()
    return _main("backward", site, [h, *streams, *before[:1]], [g_beta, *before[1:]], depth, p, norm)


def main_given(
    direction: Direction,
    site: Site,
    rows: Sequence[Tensor | None],
    values: Sequence[Tensor],
    norm: NormWeights | None,
) -> Main | None:
    """The main kernel for a width connection whose coefficients are given, as `values`, None if it cannot.

    rows: h and x, or h and the gradients of x and of the mixed residual.
    """
    return _chosen_for(direction, site, _call(rows, values), rows, norm, boundary=False, given=True)


def main_depth(site: Site, out: Tensor, depth: Any) -> Main | None:
    """The main kernel for a depth connection alone that the general one would run as `site`, None if it cannot."""
    call = _call((out, depth.o, depth.h), (depth.beta, depth.alpha), depth)
    return _chosen_for_depth(site, call, out.device, triton.__version__)


@functools.cache
def _chosen_for_depth(site: Site, call: Call, device: torch.device, version: str) -> Main | None:
    """That the main kernel runs is said once; why it does not, boundaries say."""
    if not version.startswith(VERIFIED) or _obstacle(call) or _obstacle_on(device):
        return None
    if (main := planned_depth(site, _room(device))) is not None:
        logging.getLogger("megatron_fc").info("Depth connections of %s run forward on the main kernel", _shape(site))
    return main


def _main(
    direction: Direction,
    site: Site,
    rows: Sequence[Tensor | None],
    values: Sequence[Tensor | None],
    depth: Any,
    p: Operands,
    norm: NormWeights | None,
) -> Main | None:
    """rows: of d elements per token; values: in fp32, few per token."""
    call = _call(rows, values, depth)
    call = call._replace(values=call.values | {t.dtype for t in p.parameters if t is not None})
    return _chosen_for(direction, site, call, rows, norm, boundary=depth.o is not None, given=False)


def _chosen_for(
    direction: Direction,
    site: Site,
    call: Call,
    rows: Sequence[Tensor | None],
    norm: NormWeights | None,
    boundary: bool,
    given: bool,
) -> Main | None:
    weights = norm[1:3] if norm is not None else ()
    call = call._replace(rows=call.rows | {t.dtype for t in weights if t is not None})
    device = next(t.device for t in rows if t is not None)
    return _chosen(direction, site, boundary, given, call, device, triton.__version__)


def _call(rows: Sequence[Tensor | None], values: Sequence[Tensor | None], depth: Any = None) -> Call:
    there = [t for t in rows if t is not None]
    return Call(
        rows=frozenset(t.dtype for t in there),
        values=frozenset(t.dtype for t in values if t is not None),
        all_there=not any(t is None for t in (*rows, *values)),
        aligned=all(t.data_ptr() % 16 == 0 for t in there),
        plain=depth is None or (depth.bias is None and depth.seed is None),
    )


@functools.cache
def _chosen(
    direction: Direction, site: Site, boundary: bool, given: bool, call: Call, device: torch.device, version: str
) -> Main | None:
    """Which kernel runs is said once for each kind of call."""
    tested = version.startswith(VERIFIED)
    if tested:
        found = _obstacle(call) or _obstacle_on(device) or planned(direction, site, boundary, _room(device), given)
    else:
        found = f"the main one was verified with Triton {VERIFIED}*, not with {version}"
    what = f"{'Boundaries' if boundary else 'Width connections'} of {_shape(site)}"
    what += ", coefficients given," if given else ""
    logger = logging.getLogger("megatron_fc")
    if isinstance(found, Main):
        logger.info("%s run %s on the main kernel", what, direction)
        return found
    (logger.info if tested else logger.warning)("%s run %s on the general kernel: %s", what, direction, found)
    return None


def _shape(site: Site) -> str:
    return f"d = {site.M * site.C}, m = {site.M}, n = {site.N}"


def _obstacle(call: Call) -> str | None:
    """What of a call the main kernels do not do."""
    return first_of(
        {
            f"streams in {', '.join(sorted(map(str, call.rows)))}": call.rows
            not in ({torch.bfloat16}, {torch.float16}),
            "parameters or coefficients that are not in fp32": bool(call.values - {torch.float32}),
            "absent inputs or gradients": not call.all_there,
            "tensors off 16-byte boundaries": not call.aligned,
            "bias or dropout of an output": not call.plain,
        }
    )


def _obstacle_on(device: torch.device) -> str | None:
    if triton.knobs.runtime.interpret:
        return "Triton's interpreter does not run Gluon"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda" or target.arch < 80:
        return f"the main one is for sm_80 and later, {device} is {target.backend} {target.arch}"
    return None


@functools.cache
def _room(device: torch.device) -> int:
    """Shared memory that a program may have on a device, in bytes."""
    driver: Any = triton.runtime.driver.active
    properties: dict[str, int] = driver.utils.get_device_properties(device.index or 0)
    return properties["max_shared_mem"]
