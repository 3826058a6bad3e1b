"""The residual stream of one model under several connections: counted, and by the model for what was not run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.config import HyperConfig
from megatron_fc.connections.costs.eager_traffic import hyper_unfused, torch_backend
from megatron_fc.connections.costs.traffic import Moves, Stream, enter, hyper_ideal, layers_in_a_row, residual
from megatron_fc.planning.counts import Phase
from megatron_fc.profiling.records import Report, Run

_HALF = ("torch.bfloat16", "torch.float16")


@dataclass(frozen=True)
class StreamBytes:
    """What the residual stream moves through device memory.

    Attributes:
        label: the connection.
        phases: bytes per token and layer.
        is_computed: by the formulas of `megatron_fc.connections.costs.traffic`, else counted in a run.
        ratio: of the total to that of plain residuals which were counted, or computed, likewise; None without such.
    """

    label: str
    phases: Mapping[Phase, float]
    is_computed: bool = False
    ratio: float | None = None

    @property
    def total(self) -> float:
        return sum(self.phases.values())


def side_by_side(report: Report, against: Sequence[Report] = ()) -> list[StreamBytes]:
    """The streams of other reports and of this one, then computed ones.

    Computed are plain residuals, one kernel per operation; of connections that ran on the torch backend, what it moves
    and what fused kernels would move, whether there are such kernels yet or not; and Hyper-Connections at both ends, in
    unfused torch and as if every tensor moved once.
    """
    run, stream = report.run, _stream(report.run)
    runs = [*against, report]
    counted = [StreamBytes(_label(r.run), r.stream_bytes_per_token_and_layer()) for r in runs]
    plain = next((c for c, r in zip(counted, runs, strict=True) if r.run.options is None), None)
    on_torch = [
        _computed(f"{r.run.connection}, {how}", moves(stream, config, r.run), run)
        for r in runs
        if r.run.backend == "torch" and (config := r.run.config) is not None
        for how, moves in (("torch", _on_torch), ("fused", _fused))
    ]
    hyper = [
        _computed(f"HC n={n}, {how}", moves(stream, HyperConfig(slots=n)), run)
        for how, moves in (("ideal", hyper_ideal), ("unfused", hyper_unfused))
        for n in (2, 4)
    ]
    plain_computed = _computed("residual", residual(stream), run)
    return [*_with_ratios(counted, plain), *_with_ratios([plain_computed, *on_torch, *hyper], plain_computed)]


def _on_torch(stream: Stream, connection: ConnectionConfig, run: Run) -> Moves:
    return torch_backend(stream, connection) + enter(stream, connection) * (1 / run.layers)


def _fused(stream: Stream, connection: ConnectionConfig, run: Run) -> Moves:
    """Layers that full recompute runs again do not meet the one before them."""
    in_a_row = run.model["num_layers"] / (run.layout["pp"] * run.layout["vpp"])
    layers = layers_in_a_row(stream, connection, 1 if _recomputed(run) else in_a_row)
    return layers + enter(stream, connection) * (1 / run.layers)


def _with_ratios(streams: Sequence[StreamBytes], base: StreamBytes | None) -> list[StreamBytes]:
    if base is None or not base.total:
        return list(streams)
    return [replace(stream, ratio=stream.total / base.total) for stream in streams]


def _label(run: Run) -> str:
    return f"{run.connection}, torch" if run.backend == "torch" else run.connection


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
    if again := _recomputed(run):
        phases["recompute"] = again * forward
    return StreamBytes(label, phases, is_computed=True)


def _recomputed(run: Run) -> float:
    """Share of the layers whose forward pass full recompute runs again.

    The uniform method recomputes all, the block method the first `recompute_num_layers` of every model chunk.
    """
    model, layout = run.model, run.layout
    if model.get("recompute_granularity") != "full":
        return 0.0
    if model.get("recompute_method") != "block":
        return 1.0
    return min(1.0, model["recompute_num_layers"] * layout["pp"] * layout["vpp"] / model["num_layers"])
