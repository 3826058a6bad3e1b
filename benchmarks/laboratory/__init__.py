"""A laboratory for kernels without a GPU (docs/laboratory.md)."""
