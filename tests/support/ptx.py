"""PTX for the tests of the emulator: kernels around a few instructions, and what they compute for each thread."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from laboratory.emulator import Options, run

LANES = 32


def kernel(body: str, pointers: int, threads: int = 1024, declarations: str = "", scalars: str = "") -> str:
    """A kernel with pointers in %rd0.. and thread and lane in %r0 and %r1."""
    parameters = [f".param .u64 .ptr .global .align 1 k_param_{n}" for n in range(pointers)]
    parameters += [f".param .{kind} k_param_{pointers + n}" for n, kind in enumerate(scalars.split())]
    loads = "\n".join(f"ld.param.b64 %rd{n}, [k_param_{n}];" for n in range(pointers))
    return f"""
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k({", ".join(parameters)})
.maxntid {threads}
{{
    .reg .pred %p<32>; .reg .b16 %rs<64>; .reg .b32 %r<256>; .reg .b64 %rd<64>;
    {declarations}
    {loads}
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %laneid;
    {body}
    ret;
}}
"""


def register(array: np.ndarray, number: int) -> str:
    """A register for an array's elements."""
    return f"%{ {2: 'rs', 4: 'r', 8: 'rd'}[array.itemsize] }{number}"


def apply(code: str, inputs: Sequence[np.ndarray], out: Any, options: Options | None = None) -> np.ndarray:
    """An instruction per thread: {a}, {b}, {c} are its inputs and {d} its result, of numpy type `out`."""
    result = np.zeros(len(inputs[0]), out)
    body, names = [], {}
    for n, array in enumerate([*inputs, result]):
        names["abcd"[n] if n < len(inputs) else "d"] = register(array, 20 + n)
        body.append(f"mad.wide.u32 %rd{40 + n}, %r0, {array.itemsize}, %rd{n};")
        if n < len(inputs):
            body.append(f"ld.global.b{8 * array.itemsize} {register(array, 20 + n)}, [%rd{40 + n}];")
    body.append(code.format(**names))
    body.append(f"st.global.b{8 * result.itemsize} [%rd{40 + len(inputs)}], {names['d']};")
    text = kernel("\n".join(body), len(inputs) + 1)
    run(text, (1,), len(result) // LANES, [*map(np.ascontiguousarray, inputs), result], options)
    return result


def bits(values: Any, kind: Any) -> np.ndarray:
    """Values, as an array of a type."""
    return np.asarray(values, kind)


def widen(array: np.ndarray) -> np.ndarray:
    """bf16 [uint16] -> the same values in fp32."""
    return (array.astype(np.uint32) << 16).view(np.float32)


def bf16(values: np.ndarray) -> np.ndarray:
    """Nearest bf16 by comparing the two neighbours."""
    values = np.asarray(values, np.float32)
    low = (values.view(np.uint32) >> 16).astype(np.uint16)
    high = low + np.uint16(1)
    below, above = (np.abs(widen(one).astype(np.float64) - values.astype(np.float64)) for one in (low, high))
    return np.where((above < below) | ((above == below) & (low & 1 == 1)), high, low)
