"""Memory and network traffic of training, counted.

* `profile`: a training run in which every rank counts for some steps
* `own_loop`: the same of a training loop of one's own
* `counting`: the counts of one rank in a window of steps
* `counters`: of device memory, network, kernel times
* `records`, `files`, `gather`: what each rank counted, on disk and together
* `report`: tables and pages
"""
