"""The residual stream of one model under several connections: counted, and by the model for what was not run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_fc.traffic.counts import Phase
from megatron_fc.traffic.records import Report, Run
from megatron_fc.traffic.streams import Moves, Stream, hyper_ideal, residual
from megatron_fc.traffic.streams_eager import hyper_unfused

_HALF = ("torch.bfloat16", "torch.float16")


@dataclass(frozen=True)
class StreamBytes:
    """What the residual stream moves through device memory.

    Attributes:
        label: the connection.
        phases: bytes per token and layer.
        is_computed: by the formulas of `megatron_fc.traffic.streams`, else counted in a run.
    """

    label: str
    phases: Mapping[Phase, float]
    is_computed: bool = False

    @property
    def total(self) -> float:
        return sum(self.phases.values())


def side_by_side(report: Report, against: Sequence[Report] = ()) -> list[StreamBytes]:
    """The streams of other reports and of this one, then the computed ones of what was not counted.

    Hyper-Connections are computed at both ends: in unfused torch, and as if every tensor moved once. Plain residuals
    are computed, from unfused operations, where no report has them.
    """
    counted = [
        StreamBytes(other.run.connection, other.stream_bytes_per_token_and_layer()) for other in [*against, report]
    ]
    stream = _stream(report.run)
    plain = [] if "residual" in [c.label for c in counted] else [_computed("residual", residual(stream), report.run)]
    hyper = [
        _computed(f"HC n={n}, {how}", moves(stream, n), report.run)
        for n in (2, 4)
        for how, moves in (("ideal", hyper_ideal), ("unfused", hyper_unfused))
    ]
    return [*plain, *counted, *hyper]


def _stream(run: Run) -> Stream:
    model = run.model
    is_half = model["params_dtype"] in _HALF and not model["fp32_residual_connection"]
    return Stream(model["hidden_size"], 2 if is_half else 4, 1 if model["normalization"] == "RMSNorm" else 2)


def _computed(label: str, moves: Moves, run: Run) -> StreamBytes:
    """A layer's bytes per token of the whole job.

    Sequence and context parallelism share a token's stream out; tensor parallelism alone has it on every rank.
    """
    tp, is_shared = run.layout["tp"], run.layout["sequence_parallel"]
    tokens = run.model["micro_batch_size"] * run.model["seq_length"] // run.layout["cp"] // (tp if is_shared else 1)
    copies = 1 if is_shared else tp
    forward, backward = (copies * t.total_bytes(tokens) / tokens for t in (moves.forward, moves.backward))
    phases: dict[Phase, float] = {"forward": forward, "backward": backward}
    if run.model.get("recompute_granularity") == "full":
        phases["recompute"] = forward
    return StreamBytes(label, phases, is_computed=True)
