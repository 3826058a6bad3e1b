"""Answers of a model to requests, kept in a file that outlives a killed process: no request is asked twice.

A line of JSON each, behind one line that says which model they are of. A round's answers are written as soon as it is
over; a line that was cut off is dropped.
"""

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_fc.errors import UserError


def key_of(*request: Any) -> str:
    """A request's name: a digest of what is asked."""
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:32]


def refuse_other(path: Path, there: dict[str, Any], model: dict[str, Any]) -> None:
    """Check that a file is of a model.

    Args:
        path: of the file.
        there: the facts that it has.
        model: facts that name the model and whatever else its answers depend on.

    Raises:
        UserError: the file is of another one.
    """
    for name, value in model.items():
        if there.get(name) != value:
            raise UserError(
                f"{path} is of another model, {name}: {there.get(name)} there, {value} here: give another --out"
            )


class Answers:
    """Answers by key, on disk unless `path` is None.

    Args:
        path: of the file; made where it is missing.
        model: facts that name the model and whatever else its answers depend on.

    Raises:
        UserError: the file is of another model, damaged or cannot be written, or another evaluation writes it.
    """

    def __init__(self, path: Path | None, model: dict[str, Any]) -> None:
        self._found: dict[str, Any] = {}
        self._file = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise UserError(f"{path} cannot be written, {error.strerror}: give another --out") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"another evaluation writes {path}: wait for it, or give another --out") from None
        self._read(path, model)

    def _read(self, path: Path, model: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.seek(0)
        try:
            text = self._file.read()
            whole = text[: text.rfind("\n") + 1]
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:  # of JSON or UTF-8
            raise UserError(f"{path} is damaged, {error}: delete it, and what it had is run again") from error
        if whole != text:
            self._file.truncate(len(whole.encode()))
        if not lines:
            self._write([model])
        else:
            refuse_other(path, lines[0], model)
        self._found = {line["key"]: line["answer"] for line in lines[1:]}

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        assert self._file is not None
        self._file.write("".join(f"{json.dumps(line)}\n" for line in lines))
        self._file.flush()

    def ask(
        self,
        keys: Sequence[str],
        run: Callable[[list[int]], Iterator[list[tuple[int, Any]]]],
        report: Callable[[int, Any], None],
    ) -> list[Any]:
        """Return the answers to requests, of which each is run once at most.

        Args:
            keys: of the requests; equal ones are the same request.
            run: given the numbers of requests, yields rounds of pairs: a place among these numbers, and the answer,
                which JSON can hold.
            report: told the number and the answer of every request, as soon as it is there.
        """
        places: dict[str, list[int]] = {}
        for number, key in enumerate(keys):
            places.setdefault(key, []).append(number)
        missing = [numbers[0] for key, numbers in places.items() if key not in self._found]
        for key, numbers in places.items():
            if key in self._found:
                for number in numbers:
                    report(number, self._found[key])
        for found in run(missing) if missing else ():
            new = {keys[missing[place]]: answer for place, answer in found}
            if self._file is not None:
                self._write([{"key": key, "answer": answer} for key, answer in new.items()])
            self._found |= new
            for key, answer in new.items():
                for number in places[key]:
                    report(number, answer)
        return [self._found[key] for key in keys]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
