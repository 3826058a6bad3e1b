"""Connections between sub-layers: what they compute, hold and cost. torch alone, never Megatron.

Read `config`, `reference` and `frac` first.
"""
