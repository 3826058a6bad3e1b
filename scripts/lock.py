#!/usr/bin/env python3
"""Write constraints.txt: the newest versions that go with the three that are pinned here by hand.

And docker/extras.txt: what the extras of the GPU image need besides.
"""

import json
import subprocess
import sys
from pathlib import Path

PINNED = ["torch==2.11.0", "triton==3.6.0", "megatron-core==0.19.2"]
HEADER = "# Every version of a fresh install, for Python 3.12 on Linux. Written by `make lock`; do not edit."


EXTRAS_HEADER = "# What the extras modelopt and mpi add to constraints.txt. Written by `make lock`; do not edit."


def main() -> None:
    locked = resolved(".[dev]", *PINNED)
    write("constraints.txt", HEADER, locked)
    of_image = resolved(".[train,data,eval,modelopt,mpi]", "-c", "constraints.txt")
    write("docker/extras.txt", EXTRAS_HEADER, of_image - locked)


def resolved(project: str, *arguments: str) -> set[str]:
    """Return the packages that a fresh machine would install, whatever was installed into this environment by hand."""
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed", "--report", "-"]
    report = subprocess.run([*pip, "-e", project, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    packages = [item["metadata"] for item in json.loads(report.stdout)["install"]]
    return {f"{package['name']}=={package['version']}" for package in packages if package["name"] != "megatron_fc"}


def write(path: str, header: str, packages: set[str]) -> None:
    Path(path).write_text("\n".join([header, *sorted(packages, key=str.lower)]) + "\n")


if __name__ == "__main__":
    main()
