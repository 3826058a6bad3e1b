#!/usr/bin/env python3
"""Plant one-line faults into a copy of the sources, one after the other, and see whether the tests notice.

python scripts/mutate.py [NUMBER ...]    # the faults of tests/faults.yaml, or some of them; 1 if one survives
python scripts/mutate.py --draw SEED     # candidates for that file, per folder of megatron_fc, in the order of the draw

A fault counts as caught if a test fails with it that passes without it.
"""

import argparse
import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "tests" / "faults.yaml"
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?::.+?)(?: - .*)?$", re.MULTILINE)
# Per folder of the draw.
CANDIDATES = 20


@dataclass(frozen=True)
class Fault:
    """One line that is changed.

    Attributes:
        file: path in the repository.
        old: text that the file holds once.
        new: what replaces it.
        tests: files that should notice.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()

    def apply(self, folder: Path) -> str:
        """Change the file in a copy of the repository; returns the text before."""
        path = folder / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise SystemExit(f"{self.file} holds {text.count(self.old)} times, not once: {self.old}")
        write(path, text.replace(self.old, self.new))
        return text


def write(path: Path, text: str) -> None:
    """Python takes a compiled file for that of a source with the same size and second: let a second pass."""
    before = path.stat().st_mtime
    path.write_text(text)
    os.utime(path, (before + 1, before + 1))


def try_all(numbers: list[int]) -> int:
    """Try the faults with these numbers, all if there are none; returns the exit code."""
    faults = [Fault(**{**entry, "tests": tuple(entry["tests"])}) for entry in yaml.safe_load(FAULTS.read_text())]
    survived = []
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        copy = Path(folder)
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(lambda name: (ROOT / name).exists(), tracked.stdout.splitlines()):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
        for fault in faults:  # before any takes its time
            write(copy / fault.file, fault.apply(copy))
        for number, fault in enumerate(faults, 1):
            if numbers and number not in numbers:
                continue
            began = time.monotonic()
            text = fault.apply(copy)
            failed = run_tests(copy, fault.tests)
            write(copy / fault.file, text)
            # A test that fails without the fault, too, shows nothing.
            caught = bool(failed) and not run_tests(copy, failed)
            if not caught:
                survived.append(number)
            verdict = f"caught by {failed[0]}" if caught else f"SURVIVED {' '.join(failed or fault.tests)}"
            print(f"{number:2} {time.monotonic() - began:4.0f} s  {fault.file}: {fault.new.strip()}\n     {verdict}")
            sys.stdout.flush()
    if survived:
        print(f"survived: {', '.join(map(str, survived))}", file=sys.stderr)
    return int(bool(survived))


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[str, ...]:
    """Run tests in a copy of the repository until one fails, and return that one."""
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-m", "not soak and not gpu", *tests]
    variables = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1, 2):  # all passed, some failed, or could not be collected
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    if done.returncode == 0:
        return ()
    # The last: a test that runs pytest itself prints what that said, before.
    return tuple(FAILED.findall(done.stdout)[-1:]) or tuple(re.findall(r"^ERROR (\S+)", done.stdout, re.MULTILINE)[-1:])


def draw(seed: str) -> None:
    """Print candidates for every folder of the package."""
    package = ROOT / "megatron_fc"
    for folder in sorted({path.parent for path in package.rglob("*.py")}):
        by_kind: dict[str, list[Fault]] = {}
        for path in sorted(folder.glob("*.py")):
            for kind, fault in candidates(path):
                by_kind.setdefault(kind, []).append(fault)
        name = folder.relative_to(ROOT)
        lines = sum(len(path.read_text().splitlines()) for path in folder.glob("*.py"))
        print(f"# {name}, {lines} lines")
        choice = random.Random(f"{seed} {name}")
        for _ in range(CANDIDATES):
            if not any(by_kind.values()):
                break
            faults = by_kind[choice.choice(sorted(kind for kind, faults in by_kind.items() if faults))]
            fault = faults.pop(choice.randrange(len(faults)))
            print(f"- file: {fault.file}\n  old: {fault.old}\n  new: {fault.new}")


def candidates(path: Path) -> Iterator[tuple[str, Fault]]:
    """Kinds of faults and the faults that a file could have: each changes one line that the file holds once."""
    text = path.read_text()
    lines = text.splitlines()
    for node in code_in(ast.parse(text)):
        for kind, (first, start), (last, end), change in changes(node):
            if first != last:
                continue
            line = lines[first - 1].encode()
            new = line[:start] + change(line[start:end].decode()).encode() + line[end:]
            old, changed = line.decode().strip(), new.decode().strip()
            if text.count(old) == 1 and old != changed:
                yield kind, Fault(str(path.relative_to(ROOT)), old, changed)


def code_in(node: ast.AST) -> Iterator[ast.AST]:
    """All that is computed: no annotations, decorators and classes of isinstance."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params") or is_class_check(node):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from code_in(child)


