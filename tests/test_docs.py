"""The names that texts for readers use: files, modules, commands and their options exist."""

import argparse
import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from megatron_fc.cli import COMMANDS
from megatron_fc.connections.kinds import from_label

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_fc"
PROSE = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("*/*.md")), *sorted(ROOT.glob("docs/*/*.md"))]
# Their comments name commands, too.
SCRIPTS = [ROOT / "Makefile", *sorted(ROOT.glob("configs/*.yaml")), *sorted(ROOT.glob("launch/*.sh"))]
SOURCES = [file for folder in (PACKAGE, ROOT / "benchmarks", ROOT / "scripts") for file in sorted(folder.rglob("*.py"))]
FOLDERS = "tests|examples|megatron_fc|configs|launch|benchmarks|docs|docker|scripts"

# What users and `make gpu-check` write, and scripts of Megatron's repository, which its wheel lacks.
THEIR_SCRIPTS = {"preprocess_data.py", "pretrain_gpt.py", "pretrain_hybrid.py", "pretrain_vlm.py", "train_rl.py"}
NOT_HERE = {"launch/site.sh", "benchmarks/results/fp8", *THEIR_SCRIPTS}
# An image, and what the changelog says of earlier releases.
NO_MODULES = {"megatron_fc.sqsh", "megatron_fc.megatron.arguments", "megatron_fc.megatron.order", "megatron_fc.traffic"}


def found(pattern: str, texts: list[Path]) -> Iterator[tuple[Path, str]]:
    """Each match in each of the texts once, with the text."""
    for text in texts:
        for match in sorted(set(re.findall(pattern, text.read_text(), re.MULTILINE))):
            yield text, match


def test_paths_exist() -> None:
    """Paths from the repository's folder. A `*` stands for some, a folder may end in `/`, a file without its suffix."""
    words = found(rf"(?<![\w./$}}-])(?:{FOLDERS})/[\w./*-]*", [*PROSE, *SCRIPTS, *SOURCES])
    paths = [(text, path) for text, word in words if (path := word.rstrip("./")) not in NOT_HERE]
    lost = [(text, path) for text, path in paths if not (ROOT / path).exists()]
    assert not [(text, path) for text, path in lost if not any(ROOT.glob(path)) and not any(ROOT.glob(f"{path}.*"))]


def test_python_files_exist() -> None:
    """`x.py` or `folder/x.py`: from the root, the package or the text's folder, a test, or else one of Megatron's."""
    megatron = find_spec("megatron.core")
    assert megatron is not None
    assert megatron.submodule_search_locations is not None
    theirs = [str(file) for folder in megatron.submodule_search_locations for file in Path(folder).rglob("*.py")]
    tests = [str(file) for file in (ROOT / "tests").rglob("test_*.py")]
    lost = [
        (text, file)
        for text, file in found(r"`([\w/]+\.py)`", PROSE)
        if file not in NOT_HERE
        and not any((folder / file).exists() for folder in (ROOT, PACKAGE, text.parent))
        and not any(known.endswith(f"/{file}") for known in [*tests, *theirs])
    ]
    assert not lost


def test_links_lead_somewhere() -> None:
    links = [(text, target) for text, target in found(r"\]\(([^)#]+)", PROSE) if "://" not in target]
    assert not [(text, target) for text, target in links if not (text.parent / target).exists()]


@cache
def names_of(module: str) -> set[str] | None:
    """What the text of a module defines at its top; None where there is no such module."""
    path = ROOT / module.replace(".", "/")
    files = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()]
    if not files:
        return None
    names: set[str] = set()
    for node in ast.parse(files[0].read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign) and isinstance(name := node.targets[0], ast.Name):
            # Some of `__all__` is loaded when it is used.
            names |= set(ast.literal_eval(node.value)) if name.id == "__all__" else {name.id}
    return names


def exists(name: str) -> bool:
    """Whether it is a module, or what a module defines."""
    module, _, attribute = name.rpartition(".")
    if module == "megatron_fc.megatron.specs" and is_spec(attribute):
        return True
    return names_of(name) is not None or attribute in (names_of(module) or ())


def is_spec(name: str) -> bool:
    """Whether it is what that module makes when it is asked for it: a label, with or without a prefix."""
    label = name.removeprefix("layer_").removeprefix("hybrid_")
    return label == "from_args" or from_label(label) is not None


def test_modules_exist() -> None:
    texts = [*PROSE, *SCRIPTS]
    names = list(found(r"(?<![\w./])megatron_fc(?:\.\w+)+", texts))
    for text, (module, words) in found(r"from (megatron_fc[\w.]*) import ([\w, ]+)", texts):
        names += [(text, f"{module}.{word.strip()}") for word in words.split(",")]
    names += [(text, ".".join(words)) for text, words in found(r"--spec (megatron_fc[\w.]+) (\w+)", texts)]
    assert not [(text, name) for text, name in names if name not in NO_MODULES and not exists(name)]
    assert exists("megatron_fc.megatron.specs.hybrid_dfc_x4")
    assert not exists("megatron_fc.megatron.specs.nothing")
    assert not exists("megatron_fc.nothing.specs")


@cache
def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command by its words: `train`, `traffic run`."""

    def below(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for word, one in action.choices.items():
                    yield word, one
                    yield from ((f"{word} {more}", another) for more, another in below(one))

    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for command in COMMANDS:
        command.add(commands)
    return dict(below(parser))


def command_lines(text: Path) -> list[str]:
    """The words behind `megatron-fc` or `-m megatron_fc`, up to the end of the line or code, or before a comment."""
    joined = re.sub(r"\\\n#? *", "", text.read_text())
    lines = re.findall(r"(?:megatron-fc|-m megatron_fc(?:\.mpi)?) ([a-z][^`\n#]*)", joined)
    return [line.partition(" -- ")[0] for line in lines]  # behind it are Megatron's


def test_commands_and_options_exist() -> None:
    wrong = []
    lines = [(text, line) for text in [*PROSE, *SCRIPTS] for line in command_lines(text)]
    for text, line in lines:
        words = line.split()
        if words[0] == "lm-eval":  # its options are the harness's
            continue
        parser = parsers().get(" ".join(words[:2])) or parsers().get(words[0])
        known = parser._option_string_actions if parser else {}
        wrong += [(text, line, option) for option in re.findall(r"(?<!\S)\[?(--[a-z-]+)", line) if option not in known]
        if parser is None:
            wrong.append((text, line, words[0]))
    assert not wrong


def test_every_command_is_described() -> None:
    said = {line.split()[0] for text in PROSE for line in command_lines(text)}
    assert {name for name in parsers() if " " not in name} - said <= {"demo"}  # which is `make demo`


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert not [(text, name) for text, name in found(r"(?:`|^ {4})make ([a-z-]+)", PROSE) if name not in targets]
