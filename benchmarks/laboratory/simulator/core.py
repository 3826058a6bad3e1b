"""The core (core.cpp) as a function: compiled with g++ when it is first used, and told what to run as text."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from laboratory.simulator.assumptions import KINDS, PIPES, Assumptions
from megatron_fc.errors import UserError

SOURCE = Path(__file__).with_name("core.cpp")
CACHE = Path(__file__).parents[3] / ".cache" / "simulator"
SAMPLE = 6  # processors that are simulated; they have their share of L2 and DRAM
# Seeds and skews of the launches that a mean is taken over.
STARTS = ((1, 800), (2, 3000), (3, 6000))


class Event(NamedTuple):
    """One instruction of one warp as the core takes it.

    `cycles` of its pipe, `stall` until the warp's next, scoreboards to `wait` for (mask) and to set (7: none), bytes
    `moved` by a global access (of a wait for asynchronous copies: groups that may be left), `shared` cycles.
    """

    pipe: str
    cycles: float
    stall: int
    wait: int = 0
    result: int = 7
    operands: int = 7
    kind: str = "fixed"
    moved: float = 0
    shared: float = 0


@dataclass(frozen=True)
class Launch:
    """What runs: tiles of the whole GPU, warps of a program, programs that share a processor, and how many there are of
    a persistent kernel per processor. Programs start within `skew` cycles, at moments drawn by `seed`."""

    tiles: int
    warps: int
    resident: int
    programs: int
    persistent: bool
    seed: int = 1
    skew: int = 800


@dataclass(frozen=True)
class Result:
    """Of one launch: time, and shares of it. `waits`: of the warps' time, by what they waited for."""

    us: float
    cycles: float
    issue: float
    dram_bytes_per_cycle: float
    waits: dict[str, float]


def run(segments: Sequence[Sequence[Event]], launch: Launch, assumed: Assumptions) -> Result:
    """Replay prologue, body (once per tile) and epilogue of a program."""
    values = {field.name: getattr(assumed, field.name) for field in fields(assumed)}
    values |= {name: getattr(assumed, name) for name in ("dram", "l2", "dram_latency")}
    values |= {name: float(value) for name, value in asdict(launch).items()} | {"sample": SAMPLE}
    lines = [f"{name} {value:.17g}" for name, value in values.items()]
    for number, events in enumerate(segments):
        lines.append(f"@ {number}")
        lines += [_line(event) for event in events]
    text = "\n".join([*lines, "@ end", ""])
    done = subprocess.run([program()], input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the simulator's core: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    return Result(found["cycles"] / assumed.clock_ghz / 1e3, **found)


def program() -> Path:
    """The compiled core.

    Raises:
        UserError: there is no g++.
    """
    path = CACHE / f"core-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}"
    if path.exists():
        return path
    compiler = shutil.which("g++")
    if compiler is None:
        raise UserError(
            "The simulator's core is C++ and there is no g++ on the PATH: install it (Debian: apt install g++)"
        )
    CACHE.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")  # another process may do the same: the last one to rename wins
    subprocess.run([compiler, "-std=c++17", "-O3", "-o", str(fresh), str(SOURCE)], check=True)
    fresh.rename(path)
    return path


def _line(e: Event) -> str:
    pipe, kind = PIPES.index(e.pipe), KINDS.index(e.kind)
    return f"{pipe} {e.cycles:g} {e.stall} {e.wait} {e.result} {e.operands} {kind} {e.moved:g} {e.shared:g}"
