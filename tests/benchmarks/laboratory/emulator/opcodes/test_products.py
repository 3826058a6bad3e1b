"""Products of matrices: rows and columns of each element of a fragment are those of the manual's figures."""

import itertools
from typing import Any

import numpy as np
import pytest

from laboratory.emulator import Options, run
from support.ptx import LANES, bf16, kernel, widen

RNG = np.random.default_rng(0)


def a_element(shape: str, lane: int, register: int, part: int) -> tuple[int, int]:
    group, place = lane // 4, lane % 4
    row = group + 8 * (register % 2)
    if "tf32" in shape:
        return row, place + 4 * (register // 2)
    return row, 2 * place + part + 8 * (register // 2)


def b_element(shape: str, lane: int, register: int, part: int) -> tuple[int, int]:
    group, place = lane // 4, lane % 4
    if "tf32" in shape:
        return place + 4 * register, group
    return 2 * place + part + 8 * register, group


def c_element(lane: int, register: int) -> tuple[int, int]:
    return lane // 4 + 8 * (register // 2), 2 * (lane % 4) + register % 2


SHAPES = {
    "m16n8k16 bf16": (16, 4, 2),
    "m16n8k16 f16": (16, 4, 2),
    "m16n8k8 bf16": (8, 2, 1),
    "m16n8k8 f16": (8, 2, 1),
    "m16n8k8 tf32": (8, 4, 2),
    "m16n8k4 tf32": (4, 2, 1),
}


def fragments(matrix: np.ndarray, element: Any, shape: str, registers: int, warps: int) -> np.ndarray:
    """[registers, threads] as uint32 of matrices [warps, rows, columns] in uint16 or uint32."""
    out = np.zeros((registers, warps * LANES), np.uint32)
    parts = 1 if "tf32" in shape else 2
    for warp, lane, register, part in itertools.product(range(warps), range(LANES), range(registers), range(parts)):
        out[register, warp * LANES + lane] |= int(matrix[warp][element(shape, lane, register, part)]) << 16 * part
    return out


@pytest.mark.parametrize("rounding", ["nearest", "zero"])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_matrices(shape: str, rounding: Any) -> None:
    depth, a_registers, b_registers = SHAPES[shape]
    size, kind = shape.split()
    warps = 3
    values = [RNG.standard_normal((warps, *s)).astype(np.float32) for s in ((16, depth), (depth, 8), (16, 8))]
    if kind == "bf16":
        a, b = (bf16(x) for x in values[:2])
        exact = [widen(x).astype(np.float64) for x in (a, b)]
    elif kind == "f16":
        a, b = (x.astype(np.float16).view(np.uint16) for x in values[:2])
        exact = [x.view(np.float16).astype(np.float64) for x in (a, b)]
    else:
        a, b = (x.view(np.uint32) for x in values[:2])  # with the bits that tensor cores ignore
        exact = [(x & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64) for x in (a, b)]
    c = np.zeros((4, warps * LANES), np.float32)
    for warp, lane, n in itertools.product(range(warps), range(LANES), range(4)):
        c[n, warp * LANES + lane] = values[2][warp][c_element(lane, n)]
    files = [fragments(a, a_element, shape, a_registers, warps), fragments(b, b_element, shape, b_registers, warps)]
    arrays = [*files, c, np.zeros_like(c)]
    body = []
    for n, (array, first) in enumerate(zip(arrays[:3], (10, 20, 30), strict=True)):
        for register_ in range(len(array)):
            body.append(f"mad.wide.u32 %rd9, %r0, 4, %rd{n};")
            body.append(f"ld.global.b32 %r{first + register_}, [%rd9 + {register_ * warps * LANES * 4}];")
    left, right = (
        ", ".join(f"%r{first + n}" for n in range(count)) for first, count in ((10, a_registers), (20, b_registers))
    )
    sums, operands = "{ %r30, %r31, %r32, %r33 }", f"{{ {left} }}, {{ {right} }}"
    body.append(f"mma.sync.aligned.{size}.row.col.f32.{kind}.{kind}.f32 {sums}, {operands}, {sums};")
    body.append("mad.wide.u32 %rd9, %r0, 4, %rd3;")
    body += [f"st.global.b32 [%rd9+{n * warps * LANES * 4}], %r{30 + n};" for n in range(4)]
    run(kernel("\n".join(body), 4), (1,), warps, arrays, Options(rounding=rounding))
    expected = exact[0] @ exact[1] + values[2]
    for warp, lane, n in itertools.product(range(warps), range(LANES), range(4)):
        want, got = expected[warp][c_element(lane, n)], arrays[3][n, warp * LANES + lane]
        assert abs(got - want) <= np.spacing(np.float32(abs(want))) * (0.5 if rounding == "nearest" else 1)
        assert rounding == "nearest" or abs(got) <= abs(want)


def test_a_tensor_core_that_sums_in_fp16() -> None:
    """d of fp16 pairs: register 0 is row g, register 1 row g + 8."""
    a = np.zeros((4, 32), np.uint32)
    a[0] = np.float16(1).view(np.uint16)  # a[g, 2t] = 1
    b = np.full((2, 32), int(np.float16(2).view(np.uint16)) * 0x10001, np.uint32)
    d = np.zeros((2, 32), np.uint32)
    body = "mad.wide.u32 %rd9, %r0, 4, %rd0; mad.wide.u32 %rd10, %r0, 4, %rd1; mad.wide.u32 %rd11, %r0, 4, %rd2;"
    body += "".join(f"ld.global.b32 %r{10 + n}, [%rd9+{128 * n}];" for n in range(4))
    body += "".join(f"ld.global.b32 %r{20 + n}, [%rd10+{128 * n}];" for n in range(2))
    body += "mov.b32 %r30, 0x3C003C00; mov.b32 %r31, %r30; mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16"
    body += "{%r30, %r31}, {%r10, %r11, %r12, %r13}, {%r20, %r21}, {%r30, %r31};"
    body += "st.global.b32 [%rd11], %r30; st.global.b32 [%rd11+128], %r31;"
    run(kernel(body, 3), (1,), 1, [a, b, d])
    assert np.array_equal(d[0].view(np.float16), np.full(64, 9.0))
    assert np.array_equal(d[1].view(np.float16), np.full(64, 1.0))
