"""The residual stream of one model under several connections, counted and computed."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_fc.traffic.counts import Phase


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
