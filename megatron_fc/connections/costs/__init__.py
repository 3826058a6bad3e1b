"""Costs of connections, by formula. The number of parameters is the configuration's to say.

* `flops`: floating-point operations
* `traffic`: bytes of device memory, fused kernels, one pass over memory each
* `eager_traffic`: bytes of unfused torch, operation by operation
* `eager_memory`: bytes that it holds for a moment
"""
