"""Fit the constants of `megatron-fc plan` to published runs, and say how far off it is. No GPU is needed.

    python benchmarks/fit_plan.py              # refit; every model left out once; to results/plan.md
    python benchmarks/fit_plan.py --write      # and to megatron_fc/planning/calibration.json, docs/images/plan.svg

benchmarks/published-throughput.csv has the rows: pretraining runs of NVIDIA Megatron-Bridge's performance summary and
its archive, releases 25.11 to 26.08; benchmarks/published.py has the models' public shapes and the recipes behind them.

The error of a row is the logarithm of planned by published speed. The sum of all rows' from release 26.04 on is least,
squares that grow linearly beyond SCALE, with squares that hold each constant near what was taken for it before: runs on
few models leave directions open. One row is left out, whose source names a known regression of its software.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fc.planning.calibration import DATA, Assumptions
from megatron_fc.planning.devices import DEVICES
from megatron_fc.planning.roofline import step_time
from megatron_fc.planning.sweep import sweep
from published import BEFORE as ROWS_BEFORE
from published import Row, rows

ROWS = Path(__file__).with_name("published-throughput.csv")
RESULT = Path(__file__).with_name("results") / "plan.md"
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "plan.svg"
# Families and the precisions that rows have; the share of the peak before the fit, and by how much it may differ.
COMPUTE = {"hopper": ("half", "fp8"), "blackwell": ("half", "fp8", "fp4"), "blackwell ultra": ("half", "fp8", "fp4")}
COMPUTE_BEFORE = ROWS_BEFORE.compute, 0.2
# Blackwell Ultra's memory is Blackwell's.
OTHERS_BEFORE = {
    "memory hopper": (ROWS_BEFORE.memory, 0.15),
    "memory blackwell": (ROWS_BEFORE.memory, 0.15),
    "nvlink": (ROWS_BEFORE.nvlink, 0.2),
    "network": (ROWS_BEFORE.network, 0.2),
    "launch": (ROWS_BEFORE.launch, 0.3),
}
SCALE, STEPS = 0.12, 10  # of a row's error; of the fit
COMPUTES = [(family, products) for family, kinds in COMPUTE.items() for products in kinds]
NAMES = [f"compute {family} {products}" for family, products in COMPUTES] + list(OTHERS_BEFORE)
BEFORE = np.array([COMPUTE_BEFORE[0]] * len(COMPUTES) + [before for before, _ in OTHERS_BEFORE.values()])
SPREAD = np.array([COMPUTE_BEFORE[1]] * len(COMPUTES) + [spread for _, spread in OTHERS_BEFORE.values()])


def assumed(values: dict[str, float], row: Row) -> Assumptions:
    """The constants for a row's GPU and precision."""
    family = row.plan.gpu.family
    return Assumptions(
        compute=min(values[f"compute {family} {row.plan.training.products}"], 1.0),
        compute_half=min(values[f"compute {family} half"], 1.0),
        memory=min(values[f"memory {family.split()[0]}"], 1.0),
        nvlink=min(values["nvlink"], 1.0),
        network=min(values["network"], 1.0),
        launch=values["launch"],
    )


def error(values: dict[str, float], row: Row) -> float:
    """Logarithm of planned by published speed."""
    plan = row.plan
    step = step_time(plan.work, plan.training, plan.layout, plan.gpu, plan.network, assumed(values, row))
    return log(plan.tokens_per_step / step.total / plan.layout.world / row.published)


def fit(chosen: Sequence[Row]) -> dict[str, float]:
    """The constants that suit some rows best: steps of Gauss and Newton, rows far off weighed down."""
    spreads, step = np.zeros(len(NAMES)), 1e-3

    def named(spreads: Any) -> dict[str, float]:
        return dict(zip(NAMES, (BEFORE * np.exp(spreads * SPREAD)).tolist(), strict=True))

    def errors(spreads: Any) -> Any:
        values = named(spreads)
        return np.array([error(values, row) / SCALE for row in chosen])

    for _ in range(STEPS):
        off = errors(spreads)
        slopes = np.stack([(errors(spreads + step * one) - off) / step for one in np.eye(len(NAMES))], axis=1)
        weights = 1 / np.sqrt(1 + off**2)
        curvature = slopes.T @ (weights[:, None] * slopes) + np.eye(len(NAMES))
        spreads = spreads - np.linalg.solve(curvature, slopes.T @ (weights * off) + spreads)
    return named(spreads)


