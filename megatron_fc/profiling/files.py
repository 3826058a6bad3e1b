"""Parts and reports as JSON files, written in one step so that nobody reads half of one."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_fc.errors import UserError
from megatron_fc.planning.counts import DeviceCount, DeviceCounts, DeviceKey, NetworkCount, NetworkKey
from megatron_fc.profiling.kinds import KindKey
from megatron_fc.profiling.records import Part, Rank, Report, Run, Span

SCHEMA = 2  # raised when older readers would misread
REPORT = "traffic.json"
_PARTS = "parts"


def write_part(folder: Path, part: Part) -> Path:
    """Write `folder/parts/rank-<number>.json`, over an earlier one."""
    return write_atomically(folder / _PARTS / f"rank-{part.rank.rank:05d}.json", dump_part(part))


def dump_part(part: Part) -> str:
    """A part as text."""
    return _dump("part", run=asdict(part.run), rank=_rank_to_json(part.rank), device=_device_rows(part.device))


def parse_part(text: str, origin: Path | str) -> Part:
    """Undo `dump_part`.

    Raises:
        UserError: the text is none; names its origin.
    """
    content = _parse(text, "part", origin)
    try:
        return Part(Run(**content["run"]), _rank_from_json(content["rank"]), _device_counts(content["device"]))
    except (KeyError, TypeError, ValueError) as error:
        raise _misfit(origin, error) from None


def read_part(file: Path) -> Part:
    """Read a part.

    Raises:
        UserError: as `read_report`.
    """
    return parse_part(_read(file), file)


def read_parts(folder: Path) -> list[Part]:
    """Read the parts in a folder, none if there are none.

    Raises:
        UserError: one is not readable.
    """
    return [read_part(file) for file in sorted((folder / _PARTS).glob("rank-*.json"))]


def clear(folder: Path) -> None:
    """Remove what an earlier run left, so that nothing of it can be taken for this run's."""
    for file in [*(folder / _PARTS).glob("rank-*.json"), *folder.glob(f"{Path(REPORT).stem}.*")]:
        file.unlink()


def write_report(folder: Path, report: Report) -> Path:
    """Write `folder/traffic.json`."""
    text = _dump(
        "report",
        run=asdict(report.run),
        ranks=[_rank_to_json(rank) for rank in report.ranks],
        missing=report.missing,
        device=_device_rows(report.device),
    )
    return write_atomically(folder / REPORT, text)


def read_report(path: Path) -> Report:
    """Read a report.

    Args:
        path: the JSON file, or the folder that holds it.

    Raises:
        UserError: there is none, it is cut off, or another version of megatron_fc wrote it.
    """
    file = report_file(path)
    content = _parse(_read(file), "report", file)
    try:
        ranks = [_rank_from_json(rank) for rank in content["ranks"]]
        return Report(Run(**content["run"]), ranks, list(content["missing"]), _device_counts(content["device"]))
    except (KeyError, TypeError, ValueError) as error:
        raise _misfit(file, error) from None


def report_file(path: Path) -> Path:
    """The JSON file of a report that is given by it or by its folder."""
    return path / REPORT if path.is_dir() or path.suffix != ".json" else path


def write_atomically(file: Path, text: str) -> Path:
    """Put text into a file in one step, its folder included.

    Raises:
        UserError: it cannot be written.
    """
    new = file.with_name(f"{file.name}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text)
        new.replace(file)
    except OSError as error:
        raise UserError(f"{file} cannot be written, {error.strerror}: give another --out") from None
    return file


def _dump(what: str, **content: Any) -> str:
    return json.dumps({"megatron_fc_traffic": what, "schema": SCHEMA, **content}) + "\n"


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError as error:
        raise UserError(
            f"cannot read {file}, {error.strerror}: give the folder or the {REPORT} of a `megatron-fc traffic run`"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is no text: give the {REPORT} of a `megatron-fc traffic run`") from None


def _parse(text: str, what: str, origin: Path | str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{origin} is not whole, {error.msg} at character {error.pos} of {len(text)}: copy it again, or make it "
            f"anew by `megatron-fc traffic merge`"
        ) from None
    if not isinstance(content, dict) or content.get("megatron_fc_traffic") != what:
        raise UserError(f"{origin} is no {what} of `megatron-fc traffic`: give a {REPORT}")
    if (schema := content.get("schema")) != SCHEMA:
        raise UserError(
            f"{origin} has schema {schema}, this megatron_fc reads schema {SCHEMA}: make it anew with this "
            f"version, or read it with the one that wrote it"
        )
    return content


def _misfit(origin: Path | str, error: Exception) -> UserError:
    return UserError(f"{origin} lacks a field or has a wrong one, {error}: make it anew by `megatron-fc traffic run`")


def _rank_to_json(rank: Rank) -> dict[str, Any]:
    return {
        **vars(rank),
        "timeline": [[[span.phase, span.start, span.end] for span in step] for step in rank.timeline],
        "kinds": [[*key, *asdict(count).values()] for key, count in rank.kinds.items()],
        "network": [[*asdict(key).values(), *asdict(count).values()] for key, count in rank.network.items()],
    }


def _rank_from_json(content: dict[str, Any]) -> Rank:
    return Rank(
        **{
            **content,
            "timeline": [[Span(*span) for span in step] for step in content["timeline"]],
            "kinds": {KindKey(*row[:2]): DeviceCount(*row[2:]) for row in content["kinds"]},
            "network": {NetworkKey(*row[:3]): NetworkCount(*row[3:]) for row in content["network"]},
        }
    )


def _device_rows(counts: DeviceCounts) -> list[list[Any]]:
    return [[*asdict(key).values(), *asdict(count).values()] for key, count in counts.items()]


def _device_counts(rows: list[list[Any]]) -> DeviceCounts:
    return {DeviceKey(*row[:3]): DeviceCount(*row[3:]) for row in rows}
