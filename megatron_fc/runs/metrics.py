"""A run's figures, read back from the TensorBoard events that Megatron writes.

Megatron's log lines average over an interval, and the second line of every process also over the first: the events
are the exact record. A resumed run adds a file; where it repeats steps, the newer file counts.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Series = dict[int, float]
_VALIDATION = "lm loss validation"


@dataclass
class Metrics:
    """Values by iteration.

    Attributes:
        loss: language-model loss of each training iteration, in nats per token.
        step_seconds: wall time per iteration, averaged over the logging interval.
        validation: loss on the validation set, the later of two at one step.
        test: loss on the test set, which Megatron evaluates once at the end if there is one.
        scalars: everything that was logged, by Megatron's tags.
    """

    loss: Series = field(default_factory=dict)
    step_seconds: Series = field(default_factory=dict)
    validation: Series = field(default_factory=dict)
    test: Series = field(default_factory=dict)
    scalars: dict[str, Series] = field(default_factory=dict)


def read_metrics(run_dir: Path) -> Metrics:
    """Read the events below `run_dir/tensorboard`; empty before the first iteration was logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics()
    for path in sorted((run_dir / "tensorboard").glob("events.out.tfevents.*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            values: dict[int, list[float]] = {}
            for event in events.Scalars(tag):
                values.setdefault(event.step, []).append(event.value)
            if tag == _VALIDATION and _has_test_set(events):
                # Megatron logs the test set under the same tag, after the validation set.
                metrics.test |= {step: listed.pop() for step, listed in values.items() if len(listed) > 1}
            metrics.scalars.setdefault(tag, {}).update({step: listed[-1] for step, listed in values.items()})
    metrics.scalars = {tag: dict(sorted(series.items())) for tag, series in metrics.scalars.items()}
    metrics.loss = metrics.scalars.get("lm loss", {})
    metrics.step_seconds = metrics.scalars.get("iteration-time", {})
    metrics.validation = metrics.scalars.get(_VALIDATION, {})
    return metrics


def _has_test_set(events: Any) -> bool:
    """Whether Megatron, which logs its arguments as texts, was given one."""
    tag = "do_test/text_summary"
    if tag not in events.Tags()["tensors"]:
        return False
    return any(event.tensor_proto.string_val == [b"1"] for event in events.Tensors(tag))
