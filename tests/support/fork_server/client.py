"""What stands in Python's place: asks the server for a process, hands signals on to it and ends as it ends.

It imports little, as it starts often; `client.json` beside it names the real Python, the server's socket, and the
variables that the server has read.
"""

import json
import os
import signal
import socket
import sys

_DEAF = {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGPIPE}


def main(python: str, server: str, values: dict[str, str]) -> int:
    """Run what `python ARGUMENTS` would; returns its exit code, the negative number of a signal if that ended it."""
    if len(sys.argv) == 1 or (sys.argv[1].startswith("-") and sys.argv[1] not in ("-m", "-c", "-u")):
        os.execv(python, [python, *sys.argv[1:]])  # only a new interpreter can have other options
    for name, value in values.items():
        if os.environ.get(name, value) != value:
            sys.exit(f"fork server: {name}={os.environ[name]}, but the server was started with {value}")
    signals = signal.valid_signals() - _DEAF
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    try:
        status = _run(connection, server, signals)
    except ConnectionError:
        status = b""
    if not status:
        sys.exit(f"fork server: it has ended, see {os.path.dirname(server)}/log")
    return os.waitstatus_to_exitcode(int(status))


def _run(connection: socket.socket, server: str, signals: set[signal.Signals]) -> bytes:
    """Ask for the process and hand signals on; returns how it has ended, nothing where the server ended first."""
    connection.connect(server)
    request = {
        "argv": sys.argv,
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "umask": os.umask(0),
        "ignored": [number for number in signals if signal.getsignal(number) == signal.SIG_IGN],
    }
    socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
    for number in signals:
        signal.signal(number, lambda number, _: connection.send(bytes([number])))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    return connection.recv(16)


def end(code: int) -> None:
    """As the process has ended, by a signal if it was one."""
    if code < 0:
        if -code not in _DEAF:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


with open(os.path.join(os.path.dirname(__file__), "client.json")) as file:
    facts = json.load(file)
end(main(**facts))
