"""The main kernels of Frac-Connections, in Gluon.

`choice` is what the launches ask: the kernel for a call, or why there is none. `forward` and `backward` have one each;
`rows` is what they do with a tile in shared memory, `tables` what with coefficients, `layouts` who holds what.
"""
