"""Predictions of others' kernels: the record, what is refused, and Liger's where it is installed."""

import json
import sys
from dataclasses import replace

import pytest

import calibrate
import peers
from laboratory.simulator.assumptions import H200, fingerprint
from laboratory.simulator.origins import FIRST_PARAMETER, pointer_offsets
from launched import BYTES
from megatron_fc.errors import UserError
from peer_builds import TE_FIELDS, Cut, InTriton, signature
from peer_kernels import LIGER, PEERS, TOKENS
from peers import OURS, WIDTHS, Row
from record import RESULTS

installed = pytest.mark.skipif(
    not calibrate.PACKAGE.exists(), reason="python benchmarks/calibrate.py installs liger-kernel"
)


def recorded() -> list[Row]:
    return [Row(**row) for row in json.loads((RESULTS / "peers-h200.json").read_text())["rows"]]


def rms_norm() -> InTriton:
    found = next(peer for peer in PEERS if (peer.package, peer.name) == (LIGER, "RMSNorm forward"))
    assert isinstance(found, InTriton)
    return found


def test_the_record_is_of_these_assumptions_and_has_every_kernel() -> None:
    stored = json.loads((RESULTS / "peers-h200.json").read_text())
    assert stored["assumptions"] == fingerprint()
    page = (RESULTS / "peers-h200.md").read_text()
    assert fingerprint() in page
    assert "Differences below 10 points mean nothing" in page
    found = [(r.package, r.kernel, r.width) for r in recorded() if r.package != OURS]
    assert found == [(p.package, p.name, width) for p in PEERS for width in ((0,) if p.reason else WIDTHS)]


def test_recorded_numbers_agree_with_each_other() -> None:
    """A share is the time of a copy by the predicted one, and no kernel moves less than it has to."""
    predictions = [row for row in recorded() if not row.reason]
    assert {row.package for row in predictions} == {OURS, *peers.PACKAGES}
    for row in predictions:
        copied_us = TOKENS * row.needs * row.width * BYTES / (H200.copy_tbs * 1e6)
        assert row.us * row.mid / 100 == pytest.approx(copied_us, rel=0.01)
        assert row.moves > 0.99 * row.needs


def test_a_missing_source_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["peers.py", "--only", "TileKernels"])
    with pytest.raises(UserError, match=r"--sources has no tile_kernels/mhc/post_kernel\.py.* add a checkout of"):
        peers.main()


def test_fields_of_a_structure_lie_as_the_compiler_lays_them() -> None:
    """Offsets by hand from kernel_params.h: a bool is followed by a pointer, a float by one."""
    offsets = {name: offset - FIRST_PARAMETER for offset, name in pointer_offsets(*signature(TE_FIELDS["fwd"])).items()}
    assert offsets | {"x": 16, "gamma": 40, "z": 72, "scale": 96, "scale_inv": 112, "amax": 120} == offsets
    offsets = {name: offset - FIRST_PARAMETER for offset, name in pointer_offsets(*signature(TE_FIELDS["bwd"])).items()}
    assert offsets | {"rs": 32, "dz": 72, "dgamma_part": 96, "dx": 104} == offsets


@installed
def test_a_kernel_is_predicted_as_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    calibrate.install()
    stored = next(r for r in recorded() if (r.package, r.kernel, r.width) == (LIGER, "RMSNorm forward", 2048))
    found = peers.peer_row(rms_norm(), 2048)
    assert (found.needs, found.moves) == (stored.needs, stored.moves)
    assert abs(found.mid - stored.mid) < peers.NOTICED


@installed
def test_a_kernel_that_is_not_followed_is_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    calibrate.install()
    peer = replace(rms_norm(), roles={"X_ptr": 4, "Y_ptr": 4})
    assert peers.peer_row(peer, 2048).reason == "the reader does not follow it: the replay moves 2.0 rows, the source 4"


@installed
def test_an_autotuned_kernel_takes_its_fastest_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warp for a row of 2048 has too few bytes on the way; two columns are not followed."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    calibrate.install()
    cuts = (Cut(1, 2048, 1), Cut(1, 2048, 8), Cut(1, 2, 8))
    monkeypatch.setattr(InTriton, "cuts", lambda self, width: cuts)
    assert peers.fastest(rms_norm()) == cuts[1]
