"""The rules of docs/design.md on where things stand, read from the sources' imports, those inside functions too."""

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_fc"

# A room imports from itself and from those before it.
ROOMS = (
    "errors",
    "extras",
    "connections",
    "runs",
    "planning",
    "megatron",
    "callbacks",
    "checkpoints",
    "resilience",
    "training",
    "preflight",
    "profiling",
    "compress",
    "evaluate",
    "convert",
    "data",
    "ablation",
    "analysis",
    "demo",
    "cli",
    "mpi",
    "__main__",
)
WITHOUT_MEGATRON = (
    "megatron_fc.connections",
    "megatron_fc.runs",
    "megatron_fc.planning",
    "megatron_fc.profiling.counters",
)
# Code for users' folders, which knows nothing of ours.
COPIED_OUT = "megatron_fc.convert.remote_code"
# Beside the rooms' own tests: what rooms do together, on other machines, or what is no room.
OTHER_TESTS = {"support", "distributed", "launch", "gpu", "te", "benchmarks", "docker", "docs", "packaging", "examples"}


@cache
def modules() -> dict[str, Path]:
    found = {}
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = file
    return found


@cache
def imported(module: str) -> frozenset[str]:
    """Everything that a module's text imports: our own modules by full name, others as written."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 1 and is_in(module, COPIED_OUT):
                continue  # a file beside it, wherever they are copied
            assert node.level == 0, f"{module} imports by a relative name: write the whole one"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in modules() else node.module)
    return frozenset(names)


def own(module: str) -> list[str]:
    return [name for name in imported(module) if name.partition(".")[0] == "megatron_fc"]


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_every_module_is_in_a_room() -> None:
    assert {room(module) for module in modules()} - {""} == set(ROOMS)


def test_every_import_of_our_own_exists() -> None:
    wrong = [f"{module} imports {name}" for module in modules() for name in own(module) if name not in modules()]
    assert not wrong


def test_what_is_copied_out_imports_nothing_of_ours() -> None:
    for module in modules():
        assert not (is_in(module, COPIED_OUT) and own(module)), module


def test_imports_point_down() -> None:
    up = [
        f"{module} imports {name}"
        for module in modules()
        if room(module)
        for name in own(module)
        if room(name) and ROOMS.index(room(name)) > ROOMS.index(room(module))
    ]
    assert not up


def test_no_module_imports_itself_through_others() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in own(module):
                visit(name, (*path, module))
            done.add(module)

    for module in modules():
        visit(module, ())


def test_only_the_kernels_import_triton() -> None:
    users = {module for module in modules() for name in imported(module) if is_in(name, "triton")}
    assert users
    assert all(is_in(module, "megatron_fc.connections.kernels") for module in users), users


@pytest.mark.parametrize("package", WITHOUT_MEGATRON)
def test_no_megatron_directly_or_through_others(package: str) -> None:
    reached = {module for module in modules() if is_in(module, package)}
    assert reached
    while more := {name for module in reached for name in own(module)} - reached:
        reached |= more
    # `from megatron_fc.cli import ...` also runs megatron_fc/__init__.py, which imports what it needs.
    users = {module for module in reached for name in imported(module) if is_in(name, "megatron")}
    assert not users


def test_nobody_imports_the_command_line() -> None:
    users = {
        module
        for module in modules()
        for name in own(module)
        if is_in(name, "megatron_fc.cli") and not is_in(module, "megatron_fc.cli")
    }
    assert users == {"megatron_fc.__main__", "megatron_fc.mpi"}


def test_no_folder_holds_more_than_a_fifth_of_the_code() -> None:
    lines: Counter[Path] = Counter()
    for file in modules().values():
        lines[file.parent] += len(file.read_text().splitlines())
    largest, count = lines.most_common(1)[0]
    assert count < lines.total() / 5, largest


def test_tests_stand_where_their_sources_do() -> None:
    folders = {file.parent.relative_to(ROOT / "tests") for file in (ROOT / "tests").rglob("test_*.py")}
    lost = [
        str(folder)
        for folder in folders
        if folder.parts and folder.parts[0] not in OTHER_TESTS and not (PACKAGE / folder).is_dir()
    ]
    assert not lost
    helpers = [
        file
        for file in (ROOT / "tests").rglob("*.py")
        if not file.name.startswith("test_") and file.name != "conftest.py" and file.parts[-2] != "slow_disk"
    ]
    assert all(file.is_relative_to(ROOT / "tests" / "support") for file in helpers)


QUESTIONS = ("What", "How", "Which", "Whether", "Where", "When", "Who", "Why")


def test_a_modules_first_words_say_what_it_is() -> None:
    docstrings = {module: ast.get_docstring(ast.parse(file.read_text())) or "" for module, file in modules().items()}
    lacking = [module for module, text in docstrings.items() if text.partition(" ")[0] in ("", *QUESTIONS)]
    assert not lacking
