"""Writes a report: `traffic.json` for programs, `traffic.md` for mails, `traffic.html` for reading."""

from collections.abc import Sequence
from pathlib import Path

from megatron_fc.errors import UserError
from megatron_fc.profiling.files import REPORT, read_parts, write_atomically, write_report
from megatron_fc.profiling.records import Report, check_same_but_connections, named, report_of
from megatron_fc.profiling.report.markdown import markdown
from megatron_fc.profiling.report.page import page
from megatron_fc.profiling.report.side_by_side import StreamBytes, side_by_side


def publish(folder: Path, report: Report, against: Sequence[Report] = ()) -> list[Path]:
    """Write a report's three files.

    Args:
        folder: for them.
        report: of the run.
        against: reports of runs with other connections, to stand beside it.

    Raises:
        UserError: the files cannot be written; or the report cannot stand beside one of these, because the run lost
            ranks or differs in more than connections: it has then been written without them.
    """
    try:
        if against:
            report.refuse_lost_ranks("this run, whose report is written without --against,")
        check_same_but_connections([("this run", report.run), *named(against)])
    except UserError:
        _write(folder, report, side_by_side(report))
        raise
    return _write(folder, report, side_by_side(report, against))


def _write(folder: Path, report: Report, streams: Sequence[StreamBytes]) -> list[Path]:
    return [
        write_report(folder, report),
        write_atomically(folder / REPORT.replace(".json", ".md"), markdown(report, streams)),
        write_atomically(folder / REPORT.replace(".json", ".html"), page(report, streams)),
    ]


def merge(folder: Path) -> Report:
    """Make the report of the parts in a folder, as after a run that broke off.

    Raises:
        UserError: there are none, one is not readable, or they are of several runs.
    """
    parts = read_parts(folder)
    if not parts:
        raise UserError(f"{folder}/parts holds no part of a rank: give the --out of a `megatron-fc traffic run`")
    for part in parts:
        if part.run.date != parts[0].run.date:  # the first rank's, of the run's start
            raise UserError(
                f"{folder}/parts holds parts of several runs, of {parts[0].run.date} and {part.run.date}: remove one's"
            )
    return report_of(parts)
