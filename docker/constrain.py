"""Print pip constraints for an image: what its base has stays as it is, the rest is pinned as the project pins it.

Usage: constrain.py PINS ... > constraints.txt

pip then fails where it would otherwise replace a package of the base: NVIDIA's torch, for one, is a build of its own,
and the one of the same number from the index would not fit the Transformer Engine beside it.
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path


def normal(name: str) -> str:
    """A package's name as packaging tools compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main(pins: list[str]) -> None:
    """Print one constraint per line, those of the base first."""
    base = {normal(package.metadata["Name"]): package.version for package in distributions()}
    lines = [f"{name}=={version}" for name, version in sorted(base.items())]
    for pin in pins:
        for line in Path(pin).read_text().splitlines():
            name = line.partition("==")[0]
            if name and not name.startswith("#") and normal(name) not in base:
                lines.append(line)
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
