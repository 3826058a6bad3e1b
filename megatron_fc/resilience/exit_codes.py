"""Exit codes of ranks, and which of them decides where ranks end with several.

| code | a rank ends with it |
|---|---|
| 0 | at the target, or saved after a signal |
| 2 | what was asked for is wrong, or a checkpoint cannot be read or written: the same again will fail again |
| 16 | a result was rejected and is to be computed on another device |
| 17 | a result was rejected for good |
| 75 | another rank is lost, or a node or the network is at fault: the same again may work |

A rank that ends with 2 often takes others with it, which end with 75, or are killed with 137. Launchers return the
highest code, and the one that says what to do is lost: with `EXIT_CODES=ranked` in the environment it is a high one.
"""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

WRONG_INPUT, TEMPORARY = 2, os.EX_TEMPFAIL
# Above 192 = 128 + 64, the highest that stands for a signal. launch/common.sh takes them back.
_RANKED = {16: 201, WRONG_INPUT: 202, 17: 203}


def ranked(code: int) -> int:
    """Return what a process is to end with in place of a code."""
    return _RANKED.get(code, code) if os.environ.get("EXIT_CODES") == "ranked" else code


def end_with(main: Callable[[], int]) -> NoReturn:
    """Call `main` and end this process with its code, or with that of the `SystemExit` that it raises."""
    try:
        code: object = main()
    except SystemExit as end:
        code = end.code
    sys.exit(ranked(code) if isinstance(code, int) else code)  # type: ignore[arg-type]
