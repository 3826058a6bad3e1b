"""A disk that takes its time, so that a test finds a run where it wants it, however fast or slow the machine is."""

import os
from pathlib import Path


class SlowDisk:
    """Confirms what was written to a checkpoint later, to processes with `variables` or in a job with `exports`.

    Args:
        file: says how slow it is; it is changed while they run.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        code = Path(__file__).parent / "slow_disk"
        path = os.pathsep.join([str(code), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.variables = {"PYTHONPATH": path, "SLOW_DISK": str(file)}
        self.exports = f"export PYTHONPATH=$PYTHONPATH:{code} SLOW_DISK={file}\n"  # for a site file

    def takes(self, seconds: float) -> None:
        """From now on, for every checkpoint."""
        self._file.write_text(str(seconds))

    def hangs_at(self, iteration: int) -> None:
        """The checkpoint of this iteration is never confirmed: the run goes no further."""
        self._file.write_text(f"inf iter_{iteration:07d}")

    def is_well(self) -> None:
        """From now on, and for what waits."""
        self._file.unlink()
