"""The correctness gate: right kernels pass, wrong ones stop every timing of their group."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import cases, ceilings, gate, providers, suite, swiglu
from benchmarks.cases.linear import checks_of
from benchmarks.measure import Budget
from mos_kernels.backends import eager, eager_few

CPU = torch.device("cpu")


def setting(**options) -> providers.Setting:
    return providers.Setting(24, 32, 20, torch.float32, CPU, **options)


@pytest.fixture(autouse=True)
def _nothing_checked_yet(monkeypatch):
    monkeypatch.setattr(suite, "_found", {})


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
def test_a_wrong_step_is_refused_and_only_what_does_not_use_it_is_timed(step, broken, monkeypatch):
    right = getattr(eager, step)
    monkeypatch.setattr(eager, step, lambda *arguments: broken(right(*arguments)))
    torch.manual_seed(0)
    assert gate.check_layer(setting(), "eager")
    context = suite.Context(CPU, torch.float32, "tiny")
    group = cases.growth(context, "tokens", 24, 32, 20)
    rows = suite.run_group(group, context, ceilings.Ceilings(1.0, 1.0), Budget(60))
    ours, others = ([row for row in rows if row["provider"].startswith("MoS") is mine] for mine in (True, False))
    assert ours and others and all("median_s" in row for row in others)
    for row in ours:
        assert row["status"] == "failed" and row["message"].startswith("gate: eager, stereographic: ")
        assert "median_s" not in row


def test_an_ffn_that_decodes_wrongly_is_not_timed(monkeypatch):
    """Not even where each of its linears is right."""
    torch.manual_seed(0)
    assert gate.check_decoding(setting(), providers.EAGER) == []
    monkeypatch.setattr(eager_few, "route", lambda *arguments, right=eager_few.route: right(*arguments) * 1.001)
    assert gate.check_decoding(setting(), providers.EAGER)
    context = suite.Context(CPU, torch.float32, "tiny")
    rows = suite.run_group(cases.decode(context, 24, 32, 3), context, ceilings.Ceilings(1.0, 1.0), Budget(60))
    (ours,) = [row for row in rows if row["provider"] == providers.EAGER]
    assert ours["message"].startswith("gate: MoS eager, decoding: y of an FFN is off by")
    assert all("median_s" in row for row in rows if row is not ours)


@pytest.mark.parametrize(
    "provider", [providers.EAGER, providers.EAGER_APART, providers.SWIGLU, providers.LORA_MLP], ids=str
)
def test_an_ffn_that_computes_wrongly_is_refused(provider, monkeypatch):
    torch.manual_seed(0)
    assert gate.check_ffn(setting(), provider) == []
    backward = swiglu.backward
    monkeypatch.setattr(swiglu, "backward", lambda *args, **kw: tuple(t * 1.001 for t in backward(*args, **kw)))
    monkeypatch.setattr(eager, "shrink_backward", lambda *args, right=eager.shrink_backward: _off(right(*args)))
    assert gate.check_ffn(setting(), provider)


def _off(gradients: tuple) -> tuple:
    return gradients[0] * 1.001, *gradients[1:]


def test_each_check_is_made_once_but_for_one_that_raises():
    calls = []

    def check(key: str, *found: str) -> suite.Check:
        def run() -> list[str]:
            calls.append(key)
            if not found:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return [f for f in found if f]

        return suite.Check(key, key, run)

    right, wrong, raises = check("right", ""), check("wrong", "y is off", "dA is off"), check("raises")
    for _ in range(2):
        assert suite.verdict([]).status == suite.verdict([right]).status == "ok"
        assert suite.verdict([right, wrong]) == ("failed", "gate: wrong: y is off; wrong: dA is off")
        assert suite.verdict([right, raises, wrong]) == ("out of memory", "gate: raises: CUDA out of memory")
    assert calls == ["right", "wrong", "raises", "raises"]


def test_what_a_provider_of_ours_is_held_to():
    found = {name: [c.name for c in checks_of(setting(), p.ours)] for name, p in providers.LAYERS.items()}
    assert found[providers.TRITON_OWN] == ["eager, stereographic, own router", "triton, stereographic, own router"]
    assert found[providers.EXP_LOG_EAGER] == ["eager, exp_log"] and found[providers.EAGER_COMPILED]
    assert not found[providers.FROZEN] and not found[providers.PEFT_8] and not found[providers.PRINTED]


def test_the_criterion():
    truth = {"y": torch.tensor([1.0, -2.0], dtype=torch.float64)}

    def off_by(error: float) -> dict:
        return {"y": truth["y"] + error}

    assert gate.disagreements(truth, off_by(2e-3), off_by(1e-3)) == []
    assert gate.disagreements(truth, off_by(2.1e-3), off_by(1e-3))
    assert gate.disagreements(truth, off_by(1.9e-6), off_by(0.0)) == []
    assert gate.disagreements(truth, off_by(math.nan), off_by(1e-3))
