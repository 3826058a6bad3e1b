"""Which exit code of several ranks a launcher returns."""

import subprocess
import sys

import pytest

from megatron_fc.resilience.exit_codes import ranked


def test_codes_that_decide_are_above_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 + 64 stands for the last signal."""
    assert [ranked(code) for code in (0, 2, 16, 17, 75)] == [0, 2, 16, 17, 75]
    monkeypatch.setenv("EXIT_CODES", "ranked")
    assert [ranked(code) for code in (0, 1, 75, 137)] == [0, 1, 75, 137]
    assert 128 + 64 < ranked(16) < ranked(2) < ranked(17) < 256


@pytest.mark.parametrize("raises", ["return 2", "raise SystemExit(2)", "sys.exit(2)"])
def test_however_a_command_ends(raises: str) -> None:
    program = (
        f"import sys; from megatron_fc.resilience.exit_codes import end_with\ndef main(): {raises}\nend_with(main)"
    )
    words, variables = [sys.executable, "-c", program], {"EXIT_CODES": "ranked", "PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run(words, env=variables, check=False).returncode == 202
