"""Accesses that a GPU would not survive or would answer with rubbish."""

import numpy as np
import pytest

from laboratory.emulator import AccessError, Options, run
from support.ptx import kernel


def test_accesses_outside_are_errors() -> None:
    array, other = np.zeros(40, np.float32), np.zeros(8, np.float32)
    body = "mad.wide.u32 %rd9, %r0, 4, %rd0; ld.global.b32 %r5, [%rd9+{}];"
    run(kernel(body.format(32), 2), (1,), 1, [array, other])
    message = r"(?s)ld\.global\.b32 %r5, \[%rd9\+36\].*0 bytes past the end of argument 0.*lane 31"
    with pytest.raises(AccessError, match=message):
        run(kernel(body.format(36), 2), (1,), 1, [array, other])
    with pytest.raises(AccessError, match="4 bytes before argument 0"):
        run(kernel(body.format(-4), 2), (1,), 1, [array, other])
    with pytest.raises(AccessError, match="not a multiple of 4"):
        run(kernel(body.format(2), 2), (1,), 1, [array, other])
    with pytest.raises(AccessError, match="at address 0x0"):
        run(kernel("ld.global.b32 %r5, [%rd0];", 1), (1,), 1, [None])
    guarded = f"setp.lt.u32 %p1, %r0, 4; mad.wide.u32 %rd9, %r0, 4, %rd0; @%p1 {body.split(';')[1].format(144)};"
    run(kernel(guarded, 2), (1,), 1, [array, other])
    shared = "mov.b32 %r6, global_smem; mad.lo.s32 %r7, %r0, 4, %r6; st.shared.b32 [%r7{}], %r0;"
    run(kernel(shared.format(""), 0), (1,), 1, [], Options(shared=128))
    for offset, message in (("+4", "shared memory has 130 bytes"), ("+2", "multiple of 4"), ("-4", "has 130 bytes")):
        with pytest.raises(AccessError, match=message):
            run(kernel(shared.format(offset), 0), (1,), 1, [], Options(shared=130))
    readonly = np.zeros(32, np.float32)
    readonly.flags.writeable = False
    with pytest.raises(AccessError, match="read-only"):
        run(kernel("mad.wide.u32 %rd9, %r0, 4, %rd0; st.global.b32 [%rd9], 7;", 1), (1,), 1, [readonly])


def test_arrays_that_share_memory_share_addresses() -> None:
    whole = np.arange(64, dtype=np.uint32)
    body = "mad.wide.u32 %rd8, %r0, 4, %rd0; ld.global.b32 %r5, [%rd8]; add.s32 %r5, %r5, 100;"
    body += "mad.wide.u32 %rd9, %r0, 4, %rd1; st.global.b32 [%rd9], %r5;"
    run(kernel(body, 2), (1,), 1, [whole[:32], whole[16:48]])
    assert list(whole[16:48]) == [100 + n for n in range(32)]


def test_memory_that_was_never_written() -> None:
    body = "mov.b32 %r6, global_smem; mad.lo.s32 %r7, %r0, 4, %r6; ld.shared.b32 %r8, [%r7];"
    body += "mad.wide.u32 %rd9, %r0, 4, %rd0; st.global.b32 [%rd9], %r8;"
    out = np.zeros(32, np.float32)
    run(kernel(body, 1), (1,), 1, [out], Options(shared=128))
    assert np.isnan(out).all()
    run(kernel(body, 1), (1,), 1, [out], Options(shared=128, uninitialised="zero"))
    assert not out.any()
    with pytest.raises(AccessError, match="nothing was written"):
        run(kernel(body, 1), (1,), 1, [out], Options(shared=128, uninitialised="error"))
