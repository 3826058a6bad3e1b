"""`megatron-fc` that writes down which rows are scored, and is killed in the round after the given number.

python killed_evaluation.py FILE ROUNDS WORDS ...
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_fc.training import cpu_lane

cpu_lane.install()

from megatron_fc.cli.main import main  # noqa: E402
from megatron_fc.evaluate import engine  # noqa: E402

file, rounds = Path(sys.argv[1]), int(sys.argv[2])
original = engine.score_batches
done = 0


def recorded(args: Any, chunks: Any, batches: Any, size: int, length: int) -> Any:
    global done
    rows = [str((row.tokens, row.scored)) for batch in batches for row in batch]
    with file.open("a") as out:
        out.writelines(f"{row}\n" for row in rows)
    scores = original(args, chunks, batches, size, length)
    done += 1
    if done > rounds:  # before the leader hears of it
        file.with_suffix(".lost").write_text(str(len(rows)))
        os.kill(os.getpid(), signal.SIGKILL)
    return scores


engine.score_batches = recorded
sys.exit(main(sys.argv[3:]))
