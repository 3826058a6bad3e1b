"""Exchange between lanes against what the PTX manual says, lane by lane in plain Python and numpy."""

import numpy as np
import pytest

from support.ptx import apply

RNG = np.random.default_rng(0)


def shuffle(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """Source lane and predicate, as the manual's program has them."""
    b, clamp, segment = b & 31, c & 31, c >> 8 & 31
    highest, lowest = (lane & segment) | (clamp & ~segment & 31), lane & segment
    if mode == "up":
        j, inside = lane - b, lane - b >= highest
    elif mode == "down":
        j, inside = lane + b, lane + b <= highest
    elif mode == "bfly":
        j, inside = lane ^ b, (lane ^ b) <= highest
    else:
        j = lowest | (b & ~segment & 31)
        inside = j <= highest
    return (j if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("bounds", [31, 0, (24 << 8) | 7, (16 << 8) | 31, 0x1C03])
def test_shuffles(mode: str, bounds: int) -> None:
    values = RNG.integers(0, 2**32, 64, np.uint32)
    distance = RNG.integers(0, 32, 64).astype(np.uint32)
    for by in (1, 4, 16, None):
        operand = "{b}" if by is None else by
        code = f"shfl.sync.{mode}.b32 {{d}}|%p1, {{a}}, {operand}, {bounds}, -1; @!%p1 xor.b32 {{d}}, {{d}}, 1;"
        found = apply(code, [values, distance], np.uint32)
        for thread in range(64):
            lane, first = thread % 32, thread // 32 * 32
            source, inside = shuffle(mode, lane, int(distance[thread]) if by is None else by, bounds)
            assert found[thread] == values[first + source] ^ (0 if inside else 1)


def test_votes_and_reductions() -> None:
    values = RNG.integers(0, 2**32, 64, np.uint32)
    low = values & 1 == 1
    ballots = [sum(int(low[32 * w + lane]) << lane for lane in range(32)) for w in range(2)]
    set_p = "and.b32 %r90, {a}, 1; setp.eq.b32 %p1, %r90, 1; "
    found = apply(set_p + "vote.sync.ballot.b32 {d}, %p1, -1;", [values], np.uint32)
    assert list(found) == [ballots[0]] * 32 + [ballots[1]] * 32
    found = apply(set_p + "vote.sync.any.pred %p2, %p1, -1; selp.b32 {d}, 1, 0, %p2;", [values], np.uint32)
    assert found.all()
    found = apply("redux.sync.max.u32 {d}, {a}, -1;", [values], np.uint32)
    assert list(found) == [values[:32].max()] * 32 + [values[32:].max()] * 32
    found = apply("redux.sync.add.s32 {d}, {a}, 0xFF;", [values], np.uint32)
    assert found[0] == values[:8].sum(dtype=np.uint32)
    found = apply("elect.sync %r91|%p1, 0xF0; selp.b32 {d}, %r91, 0, %p1;", [values], np.uint32)
    assert list(np.flatnonzero(found)) == [4, 36]
    assert found[4] == 4
