"""A suite's result: `summary.json` for programs, `summary.md` for reading, `differences.png`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_fc.ablation.comparison import Compared, Noise, Record, compare, noise
from megatron_fc.ablation.suite import Suite
from megatron_fc.errors import UserError
from megatron_fc.runs.plot import COLOURS
from megatron_fc.runs.statistics import Interval

NAMES = ("summary.json", "summary.md", "differences.png")


def write_report(suite: Suite, records: Sequence[Record], out: Path, command: str) -> list[Path]:
    """Compare what has finished, and write it.

    Args:
        suite: theirs.
        records: of finished runs.
        out: folder of the files.
        command: that made the records.

    Returns:
        The files, as in NAMES.

    Raises:
        UserError: as `compare`.
    """
    compared = compare(suite, records)
    noises = noise(suite, records, compared)
    files = [out / name for name in NAMES]
    files[0].write_text(json.dumps(_content(suite, records, compared, noises, command), indent=1) + "\n")
    files[1].write_text(markdown(suite, records, compared, noises, command))
    plot(compared, files[2])
    return files


def refuse_other_suite(out: Path, suite: Suite) -> None:
    """Check that a folder's table, which will be made anew, is of this suite.

    Raises:
        UserError: it is of another one.
    """
    try:
        theirs = json.loads((out / NAMES[0]).read_text())["suite"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if theirs != suite.name:
        raise UserError(f"{out} holds the table of the suite {theirs}, not of {suite.name}: give another --results")


def _content(
    suite: Suite, records: Sequence[Record], compared: Sequence[Compared], noises: Sequence[Noise], command: str
) -> dict[str, Any]:
    return {
        "suite": suite.name,
        "baseline": suite.baseline,
        "command": command,
        "runs": len(records),
        "variants": [asdict(of) for of in compared],
        "noise": [asdict(of) for of in noises],
        "half_width": suite.half_width,
        "machines": _distinct(records, "machine"),
        "versions": _distinct(records, "versions"),
        "git_commits": _distinct(records, "git_commit"),
    }


def _distinct(records: Sequence[Record], key: str) -> list[Any]:
    found: list[Any] = []
    for record in records:
        if record[key] not in found:
            found.append(record[key])
    return found


def markdown(
    suite: Suite, records: Sequence[Record], compared: Sequence[Compared], noises: Sequence[Noise], command: str
) -> str:
    """Return the tables: differences, what they cost, and the noise."""
    lines = [f"# {suite.name}", "", f"    {command}", ""]
    machines, hosts = _distinct(records, "machine"), {record["machine"]["host"] for record in records}
    lines += [
        f"{len(records)} of {len(suite.runs)} runs on {len(hosts)} machine{'s' if len(hosts) > 1 else ''} "
        f"({', '.join(sorted({machine['system'] for machine in machines}))}), "
        f"{_span([record['iterations'] for record in records])} iterations, "
        f"{_span([record['tokens'] for record in records if record['tokens']])} tokens each. Differences are means "
        f"over seeds of run minus baseline of the same seed, ± half of Student's 95 % interval; bold where "
        f"that excludes 0.",
        "",
    ]
    lines += _table(
        ["", "to", "seeds", "validation loss", "difference", "training loss, last 10", "by seed"],
        [
            [
                of.variant,
                "" if of.variant == of.against else of.against,
                _seeds(of),
                _number(_mean(of.losses.values()), ".4f"),
                _difference(of.validation, of),
                _difference(of.training, of),
                " ".join(f"{value:+.3f}" for value in of.by_seed.values()),
            ]
            for of in compared
        ],
    )
    lines += ["", "What it costs, and how calmly it trains:", ""]
    lines += _table(
        [
            "",
            "tokens/s",
            "to baseline",
            "parameters added",
            "saved per token and layer",
            "peak memory",
            "loss spikes per run",
            "gradient spikes per run",
            "gradient norm",
            "residual gain",
        ],
        [
            [
                of.variant,
                _number(of.tokens_per_second, ",.0f"),
                _number(of.speed, ".2f", "x"),
                _number(of.parameters, ",d"),
                _number(of.saved_bytes, ",.0f", " B"),
                _number(None if of.peak_memory_bytes is None else of.peak_memory_bytes / 2**20, ",.0f", " MiB"),
                _number(of.loss_spikes, ".1f"),
                _number(of.gradient_spikes, ".1f"),
                _number(of.gradient_norm, ".4g"),
                _number(of.residual_gain, ".4g"),
            ]
            for of in compared
        ],
    )
    lines += [
        "",
        "Saved bytes are what `megatron-fc plan` estimates that connections keep for backward, more than plain "
        "residuals. Norms and gains are medians. Tokens/s are those of the runs, beside other work of the machines.",
        "",
        "Noise, standard deviations of the validation loss:",
        "",
    ]
    lines += _table(
        ["", "of one seed, perturbed by 1e-7", "of seeds", "of paired differences", f"seeds for ±{suite.half_width:g}"],
        [
            [
                of.variant,
                f"{of.of_copies:.4f} ({of.copies} runs)" if of.of_copies is not None else "",
                _number(of.of_seeds, ".4f"),
                _number(of.of_differences, ".4f"),
                _number(of.seeds_needed, "d"),
            ]
            for of in noises
        ],
    )
    return "\n".join(lines) + "\n"


def _seeds(of: Compared) -> str:
    more = {"diverged": of.diverged, "not there": of.missing}
    return ", ".join([str(len(of.seeds)), *(f"{count} {what}" for what, count in more.items() if count)])


def _difference(found: Interval | None, of: Compared) -> str:
    if found is None:
        return "baseline" if of.variant == of.against else ""
    text = f"{found.mean:+.4f}" + (f" ± {found.half:.4f}" if found.half is not None else "")
    return f"**{text}**" if found.excludes_zero else text


def _mean(values: Any) -> float | None:
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _span(values: Sequence[int]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return [line(heads), line(["---", *["---:"] * (len(heads) - 1)]), *map(line, rows)]


def plot(compared: Sequence[Compared], out: Path) -> Path:
    """Draw each variant's differences: a point per seed, the mean and its interval; and which runs diverged."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [of for of in compared if of.validation is not None or (of.diverged and of.variant != of.against)]
    figure, axes = plt.subplots(figsize=(8, 1.5 + 0.42 * max(1, len(shown))), layout="constrained")
    axes.axvline(0, color=COLOURS[0], linewidth=1)
    for place, of in enumerate(shown):
        if of.diverged:
            axes.text(1, place - 0.22, f"{of.diverged} diverged ", transform=axes.get_yaxis_transform(), ha="right")
        if of.validation is None:
            continue
        points = list(of.by_seed.values())
        axes.plot(points, [place + 0.18] * len(points), "o", color=COLOURS[2], markersize=4, alpha=0.45)
        colour = COLOURS[1] if of.validation.excludes_zero else COLOURS[2]
        axes.errorbar(
            of.validation.mean, place, xerr=of.validation.half, fmt="o", color=colour, capsize=4, linewidth=1.8
        )
    against = {of.against for of in shown}
    to = {of.variant: f" to {of.against}" if len(against) > 1 else "" for of in shown}
    axes.set_yticks(range(len(shown)), [f"{of.variant}{to[of.variant]}  ({len(of.by_seed)})" for of in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel(f"validation loss minus that of {against.pop() if len(against) == 1 else 'the baseline'}")
    figure.suptitle(
        "Mean over seeds (their number in brackets) with its 95 % interval, and every seed;\n"
        "orange where the interval excludes 0",
        fontsize=9,
    )
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(out, dpi=140)
    plt.close(figure)
    return out
