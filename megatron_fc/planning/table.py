"""A plan and a sweep for people, in a terminal of 80 columns or more."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_fc.planning import calibration, memory, parameters
from megatron_fc.planning.plan import Plan
from megatron_fc.planning.sweep import Sweep, overrides

_GIB, _GB = 2**30, 1e9
_GIGA = 1e9
_BAR = 20  # characters of a whole bar
_LISTED = 8


def plan_table(plan: Plan) -> RenderableType:
    """Model, layout, memory, a step, the run, and what all of it assumes."""
    return Group(_title(plan), _run(plan), "", _memory(plan), "", _step(plan), "", _assumptions(plan))


def sweep_table(sweep: Sweep) -> RenderableType:
    """The fastest topologies, how to train as the first one does, and why others are left out."""
    table = _grid(f"Topologies that fit: {len(sweep.fitting):,}, by estimated speed")
    for column in ("layout", "batch", "recompute"):
        table.add_column(column)
    for column in ("GiB", "tokens/s", "days"):
        table.add_column(column, justify="right")
    for tried in sweep.fitting[:_LISTED]:
        table.add_row(
            _layout(tried),
            str(tried.layout.micro_batch),
            str(tried.training.recompute),
            f"{tried.memory.total / _GIB:.0f}",
            f"{tried.tokens_per_second:,.0f}",
            f"{tried.days:.1f}",
        )
    lines = [Text(line, style="dim") for line in _left_out(sweep)]
    if sweep.fitting:
        words = overrides(sweep.fitting[0], sweep.base) or ["nothing to change: the config's own is the fastest"]
        lines.insert(0, Text(f"the fastest: {' '.join(words)}"))
        if sweep.base.fits:
            lines.insert(1, Text(_own(sweep)))
    return Group(table, *lines)


def _own(sweep: Sweep) -> str:
    base, slower = sweep.base, 1 - sweep.base.tokens_per_second / sweep.fitting[0].tokens_per_second
    own = f"{_layout(base)} micro-batch {base.layout.micro_batch}"
    return f"the config's own, {own}: {base.tokens_per_second:,.0f} tokens/s, {slower:.0%} fewer"


def _left_out(sweep: Sweep) -> list[str]:
    lines = []
    if sweep.too_large:
        least = sweep.too_large[0]
        lines.append(
            f"too large: {len(sweep.too_large):,}, more than {sweep.base.usable_bytes / _GIB:.0f} GiB; the smallest is "
            f"{_layout(least)} micro-batch {least.layout.micro_batch}, recompute {least.training.recompute}: "
            f"{least.memory.total / _GIB:.0f} GiB"
        )
    for count, example in sorted(sweep.impossible.values(), reverse=True):
        lines.append(f"impossible: {count:,}, e.g. {example}")
    return lines


def _title(plan: Plan) -> RenderableType:
    nodes, per_node = plan.layout.nodes, plan.layout.gpus_per_node
    machine = f"{plan.layout.world:,} x {plan.gpu.name}, {nodes:,} nodes of {per_node}"
    return Text.assemble((plan.name, "bold"), f" on {machine}: an estimate, nothing was run\n")


def _run(plan: Plan) -> Table:
    layout, counts = plan.layout, plan.parameters
    table = _grid()
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    active = parameters.active(plan.shape)
    connections = f"; connections {counts.connections:,}" if counts.connections else ""
    table.add_row("parameters", f"{counts.total:,}, active {active:,}{connections}")
    table.add_row("layout", f"DP{layout.data:,} {_layout(plan)}" + _experts(plan))
    table.add_row(
        "batch",
        f"{layout.global_batch:,} x {plan.shape.sequence:,} = {plan.tokens_per_step:,} tokens; micro-batch "
        f"{layout.micro_batch} x DP{layout.data:,} x {layout.accumulation_steps:,} accumulation steps",
    )
    if layout.pipeline > 1:
        table.add_row("pipeline", _pipeline(plan))
    table.add_row("FLOPs/token", _flops(plan))
    weights, checkpoint = plan.checkpoint_bytes
    table.add_row("checkpoint", f"{checkpoint / _GB:,.1f} GB, of it weights {weights / _GB:,.1f} GB")
    if any(plan.kept_checkpoints):
        table.add_row("disk", f"checkpoints of the whole run: {memory.kept_bytes(plan.kept_checkpoints, checkpoint)}")
    return table


def _pipeline(plan: Plan) -> str:
    """What stages exchange, in which connections differ."""
    width, ratio = plan.shape.stream_width, plan.shape.stream_width // plan.shape.width
    times = f"{ratio} x hidden_size" if ratio > 1 else "hidden_size"
    sent = plan.step.pipeline_bytes / _GB
    stages = plan.layout.layers_of_stages
    of_layers = f"{' '.join(map(str, stages))} layers; " if len(set(stages)) > 1 else ""
    return (
        f"{of_layers}stages exchange {width:,} values per token, {times}; a rank of the slowest sends {sent:,.2f} GB a "
        f"step"
    )


def _flops(plan: Plan) -> str:
    forward, again = plan.forward, plan.recomputed.total / _GIGA
    words = (
        f"forward {forward.total / _GIGA:.3g} G, backward {2 * forward.total / _GIGA:.3g} G, recompute {again:.3g} G"
    )
    if plan.shape.connection is None:
        return words
    share = forward.connections / forward.total
    return f"{words}; connections {forward.connections / _GIGA:.5f} G of the forward pass, {share:.2%}"


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    rows = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations - memory.connection_activations,
        "  of connections": memory.connection_activations,
        "temporary": memory.temporary,
    }
    if plan.shape.connection is None:
        del rows["  of connections"]
    stage = f", stage {memory.stage} of {plan.layout.pipeline}, the worst" if plan.layout.pipeline > 1 else ""
    table = _grid(f"Memory of a rank{stage}")
    table.add_column(style="bold", no_wrap=True)
    table.add_column("GiB", justify="right")
    table.add_column(f"of {plan.gpu.hbm_gib:,.0f} GiB, {plan.assumed.reserve:.0%} of it in reserve")
    for name, size in rows.items():
        table.add_row(name, f"{size / _GIB:,.1f}", _bar(size / plan.gpu.hbm_bytes))
    verdict = "[green]fits[/green]" if plan.fits else "[red]does not fit[/red]"
    table.add_row("total", f"{memory.total / _GIB:,.1f}", f"{verdict}: {plan.usable_bytes / _GIB:,.1f} GiB usable")
    return table


def _step(plan: Plan) -> Table:
    step = plan.step
    rows = {
        "FLOPs": step.compute,
        "memory": step.memory,
        "launches": step.launches,
        "network": step.network,
        "pipeline bubble": step.bubble,
        "optimizer": step.optimizer,
    }
    table = _grid("A step, by what it waits for")
    table.add_column(style="bold", no_wrap=True)
    table.add_column("ms", justify="right")
    table.add_column(f"a rank moves {step.hbm_bytes / _GB:,.0f} GB in memory, sends {step.network_bytes / _GB:,.1f} GB")
    for name, seconds in rows.items():
        table.add_row(name, f"{1e3 * seconds:,.0f}", f"{_bar(seconds / step.total)} {seconds / step.total:.0%}")
    table.add_row(
        "total",
        f"{1e3 * step.total:,.0f}",
        f"{plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.0%}; network beside it "
        f"{1e3 * step.hidden_network:,.0f} ms",
    )
    target = f"to {plan.training.target_tokens:,} tokens"
    table.add_row("run", "", f"[bold]{plan.days:,.1f} days {target}[/bold]")
    if plan.speed_range:
        low, high = plan.speed_range
        slow, fast = (plan.days * plan.tokens_per_second / speed for speed in (low, high))
        table.add_row("four in five", "", f"{low:,.0f} to {high:,.0f} tokens/s, {fast:,.1f} to {slow:,.1f} days")
    if plan.shape.connection is not None:
        least, most = plan.slowdown_range
        table.add_row("connections", "", f"a step takes {least:.1%} to {most:.1%} longer than with plain residuals")
    return table


def _assumptions(plan: Plan) -> Text:
    assumed, gpu = plan.assumed, plan.gpu
    notes = "".join(f"\nnote: {note}" for note in plan.notes)
    peak = gpu.tflops(plan.training.products)
    return Text(
        f"{_calibration(plan)}: {assumed.compute:.0%} of {peak:,.0f} TFLOP/s, {assumed.memory:.0%} of "
        f"{gpu.hbm_gb_per_second:,.0f} GB/s of memory, {assumed.nvlink:.0%} of {gpu.nvlink_gb_per_second:,.0f} GB/s "
        f"NVLink, {assumed.network:.0%} of {plan.network:,.0f} GB/s network, {assumed.launch:.0f} us for a launch; "
        f"experts get equal shares (docs/plan.md){notes}",
        style="dim",
    )


def _calibration(plan: Plan) -> str:
    """What the constants rest on, and how far this run is from that."""
    runs, here = calibration.all_runs(), calibration.runs_of(plan.gpu)
    if not here:
        return f"not calibrated: none of {runs} public runs was on {plan.gpu.name}; assumed are {plan.gpu.family}'s"
    if not plan.is_calibrated:
        return "not calibrated, but as given"
    near = plan.nearest
    return (
        f"calibrated on {runs} public runs, {here} on {plan.gpu.name}; the nearest, {near.name}, differs most in "
        f"{near.size}, {near.times:.1f} times"
    )


def _grid(title: str | None = None) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
        show_header=title is not None,
    )


def _layout(plan: Plan) -> str:
    layout = plan.layout
    sizes = [f"TP{layout.tensor}", f"PP{layout.pipeline}"]
    if layout.virtual_pipeline > 1:
        sizes.append(f"VPP{layout.virtual_pipeline}")
    if layout.context > 1:
        sizes.append(f"CP{layout.context}")
    if layout.experts:
        sizes.append(f"EP{layout.expert}")
    return " ".join(sizes)


def _experts(plan: Plan) -> str:
    layout = plan.layout
    return f" ETP{layout.expert_tensor}, expert-DP{layout.expert_data:,}" if layout.experts else ""


def _bar(share: float) -> str:
    return "█" * round(_BAR * min(share, 1.0)) or "▏"
