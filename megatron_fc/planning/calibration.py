"""Shares of a data sheet that training reaches: constants of each family of GPUs, fitted to published runs, and errors.

`calibration.json` is written by `benchmarks/fit_plan.py`, which has the rows, the fit and what it leaves unexplained.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import exp, log2
from pathlib import Path
from typing import Any

from megatron_fc.errors import UserError
from megatron_fc.planning.devices import Device
from megatron_fc.planning.shape import Products

DATA = Path(__file__).with_suffix(".json")
# Of the speed that other operations reach in memory, kernels of connections, at worst: docs/kernels.md predicts it.
SLOWEST = {"main": 0.6, "general": 0.3, "torch": 0.7}


@dataclass(frozen=True)
class Assumptions:
    """What of its data sheet a machine reaches.

    Attributes:
        compute: of the dense peak, by products so large that their bytes do not count, in the precision of linear
            layers; compute_half: in 16 bits, by attention and the output layer.
        memory: of the memory's bandwidth.
        nvlink, network: of the links' bandwidth, inside an NVLink domain and between them.
        launch: microseconds that the host needs for a kernel, its share of Python included.
        connections: of the memory's share, by the kernels of connections.
        reserve: of the memory, for CUDA, NCCL, workspaces and fragmentation.
    """

    compute: float
    compute_half: float
    memory: float
    nvlink: float
    network: float
    launch: float
    connections: float = 1.0
    reserve: float = 0.1

    def __post_init__(self) -> None:
        refuse_impossible(vars(self))


def refuse_impossible(values: Mapping[str, float]) -> None:
    """Check constants by their names.

    Raises:
        UserError: one is no share, or no time.
    """
    for name, value in values.items():
        if name == "launch":
            if not value >= 0:
                raise UserError(f"launch={value} must be at least 0: it is in microseconds")
        elif not 0 < value <= 1:
            raise UserError(f"{name}={value} must be greater than 0 and at most 1: it is a share")


@dataclass(frozen=True)
class Nearest:
    """The published run that is most like a planned one.

    Attributes:
        name: release, system, model.
        times: by how much the most different size differs, at least 1.
        size: that one.
    """

    name: str
    times: float
    size: str


@cache
def _data() -> dict[str, Any]:
    return dict(json.loads(DATA.read_text(encoding="utf-8")))


def assumptions(gpu: Device, products: Products, without: str | None = None, reserve: float = 0.1) -> Assumptions:
    """The constants of a GPU's family.

    Args:
        gpu: one that no published run has used takes those of its family.
        products: precision of linear layers.
        without: a model whose runs are left out of the fit, None for all runs.
        reserve: of the memory, which is no constant of the fit.
    """
    data = _data()
    constants = data["constants"] if without is None else data["left_out"][without]
    shares = constants["compute"][gpu.family]
    half = shares["half"]
    return Assumptions(
        compute=shares.get(products, half),
        compute_half=half,
        memory=constants["memory"][gpu.family],
        nvlink=constants["nvlink"],
        network=constants["network"],
        launch=constants["launch"],
        reserve=reserve,
    )


def left_out_models() -> list[str]:
    """Models, of each of which there are constants that have not seen it."""
    return list(_data()["left_out"])


def runs_of(gpu: Device) -> int:
    """Published runs on a GPU that the constants are fitted to."""
    return sum(run["gpu"] == gpu.name for run in _data()["runs"])


def all_runs() -> int:
    """Published runs that the constants are fitted to."""
    return len(_data()["runs"])


def error_range(moe: bool) -> tuple[float, float]:
    """Between which shares of the planned speed four of five published runs were, each with its model left out."""
    low, high = _data()["errors"]["moe" if moe else "dense"]
    return exp(-high), exp(-low)


def nearest(gpu: Device, sizes: dict[str, float]) -> Nearest:
    """The published run on a GPU whose sizes are closest.

    Args:
        gpu: of the plan, with runs of its own.
        sizes: as `fit_plan.py` writes them of every run, all positive.
    """

    def furthest(run: dict[str, Any]) -> tuple[float, str]:
        return max((abs(log2(sizes[name] / run["sizes"][name])), name) for name in sizes)

    best = min((run for run in _data()["runs"] if run["gpu"] == gpu.name), key=furthest)
    doublings, name = furthest(best)
    return Nearest(best["name"], float(2**doublings), name)
