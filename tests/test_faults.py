"""The list of faults fits the sources, which `make mutate` alone would notice."""

import importlib.util
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def test_every_fault_has_its_line_once_and_its_tests() -> None:
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "scripts" / "mutate.py")
    assert spec is not None
    assert spec.loader is not None
    mutate = sys.modules["mutate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutate)
    faults = [mutate.Fault(**entry) for entry in yaml.safe_load(mutate.FAULTS.read_text())]
    assert len(faults) >= 30
    for fault in faults:
        assert (ROOT / fault.file).read_text().count(fault.old) == 1, fault
        assert all((ROOT / test).exists() for test in fault.tests), fault
