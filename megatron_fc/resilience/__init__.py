"""Survival on hundreds of ranks: hangs, losses, signals, wrong results.

* `rank_watch`: all ranks end when one is lost or hangs, and say which one
* `hang`: how long a rank has made no step, and where it stands
* `rejected_results`: what Megatron's rerun state machine found
* `run_record`: signals, and the record of starts and ends
"""
