"""Pointer parameters that the addresses of global accesses come from, found by following definitions backwards."""

import re
from collections.abc import Iterator, Sequence

from laboratory.simulator.sass import Instruction

FIRST_PARAMETER = 0x210  # offset in constant bank 0 on sm_90
_WITHOUT_RESULT = re.compile(
    r"ST[GSL]?|STSM|RED|ATOMS|LDGSTS|LDGDEPBAR|DEPBAR|BAR|BRA|EXIT|NOP|BSYNC|BSSY|BREAK|WARPSYNC|ERRBAR|MEMBAR|CCTL|"
    r"YIELD|RET|CALL|UBLKCP|SYNCS|FENCE"
)
# What these return is no address of a parameter.
_LOADED = frozenset(("LDG", "LDS", "SHFL", "S2R"))
_SLOT = re.compile(r"\[R\d+(?:\+(0x[0-9a-f]+))?\](?:,\s*R(\d+))?")


def pointer_offsets(ptx: str, names: Sequence[str]) -> dict[int, str]:
    """Offset in constant bank 0 of each pointer parameter, by the kernel's text in PTX. `names`: of all parameters."""
    start = ptx.index(".entry")
    offset, found = FIRST_PARAMETER, {}
    kinds = re.findall(r"\.param \.([a-z]\d+)[^\n]*?_param_\d+", ptx[start : ptx.index("{", start)])
    for kind, name in zip(kinds, names, strict=False):  # Triton appends two of its own
        size = int(kind[1:]) // 8
        offset = -(-offset // size) * size
        if size == 8:
            found[offset] = name
        offset += size
    return found


def origin(code: Sequence[Instruction], at: int, pointers: dict[int, str]) -> str:
    """The pointer parameter that the global access at this index follows.

    Raises:
        LookupError: there is none, or the text leaves open which.
    """
    address = code[at].arguments
    if "desc" in address:
        address = address.split("desc")[-1].split("]", 1)[1]
    work = [(register, at) for register in re.findall(r"U?R\d+", address.split("]")[0])]
    found: set[int] = set()
    seen: set[tuple[str, int]] = set()
    while work:
        step = work.pop()
        if step not in seen:
            seen.add(step)
            offsets, more = _definition(code, *step)
            found |= offsets & pointers.keys()
            work += more
    if not found:
        raise LookupError(f"{code[at].op} {code[at].arguments} follows no pointer parameter")
    return pointers[min(found)]


def _definition(code: Sequence[Instruction], register: str, at: int) -> tuple[set[int], list[tuple[str, int]]]:
    """Where a register got its value before instruction `at`: offsets of parameters, and registers to follow."""
    for k in [*range(at - 1, -1, -1), *range(len(code) - 1, at - 1, -1)]:  # the loop's earlier round comes last
        i = code[k]
        results = _results(i)
        if register not in results:
            continue
        if i.base == "LDL":
            return set(), list(_spilled(code, k, results.index(register)))
        if i.base in _LOADED:
            return set(), []
        skipped = 4 * results.index(register) if i.base in ("LDC", "ULDC") else 0
        offsets = {int(c, 16) + skipped for c in re.findall(r"c\[0x0\]\[0x([0-9a-f]+)\]", i.arguments)}
        more = [(r, k) for text in _arguments(i)[1:] for r in re.findall(r"\b(U?R\d+)\b", text)]
        if i.predicate:  # an earlier definition may survive it
            more.append((register, k))
        return offsets, more
    return set(), []


def _results(i: Instruction) -> list[str]:
    """Registers that an instruction writes."""
    arguments = _arguments(i)
    first = re.match(r"^(U?R)(\d+)", arguments[0]) if arguments and not _WITHOUT_RESULT.fullmatch(i.base) else None
    if first is None:
        return []
    count = 1
    if i.base in ("LDG", "LDS", "LDC", "ULDC", "LDL", "LDSM"):
        count = max(1, i.lane_bytes // 4)
    elif i.base == "HMMA":
        count = 4
    elif ".WIDE" in i.op or (i.base == "CS2R" and ".32" not in i.op):
        count = 2
    return [f"{first[1]}{int(first[2]) + k}" for k in range(count)]


def _spilled(code: Sequence[Instruction], load: int, word: int) -> Iterator[tuple[str, int]]:
    """The register that was stored to the stack where instruction `load` reads its `word`th result, and where."""
    slot = _SLOT.search(code[load].arguments)
    where = (int(slot[1], 16) if slot and slot[1] else 0) + 4 * word
    for k in [*range(load - 1, -1, -1), *range(len(code) - 1, load, -1)]:
        slot = _SLOT.search(code[k].arguments) if code[k].base == "STL" else None
        if slot and slot[2]:
            offset = int(slot[1], 16) if slot[1] else 0
            if offset <= where < offset + code[k].lane_bytes:
                yield f"R{int(slot[2]) + (where - offset) // 4}", k
                return


def _arguments(i: Instruction) -> list[str]:
    """Operands, split at commas outside of brackets."""
    parts, depth = [""], 0
    for character in i.arguments:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]
