"""A disk that confirms what was written to a checkpoint only after the seconds that the file SLOW_DISK holds."""

import contextlib
import os
import time
from pathlib import Path

_fsync = os.fsync


def _slow_fsync(file: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        if os.readlink(f"/proc/self/fd/{file}").endswith(".distcp"):
            time.sleep(float(Path(os.environ["SLOW_DISK"]).read_text()))
    _fsync(file)


os.fsync = _slow_fsync
