"""Variants against their baselines, seed by seed, and the noise that their differences come from."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fc.ablation.suite import Suite, Variant
from megatron_fc.errors import UserError
from megatron_fc.runs.statistics import Interval, differences, interval, values_needed

Record = dict[str, Any]


@dataclass(frozen=True)
class Compared:
    """A variant's finished runs.

    Attributes:
        variant, against: its name and its baseline's, which is its own where it is one.
        seeds: of its runs that did not diverge.
        diverged: how many did.
        missing: how many have not finished.
        losses: validation loss by seed.
        validation, training: difference to the baseline, the latter of the last iterations' mean; None of a baseline.
        by_seed: difference of the validation loss.
        speed: tokens/s over the baseline's, None without one.
        saved_bytes: per token and layer more than plain residuals, estimated.
        parameters: that connections add.
        loss_spikes, gradient_spikes: per run that did not diverge, None without one.
        gradient_norm: median of the runs' medians.
        residual_gain: median of the runs' last ones, None where it was not logged.
        peak_memory_bytes: median.
    """

    variant: str
    against: str
    seeds: tuple[int, ...]
    diverged: int
    missing: int
    losses: dict[int, float]
    validation: Interval | None
    training: Interval | None
    by_seed: dict[int, float]
    tokens_per_second: float | None
    speed: float | None
    saved_bytes: float | None
    parameters: int | None
    loss_spikes: float | None
    gradient_spikes: float | None
    gradient_norm: float | None
    residual_gain: float | None
    peak_memory_bytes: float | None


@dataclass(frozen=True)
class Noise:
    """Standard deviations of a variant's validation loss.

    Attributes:
        variant: its name.
        of_copies: among runs of one seed whose first weights differ by 1e-7 of themselves; None without copies.
        copies: how many such runs, the one that was not perturbed included.
        of_seeds: among seeds, None for fewer than two.
        of_differences: among the seeds' differences to the baseline, None of a baseline.
        seeds_needed: for an interval of the suite's half width at this deviation.
    """

    variant: str
    of_copies: float | None
    copies: int
    of_seeds: float | None
    of_differences: float | None
    seeds_needed: int | None


def compare(suite: Suite, records: Sequence[Record]) -> list[Compared]:
    """Compare the variants that have finished runs, in the suite's order.

    Raises:
        UserError: a baseline has no finished run, or runs of one seed read different data.
    """
    if said := lacking_baselines(suite, records):
        raise UserError(said)
    there = _by_seed(records)
    compared = []
    for name, variant in suite.variants.items():
        of = there.get(name, {})
        base = of if variant.against == name else there.get(variant.against, {})
        if of:
            _refuse_other_data(of, base)
            compared.append(_compared(name, variant, of, base))
    if not compared:
        raise UserError(f"no run of {suite.file} has finished: run `megatron-fc ablate {suite.file}`")
    return compared


def lacking_baselines(suite: Suite, records: Sequence[Record]) -> str | None:
    """Say which baseline has no finished run beside a variant that has; None where all have."""
    there = _by_seed(records)
    for name, variant in suite.variants.items():
        if name in there and variant.against not in there:
            return f"the baseline {variant.against} of {name} has no finished run: run it, or give another --baseline"
    return None


def noise(suite: Suite, records: Sequence[Record], compared: Sequence[Compared]) -> list[Noise]:
    """Return where the spread of each variant's losses comes from."""
    found = []
    for of in compared:
        first = suite.variants[of.variant].seeds[0]
        copies = [
            record["validation_loss"]
            for record in records
            if record["variant"] == of.variant and record["seed"] == first and record["validation_loss"] is not None
        ]
        has_copies = any(record["copy"] and record["variant"] == of.variant for record in records)
        between = of.validation.deviation if of.validation is not None else None
        found.append(
            Noise(
                variant=of.variant,
                of_copies=_deviation(copies) if has_copies else None,
                copies=len(copies) if has_copies else 0,
                of_seeds=_deviation(list(of.losses.values())),
                of_differences=between,
                seeds_needed=None if between is None else values_needed(between, suite.half_width),
            )
        )
    return found


def _by_seed(records: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """Records of the runs themselves, without their copies, by variant and seed."""
    there: dict[str, dict[int, Record]] = {}
    for record in records:
        if not record["copy"]:
            there.setdefault(record["variant"], {})[record["seed"]] = record
    return there


def _refuse_other_data(of: Mapping[int, Record], base: Mapping[int, Record]) -> None:
    for seed in of.keys() & base.keys():
        if of[seed]["data"] != base[seed]["data"]:
            raise UserError(
                f"{of[seed]['variant']} and {base[seed]['variant']} of seed {seed} read different data, so their "
                f"difference says nothing: delete one of the two records and run it on the other's data"
            )


def _compared(name: str, variant: Variant, of: Mapping[int, Record], base: Mapping[int, Record]) -> Compared:
    losses, before = _values(of, "validation_loss"), _values(base, "validation_loss")
    by_seed = differences(losses, before) if of is not base else {}
    training = differences(_values(of, "mean_last_loss"), _values(base, "mean_last_loss")) if of is not base else {}
    speed, speed_before = (_median(_values(records, "tokens_per_second")) for records in (of, base))
    return Compared(
        variant=name,
        against=variant.against,
        seeds=tuple(seed for seed, record in of.items() if not record["diverged"]),
        diverged=sum(record["diverged"] for record in of.values()),
        missing=len(variant.seeds) - len(of),
        losses=losses,
        validation=interval(list(by_seed.values())) if by_seed else None,
        training=interval(list(training.values())) if training else None,
        by_seed=by_seed,
        tokens_per_second=speed,
        speed=speed / speed_before if of is not base and speed and speed_before else None,
        saved_bytes=_median(_values(of, "saved_bytes")),
        parameters=next(map(int, _values(of, "connection_parameters").values()), None),
        loss_spikes=_mean([record["loss_spikes"] for record in of.values() if not record["diverged"]]),
        gradient_spikes=_mean([record["gradient_spikes"] for record in of.values() if not record["diverged"]]),
        gradient_norm=_median(_values(of, "median_gradient_norm")),
        residual_gain=_median(_values(of, "last_residual_gain")),
        peak_memory_bytes=_median(_values(of, "peak_memory_bytes")),
    )


def _values(records: Mapping[int, Record], key: str) -> dict[int, float]:
    return {seed: record[key] for seed, record in sorted(records.items()) if record[key] is not None}


def _median(values: Mapping[int, float]) -> float | None:
    return _or_none(statistics.median, list(values.values()), least=1)


def _mean(values: Sequence[float]) -> float | None:
    return _or_none(statistics.fmean, values, least=1)


def _deviation(values: Sequence[float]) -> float | None:
    return _or_none(statistics.stdev, values, least=2)


def _or_none(figure: Callable[[Sequence[float]], float], values: Sequence[float], least: int) -> float | None:
    return figure(values) if len(values) >= least else None