def without_each_model(chosen: Sequence[Row]) -> tuple[dict[str, dict[str, float]], dict[Row, float]]:
    """Constants that have not seen a model, by model, and every row's error with those that have not seen its own."""
    constants, errors = {}, {}
    for model in sorted({row.family for row in chosen}):
        constants[model] = fit([row for row in chosen if row.family != model])
        errors |= {row: error(constants[model], row) for row in chosen if row.family == model}
    return constants, errors


def told(values: dict[str, float]) -> dict[str, Any]:
    """Constants as calibration.json has them."""
    compute: dict[str, dict[str, float]] = {}
    for family, products in COMPUTES:
        compute.setdefault(family, {})[products] = round(values[f"compute {family} {products}"], 3)
    memory = {family: round(values[f"memory {family.split()[0]}"], 3) for family in COMPUTE}
    links = {name: round(values[name], 3) for name in ("nvlink", "network")}
    return {"compute": compute, "memory": memory, **links, "launch": round(values["launch"], 1)}


def off(errors: Iterable[float]) -> str:
    """Median error of planned against published speed, that of nine in ten, how many are within 30 %."""
    sizes_of = sorted(abs(exp(one) - 1) for one in errors)
    ninth = sizes_of[min(int(0.9 * len(sizes_of)), len(sizes_of) - 1)]
    within = sum(one <= 0.3 for one in sizes_of) / len(sizes_of)
    return f"{len(sizes_of)} | {statistics.median(sizes_of):.1%} | {ninth:.0%} | {within:.0%}"


def quantiles(errors: Iterable[float]) -> list[float]:
    """Of which four in five are in between."""
    return [round(float(one), 3) for one in np.quantile(list(errors), (0.1, 0.9))]


