#!/usr/bin/env python3
"""Write constraints.txt: the newest versions that go with the three that are pinned here by hand."""

import json
import subprocess
import sys
from pathlib import Path

PINNED = ["torch==2.11.0", "triton==3.6.0", "megatron-core==0.19.2"]
HEADER = "# Every version of a fresh install, for Python 3.12 on Linux. Written by `make lock`; do not edit."


def main() -> None:
    # A dry run resolves as a fresh machine would, whatever else was installed into this environment by hand.
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed"]
    resolved = subprocess.run(
        [*pip, "--report", "-", "-e", ".[dev]", *PINNED], check=True, stdout=subprocess.PIPE, text=True
    )
    packages = [item["metadata"] for item in json.loads(resolved.stdout)["install"]]
    lines = [f"{package['name']}=={package['version']}" for package in packages]
    lines = sorted((line for line in lines if not line.startswith("megatron_fc==")), key=str.lower)
    Path("constraints.txt").write_text("\n".join([HEADER, *lines]) + "\n")


if __name__ == "__main__":
    main()
