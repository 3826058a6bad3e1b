"""The kernels as the GPU's compiler leaves them, without a GPU: they fit, and what has to stay in registers does.

The tables under benchmarks/results hold all shapes; a few of them are compiled anew to show that the tables are true.
"""

import pytest

from compiled import ARCHITECTURES, FRAC, GENERAL, SHARED_MEMORY, Shape, compile_kernel, read_table, recorded


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_tables_hold_all_shapes(arch: int) -> None:
    table = read_table(arch)
    assert list(table) == recorded(arch)
    for (name, *_), compiled in table.items():
        if arch == 90:  # docs/kernels.md has what spills elsewhere
            is_main = name.startswith(("width", "boundary")) and not name.endswith(("b+d", GENERAL))
            assert compiled.stack <= (344 if is_main and "backward" in name else 128)
        assert compiled.shared <= SHARED_MEMORY[arch]
        # A lane has two columns, and nothing is a product of matrices.
        depth_by_columns = name == "depth forward" and not compiled.shared
        # Rows come by asynchronous copies, and leave two columns at a time.
        copied = name in ("given width forward", "given width backward")
        assert compiled.wide > 0 or depth_by_columns or copied
        assert compiled.tensor_core > 0 or depth_by_columns or name == "depth backward"


@pytest.mark.parametrize("name", FRAC)
def test_the_table_is_of_these_kernels(name: str) -> None:
    shape = Shape(name, 2048, 4, 4)
    assert compile_kernel(shape, 90) == read_table(90)[shape]


LARGEST = [(90, 7168, 2, 2), (80, 4096, 8, 8), (100, 2048, 4, 4), (90, 2048, 1, 4)]


@pytest.mark.parametrize(("arch", "width", "rate", "slots"), LARGEST)
def test_the_largest_kernel_elsewhere(arch: int, width: int, rate: int, slots: int) -> None:
    shape = Shape("boundary backward", width, rate, slots)
    assert compile_kernel(shape, arch) == read_table(arch)[shape]
