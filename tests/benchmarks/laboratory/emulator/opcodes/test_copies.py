"""Copies to shared memory, which land when they are waited for."""

import numpy as np

from laboratory.emulator import Options, run
from support.ptx import kernel

RNG = np.random.default_rng(0)


def test_copies_land_when_they_are_waited_for() -> None:
    body = """
    mov.b32 %r6, global_smem; mad.lo.s32 %r7, %r0, 16, %r6; mad.wide.u32 %rd8, %r0, 16, %rd0;
    st.shared.v4.b32 [%r7], {{%r0, %r0, %r0, %r0}}; st.shared.v4.b32 [%r7+1024], {{%r0, %r0, %r0, %r0}};
    cp.async.cg.shared.global [%r7], [%rd8], 16; cp.async.commit_group;
    setp.lt.u32 %p1, %r0, 8; selp.b32 %r8, 16, 4, %p1;
    cp.async.cg.shared.global [%r7+1024], [%rd8], 16, %r8; cp.async.commit_group;
    {}
    ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r7]; ld.shared.v4.b32 {{%r14, %r15, %r16, %r17}}, [%r7+1024];
    mad.wide.u32 %rd9, %r0, 16, %rd1;
    st.global.v4.b32 [%rd9], {{%r10, %r11, %r12, %r13}}; st.global.v4.b32 [%rd9+512], {{%r14, %r15, %r16, %r17}};
    """
    source = RNG.integers(1000, 2**32, (32, 4)).astype(np.uint32)
    stale = np.repeat(np.arange(32, dtype=np.uint32)[:, None], 4, axis=1)
    short = np.where((np.arange(4) < 1) | (np.arange(32)[:, None] < 8), source, 0)
    waits = {"": (stale, stale), "cp.async.wait_group 1;": (source, stale), "cp.async.wait_group 0;": (source, short)}
    for wait, expected in (waits | {"cp.async.wait_all;": (source, short)}).items():
        out = np.zeros((2, 32, 4), np.uint32)
        run(kernel(body.format(wait), 2), (1,), 1, [source, out], Options(shared=2048))
        assert np.array_equal(out, expected), wait
