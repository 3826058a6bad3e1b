"""What a connection between sub-layers is. torch alone, never Megatron.

Read `config`, `reference` and `frac` first.
"""
