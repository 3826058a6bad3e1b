"""Who is measured on an operation: our backends, the reference, and who `rivals.py` has."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from case import Absent, Case, Program, rms_norm
from megatron_fc import FracConnection
from megatron_fc.connections import HyperConfig, reference
from megatron_fc.connections.costs import traffic
from megatron_fc.connections.costs.traffic import Moves, Stream
from megatron_fc.connections.handover import Handover
from megatron_fc.connections.kernels.availability import triton_obstacle
from megatron_fc.connections.site import PendingDepth
from rivals import hyper_connections, liger_mhc, megatron

# What each operation moves: ours, and Megatron's with and without `fused_residual_rmsnorm`.
OPERATIONS = {
    "layer": traffic.layer_alone,
    "boundary": traffic.boundary,
    "width+norm": traffic.width_norm,
    "depth": traffic.depth,
    "width": traffic.width,
}
STOCK: dict[str, Callable[[Stream], Moves]] = {
    "layer": traffic.residual,
    "boundary": lambda s: traffic.bias_dropout_add(s) + traffic.norm(s) + traffic.gradient_sum(s),
    "width+norm": traffic.norm,
    "depth": traffic.bias_dropout_add,
}
FUSED_RESIDUAL: dict[str, Callable[[Stream], Moves]] = {
    "layer": traffic.fused_residual,
    "boundary": lambda s: traffic.bias_dropout_add(s) + traffic.fused_residual_norm(s),
    "width+norm": traffic.fused_residual_norm,
}
FUSED, EAGER, COMPILED = "fused kernels", "eager reference", "torch.compile of the reference"


class Contestant(NamedTuple):
    """`moves` is its own work, None where that is the operation's; `ours` must not fail."""

    name: str
    build: Callable[[], Program]
    moves: Callable[[Stream], Moves] | None = None
    ours: bool = False


def contestants(operation: str, case: Case) -> Iterator[Contestant]:
    """All contestants of an operation, ours first."""
    yield Contestant(FUSED, partial(_ours, operation, case, "triton"), ours=True)
    if operation == "layer":
        build = partial(_ours, operation, case, "triton", boundary=False)
        yield Contestant(
            "fused kernels, no boundary", build, partial(traffic.layer_in_two_operations, config=case.config), ours=True
        )
    yield Contestant("torch backend", partial(_ours, operation, case, "torch"), ours=True)
    yield Contestant(EAGER, partial(_reference, operation, case, compiled=False))
    yield Contestant(COMPILED, partial(_reference, operation, case, compiled=True))
    stock = partial(megatron, operation, case)
    if operation == "depth":
        yield Contestant("Megatron, bias-dropout-add", partial(stock, "torch"), STOCK[operation])
    elif operation in STOCK:
        yield Contestant("Megatron, torch norm", partial(stock, "torch"), STOCK[operation])
        yield Contestant("Megatron, TE norm", partial(stock, "te"), STOCK[operation])
        name = "Megatron, fused_residual_rmsnorm"
        yield Contestant(name, partial(stock, "fused_residual"), FUSED_RESIDUAL[operation])
    if operation == "layer":
        moves = partial(traffic.hyper_ideal, config=HyperConfig(slots=4))
        yield Contestant("Liger mHC, 4 streams: not FC", partial(liger_mhc, case), moves)
        yield Contestant("hyper-connections, num_fracs: not FC", partial(hyper_connections, case))


