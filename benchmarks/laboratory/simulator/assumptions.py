"""Rates, latencies and classes of instructions that no binary says: every assumption of the simulator, with its source.

A change here is a commit of its own, which predicts all kernels again before and after and says why: nobody tunes the
ruler with the thing that it measures (docs/laboratory.md). `fingerprint` names the state; every table prints it.

Sources, by their names below:
  data sheet   NVIDIA's of the H100 SXM (3.35 TB/s, 132 processors) and the H200 (4.8 TB/s).
  QuACK        media/2025-07-10-membound-sol.md of Dao-AILab/quack: shared memory 10 to 20 ns, L2 150 to 200 ns and 5 to
               10 TB/s, DRAM about 400 ns, 20 to 30 TB/s of shared memory, 3.0 TB/s by streaming kernels on an H100.
  calibration  no independent source; the 45 published times (docs/laboratory.md) are met with this value.
  guess        no source, and the calibration does not tell.
"""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

PIPES = ("fma", "imad", "alu", "xu", "tensor", "memory", "uniform", "control", "barrier", "fp64")
# What a scoreboard waits for.
KINDS = (
    "fixed", "shared", "l1", "l2", "dram", "store l2", "store dram", "special", "constant", "shuffle", "other",
    "async dram", "async l2", "commit", "wait group",
)  # fmt: skip


@dataclass(frozen=True)
class Assumptions:
    """One GPU. Latencies in cycles, rates in bytes per cycle of one processor unless a name says otherwise."""

    copy_tbs: float  # bandwidth of a device-to-device copy, read and written, TB/s
    clock_ghz: float = 1.98  # highest clock of these cards; guess
    processors: float = 132  # data sheet
    dram_ns: float = 350  # QuACK says about 400 ns; calibration
    l2_tbs: float = 5.6  # QuACK
    port: float = 64  # L2 to a processor and back, each way; guess
    l1: float = 128  # one line per cycle; guess
    shared: float = 128  # 32 banks of 4 bytes (CUDA C++ Programming Guide)
    shared_scale: float = 1.0  # multiplies the cycles that shared memory is taken: bank conflicts are not modelled
    l2_latency: float = 281  # 142 ns, just below QuACK's; guess
    l1_latency: float = 40  # guess
    shared_latency: float = 30  # QuACK
    shuffle_latency: float = 24  # guess
    special_latency: float = 22  # MUFU and conversions; guess
    constant_latency: float = 30  # LDC and special registers; guess
    other_latency: float = 25  # HMMA and all else with a scoreboard; guess
    fixed_latency: float = 6  # of what sets a scoreboard with nothing to wait for; guess
    unit_delay: float = 4  # from issue to a memory unit; guess
    store_delay: float = 10  # until a store has read its registers; guess
    barrier_latency: float = 18  # guess
    launch: float = 400  # from a program's end to the next one's first instruction; guess
    write_cost: float = 1.0  # a written byte costs as much of DRAM as a read one; calibration
    backlog: float = 1500  # cycles of queued DRAM work at which a processor stops to send more; guess
    greedy: float = 1  # a scheduler stays with a warp as long as it can; 0: it takes turns; guess
    hmma: float = 6.5  # cycles of a quarter for HMMA.16816: 62 % of wgmma's rate, 4 cycles; a guess from memory
    token_share: float = 0.125  # of the lanes' bytes of values per token, which several lanes share; guess

    @property
    def dram(self) -> float:
        """DRAM bytes per cycle and processor."""
        return self.copy_tbs * 1e3 / self.processors / self.clock_ghz

    @property
    def l2(self) -> float:
        """L2 bytes per cycle and processor."""
        return self.l2_tbs * 1e3 / self.processors / self.clock_ghz

    @property
    def dram_latency(self) -> float:
        return self.dram_ns * self.clock_ghz


