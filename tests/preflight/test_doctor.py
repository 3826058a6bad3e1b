"""The report on this machine, on one where packages are ill, and on one with GPUs; tests/packaging has the bare one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from json import dumps, loads
from pathlib import Path

import pytest
import torch

from megatron_fc.preflight import doctor
from megatron_fc.preflight.doctor import Component

Report = dict[str, Component]

# One worker: the two reports behind these tests are made once.


def inspect() -> Report:
    return {component.name: component for component in doctor.inspect_environment()}


def text_of(report: Report) -> str:
    return doctor.render(list(report.values()), width=200)


@pytest.fixture(scope="module")
def here() -> Report:
    return inspect()


@pytest.fixture(scope="module")
def ill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Report]:
    """The report where packages of the optional components are there, but not in health."""
    site = tmp_path_factory.mktemp("site")
    for package, source in {
        "apex": "__version__ = '0.9'",
        "mpi4py": "raise RuntimeError('out of order\\nin two lines')",
        "tensorboard": "import a_package_of_its_own",
        "modelopt": "import os; os.abort()",
        "transformer_engine": "print('a greeting on stdout')",
    }.items():
        write_package(site, package, source)
    write_package(site, "transformer_engine/pytorch", "")
    (site / "megatron").mkdir()
    write_package(site, "megatron/core", "raise AssertionError('the report must not import Megatron')")
    (site / "megatron/core/package_info.py").write_text("MAJOR = 0\nMINOR = 20\nPATCH = 1\nPRE_RELEASE = 'rc0'\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.delitem(sys.modules, "megatron.core", raising=False)
        yield inspect()


def write_package(site: Path, name: str, source: str) -> None:
    (site / name).mkdir()
    (site / name / "__init__.py").write_text(source)


def test_reports_what_is_installed(here: Report) -> None:
    assert here["Python"].version == ".".join(map(str, sys.version_info[:3]))
    assert here["torch"].status == "found"
    assert here["torch"].version
    assert torch.__version__.startswith(here["torch"].version)
    assert here["megatron-core"].status == "found"
    assert (here["CUDA"].status == "found") == torch.cuda.is_available()
    assert not [component.name for component in here.values() if component.is_problem]


def test_names_the_lane_that_will_run(here: Report) -> None:
    lane = "CUDA" if torch.cuda.is_available() else "CPU lane over gloo"
    assert f"Devices: {lane}" in text_of(here)
    assert "Backend: torch" in text_of(here)


@pytest.mark.slow
def test_without_an_mpi_library_all_is_well() -> None:
    """As on a fresh machine after `make demo`: the real mpi4py says so itself."""
    pytest.importorskip("mpi4py", reason="mpi4py not found: pip install 'megatron_fc[mpi]'")
    environment = os.environ | {"MPI4PY_LIBMPI": "/nowhere/libmpi.so", "COLUMNS": "200"}
    words = [sys.executable, "-m", "megatron_fc", "doctor"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    [at] = [number for number, line in enumerate(done.stdout.splitlines()) if line.startswith("mpi4py ")]
    assert "ranks from mpirun" in done.stdout.splitlines()[at]
    assert "no MPI library: apt install openmpi-bin, or load" in done.stdout.splitlines()[at + 1]


@pytest.mark.slow
def test_calls_out_the_apex_that_is_not_nvidias(ill: Report) -> None:
    assert ill["Apex"].status == "broken"
    assert "Apex broken: not NVIDIA's Apex, breaks Megatron: pip uninstall apex" in text_of(ill)


def test_reports_a_package_that_raises_at_import(ill: Report) -> None:
    assert ill["mpi4py"].status == "broken"
    assert ill["mpi4py"].note == "RuntimeError: out of order"
    assert not ill["mpi4py"].is_problem, "only mpirun asks for it"
    assert ill["megatron_fc[train]"].note == "ModuleNotFoundError: No module named 'a_package_of_its_own'"
    assert ill["megatron_fc[train]"].is_problem, "every training asks for it"


def test_survives_a_package_that_kills_its_process(ill: Report) -> None:
    assert ill["ModelOpt"].status == "broken"
    assert "SIGABRT" in ill["ModelOpt"].note
    assert ill["ModelOpt"].is_problem, "Megatron imports it"


def test_a_modelopt_that_lacks_a_package_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron catches this one."""
    write_package(tmp_path, "modelopt", "")
    write_package(tmp_path, "modelopt/torch", "import requests_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    row = doctor._inspect_modelopt()
    assert (row.status, row.is_problem) == ("broken", False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_transformer_engine_without_a_gpu_is_a_problem(ill: Report) -> None:
    assert ill["Transformer Engine"].is_problem
    assert "needs a GPU" in ill["Transformer Engine"].note


def test_a_checkout_in_front_of_the_wheel_tells_its_own_version(ill: Report) -> None:
    assert ill["megatron-core"].version == "0.20.1"
    assert ill["megatron-core"].note == "newer than 0.19: not tested"
    assert not ill["megatron-core"].is_problem


def test_lists_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"cuda": "13.0", "driver": "580.65.06", "devices": ["NVIDIA H200 (sm_90)"] * 2}
    monkeypatch.setattr(doctor, "_probe", lambda code: dumps(seen) if "torch.cuda.init" in code else "")
    report = inspect()
    assert report["CUDA"].version == "13.0"
    assert report["CUDA"].note == "2 x NVIDIA H200 (sm_90), driver 580.65.06"
    assert doctor.device_lane(list(report.values())) == "CUDA"


@pytest.mark.parametrize("report", ["here", "ill"])
def test_json_holds_the_whole_report(
    report: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    components = list(request.getfixturevalue(report).values())
    monkeypatch.setattr(doctor, "inspect_environment", lambda: components)
    status = doctor.main(json=True)
    printed = loads(capsys.readouterr().out)
    assert [Component(**component) for component in printed["components"]] == components
    assert printed["backend"] == "torch"
    assert status == int(any(component.is_problem for component in components))


def test_importing_it_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'triton', 'megatron', 'yaml', 'numpy'} & set(sys.modules)"
    code = f"import sys, megatron_fc.preflight.doctor; print({heavy} or 'nothing')"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "nothing"
