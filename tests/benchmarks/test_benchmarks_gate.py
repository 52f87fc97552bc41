"""The correctness gate: right kernels pass, wrong ones stop every timing of their group."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import cases, ceilings, gate, providers, suite
from benchmarks.measure import Budget
from mos_kernels.backends import eager

CPU = torch.device("cpu")


def setting(**options) -> providers.Setting:
    return providers.Setting(24, 32, 20, torch.float32, CPU, **options)


@pytest.fixture(autouse=True)
def _nothing_checked_yet(monkeypatch):
    monkeypatch.setattr(suite, "_passed", {})


@pytest.mark.parametrize("own_router", [False, True])
@pytest.mark.parametrize("mapping", ["stereographic", "exp_log"])
def test_the_eager_backend_passes(mapping, own_router):
    torch.manual_seed(0)
    assert gate.check_layer(setting(), "eager", mapping, own_router) == []


@pytest.mark.parametrize(
    ("step", "broken"),
    [
        ("expand", lambda y: y * 1.0001),
        ("expand_backward", lambda gradients: (gradients[0] * 1.0001, gradients[1])),
        ("shrink_backward", lambda gradients: (gradients[0], gradients[1] * math.nan, gradients[2])),
    ],
)
def test_a_wrong_step_is_refused_and_nothing_is_timed(step, broken, monkeypatch):
    right = getattr(eager, step)
    monkeypatch.setattr(eager, step, lambda *arguments: broken(right(*arguments)))
    torch.manual_seed(0)
    assert gate.check_layer(setting(), "eager")
    context = suite.Context(CPU, torch.float32, "tiny")
    group = cases.growth(context, "tokens", 24, 32, 20)
    rows = suite.run_group(group, context, ceilings.Ceilings(1.0, 1.0), Budget(60))
    assert {row["status"] for row in rows} == {"failed"} and all("gate" in row["message"] for row in rows)
    assert not any("median_s" in row for row in rows)


def test_the_criterion():
    truth = {"y": torch.tensor([1.0, -2.0], dtype=torch.float64)}

    def off_by(error: float) -> dict:
        return {"y": truth["y"] + error}

    assert gate.disagreements(truth, off_by(2e-3), off_by(1e-3)) == []
    assert gate.disagreements(truth, off_by(2.1e-3), off_by(1e-3))
    assert gate.disagreements(truth, off_by(1.9e-6), off_by(0.0)) == []
    assert gate.disagreements(truth, off_by(math.nan), off_by(1e-3))
