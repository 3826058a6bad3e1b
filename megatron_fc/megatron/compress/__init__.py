"""Compression of trained models: quantisation and distillation with NVIDIA ModelOpt, pruning by Minitron's scores.

One door per command: `quantize.quantize`, `distill.Distillation`, `prune.prune`; `state` lets any other run go on from
a checkpoint that ModelOpt has changed. Importing this package does not import ModelOpt, which is optional.
"""
