"""The table of losses side by side."""

import pytest

from megatron_fc.runs.losses import print_losses


def test_differences_are_to_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    print_losses({"dense": 5.25, "fp8": 5.5, "pruned": 4.9999})
    rows = [line.strip("│").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["dense", "5.2500", ""],
        ["fp8", "5.5000", "+0.2500"],
        ["pruned", "4.9999", "-0.2501"],
    ]
