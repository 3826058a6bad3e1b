"""Megatron's checkpoints: found, checked, chosen, kept, derived from one another.

* `location`: where they lie
* `structure`: what they hold, their connections above all
* `integrity`: whether they are still what was written
* `errors`: what went wrong while Megatron loaded or wrote one
* `resume`: which one a run goes on from
* `retention`: which ones stay
* `upcycle`, `derive`: a plain checkpoint gets connections, tensor by tensor
* `modelopt_state`: checkpoints of models that ModelOpt has changed
"""
