"""Training step of OLMoE-7B's layers in real Megatron, residual against Frac-Connections with each backend.

    python benchmarks/step.py                       # as many layers as fit on the card
    python benchmarks/step.py --layers 4 --connection dfc_x2
    python benchmarks/step.py --precision bf16 fp8_delayed fp8_tensorwise fp8_blockwise --input-norms
    python benchmarks/step.py --device cpu          # does it run? A tiny model; the figures say nothing.

Forward and backward of the micro-batches, and Megatron's optimizer. The models take turns: in every round each is
built, warmed up, timed and freed, another one first every round. Ratios are those of a round. See benchmarks/README.md.
"""

import gc
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

import olmoe
import options
import record
from clock import said
from megatron_fc import FracConfig
from megatron_fc.connections.kernels.availability import triton_obstacle
from megatron_fc.errors import UserError
from megatron_fc.training.machine import device_capability
from megatron_fc.training.precision import PRECISIONS, refuse_on_device
from olmoe import OLMOE_7B, TINY, Size, Trainee
from rank import one_rank

RESIDUAL, FUSED_RESIDUAL = "residual", "residual, fused_residual_rmsnorm"
WARM_UP = 2  # the first steps allocate and compile
USED = 0.88  # of the free memory: what is reserved in pieces that do not fit is lost


@dataclass
class Row:
    """One contestant. One value per round; `absent` and `error` say why there are none."""

    contestant: str
    ours: bool
    precision: str = "bf16"
    absent: str = ""
    error: str = ""
    step_ms: list[float] = field(default_factory=list)
    gradients_ms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of the first round, warm-up included
    peak_bytes: int = 0
    tokens_per_s: float | None = None
    throughput_against_residual: float | None = None
    peak_against_residual: float | None = None
    throughput_against_bf16: float | None = None


@dataclass(frozen=True)
class Setting:
    """What all contestants of a run share."""

    size: Size
    tokens: torch.Tensor  # [micro-batches, sequences, length + 1]
    steps: int


Build = Callable[[int], Trainee]


def contestants(
    frac: FracConfig, size: Size, device: str, precisions: Sequence[str], input_norms: bool
) -> Iterator[tuple[Row, Build]]:
    """Rows, and what builds a contestant with a number of layers."""
    te = olmoe.uses_transformer_engine()
    without_te = "" if te else "needs Transformer Engine, which is not installed"
    without_triton = triton_obstacle(device, torch.bfloat16) or ""
    for precision in precisions:
        low = precision != "bf16"
        missing = (low and without_te) or unfit(size, precision)

        def entrant(
            name: str,
            frac: FracConfig | None,
            absent: str = "",
            fused_residual: bool = False,
            precision: str = precision,
        ) -> tuple[Row, Build]:
            row = Row(name, ours=frac is not None, precision=precision, absent=absent)
            return row, lambda layers: Trainee(size, layers, frac, fused_residual, precision)

        yield entrant(RESIDUAL, None, missing)
        if not low:
            yield entrant(FUSED_RESIDUAL, None, without_te, fused_residual=True)
        triton = replace(frac, backend="triton")
        yield entrant(f"{frac.label}, triton", triton, missing or without_triton)
        if input_norms:
            projection = replace(triton, input_norm="projection")
            yield entrant(f"{frac.label}, triton, norm in the projection", projection, missing or without_te)
        if not low:
            yield entrant(f"{frac.label}, torch", replace(frac, backend="torch"))


def unfit(size: Size, precision: str) -> str:
    """Why this device cannot run a precision, empty if it can."""
    try:
        refuse_on_device(olmoe.transformer_config(size, 1, precision=precision), device_capability())
    except UserError as error:
        return str(error)
    return ""


def turn(build: Build, layers: int, setting: Setting, steps: int) -> tuple[float, float, int, list[float]]:
    """Build, warm up, time and free a model: median ms of a step, of its gradients; peak bytes; the losses."""
    clean()
    left = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainee = build(layers)
    try:
        for _ in range(WARM_UP):
            trainee.step(setting.tokens)
        seconds = [trainee.step(setting.tokens) for _ in range(steps)]
    finally:
        trainee.free()
    gradients, whole = (1000 * statistics.median(times) for times in zip(*seconds, strict=True))
    return whole, gradients, torch.cuda.max_memory_allocated() - left, trainee.losses


