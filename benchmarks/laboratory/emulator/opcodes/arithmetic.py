"""Arithmetic on integers and floats."""

from laboratory.emulator.registry import FLOATS, PACKED, checked, integer, opcode, split
from laboratory.emulator.syntax import Instruction
from laboratory.emulator.writer import Writer

_OPERATORS = {"add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}"}
_FLOAT_FUNCTIONS = {"min": "fmin({}, {})", "max": "fmax({}, {})", "div": "{} / {}", "neg": "-{}", "abs": "np.abs({})"}
_UNARY = {"sqrt": "np.sqrt({})", "rsqrt": "rsqrt({})", "rcp": "F32(1) / {}", "ex2": "exp2({})", "lg2": "log2({})"}
_UNARY |= {"sin": "sin({})", "cos": "cos({})", "tanh": "tanh({})"}
_UNARY_F64 = {"rcp": "1 / {}", "rsqrt": "1 / np.sqrt({})", "sqrt": "np.sqrt({})"}
_UNARY_HALF = {"ex2": "np.exp2({})", "tanh": "np.tanh({})"}
_FLOAT_MODIFIERS = {"rn", "ftz", "sat", "full", "approx"}


def _fill(form: str, names: list[str]) -> str:
    """An expression with as many operands as it has places for."""
    if form.count("{}") != len(names):
        raise ValueError(f"{len(names)} operands")
    return form.format(*names)


def _float(w: Writer, i: Instruction, kind: str, modifiers: set[str], form: str) -> None:
    """A function of floats of one type."""
    result, *operands = i.operands
    if kind in PACKED:
        names = ", ".join(w.use(operand, "u32") for operand in operands)
        holes = ["abcd"[n] for n in range(len(operands))]
        w.set(result, "u32", f"packed_{kind[:-2]}(lambda {', '.join(holes)}: {_fill(form, holes)}, {names})")
        return
    names_of = [w.use(operand, kind) for operand in operands]
    if kind == "f16":
        names_of = [f"{name}.astype(F32)" for name in names_of]
    if "ftz" in modifiers:
        names_of = [w.let(f"flush({name})") for name in names_of]
    expression = _fill(form, names_of)
    if "ftz" in modifiers:
        expression = f"flush({expression})"
    if "sat" in modifiers:
        expression = f"saturate({expression})"
    w.set(result, kind, f"({expression}).astype(F16)" if kind == "f16" else expression)


@opcode("add", "sub", "mul")
@checked
def _add(w: Writer, i: Instruction, parts: list[str]) -> None:
    name, kind = i.parts[0], parts[-1]
    if kind in FLOATS | PACKED:
        _, modifiers = split(parts, _FLOAT_MODIFIERS)
        _float(w, i, kind, modifiers, _OPERATORS[name])
        return
    _, modifiers = split(parts, {"lo", "hi", "wide"} if name == "mul" else set())
    result, *operands = i.operands
    if "wide" in modifiers:
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        a, b = (w.let(f"{w.use(operand, kind)}.astype({wide.upper()})") for operand in operands)
        w.set(result, wide, f"{a} * {b}")
    elif "hi" in modifiers:
        a, b = (w.use(operand, kind) for operand in operands)
        w.set(result, kind, f"multiply_high({a}, {b})")
    else:
        unsigned = integer(kind, False)
        w.set(result, unsigned, _fill(_OPERATORS[name], [w.use(operand, unsigned) for operand in operands]))


@opcode("mad")
@checked
def _mad(w: Writer, i: Instruction, parts: list[str]) -> None:
    kind = parts[-1]
    if kind in FLOATS:
        _fma(w, i, parts)
        return
    _, modifiers = split(parts, {"lo", "hi", "wide"})
    result, a, b, c = i.operands
    if "wide" in modifiers:
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        x, y = (w.let(f"{w.use(operand, kind)}.astype({wide.upper()})") for operand in (a, b))
        w.set(result, wide, f"{x} * {y} + {w.use(c, wide)}")
    elif "hi" in modifiers:
        w.set(result, kind, f"multiply_high({w.use(a, kind)}, {w.use(b, kind)}) + {w.use(c, kind)}")
    else:
        unsigned = integer(kind, False)
        w.set(result, unsigned, "{} * {} + {}".format(*(w.use(operand, unsigned) for operand in (a, b, c))))


@opcode("fma")
@checked
def _fma(w: Writer, i: Instruction, parts: list[str]) -> None:
    kind, modifiers = split(parts, {"rn", "ftz", "sat"})
    forms = {"f32": "fma({}, {}, {})", "f64": "{} * {} + {}"}
    wide = "({}.astype(F64) * {}.astype(F64) + {}.astype(F64))"
    _float(w, i, kind, modifiers, forms.get(kind, wide + (".astype(F32)" if kind.startswith("bf") else "")))


@opcode("div", "rem", "min", "max", "neg", "abs", "sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos", "tanh")
@checked
def _function(w: Writer, i: Instruction, parts: list[str]) -> None:
    name, kind = i.parts[0], parts[-1]
    if kind in FLOATS | PACKED:
        known = _FLOAT_MODIFIERS | ({"NaN"} if name in ("min", "max") else set())
        _, modifiers = split(parts, known)
        form = (_FLOAT_FUNCTIONS | _UNARY)[name]
        if "NaN" in modifiers:
            form = {"min": "np.minimum({}, {})", "max": "np.maximum({}, {})"}[name]
        if name in _UNARY and kind != "f32":
            form = (_UNARY_F64 if kind == "f64" else _UNARY_HALF)[name]
        _float(w, i, kind, modifiers, form)
        return
    split(parts, set())
    result, *operands = i.operands
    forms = {"div": "divide({}, {})", "rem": "remainder({}, {})", "neg": "-{}", "abs": "np.abs({})"}
    forms |= {"min": "np.minimum({}, {})", "max": "np.maximum({}, {})"}
    w.set(result, kind, _fill(forms[name], [w.use(operand, kind) for operand in operands]))


@opcode("copysign")
@checked
def _copysign(w: Writer, i: Instruction, parts: list[str]) -> None:
    result, sign, size = i.operands
    w.set(result, parts[-1], f"np.copysign({w.use(size, parts[-1])}, {w.use(sign, parts[-1])})")
