"""Where the time of a run of the tests went: its slowest tests and its folders, at the end of what pytest prints."""

from collections import Counter

import pytest

SLOWEST = 20


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--times", action="store_true", help=f"print the {SLOWEST} slowest tests and the time per folder")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Seconds of a test include those of fixtures that it was the first to need, and of workers that ran beside it."""
    if not config.option.times:
        return
    tests: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                tests[report.nodeid] += report.duration
    folders: Counter[str] = Counter()
    number: Counter[str] = Counter()
    for test, seconds in tests.items():
        folder = test.partition("::")[0].rpartition("/")[0]
        folders[folder] += seconds
        number[folder] += 1
    terminalreporter.section(f"slowest {SLOWEST} of {len(tests):,} tests")
    for test, seconds in tests.most_common(SLOWEST):
        terminalreporter.write_line(f"{seconds:7.1f} s  {test}")
    terminalreporter.section("time per folder")
    total = folders.total() or 1.0
    for folder, seconds in folders.most_common():
        terminalreporter.write_line(f"{seconds:7.1f} s {seconds / total:4.0%}  {folder}, {number[folder]:,} tests")
