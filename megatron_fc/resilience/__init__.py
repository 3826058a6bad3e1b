"""Survival on hundreds of ranks: hangs, losses, signals, wrong results.

* `star`: the connections of the ranks to the first one
* `rank_watch`: all ranks end when one is lost or hangs, and say which one
* `hang`: how long a rank has made no step, and where it stands
* `rejected_results`: what Megatron's rerun state machine found
* `run_record`: signals, and the record of starts and ends
* `checkpoint_worker`: the run ends with the process that writes its checkpoints, and that with the run
* `helpers`: helper processes end with their rank
"""
