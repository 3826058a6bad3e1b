"""A launch's arguments."""

import struct

import numpy as np
import pytest

from laboratory.emulator import PTXError, run
from support.ptx import kernel


def test_parameters() -> None:
    body = """
    ld.param.b32 %r5, [k_param_1]; ld.param.b64 %rd5, [k_param_2]; ld.param.f32 %r6, [k_param_3];
    st.global.b32 [%rd0], %r5; st.global.b64 [%rd0+8], %rd5; st.global.b32 [%rd0+4], %r6;
    """
    out = np.zeros(16, np.uint8)
    text = kernel(body, 1, scalars="u32 u64 f32")
    run(text, (1,), 1, [out, -5, 2**40 + 1, 0.1])
    assert struct.unpack("<ifQ", out.tobytes()) == (-5, np.float32(0.1), 2**40 + 1)
    with pytest.raises(PTXError, match="takes 4 arguments"):
        run(text, (1,), 1, [out, 1])
    with pytest.raises(PTXError, match="not a pointer"):
        run(text, (1,), 1, [out, out, 1, 0.1])
    with pytest.raises(PTXError, match="for 32 threads"):
        run(kernel("", 0, threads=32), (1,), 2, [])