H100 = Assumptions(copy_tbs=2.95)  # 88 % of the data sheet's; QuACK's kernels reach 3.0; calibration
H200 = Assumptions(copy_tbs=4.3)  # the same share of its data sheet's, and a little more: 90 %; guess
# Less of everything at once, the clock that of the PCIe card (chipsandcheese.com, "Nvidia's H100: Funny L2"). Guesses.
H200_LOW = Assumptions(
    copy_tbs=4.3, clock_ghz=1.755, dram_ns=500, l2_tbs=5.0, l2_latency=320, barrier_latency=25, hmma=8.0
)
LAUNCH_US = 5.0  # of a kernel, in published times of whole calls; calibration

# Of a processor, CUDA C++ Programming Guide, compute capability 9.0.
REGISTERS, THREADS, PROGRAMS, SHARED_BYTES, RESERVED_BYTES = 65536, 2048, 32, 227 * 1024, 1024


@dataclass(frozen=True)
class Use:
    """What an instruction takes: a pipe, cycles of it in one quarter of a processor, what it waits for, shared cycles.

    Cycles: 2 is 16 lanes per cycle and quarter (CUDA C++ Programming Guide, throughput of instructions). What goes to
    `fma` takes the pipe `imad` where its own is taken. A global access has no kind; the kernel's pointers decide.
    """

    pipe: str
    cycles: float = 2
    kind: str | None = "fixed"
    shared: float = field(default=0)


_TABLE = {
    "FFMA FMUL FADD HFMA2 HADD2 HMUL2 FSWZADD": Use("fma"),
    "MUFU F2F F2I I2F POPC FLO BREV F2IP": Use("xu", 8, "special"),
    "DADD DMUL DFMA DSETP": Use("fp64", 2, "other"),
    "SHFL": Use("memory", 2, "shuffle", 1),
    "LDG STG LDGSTS RED ATOMG": Use("memory", 2, None),
    "LDC S2R S2UR LEPC CS2UR": Use("memory", 2, "constant"),
    "ATOMS ATOM MEMBAR ERRBAR CCTL FENCE SYNCS UBLKCP LDL STL MOVM": Use("memory", 2, "other"),
    "BAR": Use("barrier"),
    "LDGDEPBAR": Use("control", 1, "commit"),
    "DEPBAR": Use("control", 1, "wait group"),
    "BRA EXIT NOP BSSY BSYNC WARPSYNC BREAK YIELD RET CALL": Use("control", 1),
    "R2UR": Use("uniform", 2, "other"),
    "VOTEU": Use("uniform"),
}
_BY_OPCODE = {opcode: use for opcodes, use in _TABLE.items() for opcode in opcodes.split()}


def use_of(op: str, lane_bytes: int, hmma: float) -> Use:
    """Of an instruction by its full name, such as `LDS.128`; `lane_bytes`: what each lane moves, `hmma`: as assumed."""
    base = op.partition(".")[0]
    if base in _BY_OPCODE:
        return _BY_OPCODE[base]
    if base == "IMAD":
        return Use("imad", 4 if ".WIDE" in op or ".HI" in op else 2)
    if base == "HMMA":
        return Use("tensor", hmma / 2 if ".1688." in op and "TF32" not in op else hmma, "other")
    if base in ("LDS", "STS"):
        return Use("memory", 2, "shared", max(1, lane_bytes * 32 // 128))
    if base in ("LDSM", "STSM"):
        return Use("memory", 2, "shared", lane_bytes // 4)
    if base.startswith("U"):
        return Use("uniform")
    return Use("alu")


def fingerprint() -> str:
    """Of all that decides a prediction beside the binary, this file and the core without comments: twelve digits."""
    here = Path(__file__)
    texts = (here.read_text(), here.with_name("core.cpp").read_text())
    bare = [re.sub(rf"{mark}.*|\s+", "", text) for mark, text in zip(("#", "//"), texts, strict=True)]
    return hashlib.sha256("".join(bare).encode()).hexdigest()[:12]
