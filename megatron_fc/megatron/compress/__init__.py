"""Compression of trained models: quantisation and distillation with NVIDIA ModelOpt.

One door per command: `quantize.quantize` and `distill.distill`; `state` lets any other run go on from a
checkpoint that ModelOpt has changed. Importing this package does not import ModelOpt, which is optional.
"""