def is_class_check(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"


OTHER = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not", "is not": "is"}
OTHER |= {"in": "not in", "not in": "in", "and": "or", "or": "and"}
OTHER |= {"+": "-", "-": "+", "*": "//", "//": "*", "**": "*"}
OPERATOR = re.compile("|".join(re.escape(word) for word in sorted(OTHER, key=len, reverse=True)))
Place = tuple[int, int]  # line, column


def changes(node: ast.AST) -> Iterator[tuple[str, Place, Place, Callable[[str], str]]]:
    """Kind, where what is changed begins and ends, and the change."""

    def span(left: ast.expr, right: ast.expr) -> tuple[Place, Place]:
        return (left.lineno, left.col_offset), (right.end_lineno or 0, right.end_col_offset or 0)

    def between(left: ast.expr, right: ast.expr) -> tuple[Place, Place]:
        return span(left, left)[1], span(right, right)[0]

    def other(text: str) -> str:
        return OPERATOR.sub(lambda found: OTHER[found[0]], text, count=1)

    def to(text: str) -> Callable[[str], str]:
        return lambda _: text

    match node:
        case ast.Compare(left, [_], [right]):
            yield "comparison", *between(left, right), other
        case ast.BinOp(left, ast.Add() | ast.Sub() | ast.Mult() | ast.FloorDiv() | ast.Pow(), right):
            yield "arithmetic", *between(left, right), other
        case ast.BoolOp(_, [left, right]):
            yield "condition", *between(left, right), other
        case ast.UnaryOp(ast.Not(), operand):
            yield "condition", *span(node, operand), lambda text: text.removeprefix("not ")
        case ast.If(test, [ast.Raise(), *_]):
            yield "skipped check", *span(test, test), to("False")
        case ast.Subscript(_, ast.Constant(int() as number)):
            yield "index", *span(node.slice, node.slice), to(str(number + 1))
        case ast.Subscript(_, ast.Tuple([ast.expr(), ast.expr()] as pair)) if not any_slice(pair):
            yield "swap", *span(*pair), swapped
        case ast.Call(_, [ast.Name(), ast.Name()] as pair, []) if not is_class_check(node):
            yield "swap", *span(*pair), swapped
        case ast.Constant(bool() as value):
            yield "default or mark", *span(node, node), to(str(not value))
        case ast.Constant(int() as number):
            yield "number", *span(node, node), to(str(number + 1))


def any_slice(parts: list[ast.expr]) -> bool:
    return any(isinstance(part, ast.Slice) for part in parts)


def swapped(pair: str) -> str:
    """Two expressions, the other way round."""
    first, second = ast.parse(f"({pair})", mode="eval").body.elts  # type: ignore[attr-defined]
    return f"{ast.unparse(second)}, {ast.unparse(first)}"


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, metavar="NUMBER", help="of faults to try, from 1 on")
    parser.add_argument("--draw", metavar="SEED", help="print candidates instead")
    args = parser.parse_args()
    if args.draw is not None:
        draw(args.draw)
        return 0
    return try_all(args.numbers)


if __name__ == "__main__":
    sys.exit(main())
