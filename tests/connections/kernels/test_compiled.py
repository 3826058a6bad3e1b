"""The kernels as the GPU's compiler leaves them, without a GPU: they fit, and what has to stay in registers does.

The tables under benchmarks/results hold all shapes; a few of them are compiled anew to show that the tables are true.
"""

import itertools

import pytest

from compiled import ARCHITECTURES, GENERAL, KERNELS, RATES, SHARED_MEMORY, WIDTHS, compile_kernel, read_table


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_tables_hold_all_shapes(arch: int) -> None:
    table = read_table(arch)
    assert set(table) == set(itertools.product(KERNELS, WIDTHS, RATES))
    for (name, _, _), compiled in table.items():
        if arch == 90:  # docs/kernels.md has what spills elsewhere
            backward = 128 if name.endswith(("b+d", GENERAL)) or name.startswith("depth") else 304
            assert compiled.stack <= (backward if "backward" in name else 24)
        assert compiled.shared <= SHARED_MEMORY[arch]
        assert compiled.wide > 0
        if name != "depth backward":  # which has no product of matrices
            assert compiled.tensor_core > 0


@pytest.mark.parametrize("name", KERNELS)
def test_the_table_is_of_these_kernels(name: str) -> None:
    assert compile_kernel(name, 2048, 4, 90) == read_table(90)[name, 2048, 4]


@pytest.mark.parametrize(("arch", "width", "rate"), [(90, 7168, 2), (80, 4096, 8), (100, 2048, 4)])
def test_the_largest_kernel_elsewhere(arch: int, width: int, rate: int) -> None:
    name = "boundary backward"
    assert compile_kernel(name, width, rate, arch) == read_table(arch)[name, width, rate]
