"""The demo with a language model, on a tiny one: it runs through, and its problems are solved by their equations."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from finetune_setup import save_llama

from benchmarks.study.decoder.problems import solves

DEMO = Path(__file__).parents[2] / "demo"
sys.path.insert(0, str(DEMO))
_spec = importlib.util.spec_from_file_location("demo_lm", DEMO / "demo_lm.py")
demo_lm = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(demo_lm)


def test_every_problem_has_its_equation_and_another_text():
    problems = demo_lm.make(300, seed=0)
    assert all(solves(problem.equation, problem.answer) for problem in problems)
    assert all(problem.answer == int(problem.answer) > 0 for problem in problems)
    assert len({problem.text for problem in problems}) == 300 and problems == demo_lm.make(300, seed=0)
    assert not {p.text for p in problems} & {p.text for p in demo_lm.make(40, seed=1)}


def test_a_folder_of_something_else_and_no_problems_are_refused(tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    for arguments, message in ((["--output", str(tmp_path)], "holds adapter, of no earlier demo: name another"),
                               (["--problems", "0"], "--problems 0 must be at least 1")):  # fmt: skip
        with pytest.raises(SystemExit):
            demo_lm.main(arguments)
        assert message in capsys.readouterr().err and (tmp_path / "adapter").is_dir()


def test_it_runs_through(tmp_path, capsys):
    save_llama(tmp_path / "llama")
    arguments = ["--model", str(tmp_path / "llama"), "--output", str(tmp_path / "out"), "--problems", "48"]
    assert demo_lm.main(arguments) == 0
    printed = capsys.readouterr().out
    wanted = (
        "before: ",
        "trainable params",
        "step 3 of 3: loss",
        "after, with the mixture: ",
        "exported as a plain LoRA",
        "KL",
    )
    assert "grad_norm" not in printed
    for text in (*wanted, "the merged model: ", "writes the same equation in"):
        assert text in printed, text
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"adapter", "lora", "merged"}
