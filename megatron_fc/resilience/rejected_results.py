"""Rejected results in words: what Megatron's rerun state machine found when it ended a run, exit codes 16 and 17.

A loss that is NaN or infinite is computed again in place. If it is another one then, the hardware erred for a moment,
and Megatron ends with 17. If it is the same, Megatron saves what was there before the step and ends with 16, so that
the next start computes it on another device: the same loss there is the model's or the data's, another one means that
the first device is broken. Either way that start ends with 17, and so does each that goes on from that checkpoint.
"""

import os
from argparse import Namespace
from collections.abc import Callable

import torch
from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine

from megatron_fc.callbacks import Callback

REPEAT_ELSEWHERE, WRONG = 16, 17


class RejectedResults(Callback):
    """Says what Megatron found where it ends the run for it, on all ranks.

    The run then ends with Megatron's code; with 75 instead of 17 where it may go on from its last checkpoint.

    Args:
        args: Megatron's arguments, which count the iterations.
        explain: told what was found, in a sentence.
    """

    def __init__(self, args: Namespace, explain: Callable[[str], None]) -> None:
        self._args, self._explain = args, explain

    def failed(self, error: BaseException) -> BaseException:
        if not isinstance(error, SystemExit) or error.code not in (REPEAT_ELSEWHERE, WRONG):
            return error
        finding, is_passing = _finding(self._args)
        self._explain(finding)
        return SystemExit(os.EX_TEMPFAIL) if is_passing else error


def _finding(args: Namespace) -> tuple[str, bool]:
    """The sentence, and whether it was an error that has passed."""
    machine = get_rerun_state_machine()
    # Only the rank that rejected a result knows of it.
    call = machine.failed_validation_call
    mine = (call.caller, machine.suspicious_device, machine.suspicious_node) if call else None
    ranks = [mine] * args.world_size
    torch.distributed.all_gather_object(ranks, mine)
    (message, rank), device, node = next(seen for seen in ranks if seen)

    number = args.curr_iteration + 1  # Megatron's own messages number it one too high
    what = f"iteration {number}: {message} on rank {rank}"
    first = f"device {device} of {node}"
    if machine.state == RerunState.RERUNNING_IN_PLACE:
        return f"{what}, not when it was repeated: a transient error of the hardware", True
    if machine.state == RerunState.WILL_RERUN_FROM_CHECKPOINT:
        return f"{what}, also when it was repeated on {first}: the next start repeats it on another", False
    if machine.state == RerunState.RERUNNING_AGAIN_FROM_CHECKPOINT:
        return f"{what}: to be repeated on another device than {first}, which this start was given again", False
    where = f"logs/rank{rank}.log says whether {first}, or the data and the model are at fault"
    skip = f"to go on without it: iterations_to_skip=[{number}] rerun_mode=disabled"
    return f"{what}, repeated on another device: {where}; {skip}", False
