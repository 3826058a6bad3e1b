"""What connections cost: bytes of device memory by formula.

* `traffic`: fused kernels, one pass over memory each
* `eager_traffic`: unfused torch, operation by operation
"""