def report(every: Sequence[Row], values: dict[str, float], apart: dict[Row, float]) -> str:
    """Constants, errors by set of rows, and every row."""
    recent = list(apart)
    old = [row for row in every if not row.is_recent]
    regressed = [row for row in every if row.is_recent and row not in apart]
    _, old_apart = without_each_model(old)
    lines = ["# Planned against published", "", "`python benchmarks/fit_plan.py` writes this page.", ""]
    lines += ["| constant | before | fitted |", "|---|---:|---:|"]
    lines += [f"| {name} | {BEFORE[at]:.2f} | {values[name]:.2f} |" for at, name in enumerate(NAMES)]
    lines += ["", "| rows | number | median error | nine of ten within | within 30 % |", "|---|---:|---:|---:|---:|"]
    lines += [f"| from 26.04 on, fitted | {off(error(values, row) for row in recent)} |"]
    lines += [f"| from 26.04 on, each model left out | {off(apart.values())} |"]
    lines += [f"| the same and the one with a known bug | {off([*apart.values(), *_errors(values, regressed)])} |"]
    lines += [f"| before 26.04, with constants from 26.04 on | {off(_errors(values, old))} |"]
    lines += [f"| before 26.04, fitted to these, each model left out | {off(old_apart.values())} |", ""]
    for kind, moe in (("dense", False), ("MoE", True)):
        of_kind = [error(values, row) for row in old if any(row.plan.shape.moe_layers) == moe]
        lines.append(
            f"Before 26.04 {kind} models reached {exp(-statistics.median(of_kind)):.0%} of the speed planned with "
            f"constants from 26.04 on (median of {len(of_kind)})."
        )
    lines += [
        "",
        "| row | published | planned by published | model left out | GiB | of |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in every:
        left_out = (
            f"{exp(apart[row]):.2f}" if row in apart else f"{exp(old_apart[row]):.2f}" if row in old_apart else ""
        )
        memory = row.plan.memory.total / 2**30
        lines.append(
            f"| {row.name} | {row.published:,.0f} | {exp(error(values, row)):.2f} | {left_out} | {memory:.0f} | "
            f"{row.plan.gpu.hbm_gib:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _errors(values: dict[str, float], chosen: Iterable[Row]) -> list[float]:
    return [error(values, row) for row in chosen]


def ranks(chosen: Iterable[Row], values: dict[str, float]) -> str:
    """Where a sweep of each model and machine has the published layout, by speed."""
    lines = [
        "",
        "| newest row of a model and GPU | rank | of | the fastest | times as fast |",
        "|---|---:|---:|---|---:|",
    ]
    seen = set()
    for row in chosen:
        kind = row.system, row.model, row.precision
        if kind in seen:
            continue
        seen.add(kind)
        plan = replace(row.plan, assumed=assumed(values, row))
        found = sweep(plan).fitting
        rank = 1 + sum(other.tokens_per_second > 1.0001 * plan.tokens_per_second for other in found)
        best = found[0]
        how = f"{best.layout} micro-batch {best.layout.micro_batch}, recompute {best.training.recompute}"
        times = best.tokens_per_second / plan.tokens_per_second
        lines.append(f"| {row.name} | {rank} | {len(found)} | {how} | {times:.2f} |")
    return "\n".join(lines) + "\n"


def write(every: Sequence[Row], values: dict[str, float], left_out: dict[str, Any], apart: dict[Row, float]) -> None:
    """calibration.json: constants, those without each model, errors of dense and MoE models, the runs."""
    errors = {
        kind: quantiles(one for row, one in apart.items() if any(row.plan.shape.moe_layers) == moe)
        for kind, moe in (("dense", False), ("moe", True))
    }
    runs = [{"name": row.name, "gpu": row.plan.gpu.name, "sizes": row.plan.sizes} for row in apart]
    told_left_out = {model: told(constants) for model, constants in left_out.items()}
    data = {"constants": told(values), "left_out": told_left_out, "errors": errors, "runs": runs}
    DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    draw(every, values)


def draw(every: Sequence[Row], values: dict[str, float]) -> None:
    """Planned over published, a disc for each row, those that are fitted to filled; the lines are 0 and 30 % off."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "plan"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 5.5), layout="constrained")
    for model in sorted({row.family for row in every}):
        of_model = [row for row in every if row.family == model]
        colour = None
        for is_recent in (True, False):
            shown = [row for row in of_model if row.is_recent == is_recent]
            planned = [row.published * exp(error(values, row)) for row in shown]
            colour = axes.scatter(
                [row.published for row in shown],
                planned,
                s=20,
                label=model if is_recent else None,
                edgecolors=colour,
                facecolors=None if is_recent else "none",
            ).get_edgecolors()[:1]
    ends = np.array([1e3, 6e4])
    for factor, style in ((1, "-"), (1.3, "--"), (1 / 1.3, "--")):
        axes.plot(ends, factor * ends, style, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="published tokens/s per GPU", ylabel="planned", xlim=ends, ylim=ends)
    axes.legend()
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="?", default=ROWS)
    parser.add_argument("--write", action="store_true", help="calibration.json and the figure of docs/plan.md, too")
    options = parser.parse_args()
    every = rows(options.rows)
    recent = [row for row in every if row.is_recent and not row.has_regression]
    assert {row.plan.gpu.family for row in recent} == {gpu.family for gpu in DEVICES.values()}
    values = fit(recent)
    left_out, apart = without_each_model(recent)
    page = report(every, values, apart) + ranks(recent, values)
    print(page)
    RESULT.write_text(page, encoding="utf-8")
    if options.write:
        write(every, values, left_out, apart)


if __name__ == "__main__":
    main()
