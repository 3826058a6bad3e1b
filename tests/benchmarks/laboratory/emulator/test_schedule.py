"""Barriers, and the orders in which warps and CTAs run."""

from typing import Any

import numpy as np
import pytest

from laboratory.emulator import Hang, Options, run
from support.ptx import kernel


def test_ctas_that_take_different_ways_past_barriers() -> None:
    """CTA n goes around n times, over a barrier each time."""
    body = """
    mov.u32 %r2, %ctaid.x; mov.b32 %r6, global_smem; mad.lo.s32 %r7, %r0, 4, %r6; xor.b32 %r8, %r0, 32;
    mad.lo.s32 %r9, %r8, 4, %r6; mov.b32 %r5, %r0; mov.b32 %r4, 0;
$LOOP:
    setp.ge.u32 %p1, %r4, %r2; @%p1 bra $DONE;
    bar.sync 0; st.shared.b32 [%r7], %r5; bar.sync 0; ld.shared.b32 %r5, [%r9];
    add.s32 %r5, %r5, 1000; add.s32 %r4, %r4, 1; bra.uni $LOOP;
$DONE:
    mad.lo.s32 %r3, %r2, 64, %r0; mad.wide.u32 %rd9, %r3, 4, %rd0; st.global.b32 [%rd9], %r5;
    """
    for order in ("lockstep", "random"):
        out = np.zeros((5, 64), np.uint32)
        run(kernel(body, 1), (5,), 2, [out], Options(order=order, shared=256, races="lanes"))
        threads = np.arange(64)
        assert all(np.array_equal(out[n], (threads ^ 32 * (n % 2)) + 1000 * n) for n in range(5))


@pytest.mark.parametrize("order", ["lockstep", "random"])
def test_threads_that_wait_forever_are_an_error(order: Any) -> None:
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bra $END; bar.sync 0;\n$END:\n bar.sync 1;"
    with pytest.raises(Hang, match=r"(?s)never reach.*bar\.sync"):
        run(kernel(body, 0), (1,), 2, [], Options(order=order))
    with pytest.raises(Hang, match="still running"):
        run(kernel("$LOOP:\n bra $LOOP;", 0), (1,), 1, [], Options(order=order, limit=1000))
    run(kernel("setp.lt.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0;", 0), (1,), 2, [], Options(order=order))
    part = "setp.lt.u32 %p1, %r0, 64; @%p1 bra $A; bra $B;\n$A:\n bar.sync 1, 64;\n$B:\n bar.sync 0;"
    run(kernel(part, 0), (1,), 4, [], Options(order=order))


def test_ctas_in_another_order() -> None:
    """What depends on the order changes with the seed, what does not stays; in batches of two CTAs."""
    body = """
    mov.u32 %r2, %ctaid.x; st.global.b32 [%rd0], %r2; mad.wide.u32 %rd9, %r2, 4, %rd1; st.global.b32 [%rd9], %r2;
    """
    lasts = set()
    for seed in range(8):
        last, own = np.zeros(1, np.uint32), np.zeros(6, np.uint32)
        run(kernel(body, 2), (6,), 1, [last, own], Options(ctas="random", seed=seed, threads=64))
        assert list(own) == list(range(6))
        lasts.add(int(last[0]))
    assert len(lasts) > 2
    run(kernel(body, 2), (6,), 1, [last, own], Options(threads=64))
    assert last[0] == 5
