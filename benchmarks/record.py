"""What a result says of the machine and the software that it was measured with, and the files that it goes into."""

import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_fc.errors import UserError

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformer-engine", "liger-kernel", "hyper-connections")


def facts(device: str) -> dict[str, Any]:
    """Machine, versions, date, command and commit; what cannot be found out is `unknown` or `not installed`."""
    return {
        "machine": machine(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if on_gpu(device)
        else "",
        "versions": {
            "python": platform.python_version(),
            "megatron-core": _megatron_version(),
            **{name: installed_version(name) for name in PACKAGES},
        },
        "date": date.today().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit(RESULTS.parent, "--dirty"),
    }


def commit(folder: Path, *options: str) -> str:
    """Of a checkout."""
    return _output("git", "-C", str(folder), "describe", "--always", "--exclude=*", "--abbrev=12", *options)


def machine(device: str) -> str:
    """The GPU's name and memory, or the processor's architecture."""
    if not on_gpu(device):
        threads = torch.get_num_threads()
        return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def on_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _megatron_version() -> str:
    try:
        from megatron_fc.megatron.versions import megatron_version
    except UserError:
        return "not installed"
    return str(megatron_version())


def write(folder: Path, name: str, result: dict[str, Any], markdown: str = "") -> None:
    """Write NAME-MACHINE.json, and the same for people as Markdown where there is any."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", f"{name}-{result['machine']}".lower()).strip("-")
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=2) + "\n")
    if markdown:
        (folder / f"{stem}.md").write_text(markdown)


def heading(title: str, result: dict[str, Any]) -> str:
    """Title and facts of a result in Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    driver = f", driver {result['driver']}" if result["driver"] else ""
    return (
        f"# {title}\n\n`{result['command']}`\n\n"
        f"{result['machine']}{driver}. {versions}. Commit {result['commit']}, {result['date']}.\n"
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first `left` columns are text and whose others are numbers."""
    lines = [columns, ["---"] * left + ["---:"] * (len(columns) - left), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0]
