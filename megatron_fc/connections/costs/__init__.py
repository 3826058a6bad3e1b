"""What connections cost, by formula; how many parameters they have says their configuration.

* `flops`: floating-point operations
* `traffic`: bytes of device memory, fused kernels, one pass over memory each
* `eager_traffic`: bytes of unfused torch, operation by operation
"""
