import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of docs/parallelism.md; rows travel with the reports, so that it works with several workers."""
    reports = terminalreporter.stats.get("passed", [])
    rows = [value for report in reports for name, value in report.user_properties if name == "layout"]
    if rows:
        terminalreporter.write_line("| layout | precision | FC | HC | mHC, mFC | recompute |")
        terminalreporter.write_line("|---|---|---|---|---|---|")
        for row in rows:
            terminalreporter.write_line(row)
