"""Share of a copy's bandwidth that every kernel reaches on a GPU, beside what was predicted for it.

    python benchmarks/shares.py                  # all that results/predicted-h200.json has at 16,384 tokens
    python benchmarks/shares.py --device cpu     # does it run? Without a GPU the kernels run in the emulator.

What decides most comes first: boundary backward. Kernels take turns with a copy whose bandwidth is the scale. The
launch that adds up the programs' sums is in a backward pass's time, and is not in its prediction.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import options
import record
from clock import median, take_turns
from compiled import Shape
from launched import BYTES, rows_moved
from megatron_fc import FracConfig, HyperConfig
from megatron_fc.connections.kernels import launch
from megatron_fc.connections.norm import NormWeights
from predict import Prediction

PREDICTED = record.RESULTS / "predicted-h200.json"
TOKENS = 16384
FEW, SOME = 16, 2  # tokens and kernels where nothing is measured
FIRST = ("boundary backward", "width backward", "boundary forward", "width forward", "depth backward", "depth forward")
ROUNDS = 10


@dataclass(frozen=True)
class Share:
    """One kernel at one shape; shares in per cent of a copy's bandwidth, None where there is no figure or an error."""

    kernel: str
    width: int
    rate: int
    slots: int
    tokens: int
    ms: float | None
    measured: float | None
    mid: float
    low: float
    error: str = ""


def chosen() -> list[Prediction]:
    """What was predicted at `TOKENS`, by kernel in the order of `FIRST`, and of each the paper's shape first."""
    rows = [Prediction(**row) for row in json.loads(PREDICTED.read_text())["rows"]]
    known = [p for p in rows if p.tokens == TOKENS and p.kernel.removeprefix("given ") in FIRST]

    def order(p: Prediction) -> tuple[Any, ...]:
        name = p.kernel.removeprefix("given ")
        return (p.width, p.rate, p.slots) != (2048, 4, 4), name != p.kernel, FIRST.index(name), p.width, p.rate, p.slots

    return sorted(known, key=order)


def call(shape: Shape, tokens: int, device: torch.device) -> Callable[[], Any]:
    """One launch of a kernel, with random inputs; in backward with the sums'."""
    name, width, m, n = shape
    config = FracConfig(rate=m) if m == n else HyperConfig(slots=n, fractions=m)
    generator = torch.Generator(device).manual_seed(1)

    def random(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    wide = config.stream_width(width)
    h, g_mixed, (o, g_x) = random(tokens, wide), random(tokens, wide), (random(tokens, width) for _ in range(2))
    beta, alpha, gamma = (random(tokens, size, dtype=torch.float32) for size in (n, n * n, n * m))
    norm = NormWeights("rmsnorm", random(width))
    site = config.build(width).to(device)
    for parameter in site.parameters():
        parameter.data = 0.1 * random(*parameter.shape, dtype=torch.float32)
    p = site.operands()
    incoming = (g_x, random(tokens, n, dtype=torch.float32), g_mixed)
    before = launch.DepthInputs(o, h, beta, alpha)
    calls: dict[str, Callable[[], Any]] = {
        "width forward": lambda: launch.width_forward(h, p, norm),
        "width backward": lambda: launch.width_backward(*incoming, h, p, norm),
        "boundary forward": lambda: launch.boundary_forward(before, p, norm),
        "boundary backward": lambda: launch.boundary_backward(*incoming, h, before, p, norm),
        "depth forward": lambda: launch.depth_forward(before),
        "depth backward": lambda: launch.depth_backward(g_mixed, before),
        "given width forward": lambda: launch.given_width_forward(h, gamma, m, norm),
        "given width backward": lambda: launch.given_width_backward(g_x, g_mixed, h, gamma, alpha, m, norm),
    }
    return calls[name]


@torch.no_grad()
def measure(p: Prediction, tokens: int, device: torch.device) -> Share:
    """Let a kernel and a copy of as many bytes take turns."""
    moved = rows_moved(p.shape) * p.width * BYTES * tokens
    source = torch.empty(int(moved) // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    functions = {"kernel": call(p.shape, tokens, device), "copy": lambda: target.copy_(source)}
    on_gpu = device.type == "cuda"
    times = take_turns(functions, device, ROUNDS if on_gpu else 1, tokens * p.width * BYTES)
    kernel, copy = times["kernel"], times["copy"]
    ms, copied = (median(t.replayed) or median(t.direct) for t in (kernel, copy))
    share = 100 * copied / ms if on_gpu and ms and copied else None
    return Share(*p.shape, tokens, ms, share, p.mid, p.low, kernel.error or kernel.graph_error)


def page(result: dict[str, Any], shares: list[Share]) -> str:
    columns = ("kernel", "d", "m", "n", "ms", "measured, %", "predicted, %", "low case, %", "error")

    def cells(s: Share) -> Iterator[str]:
        yield from (s.kernel, str(s.width), str(s.rate), str(s.slots))
        yield "" if s.ms is None else f"{s.ms:.3f}"
        yield "" if s.measured is None else f"{s.measured:.0f}"
        yield from (f"{s.mid:.0f}", f"{s.low:.0f}", s.error)

    says = "" if result["on_gpu"] else "Run on a CPU: the kernels ran, and no figure here says anything of a GPU.\n\n"
    tokens = shares[0].tokens if shares else TOKENS
    return (
        record.heading("Share of a copy's bandwidth, measured beside predicted", result)
        + f"{says}bf16 streams, RMSNorm in the pass, {tokens:,} tokens; medians of {ROUNDS} rounds replayed from CUDA "
        f"graphs. Predictions are for an H200 under assumptions {result['assumptions']}, and lack the launch that adds "
        "up the programs' sums in backward.\n\n" + record.table(columns, (list(cells(s)) for s in shares))
    )


def main() -> int:
    args = options.parse(options.parser(__doc__))
    device, budget = torch.device(args.device), options.Budget(args.budget)
    on_gpu = device.type == "cuda"
    if on_gpu:
        lane: Any = nullcontext()
    else:
        from laboratory.emulator.driver import emulated

        lane = emulated(90)
    shares: list[Share] = []
    with lane:
        for p in chosen() if on_gpu else chosen()[:SOME]:
            if budget.left <= 0:
                break
            shares.append(share := measure(p, TOKENS if on_gpu else FEW, device))
            figure = "no figure" if share.measured is None else f"{share.measured:.0f} %"
            print(f"{p.place}: {figure}, predicted {p.mid:.0f} (low {p.low:.0f}) {share.error}", flush=True)
    left = len(chosen()) - len(shares)
    print(f"{left} of {len(chosen())} shapes were not measured" if left else "all shapes were measured")
    assumptions = json.loads(PREDICTED.read_text())["assumptions"]
    rows = [asdict(share) for share in shares]
    result = record.facts(args.device) | {"on_gpu": on_gpu, "assumptions": assumptions, "rows": rows}
    if args.output:
        record.write(args.output, "shares", result, page(result, shares))
    return int(any(s.error for s in shares))


if __name__ == "__main__":
    sys.exit(main())
