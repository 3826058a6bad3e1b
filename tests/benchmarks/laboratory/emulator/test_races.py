"""Races: what is one, and what is none."""

import numpy as np
import pytest

from laboratory.emulator import Options, RaceError, run
from support.ptx import kernel

EXCHANGE = """
    mov.b32 %r6, global_smem; mad.lo.s32 %r7, %r0, 4, %r6; xor.b32 %r8, %r0, {}; mad.lo.s32 %r9, %r8, 4, %r6;
    st.shared.b32 [%r7], %r0;
    {}
    ld.shared.b32 %r5, [%r9];
    mad.wide.u32 %rd9, %r0, 4, %rd0; st.global.b32 [%rd9], %r5;
"""


def test_a_missing_barrier_shows() -> None:
    expected = np.arange(128, dtype=np.uint32) ^ 64
    options = [Options(shared=512), Options(shared=512, order="random"), Options(shared=512, races="lanes")]
    for option in options:
        out = np.zeros(128, np.uint32)
        run(kernel(EXCHANGE.format(64, "bar.sync 0;"), 1), (1,), 4, [out], option)
        assert np.array_equal(out, expected)
    wrong = np.zeros(128, np.uint32)
    run(kernel(EXCHANGE.format(64, ""), 1), (1,), 4, [wrong], options[1])
    assert not np.array_equal(wrong, expected)
    message = r"(?s)ld\.shared.*reads shared memory that warp 2, lane 0 of CTA 0 wrote.*st\.shared"
    with pytest.raises(RaceError, match=message):
        run(kernel(EXCHANGE.format(64, ""), 1), (1,), 4, [wrong], options[2])
    # Within a warp lanes go together, but nothing says that they do.
    run(kernel(EXCHANGE.format(1, "bar.warp.sync -1;"), 1), (1,), 4, [wrong], options[2])
    run(kernel(EXCHANGE.format(1, ""), 1), (1,), 4, [wrong], Options(shared=512, races="warps"))
    with pytest.raises(RaceError):
        run(kernel(EXCHANGE.format(1, ""), 1), (1,), 4, [wrong], options[2])


def test_races_between_ctas_and_of_reads_before_writes() -> None:
    out = np.zeros(64, np.uint32)
    body = "mov.u32 %r2, %ctaid.x; mad.wide.u32 %rd9, %r0, 4, %rd0; st.global.b32 [%rd9], %r2;"
    with pytest.raises(RaceError, match="global memory"):
        run(kernel(body, 1), (2,), 2, [out], Options(races="warps"))
    body = "mad.wide.u32 %rd8, %r0, 4, %rd0; ld.global.b32 %r5, [%rd8]; xor.b32 %r6, %r0, 32; add.s32 %r5, %r5, 1;"
    body += "mad.wide.u32 %rd9, %r6, 4, %rd0; {} st.global.b32 [%rd9], %r5;"
    run(kernel(body.format("bar.sync 0;"), 1), (1,), 2, [out], Options(races="lanes"))
    with pytest.raises(RaceError, match="read"):
        run(kernel(body.format(""), 1), (1,), 2, [out], Options(races="warps"))
    body = "mov.b32 %r6, global_smem; shr.u32 %r7, %r0, 5; st.shared.b32 [%r6], {};"
    run(kernel(body.format("7"), 0), (1,), 2, [], Options(shared=4, races="values"))
    with pytest.raises(RaceError, match="another value"):
        run(kernel(body.format("%r7"), 0), (1,), 2, [], Options(shared=4, races="warps"))
    run(kernel(body.format("%r1"), 0), (1,), 2, [], Options(shared=4, races="lanes"))
    with pytest.raises(RaceError, match="another value"):
        run(kernel(body.format("%r1"), 0), (1,), 2, [], Options(shared=4, races="values"))
