"""What stands in Python's place: asks the server for a process, hands signals on to it and ends as it ends.

Reads PYTHON, the real one, SERVER, a socket's path, and VALUES, the variables that the server has read; imports little,
as it starts often.
"""

import json
import os
import signal
import socket
import sys

PYTHON: str
SERVER: str
VALUES: dict[str, str]

_DEAF = {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGPIPE}


def main() -> int:
    for name, value in VALUES.items():
        if os.environ.get(name, value) != value:
            sys.exit(f"fork server: {name}={os.environ[name]}, but the server was started with {value}")
    if len(sys.argv) == 1 or (sys.argv[1].startswith("-") and sys.argv[1] not in ("-m", "-c", "-u")):
        os.execv(PYTHON, [PYTHON, *sys.argv[1:]])  # with options that only a new interpreter can follow
    signals = signal.valid_signals() - _DEAF
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    server.connect(SERVER)
    request = {
        "argv": sys.argv,
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "umask": os.umask(0),
        "ignored": [number for number in signals if signal.getsignal(number) == signal.SIG_IGN],
    }
    socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
    for number in signals:
        signal.signal(number, lambda number, _: server.send(bytes([number])))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    status = server.recv(16)
    if not status:
        sys.exit(f"fork server: it has ended, see {os.path.dirname(SERVER)}/log")
    return os.waitstatus_to_exitcode(int(status))


def end(code: int) -> None:
    """As the process has ended, by a signal if it was one."""
    if code < 0:
        if -code not in _DEAF:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


end(main())
