"""Fail the build of an image in which a package is missing, broken, or not the one that the base came with.

Usage: check.py CONSTRAINTS NAME ...

A name is imported. One that ends in `?` is only looked for: Transformer Engine and Apex load the GPU driver, which is
not there while an image is built.
"""

import importlib
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.specifiers import SpecifierSet


def main(constraints: str, names: list[str]) -> None:
    """Check all names and all installed versions, then print the names."""
    # First, as importing setuptools adds its own copies of packages to what can be found.
    for line in Path(constraints).read_text().splitlines():
        package, _, wanted = line.partition("==")
        try:
            found = version(package)
        except PackageNotFoundError:
            continue  # a pin of something that nothing here needs
        if not SpecifierSet(f"=={wanted}").contains(found, prereleases=True):
            sys.exit(f"check: {package} is {found}, not {wanted} as constrained")
    for name in names:
        if name.endswith("?"):
            if importlib.util.find_spec(name[:-1]) is None:
                sys.exit(f"check: {name[:-1]} is not in this image: is BASE one of NVIDIA's PyTorch images?")
        else:
            importlib.import_module(name)
    print("check: all there:", " ".join(names))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
