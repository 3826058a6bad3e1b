"""What the texts for readers print in blocks: commands, their output, Python.

The texts are README.md, those of docs/, and the comments at the top of configs/*.yaml and launch/*.sh. A chunk is the
lines of an indented block up to an empty one.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PROSE = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_COMMENTED = [*sorted((ROOT / "configs").glob("*.yaml")), *sorted((ROOT / "launch").glob("*.sh"))]
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _indented(text: str, start: str) -> list[list[str]]:
    """Chunks of lines that begin so; a line of another kind, or one with nothing behind `start`, is between two."""
    chunks: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith(start) and line.strip("# "):
            chunks[-1].append(line.removeprefix(start))
        elif chunks[-1]:
            chunks.append([])
    return [chunk for chunk in chunks if chunk]


def chunks() -> dict[str, list[list[str]]]:
    """Those of every text, by its path from the root."""
    found = {_name(path): _indented(_FENCED.sub("", path.read_text()), "    ") for path in _PROSE}
    for path in _COMMENTED:
        comments = re.match(r"(?:#.*\n|\n)*", path.read_text())
        assert comments is not None
        without_lists = re.sub(r"^# - .*\n(?:#   .*\n)*", "", comments[0], flags=re.MULTILINE)
        found[_name(path)] = _indented(without_lists, "#   ")
    return {name: of_page for name, of_page in found.items() if of_page}


def commands(chunk: list[str]) -> list[str]:
    """Its lines as commands: continued lines in one, and without what is said of them behind two spaces."""
    lines = re.sub(r" *\\\n *", " ", "\n".join(chunk)).splitlines()
    return [command for line in lines if (command := re.split(" {2,}", line.strip())[0]) and command[0] != "#"]


def snippets(language: str = "python") -> dict[str, list[str]]:
    """The fenced blocks of a language, of every text that has some."""
    found = {_name(path): _FENCED.findall(path.read_text()) for path in _PROSE}
    assert {name for blocks in found.values() for name, _ in blocks} <= {"python", "yaml"}, "what is it?"
    chosen = {name: [code for of, code in blocks if of == language] for name, blocks in found.items()}
    return {name: blocks for name, blocks in chosen.items() if blocks}


def first_missing(shown: list[str], printed: str) -> str | None:
    """The first of the lines that was not printed behind the one before it.

    Others may be between them, lines may break elsewhere, and `...` stands for anything.
    """
    text, place = " ".join(printed.split()), 0
    for line in shown:
        parts = re.split(r"\.\.\.(?: \(as above\))?", " ".join(line.split()))
        found = re.compile(rf"(?<!\S){'.*?'.join(map(re.escape, parts))}(?!\S)").search(text, place)
        if found is None:
            return line
        place = found.end()
    return None
