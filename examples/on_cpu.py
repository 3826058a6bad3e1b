"""Run a script of Megatron's on a machine without a GPU: python examples/on_cpu.py SCRIPT [ARGUMENTS].

Megatron assumes CUDA in some sixty places. `cpu_lane` redirects them to the CPU before the script is read; the script
stays as it is. Where there is a CUDA device this changes nothing.
"""

import runpy
import sys
from pathlib import Path

from megatron_fc.training import cpu_lane

if __name__ == "__main__":
    cpu_lane.install()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as Python does for a script: the modules beside it
    runpy.run_path(sys.argv[0], run_name="__main__")
