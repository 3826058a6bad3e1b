"""A run's starts and ends, a JSON line each in `run_dir/starts.jsonl`; how it stands, one word in `run_dir/state`.

The word is for scripts: `continue` (start the same again), `done` (the target is reached), or `stuck`, which the launch
scripts write when they give up.
"""

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

STARTS, STATE = "starts.jsonl", "state"
REACHED = "target"


def record_start(
    run_dir: Path,
    *,
    hosts: list[str],
    iteration: int,
    consumed_samples: int,
    target_samples: int,
    checkpoint: str | None,
    ckpt_step: int | None = None,
    changed: Mapping[str, tuple[Any, Any]] = {},
) -> None:
    """Note that a run starts.

    Args:
        run_dir: folder of the run; created if needed.
        hosts: of the ranks, in their order.
        iteration: that was done last, 0 for a new run.
        consumed_samples: up to there.
        target_samples: at which the run is done.
        checkpoint: that the run goes on from.
        ckpt_step: as the command gives it.
        changed: settings that differ from the checkpoint's, with the value there and now.
    """
    facts = {"host": list(dict.fromkeys(hosts)), "world_size": len(hosts), "iteration": iteration}
    facts |= {"consumed_samples": consumed_samples, "target_samples": target_samples, "checkpoint": checkpoint}
    facts |= {"ckpt_step": ckpt_step, "changed": {name: list(values) for name, values in changed.items()}}
    _append(run_dir, "start", facts)
    _write_state(run_dir, "continue")


def record_end(
    run_dir: Path,
    *,
    iteration: int,
    consumed_samples: int,
    target_samples: int,
    reason: str,
    exit_code: int | None = None,
) -> None:
    """Note that a run ends.

    Args:
        run_dir: folder of the run.
        iteration: that was done last.
        consumed_samples: up to there.
        target_samples: at which the run is done.
        reason: REACHED, a signal, which rank was lost, or the text of an error.
        exit_code: that Megatron chose, where it ended the run.
    """
    facts = {"iteration": iteration, "consumed_samples": consumed_samples, "target_samples": target_samples}
    _append(run_dir, "end", facts | {"reason": reason, "exit_code": exit_code})
    _write_state(run_dir, "done" if reason == REACHED else "continue")


def read_state(run_dir: Path) -> str | None:
    """Return the word of `run_dir/state`, None if there is none."""
    state = run_dir / STATE
    return state.read_text().strip() if state.exists() else None


def read_events(run_dir: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the starts and ends, and how many lines cannot be read: a machine that dies tears the one it writes."""
    path = run_dir / STARTS
    if not path.exists():
        return [], 0
    events, unreadable = [], 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            event = None
        if isinstance(event, dict):
            events.append(event)
        else:
            unreadable += 1
    return events, unreadable


def _append(run_dir: Path, event: str, facts: dict[str, Any]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    job, restart = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    line = {"event": event, "time": datetime.now(UTC).isoformat(timespec="seconds"), "job": job, "restart": restart}
    with open(run_dir / STARTS, "a") as file:
        file.write(json.dumps(line | facts, default=str) + "\n")


def _write_state(run_dir: Path, word: str) -> None:
    """In one step, so that nobody reads half a word."""
    new = run_dir / f"{STATE}.new"
    new.write_text(f"{word}\n")
    new.replace(run_dir / STATE)
