"""Records of a profiled run: a part of every rank, and the report that is made of the parts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.kinds import KINDS
from megatron_fc.errors import UserError
from megatron_fc.planning.counts import DeviceCount, DeviceCounts, NetworkCounts, Phase, total_device, total_network
from megatron_fc.profiling.kinds import KindCounts, KindKey
from megatron_fc.profiling.units import show_bytes, show_number


@dataclass
class Run:
    """What is the same on all ranks.

    Attributes:
        connection: residual, sfc_x4, dfc_x4, dhc_x4 ...
        options: the connection's kind and the fields of its configuration, None for plain residuals.
        backend: what it ran on, triton or torch; None for plain residuals.
        model: what decides the bytes but for the connection: layers, widths, sequence, batch, precision ...
        layout: parallel sizes, `world_size` and `nodes`.
        layers: of the whole model.
        tokens_per_step: of all ranks together.
        from_step: first counted step, from 0.
        steps: that were to be counted.
        parameters: of the whole model.
        device: name of what it ran on, `cpu` or that of a card.
        command, date, versions, git_commit: how the report came about.
    """

    connection: str
    options: dict[str, Any] | None
    backend: str | None
    model: dict[str, Any]
    layout: dict[str, Any]
    layers: int
    tokens_per_step: int
    from_step: int
    steps: int
    parameters: int
    device: str
    command: str
    date: str
    versions: dict[str, str | None]
    git_commit: str | None

    @property
    def config(self) -> ConnectionConfig | None:
        """The connection's configuration, None for plain residuals.

        Raises:
            UserError: another version of megatron_fc has written it, which knew other options.
        """
        if self.options is None:
            return None
        fields = dict(self.options)
        return KINDS[fields.pop("kind")].from_dict(fields)


def check_same_but_connections(runs: Sequence[tuple[str, Run]]) -> None:
    """Refuse runs that differ in more than their connections.

    Args:
        runs: each with a name for the message.

    Raises:
        UserError: names the fields that differ.
    """
    name, first = runs[0]
    for other_name, other in runs[1:]:
        if differing := _differences(first, other):
            raise UserError(
                f"{name} and {other_name} are of runs that differ in {'; '.join(differing)}: only connections may"
            )


def _differences(first: Run, other: Run) -> list[str]:
    mine, theirs = ({**run.model, **run.layout, "device": run.device} for run in (first, other))
    fields = [*mine, *(field for field in theirs if field not in mine)]
    return [
        f"{field} ({mine.get(field)}, {theirs.get(field)})" for field in fields if mine.get(field) != theirs.get(field)
    ]


@dataclass(frozen=True)
class Span:
    """A phase of a step on a rank, in seconds since 1970 by the clock of its host."""

    phase: Literal["forward", "backward", "optimizer"]
    start: float
    end: float


@dataclass
class Rank:
    """One rank.

    Attributes:
        rank: its global number.
        host: its node.
        coordinates: its place in each parallelism, say {"tp": 0, "pp": 1, ...}.
        step_seconds: of the counted steps that are complete; the counts are their sum.
        timeline: of each of these steps.
        kinds: device memory by kind of layer.
        network: collectives.
        copy_bytes_per_second: read and written by a copy on this rank's device; None where it was not measured.
    """

    rank: int
    host: str
    coordinates: dict[str, int]
    step_seconds: list[float] = field(default_factory=list)
    timeline: list[list[Span]] = field(default_factory=list)
    kinds: KindCounts = field(default_factory=dict)
    network: NetworkCounts = field(default_factory=dict)
    copy_bytes_per_second: float | None = None

    @property
    def steps(self) -> int:
        """Number of counted steps, 1 at least so that one can divide by it."""
        return max(1, len(self.step_seconds))

    @property
    def device_bytes_per_step(self) -> float:
        """Read and written."""
        total = total_device(self.kinds.values())
        return (total.read_bytes + total.written_bytes) / self.steps

    @property
    def network_bytes_per_step(self) -> tuple[float, float]:
        """Sent within the node, and to other nodes."""
        total = total_network(self.network.values())
        return total.intra_node_bytes / self.steps, total.inter_node_bytes / self.steps

    @property
    def seconds_per_step(self) -> float:
        """Mean of the counted steps; 0 before the first is complete."""
        return sum(self.step_seconds) / self.steps


@dataclass
class Part:
    """What one rank writes: the run, itself, and device memory by module and operation."""

    run: Run
    rank: Rank
    device: DeviceCounts


@dataclass
class Report:
    """All ranks of a run.

    Attributes:
        run: what is the same on all.
        ranks: those whose part is there, in order.
        missing: numbers of the others.
        device: device memory by module and operation, summed over ranks and steps.
    """

    run: Run
    ranks: list[Rank]
    missing: list[int]
    device: DeviceCounts

    @property
    def incomplete(self) -> list[Rank]:
        """Ranks that were lost in the window: they counted fewer steps."""
        return [rank for rank in self.ranks if len(rank.step_seconds) < self.run.steps]

    def refuse_lost_ranks(self, name: str) -> None:
        """Refuse to compare sums that are without some ranks.

        Args:
            name: of this report, for the message.

        Raises:
            UserError: ranks are missing, wholly or for some steps.
        """
        if lost := sorted([*self.missing, *(rank.rank for rank in self.incomplete)]):
            raise UserError(
                f"{name} lacks {'rank' if len(lost) == 1 else 'ranks'} {', '.join(map(str, lost))}, wholly or in part, "
                f"and so cannot be compared: profile again"
            )

    def warnings(self) -> list[str]:
        """What the report lacks, and where it is not as training is, one sentence each."""
        said = []
        if self.missing:
            what = "rank" if len(self.missing) == 1 else "ranks"
            pronoun = "it" if what == "rank" else "them"
            numbers = ", ".join(map(str, self.missing))
            said.append(f"Nothing is known of {what} {numbers}: every sum is without {pronoun}.")
        if self.run.model.get("transformer_impl") == "transformer_engine":
            said.append("Transformer Engine starts kernels past torch's dispatcher: their bytes are not in any sum.")
        if self.run.device != "cpu":
            said.append(
                "Counted without torch.compile: what Megatron fuses with it, SwiGLU and bias-dropout-add among them, "
                "moves fewer bytes in training."
            )
        said += [
            f"Rank {rank.rank} on {rank.host} counted {len(rank.step_seconds)} of {self.run.steps} steps, then the run "
            f"broke off."
            for rank in self.incomplete
        ]
        return said

    def summary(self) -> str:
        """The main figures in a line."""
        intra, inter = self.network_bytes_per_token
        return (
            f"{self.run.connection}: {show_bytes(self.device_bytes_per_token)} of device memory per token, "
            f"{show_bytes(intra + inter)} over the network, {show_bytes(inter)} of it between nodes; "
            f"{show_number(len(self.ranks), 'rank')} on {show_number(len(self.hosts), 'node')}"
        )

    @property
    def hosts(self) -> list[str]:
        return list(dict.fromkeys(rank.host for rank in self.ranks))

    @property
    def seconds_per_step(self) -> float:
        """Of the slowest rank."""
        return max(rank.seconds_per_step for rank in self.ranks)

    def by_kind(self) -> dict[KindKey, float]:
        """Device bytes per token, read and written, of all ranks together."""
        return _summed(
            (key, (count.read_bytes + count.written_bytes) / rank.steps / self.run.tokens_per_step)
            for rank in self.ranks
            for key, count in rank.kinds.items()
        )

    def by_group(self) -> dict[str, tuple[float, float]]:
        """Bytes sent per token and group, within nodes and between nodes, of all ranks together."""
        entries = [(rank, key.group, count) for rank in self.ranks for key, count in rank.network.items()]
        tokens = self.run.tokens_per_step
        intra = _summed((group, count.intra_node_bytes / rank.steps / tokens) for rank, group, count in entries)
        inter = _summed((group, count.inter_node_bytes / rank.steps / tokens) for rank, group, count in entries)
        return {group: (intra[group], inter[group]) for group in sorted(intra)}

    def stream_bytes_per_token_and_layer(self) -> dict[Phase, float]:
        """Device bytes of the residual stream: connections, norms and additions."""
        return {
            key.phase: value / self.run.layers for key, value in self.by_kind().items() if key.kind == "residual stream"
        }

    @property
    def device_bytes_per_token(self) -> float:
        return sum(self.by_kind().values())

    @property
    def network_bytes_per_token(self) -> tuple[float, float]:
        """Sent within nodes, and between nodes."""
        groups = self.by_group().values()
        return sum(intra for intra, _ in groups), sum(inter for _, inter in groups)


def _summed[Key](entries: Iterable[tuple[Key, float]]) -> dict[Key, float]:
    sums: dict[Key, float] = {}
    for key, value in entries:
        sums[key] = sums.get(key, 0.0) + value
    return sums


def report_of(parts: Iterable[Part]) -> Report:
    """Make the report of the parts that are there, of one at least."""
    parts = sorted(parts, key=lambda part: part.rank.rank)
    run = parts[0].run
    device: DeviceCounts = {}
    for part in parts:
        for key, count in part.device.items():
            device.setdefault(key, DeviceCount()).add(count)
    there = {part.rank.rank for part in parts}
    missing = [rank for rank in range(run.layout["world_size"]) if rank not in there]
    return Report(run, [part.rank for part in parts], missing, device)


def named(reports: Iterable[Report]) -> list[tuple[str, Run]]:
    """Runs by the commands that they were called with."""
    return [(f"`{report.run.command}`", report.run) for report in reports]
