"""The residual stream of one model under several connections, counted and computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_fc.traffic.counts import Phase
from megatron_fc.traffic.records import Report


@dataclass(frozen=True)
class Stream:
    """The residual stream's device memory.

    Attributes:
        label: the connection.
        phases: bytes per token and layer.
        is_computed: by the model of `streams`, else counted in a run.
    """

    label: str
    phases: Mapping[Phase, float]
    is_computed: bool = False

    @property
    def total(self) -> float:
        return sum(self.phases.values())


def side_by_side(report: Report, against: Sequence[Report] = ()) -> list[Stream]:
    """The streams of other reports, of this one, and the computed ones of what was not counted."""
    counted = [*against, report]
    return [Stream(other.run.connection, other.stream_bytes_per_token_and_layer()) for other in counted]
