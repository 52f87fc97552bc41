"""The rules of everyday.py: which tests run every day, and what fails a run that costs too much."""

from __future__ import annotations

from pathlib import Path

import pytest
from everyday import covering

pytest_plugins = "pytester"

EXAMPLES = """
import subprocess, sys, time
import pytest

def work(seconds):
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass

@pytest.mark.parametrize("damage", ["a", "b", "c"])
@pytest.mark.parametrize("door", ["d", "e", "f"])
@pytest.mark.one_at_a_time("door", "damage")
def test_crossed(door, damage): pass

@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "bert"])
def test_family(family): pass

@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma", "bert", "gpt2"])
def test_of_families(family): pass

@pytest.mark.parametrize("family", ["qwen2", "gemma"])
def test_without_a_llama(family): pass

@pytest.mark.full
def test_long(): work(0.25)

def test_sleeping(): time.sleep(0.3)

def test_too_long(): work(0.25)

@pytest.mark.budget(60)
def test_allowed(): work(0.25)

def test_child():
    subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.25: pass"], check=True)
"""


@pytest.fixture
def run(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    pytester.makepyfile(test_examples=EXAMPLES)
    pytester.makefile(".ini", pytest="[pytest]\nmarkers =\n    full\n    one_at_a_time\n    budget")
    return lambda *options: pytester.runpytest_subprocess("-q", "-p", "everyday", "-p", "no:hypothesispytest", *options)


def names(outcome) -> list[str]:
    return [line.partition("::")[2] for line in outcome.outlines if "::" in line]


def test_what_is_left_for_the_full_run(run):
    left_out = {name for name in names(run("--collect-only", "-m", "full"))}
    assert left_out == {
        "test_crossed[e-b]", "test_crossed[e-c]", "test_crossed[f-b]", "test_crossed[f-c]",
        "test_family[qwen2]", "test_family[gemma]", "test_long",
    }  # fmt: skip


@pytest.mark.budget(6)  # three processes of Python
def test_a_test_over_the_budget_fails_the_run(run):
    over = run("--budget", "0.2", "-n", "2")
    over.assert_outcomes(passed=26)
    assert over.ret == pytest.ExitCode.TESTS_FAILED
    assert sorted(name.partition(":")[0] for name in names(over)) == ["test_child", "test_too_long"]


@pytest.mark.parametrize("options", [("--budget", "30"), ("-k", "too_long")], ids=["within", "without a budget"])
def test_other_runs_do_not_fail(run, options):
    assert run(*options).ret == pytest.ExitCode.OK


def test_few_candidates_cover_all_kinds():
    kinds = {0: {"a"}, 1: {"a", "b"}, 2: {"c"}, 3: {"b", "c"}}
    assert covering(kinds, kinds.get) == [1, 2]
    assert covering(kinds, kinds.get, cost=lambda candidate: 9 if candidate == 1 else 1) == [0, 3]
    assert covering([], kinds.get) == []
