"""The emulator's errors. Every message names the instruction, and the thread and address where there is one."""


class PTXError(Exception):
    """Anything wrong with a kernel or its execution."""


class Unsupported(PTXError):
    """The text has something that the emulator does not know or do."""


class AccessError(PTXError):
    """An access outside of any array, misaligned, or of memory that nothing was written to."""


class RaceError(PTXError):
    """Two threads touch the same memory, one of them writing, with nothing that orders them."""


class Hang(PTXError):
    """Threads wait for others that never arrive, or a loop does not end."""


class Fault(Exception):
    """Raised inside of an instruction; the scheduler, which knows the threads, makes a `PTXError` of it."""

    def __init__(self, error: type[PTXError], at: int, message: str, thread: int | None = None) -> None:
        super().__init__(message)
        self.error, self.at, self.message, self.thread = error, at, message, thread
