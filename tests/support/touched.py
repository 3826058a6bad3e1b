"""Which modules of the package the tests have run a function of, also in the processes that `fork_server` makes.

`pytest --touched` names the others at its end. It costs next to nothing: Python reports each function's first start,
and the text of a compiled kernel names its files.
"""

import ast
import inspect
import os
import re
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import CodeType

import pytest

_PACKAGE = Path(__file__).parents[2] / "megatron_fc"
_VARIABLE = "TOUCHED_MODULES"  # the file to which processes write the names


def watch() -> None:
    """Write the names from now on, in this process and its forks; nothing if nobody has asked for them."""
    if _VARIABLE not in os.environ:
        return
    file, package = os.environ[_VARIABLE], f"{_PACKAGE}{os.sep}"
    function, once = inspect.CO_OPTIMIZED, sys.monitoring.DISABLE  # names of modules are gone at Python's end
    written: set[str] = set()

    def started(code: CodeType, _: int) -> object:
        name = code.co_filename
        # Bodies of modules and classes, which run on import, have no such flag.
        if name.startswith(package) and code.co_flags & function and name not in written:
            written.add(name)
            with suppress(OSError), open(file, "a") as names:  # of a test that fills the disk
                names.write(f"{name}\n")
        return once

    tool, event = sys.monitoring.COVERAGE_ID, sys.monitoring.events.PY_START
    if sys.monitoring.get_tool(tool) == "touched":  # a fork of a process that watches already
        return
    sys.monitoring.use_tool_id(tool, "touched")
    sys.monitoring.register_callback(tool, event, started)
    sys.monitoring.set_events(tool, event)


def compiled_from(text: str) -> None:
    """Write the names of the files that the text of a kernel, in PTX, comes from.

    Triton may have kept it from another checkout of the same sources.
    """
    if _VARIABLE in os.environ:
        files = re.findall(r'^\s*\.file\s+\d+\s+".*/megatron_fc/(.*\.py)"', text, re.MULTILINE)
        with open(os.environ[_VARIABLE], "a") as names:
            names.writelines(f"{_PACKAGE / file}\n" for file in files)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--touched", action="store_true", help="name the modules that no test has run a function of")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.touched and _VARIABLE not in os.environ:  # else this is one of its workers
        os.environ[_VARIABLE] = tempfile.mkstemp(prefix="touched-")[1]
    watch()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.option.touched or hasattr(config, "workerinput"):
        return
    file = Path(os.environ.pop(_VARIABLE))
    touched = set(file.read_text().splitlines())
    file.unlink()
    modules = [path for path in sorted(_PACKAGE.rglob("*.py")) if _has_functions(path)]
    others = [str(path.relative_to(_PACKAGE.parent)) for path in modules if str(path) not in touched]
    terminalreporter.section("modules")
    terminalreporter.write_line(
        f"{len(modules) - len(others)} of {len(modules)} modules were touched"
        + (f"; not {', '.join(others)}" if others else "")
    )


def _has_functions(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef | ast.Lambda) for node in ast.walk(ast.parse(path.read_text())))
