"""What the command lines of the GPU benchmarks share: device, time budget, folder of the results."""

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_fc import FracConfig
from record import RESULTS

CONNECTIONS = ("dfc_x4", "dfc_x2", "sfc_x4", "sfc_x2")


@dataclass
class Budget:
    """Seconds that a benchmark may take; None is without end. What is under way is finished, no more is begun."""

    seconds: float | None
    start: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        return float("inf") if self.seconds is None else self.seconds - self.spent


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the common options."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu shows that it runs, nothing else")
    made.add_argument("--budget", type=float, metavar="SECONDS", help="begin nothing more after this time")
    made.add_argument("--output", type=Path, help="folder for the results; default benchmarks/results, on cpu none")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse, fill in the folder, and leave with exit code 2 where the device is missing."""
    args = made.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            f"error: torch sees no CUDA device: run {made.prog} on a machine with one, or add --device cpu to see that "
            f"it runs",
            file=sys.stderr,
        )
        sys.exit(2)
    if args.output is None and args.device == "cuda":
        args.output = RESULTS
    return args


def connection(label: str) -> FracConfig:
    """The configuration of a label in CONNECTIONS."""
    kind, rate = label.split("_x")
    return FracConfig(rate=int(rate), dynamic=kind == "dfc")
