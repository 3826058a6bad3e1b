"""The Python of the tests that starts at once behaves as Python does."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import fork_server

PYTHONS = pytest.mark.parametrize("real", [True, False], ids=["real", "forked"])


def python(real: bool) -> str:
    return sys.executable if real else fork_server.python()


def start(real: bool, code: str, **options: Any) -> subprocess.Popen[str]:
    """A process that runs the code and has written a line."""
    process = subprocess.Popen([python(real), "-c", code], stdout=subprocess.PIPE, text=True, **options)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


LISTENS = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))
print("here", flush=True)
time.sleep(600)
"""


@PYTHONS
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGUSR1, 7), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -9), (signal.SIGINT, -signal.SIGINT)],
)
def test_signals_and_how_they_end_it(number: signal.Signals, code: int, real: bool) -> None:
    process = start(real, LISTENS, stderr=subprocess.DEVNULL)
    process.send_signal(number)
    assert process.wait() == code
    assert process.stdout is not None
    assert process.stdout.read() == "", "nobody else holds the pipe"


LISTENS_TOO = f"""
import signal, subprocess
signal.signal(signal.SIGUSR1, lambda *_: None)
print(subprocess.run([{sys.executable!r}, "-c", {LISTENS!r}]).returncode)
"""


@PYTHONS
def test_a_signal_to_the_group_reaches_its_children(real: bool) -> None:
    process = start(real, LISTENS_TOO, start_new_session=True)
    os.killpg(process.pid, signal.SIGUSR1)
    assert process.communicate() == ("7\n", None)
    assert process.returncode == 0


@PYTHONS
def test_signals_that_a_launcher_ignores(real: bool) -> None:
    """As launch/common.sh has a task ignore them, until the handlers are there."""
    code = "import signal; print(signal.getsignal(signal.SIGTERM) == signal.SIG_IGN)"
    words = ["bash", "-c", f'trap "" TERM; exec {python(real)} -c "{code}"']
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "True\n"


FACTS = """
import json, os, sys
print(json.dumps({
    "arguments": sys.argv, "directory": os.getcwd(), "here": os.environ.get("HERE"), "path": sys.path[0],
    "umask": os.umask(0), "input": sys.stdin.read(), "name": __name__, "leader": os.environ.get("GONE"),
    "is_program": os.path.basename(sys.executable).startswith("python"),
}))
sys.exit("said at the end")
"""


@pytest.mark.parametrize("way", ["-c", "-m", "script"])
def test_what_it_is_given(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GONE", "before")
    fork_server.python()
    monkeypatch.delenv("GONE")
    (tmp_path / "facts.py").write_text(FACTS)
    words = {"-c": ["-c", FACTS], "-m": ["-m", "facts"], "script": [str(tmp_path / "facts.py")]}[way]
    found = []
    for real in (True, False):
        done = subprocess.run(
            [python(real), *words, "one", "two words"],
            cwd=tmp_path,
            env=os.environ | {"HERE": "there"},
            input="typed",
            capture_output=True,
            text=True,
            umask=0o27,
            check=False,
        )
        assert (done.returncode, done.stderr) == (1, "said at the end\n")
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
    assert (found[0]["input"], found[0]["here"], found[0]["umask"]) == ("typed", "there", 0o27)


@PYTHONS
def test_exceptions_threads_and_what_is_done_at_exit(real: bool) -> None:
    code = (
        "import atexit, threading, time\natexit.register(print, 'last')\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\nprint('first')\n1 / 0\n"
    )
    done = subprocess.run([python(real), "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "first\nthread\nlast\n")
    assert done.stderr.startswith("Traceback ")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_its_imports_are_done_and_its_number_is_known() -> None:
    code = "import os, sys; print('here', flush=True); input(); print('megatron.training' in sys.modules, os.getpid())"
    process = start(False, code, stdin=subprocess.PIPE)
    assert process.communicate("\n")[0] == f"True {fork_server.process_id(process)}\n"
    assert process.pid != fork_server.process_id(process)


def test_other_variables_than_the_servers_are_refused() -> None:
    done = subprocess.run(
        [fork_server.python(), "-c", "pass"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "fork server: TRITON_INTERPRET=1, but the server was started with 0\n"


def test_options_that_need_a_new_interpreter_have_one() -> None:
    words = [fork_server.python(), "-P", "-c", "import sys; print(sys.flags.safe_path, 'torch' in sys.modules)"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "True False\n"
