"""Megatron's checkpoints: found, checked, chosen, kept, derived from one another.

* `location`: where they lie
* `structure`: which connections they hold
* `integrity`: whether they are still what was written
* `resume`: which one a run goes on from
* `retention`: which ones stay
* `upcycle`, `derive`: a plain checkpoint gets Frac-Connections, tensor by tensor
* `modelopt_state`: checkpoints of models that ModelOpt has changed
"""
