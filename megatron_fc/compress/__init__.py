"""Smaller models of trained ones: quantisation and distillation with NVIDIA ModelOpt, pruning by Minitron's scores.

One door per command: `quantize.quantize`, `distill.Distillation`, `prune.prune`.
"""
