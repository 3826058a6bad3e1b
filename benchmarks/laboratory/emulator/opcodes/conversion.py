"""Conversions between types."""

import re

from laboratory.emulator.registry import FLOATS, PACKED, checked, opcode
from laboratory.emulator.syntax import Instruction, Operand
from laboratory.emulator.writer import Writer


@opcode("cvt")
@checked
def _cvt(w: Writer, i: Instruction, parts: list[str]) -> None:
    to, source = parts[-2:]
    rest = set(parts[:-2])
    rounding = next((part for part in parts if re.fullmatch(r"r[nzmp]i?|rna", part)), "")
    result, *operands = i.operands
    if rest - {rounding, "sat", "ftz"}:
        raise KeyError(", ".join(rest - {rounding, "sat", "ftz"}))
    if to in PACKED and source == "f32":
        high, low = (w.use(operand, "f32") for operand in operands)
        name = {"bf16x2": "round_bf16", "f16x2": "round_f16"}[to] + {"rn": "", "rz": "_zero"}[rounding]
        w.set(result, "u32", f"{name}({low}) | ({name}({high}) << U32(16))")
        return
    (a,) = operands
    if to == "tf32":
        if rounding != "rna":
            raise KeyError(rounding)
        w.set(result, "f32", f"round_tf32({w.use(a, 'f32')})")
    elif source in FLOATS and to in FLOATS:
        _convert_float(w, result, a, source, to, rounding, "sat" in rest, "ftz" in rest)
    elif source in FLOATS:
        value = w.use(a, source)
        w.wide_set(result, to, f"to_integer({value}, {rounding!r}, {to!r})")
    elif to in FLOATS:
        if rounding != "rn":
            raise KeyError(rounding)
        value = w.wide_use(a, source)
        kind = "F32" if to == "bf16" else to.upper()
        w.set(result, to, f"{value}.astype({kind})")
    else:
        value = w.wide_use(a, source)
        clamped = f"clamp_integer({value}, {to!r})" if "sat" in rest else f"{value}.astype({to.upper()})"
        w.wide_set(result, to, clamped)


def _convert_float(
    w: Writer, result: Operand, a: Operand, source: str, to: str, rounding: str, saturate: bool, flush: bool
) -> None:
    value = w.use(a, source)
    if flush and source == "f32":
        value = w.let(f"flush({value})")
    if rounding in ("rni", "rzi", "rmi", "rpi"):
        value = w.let(f"np.{ {'rni': 'rint', 'rzi': 'trunc', 'rmi': 'floor', 'rpi': 'ceil'}[rounding] }({value})")
    elif rounding == "rz" and (source, to) == ("f32", "bf16"):
        w.set(result, "u16", f"round_bf16_zero({value}).astype(U16)")
        return
    elif rounding == "rz" and (source, to) == ("f64", "f32"):
        value = w.let(f"toward_zero({value})")
    elif rounding not in ("", "rn"):
        raise KeyError(rounding)
    if saturate:
        value = w.let(f"saturate({value})")
    if (source, to) == ("f32", "f16"):
        w.set(result, "u16", f"round_f16({value}).astype(U16)")
    elif to == "bf16" or (to == "f32" and source in ("bf16", "f32")):
        w.set(result, to, f"{value}.astype(F32)" if source in ("f64", "f16") else value)
    else:
        w.set(result, to, f"{value}.astype({to.upper()})")
