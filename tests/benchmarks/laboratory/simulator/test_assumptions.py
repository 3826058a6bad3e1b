"""The frozen assumptions: classes of instructions, and that recorded tables were made under them."""

import json

import pytest

from laboratory.simulator.assumptions import H100, H200, H200_LOW, Use, fingerprint, use_of
from record import RESULTS


@pytest.mark.parametrize(
    ("op", "lane_bytes", "use"),
    [
        ("FFMA.FTZ", 4, Use("fma")),
        ("IMAD.MOV.U32", 4, Use("imad", 2)),
        ("IMAD.WIDE", 4, Use("imad", 4)),
        ("MUFU.RSQ", 4, Use("xu", 8, "special")),
        ("HMMA.16816.F32.BF16", 4, Use("tensor", 6.5, "other")),
        ("HMMA.1688.F32.BF16", 4, Use("tensor", 3.25, "other")),
        ("HMMA.1688.F32.TF32", 4, Use("tensor", 6.5, "other")),
        ("LDS.128", 16, Use("memory", 2, "shared", 4)),
        ("LDSM.16.M88.2", 8, Use("memory", 2, "shared", 2)),
        ("SHFL.BFLY", 4, Use("memory", 2, "shuffle", 1)),
        ("LDG.E.128", 16, Use("memory", 2, None)),
        ("UIADD3", 4, Use("uniform")),
        ("PRMT", 4, Use("alu")),
    ],
)
def test_classes_of_instructions(op: str, lane_bytes: int, use: Use) -> None:
    assert use_of(op, lane_bytes, 6.5) == use


def test_rates_follow_from_the_card() -> None:
    assert H200.dram * 132 * H200.clock_ghz == pytest.approx(4300)
    assert H100.dram_latency == pytest.approx(693)
    assert H200_LOW.dram_latency > H200.dram_latency


@pytest.mark.parametrize("name", ["predicted-h200", "sensitivity-h200", "calibration-h100"])
def test_recorded_tables_were_made_under_these_assumptions(name: str) -> None:
    """A change of the ruler measures everything again: run predict.py, its --sensitivity, and calibrate.py."""
    stored = json.loads((RESULTS / f"{name}.json").read_text())
    assert stored["assumptions"] == fingerprint()
    assert fingerprint() in (RESULTS / f"{name}.md").read_text()
