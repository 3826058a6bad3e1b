"""The time of a compiled kernel, predicted: its sm_90 instructions with their control codes, replayed.

`sass` reads the binary, `origins` finds which pointer an access follows, `assumptions` holds all that no binary says,
`kernel` puts them together, `core` (and core.cpp) runs the result. docs/laboratory.md has calibration and limits.
"""
