"""Collects a text corpus from what is installed on every machine that can run this project.

Documents are named by their path below a named root, never by where the root lies, so two machines with
the same Python and the same packages get the same corpus, wherever their virtual environment is.
"""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path

TEXT_SUFFIXES = frozenset({".py", ".rst", ".md", ".txt"})
MIN_BYTES = 256
# Longer files are almost always generated tables, and one of them would dominate a small corpus.
MAX_BYTES = 200_000

# Libraries and their prose, not their test suites (repetitive, and left out by many distributors), nor
# code tables and what pip has installed next to the standard library.
SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "lib2to3",
        "licenses",
        "pydoc_data",
        "site-packages",
        "test",
        "testing",
        "tests",
    }
)
# Licences repeat; the next are written at build time and hold paths of that machine; the last are tables.
SKIPPED_PREFIXES = (
    *("license", "copying", "notice"),
    *("_sysconfigdata", "python-config", "__config__"),
    *("entities.py", "stringprep.py"),
)

# (distribution, folder below site-packages). Each is installed with megatron-fc itself, directly or by torch.
PACKAGE_FOLDERS = (
    ("megatron-core", "megatron/core/datasets"),
    ("megatron-core", "megatron/core/distributed"),
    ("megatron-core", "megatron/core/models"),
    ("megatron-core", "megatron/core/optimizer"),
    ("megatron-core", "megatron/core/pipeline_parallel"),
    ("megatron-core", "megatron/core/tensor_parallel"),
    ("megatron-core", "megatron/core/transformer"),
    ("networkx", "networkx"),
    ("numpy", "numpy"),
    ("torch", "torch/autograd"),
    ("torch", "torch/distributions"),
    ("torch", "torch/nn"),
    ("torch", "torch/optim"),
)

# Distributions whose long description (the README on the package index) is taken; not torch's and
# transformers', whose lists of installed files are so long that a reuse would mostly wait for them.
DESCRIBED_PACKAGES = (
    "filelock",
    "fsspec",
    "huggingface-hub",
    "jinja2",
    "markdown-it-py",
    "matplotlib",
    "megatron-core",
    "mpmath",
    "networkx",
    "numpy",
    "packaging",
    "pillow",
    "pygments",
    "regex",
    "rich",
    "safetensors",
    "sympy",
    "tensorboard",
    "tokenizers",
    "tqdm",
    "triton",
    "typing-extensions",
)


@dataclass(frozen=True)
class Root:
    """A folder of text files. `name` prefixes its documents' names, `version` says which edition it is."""

    name: str
    folder: Path
    version: str = ""


@dataclass(frozen=True)
class Document:
    """One file: its name (root and path below it, with slashes) and its text."""

    name: str
    text: str


def installed_roots() -> tuple[Root, ...]:
    """The standard library and those of the fixed list of packages that are installed here."""
    roots = [Root("python", Path(sysconfig.get_path("stdlib")), platform.python_version())]
    for package, folder in PACKAGE_FOLDERS:
        for distribution in _installed(package):
            location = Path(str(distribution.locate_file(folder)))
            if location.is_dir():  # not so where the package is an editable install
                roots.append(Root(folder, location, distribution.version))
    for package in DESCRIBED_PACKAGES:
        for distribution in _installed(package):
            for file in distribution.files or ():
                if file.name == "METADATA":
                    location = Path(str(file.locate())).parent
                    roots.append(Root(f"{package}-description", location, distribution.version))
    return tuple(roots)


def collect(roots: Iterable[Root]) -> list[Document]:
    """Every usable document below `roots`, ordered by name.

    Left out: files that are not UTF-8, shorter than MIN_BYTES or longer than MAX_BYTES, and files whose
    text an earlier document already has. Line ends become a single newline.
    """
    documents: list[Document] = []
    seen: set[bytes] = set()
    for name, path in sorted(_files(roots)):
        text = _read(path)
        if text is None:
            continue
        digest = sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            documents.append(Document(name, text))
    return documents


def is_validation(document: Document, fraction: float) -> bool:
    """Whether the document belongs to the validation split: decided by its name alone.

    So a document never changes sides when others are added or removed.
    """
    return _name_hash(document) < fraction * 2**64


def sample(documents: Iterable[Document], max_bytes: int) -> list[Document]:
    """A mix of documents from every root, at most `max_bytes` of UTF-8 in all and at least one document."""
    chosen: list[Document] = []
    size = 0
    for document in sorted(documents, key=_name_hash):
        size += len(document.text.encode())
        if chosen and size > max_bytes:
            break
        chosen.append(document)
    return chosen


def _installed(package: str) -> Iterator[metadata.Distribution]:
    try:
        yield metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return


def _files(roots: Iterable[Root]) -> Iterator[tuple[str, Path]]:
    for root in roots:
        for folder, subfolders, files in root.folder.walk():
            subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
            for file in files:
                path = folder / file
                if _is_text(path):
                    yield f"{root.name}/{path.relative_to(root.folder).as_posix()}", path


def _is_text(path: Path) -> bool:
    if path.name.lower().startswith(SKIPPED_PREFIXES):
        return False
    return path.suffix in TEXT_SUFFIXES or path.name == "METADATA"


def _read(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if path.name == "METADATA":
        # The header is a list of fields, often with a whole licence; the description follows it.
        text = text.partition("\n\n")[2]
    return text if MIN_BYTES <= len(text.encode()) <= MAX_BYTES else None


def _name_hash(document: Document) -> int:
    # surrogateescape: a file name need not be UTF-8 even where its text is.
    return int.from_bytes(sha256(document.name.encode("utf-8", "surrogateescape")).digest()[:8])