def clean() -> None:
    """Give the memory of what is no longer used back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def fitting_layers(entrants: list[tuple[Row, Build]], setting: Setting, budget: options.Budget) -> int:
    """As many layers as the free memory holds, by the peaks of one and of two layers; of the hungriest contestant."""
    clean()
    free, _ = torch.cuda.mem_get_info()
    short = replace(setting, tokens=setting.tokens[:1])  # micro-batches follow one another
    fitting = setting.size.layers
    for row, build in within(budget, entrants):
        try:
            one, two = (turn(build, layers, short, steps=1)[2] for layers in (1, 2))
        except Exception as error:
            row.error = said(error)
            continue
        fits = 1 + int((USED * free - one) / (two - one))
        print(
            f"{row.contestant}, {row.precision}: {(two - one) / 2**30:.1f} GiB a layer, {fits} layers fit", flush=True
        )
        fitting = min(fitting, fits)
    return max(1, fitting)


def within(budget: options.Budget, entrants: list[tuple[Row, Build]]) -> Iterator[tuple[Row, Build]]:
    """Those for whom the budget has time left, if each takes as long as the longest so far."""
    longest = 0.0
    for row, build in entrants:
        if budget.left <= longest:
            print(f"not begun, the budget of {budget.seconds:.0f} s would not do: {row.contestant}", flush=True)
            return
        before = budget.spent
        yield row, build
        longest = max(longest, budget.spent - before)


def compete(
    entrants: list[tuple[Row, Build]], layers: int, setting: Setting, number: int, budget: options.Budget
) -> Iterator[Row]:
    """One round: a turn of everyone who has not failed, into the rows; yields each that is over."""
    running = [(row, build) for row, build in entrants if not row.error]
    first = number % len(running) if running else 0
    for row, build in within(budget, running[first:] + running[:first]):
        try:
            whole, gradients, peak, losses = turn(build, layers, setting, setting.steps)
        except Exception as error:
            row.error = said(error)
            yield row
            continue
        row.step_ms.append(whole)
        row.gradients_ms.append(gradients)
        row.losses = row.losses or losses
        row.peak_bytes = max(row.peak_bytes, peak)
        print(f"round {number + 1}, {row.contestant}, {row.precision}: {whole:,.0f} ms a step", flush=True)
        yield row


def conclude(rows: list[Row], tokens: int) -> None:
    """Throughput, and ratios to the residual model of the same precision, and of bf16, in the same round.

    While a round is under way, or where the budget has cut the last one, only some rows have its value.
    """
    residuals = {row.precision: row for row in rows if row.contestant == RESIDUAL}
    in_bf16 = residuals.get("bf16")
    for row in rows:
        residual = residuals[row.precision]
        if row.error or not row.step_ms:
            continue
        row.tokens_per_s = 1000 * tokens / statistics.median(row.step_ms)
        if residual.step_ms and not residual.error:
            pairs = zip(residual.step_ms, row.step_ms, strict=False)
            row.throughput_against_residual = statistics.median(a / b for a, b in pairs)
            row.peak_against_residual = row.peak_bytes / residual.peak_bytes if residual.peak_bytes else None
        if in_bf16 is not None and in_bf16.step_ms and not in_bf16.error:
            pairs = zip(in_bf16.step_ms, row.step_ms, strict=False)
            row.throughput_against_bf16 = statistics.median(a / b for a, b in pairs)


COLUMNS = (
    "",
    "precision",
    "tokens/s",
    "against residual",
    "against residual in bf16",
    "step ms",
    "of these until gradients",
    "peak GiB",
    "against residual",
)


def report(result: dict[str, Any], rows: list[Row]) -> str:
    text = record.heading("Training step", result)
    if not result["machine_is_gpu"]:
        text += "\n**On a CPU, a tiny model, kernels in the interpreter: no figure here says anything of a GPU.**\n"
    size = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in result["model"].items())
    text += (
        f"\nLayers: {result['layers']}. Model: {size}. {result['layer_spec']}. Tokens per step: "
        f"{result['tokens_per_step']:,} in {result['micro_batches']} micro-batches. Rounds: {result['rounds']}, of "
        f"{result['steps']} steps each.\n\n"
    )
    lines = []
    for row in rows:
        why = (row.error and f"**{row.error}**") or row.absent or ("" if row.step_ms else "not measured")
        if why:
            lines.append([f"{row.contestant}: {why}", row.precision, *[""] * (len(COLUMNS) - 2)])
            continue
        lines.append(
            [
                row.contestant,
                row.precision,
                f"{row.tokens_per_s:,.0f}",
                _ratio(row.throughput_against_residual),
                _ratio(row.throughput_against_bf16),
                f"{statistics.median(row.step_ms):,.1f}",
                f"{statistics.median(row.gradients_ms):,.1f}",
                f"{row.peak_bytes / 2**30:.2f}",
                _ratio(row.peak_against_residual),
            ]
        )
    return text + record.table(COLUMNS, lines)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}x"


def main() -> int:
    parser = options.parser(__doc__)
    parser.add_argument("--connection", default="dfc_x4", choices=options.CONNECTIONS)
    parser.add_argument("--layers", type=int, help="default: as many as fit, 2 on cpu")
    parser.add_argument("--micro-batches", type=int, default=4, help="of --sequences each, in every step; default 4")
    parser.add_argument("--sequences", type=int, default=1, help="of a micro-batch; default 1")
    parser.add_argument("--steps", type=int, default=5, help="timed in every turn; default 5")
    parser.add_argument("--rounds", type=int, default=3, help="default 3, fewer where the budget ends")
    parser.add_argument("--precision", nargs="+", default=["bf16"], choices=PRECISIONS, help="default bf16")
    parser.add_argument(
        "--input-norms", action="store_true", help="also with the norms that Transformer Engine fuses left to it"
    )
    args = options.parse(parser)
    budget = options.Budget(args.budget)
    size = OLMOE_7B if args.device == "cuda" else TINY
    generator = torch.Generator().manual_seed(1)
    shape = (args.micro_batches, args.sequences, size.sequence + 1)
    tokens = torch.randint(size.vocabulary, shape, generator=generator).to(args.device)
    setting = Setting(size, tokens, args.steps)
    frac = options.connection(args.connection)
    te = olmoe.uses_transformer_engine()
    result = record.facts(args.device) | {
        "machine_is_gpu": record.on_gpu(args.device),
        "layer_spec": "Transformer Engine's layers" if te else "Megatron's local layers, no Transformer Engine",
        "model": {name: value for name, value in asdict(size).items() if name != "layers"},
        "tokens_per_step": args.micro_batches * args.sequences * size.sequence,
        "micro_batches": args.micro_batches,
        "steps": args.steps,
        "rounds": 0,
    }
    with one_rank():
        everyone = list(contestants(frac, size, args.device, args.precision, args.input_norms))
        entrants = [(row, build) for row, build in everyone if not row.absent]
        layers = args.layers or (size.layers if args.device == "cpu" else fitting_layers(entrants, setting, budget))
        result["layers"], rows, longest = layers, [row for row, _ in everyone], 0.0
        for number in range(args.rounds):
            if number and budget.left < longest:
                print(f"no round {number + 1}: it would exceed the budget of {args.budget:.0f} s", flush=True)
                break
            before = budget.spent
            for _ in compete(entrants, layers, setting, number, budget):
                conclude(rows, result["tokens_per_step"])
                result["rounds"] = number + 1
                if args.output:  # now, in case that the run is ended from outside
                    stored = result | {"rows": [asdict(row) for row in rows]}
                    record.write(args.output, "step", stored, report(result, rows))
            longest = max(longest, budget.spent - before)
        clean()
    print(report(result, rows))
    for row in rows:
        if row.error:
            print(f"failed: {row.contestant}, {row.precision}: {row.error}", file=sys.stderr)
    return int(any(row.error for row in rows if row.ours))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
