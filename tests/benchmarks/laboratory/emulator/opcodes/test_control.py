"""Loops and branches whose way depends on the thread, and what is not emulated."""

import numpy as np
import pytest

from laboratory.emulator import Options, Unsupported, run
from support.ptx import kernel

RNG = np.random.default_rng(0)


def test_loops_whose_length_depends_on_the_thread() -> None:
    body = """
    mov.u32 %r2, %ctaid.x; mad.lo.s32 %r3, %r2, 64, %r0; mad.wide.u32 %rd9, %r3, 4, %rd0; ld.global.b32 %r4, [%rd9];
    mov.b32 %r5, 0;
    setp.eq.b32 %p1, %r4, 0;
    @%p1 bra $DONE;
$LOOP:
    add.s32 %r5, %r5, %r4; sub.s32 %r4, %r4, 1; setp.ne.b32 %p2, %r4, 0;
    @%p2 bra $LOOP;
$DONE:
    bar.sync 0;
    st.global.b32 [%rd9], %r5;
    """
    values = RNG.integers(0, 20, 3 * 64).astype(np.uint32)
    for order in ("lockstep", "random"):
        out = values.copy()
        run(kernel(body, 1), (3,), 2, [out], Options(order=order))
        assert list(out) == [n * (n + 1) // 2 for n in values]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("frobnicate.b32 %r1, %r2;", "no such opcode"),
        ("add.weird.s32 %r1, %r2, %r3;", "weird"),
        ("mbarrier.init.shared.b64 [%r1], 1;", "not emulated"),
        ("wgmma.fence.sync.aligned;", "not emulated"),
        ("cp.async.bulk.commit_group;", "not emulated"),
        ("call.uni helper, ();", "not emulated"),
        ("mov.u32 %r1, %nonsense;", "no register"),
        ("add.s32 %r1, %rd1, 5;", "as u32"),
        ("max.f32 %r1, %r2, %r3, %r4;", "3 operands"),
        ("add.rz.f32 %r1, %r2, %r3;", "rz"),
    ],
)
def test_what_is_not_known_is_an_error_that_names_the_line(code: str, message: str) -> None:
    text = kernel(code, 1)
    line = 1 + text[: text.index(code)].count("\n")
    with pytest.raises(Unsupported, match=rf"(?s)line {line}: {code.split()[0].rstrip(';')}.*{message}"):
        run(text, (1,), 1, [np.zeros(4)])
