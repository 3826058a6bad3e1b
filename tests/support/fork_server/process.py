"""What a fork of the server does to be what `python ARGUMENTS` would be."""

import atexit
import os
import runpy
import signal
import site
import sys
import threading
import traceback
import types
from collections.abc import Callable

_SERVERS_PATHS = [path for path in os.environ["PYTHONPATH"].split(os.pathsep) if path]


def become(
    files: list[int],
    set_on_import: dict[str, str],
    argv: list[str],
    environment: dict[str, str],
    directory: str,
    umask: int,
    ignored: list[int],
) -> None:
    """Never returns.

    Args:
        files: open ones, for 0, 1 and 2; all others are closed.
        set_on_import: what the imports have set in the environment.
        argv: the client's, its own path and what would be Python's arguments.
        environment: the client's.
        directory: the client's.
        umask: the client's.
        ignored: signals that the client was started to ignore.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python does where it is not ignored
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)  # type: ignore[misc]
    os.umask(umask)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(set_on_import | environment)
    named = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    installed = [path for path in sys.path[1:] if path not in _SERVERS_PATHS]
    sys.path[:] = ["", *dict.fromkeys([*named, *_SERVERS_PATHS]), *installed]
    sys.executable = argv[0]
    sys.orig_argv = argv
    sys.modules.pop("sitecustomize", None)
    site.execsitecustomize()
    _end_after(lambda: _run(argv[1:]))


def _run(words: list[str]) -> None:
    if words[0] == "-u":
        words = words[1:]
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    match words:
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            sys.path[0] = os.getcwd()
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(code, "<string>", "exec"), main.__dict__)
        case [script, *rest]:
            sys.argv = [script, *rest]
            sys.path[0] = os.path.dirname(os.path.realpath(script))
            runpy.run_path(script, run_name="__main__")


def _end_after(job: Callable[[], None]) -> None:
    """End as Python ends, but leave a million objects where they are: to take them down would copy all their pages."""
    code: object = 0
    try:
        job()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
