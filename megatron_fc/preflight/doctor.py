"""``megatron-fc doctor``: what is installed here, what each part enables and what replaces it when missing.

Every package is imported in a Python process of its own: one that crashes, hangs or prints at import cannot
spoil the report, and the process that asks for the report loads nothing.
"""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from json import dumps, loads
from pathlib import Path
from typing import Literal

from megatron_fc.extras import DATA, EVAL, TRAIN
from megatron_fc.preflight.plain_table import plain_table

TESTED_MEGATRON = (0, 19)
PROBE_TIMEOUT_S = 120

_EXCEPTION = re.compile(r"[\w.]+(Error|Exception)\b")

# torch does not tell the driver's release; the kernel module does.
_CUDA_PROBE = r"""
import json, pathlib, re, torch
torch.cuda.init()
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
driver = pathlib.Path("/proc/driver/nvidia/version")
release = re.search(r"\d+\.\d[\d.]*", driver.read_text()) if driver.exists() else None
print(json.dumps({
    "cuda": torch.version.cuda,
    "driver": release[0] if release else "unknown",
    "devices": [f"{device.name} (sm_{device.major}{device.minor})" for device in devices],
}))
"""

# MPI_Init, which importing MPI calls by default, may wait for ever outside of mpirun.
_MPI_PROBE = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version().split(",")[0].splitlines()[0])
"""


# torch.utils.tensorboard builds on the last one; importing tensorboard alone loads next to nothing.
_TRAIN_PROBE = f"import {', '.join(TRAIN)}, tensorboard.summary.writer.event_file_writer"


@dataclass(frozen=True)
class Component:
    """One row of the report.

    Attributes:
        name: of the component.
        enables: what it is for.
        without: what takes its place.
        status: whether it is installed, and works.
        version: as its package says.
        note: what else is to be known.
        need: "always", "once installed" (Megatron imports it then, and a broken one ends the run), or "when asked for".
    """

    name: str
    enables: str
    without: str
    status: Literal["found", "missing", "broken"] = "missing"
    version: str | None = None
    note: str = ""
    need: Literal["always", "once installed", "when asked for"] = "once installed"

    @property
    def is_problem(self) -> bool:
        """Whether a run on this machine fails because of it."""
        if self.status == "missing":
            return self.need == "always"
        return self.status == "broken" and self.need != "when asked for"


_PYTHON = Component("Python", "everything", "required: 3.12 or newer", need="always")
_TORCH = Component("torch", "models, autograd, the torch backend", "required: pip install torch", need="always")
_CUDA = Component("CUDA", "training on NVIDIA GPUs over NCCL", "the CPU lane: Megatron on the CPU over gloo")
_TRITON = Component("Triton", "Megatron's own Triton kernels, the fused kernels on CUDA", "the torch backend")
_MEGATRON = Component(
    "megatron-core", "layers, parallelism, the training loop", "required: pip install megatron-core", need="always"
)
_TE = Component("Transformer Engine", "FP8, fused norms and attention, context parallelism", "Megatron's local layers")
_APEX = Component(
    "Apex",
    "fused norms and optimizers, gradient accumulation fusion",
    "torch's norms and optimizers, --no-gradient-accumulation-fusion",
)
_MODELOPT = Component("ModelOpt", "megatron-fc quantize and distill", "nothing else needs it")
_MPI4PY = Component("mpi4py", "ranks from mpirun", "torchrun or srun", need="when asked for")
_TRAIN = Component("megatron_fc[train]", "megatron-fc train and all other commands", "the plugin in your own pipeline")
_DATA = Component("megatron_fc[data]", "megatron-fc data tokenize", "data in Megatron's format", need="when asked for")
_EVAL = Component("megatron_fc[eval]", "evaluation on tasks", "megatron-fc evaluate perplexity", need="when asked for")


def inspect_environment() -> list[Component]:
    """Look at every component; imports run in parallel and in processes of their own."""
    inspections: list[Callable[[], Component]] = [
        lambda: replace(_PYTHON, status="found", version=platform.python_version(), note=sys.executable),
        partial(_inspect, _TORCH, "torch", "import torch"),
        _inspect_cuda,
        partial(_inspect, _TRITON, "triton", "import triton"),
        _inspect_megatron,
        # torch comes first: it loads the CUDA libraries that these packages link to.
        partial(_inspect, _TE, "transformer_engine", "import torch, transformer_engine.pytorch"),
        _inspect_apex,
        _inspect_modelopt,
        _inspect_mpi4py,
        partial(_inspect_extra, _TRAIN, TRAIN, _TRAIN_PROBE),
        partial(_inspect_extra, _DATA, DATA),
        partial(_inspect_extra, _EVAL, EVAL),
    ]
    with ThreadPoolExecutor() as pool:
        components = list(pool.map(lambda inspection: inspection(), inspections))
    if _has_cuda(components):
        return components
    return [_unusable_on_cpu(component) for component in components]


def backend(components: Sequence[Component]) -> str:
    """Name the implementation of Frac-Connections that backend=auto takes here."""
    has_triton = any(component.name == _TRITON.name and component.status == "found" for component in components)
    return "triton" if has_triton and _has_cuda(components) else "torch"


def device_lane(components: Sequence[Component]) -> str:
    """Name the devices that training will use."""
    return "CUDA" if _has_cuda(components) else "CPU lane over gloo"


def render(components: Sequence[Component], width: int) -> str:
    """Lay the report out for a terminal of so many columns."""
    rows = [(component.name, _here(component), component.enables, component.without) for component in components]
    return "\n".join(
        [
            plain_table(("Component", "Here", "Enables", "Without it"), rows, width),
            "",
            f"Backend: {backend(components)}",
            f"Devices: {device_lane(components)}",
            *(f"To correct: {c.name} {c.status}: {c.note or c.without}" for c in components if c.is_problem),
        ]
    )


def _here(component: Component) -> str:
    words = [component.version or component.status]
    if component.version and component.status != "found":
        words.append(f"({component.status})")
    return "\n".join(filter(None, [" ".join(words), component.note]))


def main(json: bool = False) -> int:
    """Print the report, as a table or as JSON; return 1 when a run on this machine would fail, else 0."""
    components = inspect_environment()
    if json:
        report = {
            "backend": backend(components),
            "devices": device_lane(components),
            "components": [asdict(component) for component in components],
        }
        print(dumps(report, indent=2))
    else:
        print(render(components, shutil.get_terminal_size((120, 24)).columns))
    return int(any(component.is_problem for component in components))


class _ProbeFailed(Exception):
    """The reason, in one line, for which a probe did not run to its end."""


def _probe(code: str) -> str:
    """Run `code` in a process that sees this one's import path; return the last line it printed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        # -P: the working directory is searched only where this process searches it too.
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise _ProbeFailed(f"its import took more than {PROBE_TIMEOUT_S} s") from None
    if done.returncode < 0:
        raise _ProbeFailed(f"its import ended with {signal.Signals(-done.returncode).name}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"its import ended with exit status {done.returncode}"]
        # The message of an exception may run over several lines; its first one names it.
        raise _ProbeFailed(next((line for line in reversed(lines) if _EXCEPTION.match(line)), lines[-1]))
    return (done.stdout.strip().splitlines() or [""])[-1]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _inspect(row: Component, module: str, code: str, distribution: str = "") -> Component:
    if find_spec(module) is None:
        return row
    version = _version(distribution or module)
    try:
        return replace(row, status="found", version=version, note=_probe(code))
    except _ProbeFailed as failure:
        return replace(row, status="broken", version=version, note=str(failure))


def _inspect_cuda() -> Component:
    try:
        found = loads(_probe(_CUDA_PROBE))
    except _ProbeFailed as failure:
        # "RuntimeError: Found no NVIDIA driver on your system. Please check ...": the first sentence will do.
        reason = str(failure).partition(": ")[2] or str(failure)
        return replace(_CUDA, note=reason.partition(". ")[0])
    devices = ", ".join(f"{count} x {name}" for name, count in Counter(found["devices"]).items())
    return replace(_CUDA, status="found", version=found["cuda"], note=f"{devices}, driver {found['driver']}")


def _inspect_megatron() -> Component:
    spec = find_spec("megatron.core") if find_spec("megatron") else None
    if spec is None or spec.origin is None:
        return _MEGATRON
    # A Megatron-LM checkout on PYTHONPATH comes before an installed wheel: only the files that Python would
    # import tell the version.
    package_info = Path(spec.origin).with_name("package_info.py").read_text()
    numbers = re.findall(r"^(?:MAJOR|MINOR|PATCH) = (\d+)", package_info, re.MULTILINE)
    series, tested = tuple(map(int, numbers[:2])), "{}.{}".format(*TESTED_MEGATRON)
    row = replace(_MEGATRON, status="found", version=".".join(numbers))
    if series < TESTED_MEGATRON:
        return replace(row, status="broken", note=f"too old: {tested} or newer is needed")
    if series > TESTED_MEGATRON:
        return replace(row, note=f"newer than {tested}: not tested")
    return row


def _inspect_apex() -> Component:
    spec = find_spec("apex")
    # Two projects are called apex. Only NVIDIA's has apex.optimizers and, built for a GPU, the module amp_C.
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or []]
    if spec and find_spec("amp_C") is None and not any((folder / "optimizers").is_dir() for folder in folders):
        return replace(
            _APEX,
            status="broken",
            version=_version("apex"),
            note="not NVIDIA's Apex, breaks Megatron: pip uninstall apex",
        )
    return _inspect(_APEX, "apex", "import torch, amp_C, apex.optimizers")


