"""The core on programs whose time can be computed by hand. Rates and latencies of the test, not of a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest

from laboratory.simulator import core
from laboratory.simulator.assumptions import H200
from laboratory.simulator.core import Event, Launch
from megatron_fc.errors import UserError

ASSUMED = replace(H200, barrier_latency=18, special_latency=22, shared_latency=30, unit_delay=4, launch=400)
ONE_WARP = Launch(tiles=1, warps=1, resident=1, programs=1, persistent=False, skew=0)
ALU = Event("alu", 2, 1)
LOAD = Event("memory", 2, 1, result=0, kind="dram", moved=512)
WAIT = ALU._replace(wait=0b1)


def cycles(body: list[Event], launch: Launch = ONE_WARP, **varied: float) -> float:
    return core.run([[], body, []], launch, replace(ASSUMED, **varied)).cycles


def test_a_stall_passes_before_the_next_instruction() -> None:
    """Issues at 0, 3, ... 27."""
    assert cycles([Event("alu", 2, 3)] * 10) == 27


def test_a_pipe_is_taken_for_its_cycles() -> None:
    assert cycles([Event("xu", 8, 1)] * 4) == 24
    assert cycles([Event("imad", 2, 1)] * 4) == 6


def test_fma_has_the_pipe_of_imad_beside_its_own() -> None:
    assert cycles([Event("fma", 2, 1)] * 10) == 9
    # fma at 0, imad at 1; both pipes are taken at 2 but the first is free again, the second is not before 3.
    assert cycles([Event("fma", 2, 1), Event("imad", 2, 1), Event("fma", 2, 1), Event("imad", 2, 1)]) == 3


def test_an_instruction_waits_for_the_scoreboards_of_its_mask() -> None:
    special = Event("xu", 2, 1, result=3, kind="special")
    assert cycles([special, ALU._replace(wait=0b1000)]) == 22
    assert cycles([special, ALU._replace(wait=0b0111)]) == 1


def test_operands_are_read_before_the_result_is_there() -> None:
    """Both units are 4 cycles away; 8 cycles of shared memory, then the result takes 30 - 4 more, the operands 4."""
    load = Event("memory", 2, 1, result=0, operands=1, kind="shared", shared=8)
    assert cycles([load, ALU._replace(wait=0b01)]) == 4 + 8 + 26
    assert cycles([load, ALU._replace(wait=0b10)]) == 4 + 8 + 4


def test_warps_of_a_program_meet_at_a_barrier() -> None:
    """The second warp starts at 2 and arrives at 3; both go on 18 cycles later."""
    two = replace(ONE_WARP, warps=2)
    assert cycles([ALU, Event("barrier", 2, 1), ALU], two) == 3 + 18
    assert cycles([ALU, Event("barrier", 2, 1), ALU]) == 1 + 18


def test_warps_share_a_scheduler_by_four() -> None:
    """Warps 0 and 4 share one: 16 issues, from cycle 0 on. Warp 3 has its own, and starts at 6."""
    assert cycles([ALU._replace(pipe="uniform", cycles=1)] * 8, replace(ONE_WARP, warps=4)) == 6 + 7
    assert cycles([ALU._replace(pipe="uniform", cycles=1)] * 8, replace(ONE_WARP, warps=8)) == 14 + 7
    assert cycles([ALU._replace(pipe="uniform", cycles=1)] * 80, replace(ONE_WARP, warps=8)) == pytest.approx(
        6 + 160, abs=8
    )


def test_shared_memory_serves_all_warps_one_after_another() -> None:
    load = Event("memory", 2, 1, result=0, kind="shared", shared=4)
    found = cycles([load] * 32 + [WAIT], replace(ONE_WARP, warps=8))
    assert found == pytest.approx(8 * 32 * 4, rel=0.05)
    assert cycles([load._replace(shared=6)] * 32 + [WAIT], replace(ONE_WARP, warps=8)) == pytest.approx(
        1.5 * found, rel=0.05
    )


def test_a_read_from_dram_takes_its_latency_and_one_from_l2_less() -> None:
    """To the unit, through L1 (512 bytes at 128), L2, DRAM, back through the port; less the 6 cycles of issue."""
    passed = 4 + 512 / ASSUMED.l1 + 512 / (6 * ASSUMED.l2) - 6 + 512 / ASSUMED.port
    assert cycles([LOAD, WAIT]) == pytest.approx(passed + 512 / (6 * ASSUMED.dram) + ASSUMED.dram_latency, abs=1)
    assert cycles([LOAD._replace(kind="l2"), WAIT]) == pytest.approx(passed + ASSUMED.l2_latency, abs=1)


def test_asynchronous_copies_are_waited_for_by_group() -> None:
    copy = LOAD._replace(kind="async dram", result=7)
    commit, wait = Event("control", 1, 1, kind="commit"), Event("control", 1, 1, kind="wait group")
    both = cycles([copy, commit, copy, commit, wait])
    assert both > ASSUMED.dram_latency
    assert cycles([copy, commit, copy, commit, wait._replace(moved=2)]) < 30  # when DRAM has done its part
    first = cycles([copy, commit, copy._replace(moved=512 * 32), commit, wait._replace(moved=1)])
    assert first == pytest.approx(both, abs=30)
    assert cycles([copy, commit, copy._replace(moved=512 * 32), commit, wait]) > first + 100


def test_programs_follow_each_other_after_a_launch() -> None:
    """Twelve tiles on six processors, two each: issues at 0, 2, 4, 6, and 400 cycles after the last one again."""
    small = {"processors": 6}
    assert cycles([ALU] * 4, replace(ONE_WARP, tiles=12), **small) == 6 + 400 + 6
    assert cycles([ALU] * 4, replace(ONE_WARP, tiles=12, persistent=True), **small) == 14


def test_a_persistent_program_runs_its_body_once_per_tile() -> None:
    launch = replace(ONE_WARP, tiles=5 * 132, persistent=True)
    found = core.run([[ALU] * 3, [ALU] * 7, [ALU] * 2], launch, ASSUMED)
    assert found.cycles == 2 * (3 + 5 * 7 + 2 - 1)


@pytest.mark.parametrize("backlog", [1500, 10_000])
def test_dram_bounds_what_is_only_moved(backlog: float) -> None:
    launch = Launch(tiles=20_000, warps=8, resident=4, programs=4, persistent=True)
    found = core.run(
        [[], [LOAD] * 4 + [LOAD._replace(kind="store dram", wait=0b1, result=7)] * 4, []],
        launch,
        replace(ASSUMED, backlog=backlog),
    )
    assert found.dram_bytes_per_cycle == pytest.approx(ASSUMED.dram, rel=0.04)
    assert found.us == pytest.approx(20_000 * 8 * 8 * 512 / (ASSUMED.copy_tbs * 1e6), rel=0.04)


def test_the_same_start_gives_the_same_cycles() -> None:
    launch = Launch(tiles=2000, warps=4, resident=4, programs=4, persistent=True, seed=3, skew=3000)
    body = [LOAD, WAIT, Event("barrier", 2, 1), *[ALU] * 50]
    assert cycles(body, launch) == cycles(body, launch)
    assert cycles(body, launch) != cycles(body, replace(launch, seed=4))


def test_without_a_compiler_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(core, "CACHE", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no g\+\+ on the PATH: install it"):
        core.program()
