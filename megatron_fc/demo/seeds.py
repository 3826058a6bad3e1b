"""The demo's result among those of other seeds: one run of a small model shows little by itself."""

import json
from pathlib import Path

from megatron_fc.runs.statistics import interval

# By seed: training loss of dfc_x4 minus that of residual, each the mean of its last ten iterations, from the records of
# configs/ablation/paper.yaml.
_RECORDED = Path(__file__).with_name("seeds.json")


def recorded_differences() -> dict[int, float]:
    return {int(seed): difference for seed, difference in json.loads(_RECORDED.read_text()).items()}


def among_seeds(difference: float) -> str:
    """Say where a difference of the training loss, as the recorded ones, lies among those."""
    recorded = recorded_differences()
    values = sorted(recorded.values())
    mean = interval(values)
    below = sum(value < difference for value in values)
    seeds = f"seeds {min(recorded)} to {max(recorded)}"
    return (
        f"{difference:+.4f} is one seed's; over {seeds} the mean of the last 10 differed by {mean.mean:+.4f} ± "
        f"{mean.half:.4f} (95 %),\n        each by {values[0]:+.4f} to {values[-1]:+.4f}; {below} of these "
        f"{len(values)} are below this run's"
    )
