"""Which tests run every day, which only in full, and what an everyday test may cost. tests/README.md says it in words.

Hooks of conftest.py, and `covering`, which chooses seeds.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Hashable, Iterable, Sequence

import pytest

LIKE_LLAMA = {"qwen2", "gemma"}
"""Families that differ from Llama in numbers alone: a test that runs with Llama too leaves them to the full run."""
MANY = 6
"""So many families in a test's parameter make it a test of the families: it runs with each of them every day."""


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "fail the run where a test takes more seconds of processor time, its own and its child processes'"
    parser.addoption("--budget", type=float, metavar="SECONDS", help=text)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("budget") is not None:
        config.pluginmanager.register(Budget(config))


@pytest.hookimpl(tryfirst=True)  # before -m chooses by the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases = collections.defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for group in cases.values():
        columns = {name: {_text(item, name) for item in group} for name in group[0].callspec.params}
        families = [name for name, values in columns.items() if "llama" in values and len(values) < MANY]
        first = group[0].callspec.params
        for item in group:
            crossed = [name for mark in item.iter_markers("one_at_a_time") for name in mark.args]
            changed = sum(item.callspec.params[name] is not first[name] for name in crossed)
            if changed > 1 or any(_text(item, name) in LIKE_LLAMA for name in families):
                item.add_marker(pytest.mark.full)


def _text(item: pytest.Item, parameter: str) -> str | None:
    value = item.callspec.params.get(parameter)
    return value if isinstance(value, str) else None


def covering(
    candidates: Iterable, kinds: Callable[..., set[Hashable]], cost: Callable[..., float] = lambda candidate: 1.0
) -> list:
    """Few of the candidates that reach each kind that any of them reaches: in turn, what adds most for its cost."""
    left = {candidate: kinds(candidate) for candidate in candidates}
    missing, chosen = set().union(*left.values()), []
    while missing:
        best = max(left, key=lambda candidate: len(left[candidate] & missing) / cost(candidate))
        missing -= left.pop(best)
        chosen.append(best)
    return sorted(chosen)


def full_but(everyday: Sequence, values: Iterable) -> list:
    """The values for `parametrize`, a tuple for several parameters; those that are not everyday's are marked full."""

    def marked(value):
        return pytest.param(*value if isinstance(value, tuple) else (value,), marks=pytest.mark.full)

    return [value if value in everyday else marked(value) for value in values]


class Budget:
    """Processor time, since a busy machine lengthens only the time on the clock."""

    def __init__(self, config: pytest.Config):
        self.seconds = config.getoption("budget")
        self.over: list[str] = []
        self.reports_elsewhere = hasattr(config, "workerinput")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item):
        before = _processor_seconds()
        result = yield
        taken, mark = _processor_seconds() - before, item.get_closest_marker("budget")
        allowed = mark.args[0] if mark else self.seconds
        if taken > allowed and not item.get_closest_marker("full"):
            item.user_properties.append(("over budget", f"{item.nodeid}: {taken:.1f} s of {allowed:g} s"))
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.over += [text for name, text in report.user_properties if name == "over budget"]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.over and not self.reports_elsewhere and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.over:
            terminalreporter.section("over the everyday budget of processor time", red=True)
            terminalreporter.write_line("Make them cheaper, or mark them `full` or `budget`: tests/README.md.")
            for line in self.over:
                terminalreporter.write_line(line)


def _processor_seconds() -> float:
    """Of this process and of the child processes that it has waited for."""
    return sum(os.times()[:4])
