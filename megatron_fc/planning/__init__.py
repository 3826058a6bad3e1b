"""Estimates of what a run needs and how long it takes, from plain integers: no Megatron, no GPU.

* `layout`, `stages`, `placement`: ranks, the layers of their stages, the groups and nodes that they are in
* `shape`: the model and how it is trained
* `parameters`, `memory`, `activations`, `flops`: exact counts
* `counts`, `ring`, `network`: bytes, by where they arise
* `devices`, `links`, `operations`, `work`, `overlap`, `calibration`, `roofline`: time
* `plan`, `sweep`, `table`: a whole run, other layouts for it, both for people
"""
