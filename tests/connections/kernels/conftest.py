"""The kernels in Triton's interpreter, on CPU tensors.

Triton reads TRITON_INTERPRET when a kernel is defined, so these tests run in a process that sets it before anything
imports the kernels: `test_in_interpreter.py` starts it, and pytest leaves the others here alone.
"""

import os

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = (
    ["test_in_interpreter.py", "test_compiled.py"]
    if INTERPRETING
    else ["test_operations.py", "test_traffic.py", "test_model.py", "test_observers.py", "test_layouts_with_kernels.py"]
)
