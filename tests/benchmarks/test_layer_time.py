"""The predicted time of a layer is that of the recorded predictions, and the figure's page says what it is."""

import json
from dataclasses import asdict

import layer_time
from laboratory.simulator.assumptions import fingerprint
from record import RESULTS


def test_the_record_follows_from_the_predictions() -> None:
    stored = json.loads((RESULTS / "layer-time-h200.json").read_text())
    assert stored["rows"] == [asdict(bar) for bar in layer_time.bars()]
    assert stored["assumptions"] == fingerprint()
    text = (RESULTS / "layer-time-h200.md").read_text()
    assert "Predicted, not measured" in text
    for bar in layer_time.bars():
        assert f"| {bar.scheme} |" in text


def test_times_by_hand() -> None:
    """16,384 tokens of 4,096 bytes at 4.3 TB/s: 15.6 us for a row."""
    stock, *others = layer_time.bars()
    assert abs(stock.total - 22 * 16384 * 4096 / 4.3e6) < 0.5
    first, now = others[:2]
    assert first.total > now.total > 20 / 22 * stock.total