def _inspect_modelopt() -> Component:
    row = _inspect(_MODELOPT, "modelopt", "import torch, modelopt.torch", "nvidia-modelopt")
    # Megatron imports it, and goes on without it after an ImportError.
    is_harmless = row.note.startswith(("ImportError", "ModuleNotFoundError"))
    return replace(row, need="when asked for") if is_harmless else row


def _inspect_mpi4py() -> Component:
    row = _inspect(_MPI4PY, "mpi4py", _MPI_PROBE)
    if "cannot load MPI library" in row.note:
        return replace(
            row, status="missing", note="no MPI library: apt install openmpi-bin, or load your site's module"
        )
    return row


def _inspect_extra(row: Component, modules: Mapping[str, str], probe: str = "") -> Component:
    """Look at what one of the extras of pyproject.toml brings."""
    missing = [package for module, package in modules.items() if find_spec(module) is None]
    if missing:
        return replace(row, note=f"no {', '.join(missing)}: pip install '{row.name}'")
    return _inspect(row, next(iter(modules)), probe or f"import {', '.join(modules)}", "megatron_fc")


def _has_cuda(components: Sequence[Component]) -> bool:
    return any(component.name == _CUDA.name and component.status == "found" for component in components)


def _unusable_on_cpu(component: Component) -> Component:
    """Megatron takes these two wherever it can import them, and their kernels have no CPU version."""
    if component.name in (_TE.name, _APEX.name) and component.status == "found":
        return replace(component, status="broken", note="needs a GPU, and Megatron would use it here: uninstall it")
    return component