def _ours(operation: str, case: Case, backend: str, boundary: bool = True) -> Program:
    if operation == "boundary" and backend == "torch":
        raise Absent("this backend has no boundary: it runs depth and width connection one after the other")
    obstacle = triton_obstacle(case.device.type, case.dtype) if backend == "triton" else None
    if obstacle:
        raise Absent(obstacle)
    first, second = (_on(backend, site) for site in case.sites)
    h, (o, o2) = case.h, case.o
    norm, norm2 = (case.norm(number) for number in range(2))
    parameters, parameters2 = ([*site.parameters(), n.weight] for site, n in ((first, norm), (second, norm2)))
    given = _handed_over(case, backend)

    def layer() -> Sequence[Tensor]:
        x, handover = first(h, norm, hand_over=True)
        if boundary and backend == "triton":
            h2, prepared = second(PendingDepth(o, h, handover), norm2)
        else:
            h2, prepared = first.depth(o, h, handover), None
        x2, handover2 = second(h2, norm2, hand_over=True, prepared=prepared)
        return x, x2, second.depth(o2, h2, handover2)

    def plain() -> Sequence[Tensor]:
        x, handover = first(h, hand_over=True)
        return x, handover.beta, handover.mixed

    def normed() -> Sequence[Tensor]:
        x, handover = first(h, norm, hand_over=True)
        return x, handover.beta, handover.mixed

    def depth() -> Sequence[Tensor]:
        return [first.depth(o, h, given)]

    def meeting() -> Sequence[Tensor]:
        h2, prepared = second(PendingDepth(o, h, given), norm2)
        x, handover = second(h2, norm2, hand_over=True, prepared=prepared)
        return x, handover.beta, handover.mixed

    incoming = [case.g_x, case.g_beta, case.g_h]
    return {
        "width": Program(plain, [h, *first.parameters()], incoming),
        "width+norm": Program(normed, [h, *parameters], incoming),
        "depth": Program(depth, [o, given.beta, given.mixed], [case.g_h]),
        "boundary": Program(meeting, [o, given.beta, given.mixed, *parameters2], incoming),
        "layer": Program(layer, [h, o, o2, *parameters, *parameters2], [case.g_x, case.g_x2, case.g_h]),
    }[operation]


def _handed_over(case: Case, backend: str) -> Handover:
    """What the width connection of the first site hands over, to be differentiated."""
    with torch.no_grad():
        _, given = _on("torch", case.sites[0])(case.h, hand_over=True)
    return Handover(given.beta.requires_grad_(), given.alpha, given.mixed.requires_grad_(), backend)


def _on(backend: str, site: FracConnection) -> FracConnection:
    site = copy.deepcopy(site)
    site.config = replace(site.config, backend=backend)
    return site


def _reference(operation: str, case: Case, compiled: bool) -> Program:
    """`megatron_fc.connections.reference`. Alone, its depth connection computes the coefficients from h, as it must."""
    config = case.config
    first, second = (site.site_parameters() for site in case.sites)
    h, (o, o2) = case.h, case.o
    weight, weight2 = case.norms

    def width() -> Sequence[Tensor]:
        return [reference.width(h, first, config)]

    def normed() -> Sequence[Tensor]:
        return [rms_norm(reference.width(h, first, config), weight)]

    def depth() -> Sequence[Tensor]:
        return [reference.depth(o, h, first, config)]

    def boundary() -> Sequence[Tensor]:
        h2 = reference.depth(o, h, first, config)
        return h2, rms_norm(reference.width(h2, second, config), weight2)

    def layer() -> Sequence[Tensor]:
        x = rms_norm(reference.width(h, first, config), weight)
        h2, x2 = boundary()
        return x, x2, reference.depth(o2, h2, second, config)

    parameters, parameters2 = ([*site.parameters(), w] for site, w in zip(case.sites, case.norms, strict=True))
    both = [*parameters, *parameters2]
    program = {
        "width": Program(width, [h, *parameters[:-1]], [case.g_x]),
        "width+norm": Program(normed, [h, *parameters], [case.g_x]),
        "depth": Program(depth, [h, o, *parameters[:-1]], [case.g_h]),
        "boundary": Program(boundary, [h, o, *both], [case.g_h, case.g_x]),
        "layer": Program(layer, [h, o, o2, *both], [case.g_x, case.g_x2, case.g_h]),
    }[operation]
    if not compiled:
        return program
    torch._dynamo.reset()
    # Inductor would need a C++ toolchain on a CPU, where nothing is measured anyway.
    backend = "inductor" if case.device.type == "cuda" else "aot_eager"
    return replace(program, forward=torch.compile(program.forward, backend=backend, fullgraph=True, dynamic=False))
