"""The suite itself: every group runs at tiny sizes, trouble of one provider is its own, time is kept."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import cases, maps, measure, providers, qwen2, suite
from benchmarks.ceilings import Ceilings
from benchmarks.measure import Budget, LeftOut
from reference.per_expert import mos_linear_per_expert

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CONTEXT = suite.Context(CPU, torch.float32, "tiny")
TOP = Ceilings(1e9, 1e9)


@pytest.mark.full
def test_everything_runs_at_tiny_sizes(tmp_path):
    """Every provider of every group, the Triton backend in the interpreter: none fails, none is left out."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks", "run", "--device", "cpu", "--tiny", "--results", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    ours = providers.TRITON, providers.TRITON_APART, providers.EXP_LOG_TRITON, "stereographic, our Triton"
    for name in (*ours, "expand backward"):
        assert name in run.stdout
    missing = [name for name in ("peft", "geoopt") if importlib.util.find_spec(name) is None]
    assert missing or "left out" not in run.stdout
    assert not list(tmp_path.iterdir())  # tiny rows are not kept


def group(**variants) -> suite.Group:
    return suite.Group("layer", "forward", {"tokens": 1}, {n: suite.Variant(v) for n, v in variants.items()}, "good")


def made(call) -> suite.Made:
    return suite.Made(call)


def test_one_providers_trouble_is_its_own():
    def raises(error: Exception):
        def make():
            raise error

        return make

    rows = suite.run_group(
        group(
            good=lambda: made(lambda: None), broken=raises(RuntimeError("wrong\nsecond line")),
            large=raises(torch.OutOfMemoryError("CUDA out of memory")), absent=raises(ModuleNotFoundError("no peft")),
            elsewhere=raises(LeftOut("no GPU")),
        ),
        CONTEXT, TOP, Budget(60),
    )  # fmt: skip
    found = {row["provider"]: (row["status"], row["message"]) for row in rows}
    assert found["good"] == ("ok", "") and rows[0]["rounds"] == 1
    assert found["broken"] == ("failed", "RuntimeError: wrong")
    assert found["large"][0] == "out of memory"
    assert found["absent"] == ("left out", "no peft") and found["elsewhere"] == ("left out", "no GPU")


def test_a_fault_that_ends_a_group_ends_no_run(monkeypatch):
    """As a kernel's fault on a GPU, after which waiting for it raises."""
    monkeypatch.setattr(suite, "interleaved", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("illegal access")))
    groups = [group(good=lambda: made(lambda: None)), group(good=lambda: made(lambda: None))]
    rows = [row for _, rows, _ in suite.run(groups, CONTEXT, TOP, Budget(60)) for row in rows]
    assert [(row["status"], row["message"]) for row in rows] == [("failed", "RuntimeError: illegal access")] * 2


def test_groups_after_the_budget_are_named_as_left_out():
    groups = [group(good=lambda: made(lambda: None))] * 2
    rows = [rows for _, rows, _ in suite.run(groups, CONTEXT, TOP, Budget(0.0))]
    assert [row["status"] for row in (*rows[0], *rows[1])] == ["left out"] * 2 and "budget" in rows[0][0]["message"]
    assert Budget(100, since=time.time() - 90).left() == pytest.approx(10, abs=1)


@pytest.mark.parametrize(("later_s", "status"), [(0.0, "ok"), (10.0, "left out")])
def test_what_is_ready_only_after_the_alarm_is_kept(later_s, status, monkeypatch):
    """As a backward that compiles where no signal reaches it: the first call is late, and the next is quick or not."""
    monkeypatch.setattr(suite, "GRACE_S", 0.3)
    monkeypatch.setattr(suite.Context, "compile_s", 0.1)
    waits = iter([0.3])
    variant = suite.Variant(lambda: made(lambda: time.sleep(next(waits, later_s))), compiled=True)
    (row,) = suite.run_group(suite.Group("layer", "forward", {}, {"late": variant}), CONTEXT, TOP, Budget(60))
    assert row["status"] == status and row["message"] == ("" if status == "ok" else "not ready within 0 s")


def test_what_takes_too_long_to_prepare_is_stopped():
    def slow() -> None:
        try:
            while True:
                time.sleep(0.01)
        except LeftOut as error:  # as torch.compile does
            raise RuntimeError("wrapped") from error

    with pytest.raises(LeftOut, match="not ready"), measure.time_limit(0.2):
        slow()
    with pytest.raises(ValueError, match="of its own"), measure.time_limit(60):
        raise ValueError("of its own")


def test_rounds_are_interleaved_in_a_rotating_order():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    found = measure.interleaved(calls, CPU, rounds=3, seconds=60, warmup_s=None, budget=Budget(60))
    assert "".join(order) == "abcbcacab" and all(len(seconds) == 3 for seconds in found.values())


def test_launches_and_operations_are_counted():
    x = torch.randn(4, 6, requires_grad=True)
    weight = torch.randn(5, 6)
    assert measure.operations(lambda: (x.detach() @ weight.t()).view(20)) == 1
    assert measure.operations(lambda: torch.autograd.grad((x @ weight.t()).sum(), x)) >= 4


def test_rows_are_kept_before_they_are_weighed(monkeypatch):
    kept, wide = [], suite.Context(CPU, torch.float32, "quick")
    monkeypatch.setattr(suite.Context, "rounds", 1)
    monkeypatch.setattr(suite.Context, "least_s", 0.0)
    one = group(good=lambda: suite.Made(lambda: torch.ones(3) + 1, note="made so"))
    one.weigh = True
    rows = suite.run_group(one, wide, TOP, Budget(60), kept.append)
    assert len(kept) == 1 and "median_s" in kept[0][0] and "peak_bytes" not in kept[0][0]
    assert rows[0]["peak_bytes"] > 0 and rows[0]["operations"] >= 1 and rows[0]["message"] == "made so"


def test_quantiles_and_memory():
    assert measure.quantiles([5, 1, 2, 4, 3]) == {"median_s": 3, "q20_s": 1.8, "q80_s": 4.2, "rounds": 5}
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(32, 16)
    assert measure.saved_bytes(lambda: (x @ weight.t()).exp(), [x, weight]) == 8 * 32 * 4
    assert measure.peak_bytes(lambda: (x @ weight.t()).detach() * 2, CPU) >= 2 * 8 * 32 * 4
    source, tensors = measure.rotated(lambda: torch.randn(2), 3)
    assert [source() is t for t in (*tensors, tensors[0])] == [True] * 4


@pytest.mark.parametrize("name", [n for n, p in providers.LAYERS.items() if not p.compiled and "Triton" not in n])
def test_providers_compute_what_their_names_say(name):
    """Every curved arm gives the layer of the reference; a LoRA of another rank gives something else than the base."""
    torch.manual_seed(0)
    setting = providers.Setting(24, 32, 20, torch.float64, CPU, experts=3, rank=2, active=2)
    base, x = providers.Base(setting), torch.randn(20, 24, dtype=torch.float64)
    arm = providers.LAYERS[name].make(base)
    y = arm.forward(x, base.gates)
    if arm.trained:
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), arm.trained))
    curved = {providers.EXP_LOG: "exp_log", providers.GEOOPT: "exp_log", providers.EXP_LOG_EAGER: "exp_log"}
    curved |= dict.fromkeys((providers.PRINTED, providers.TIDIED, providers.MAPPED, providers.EAGER), "stereographic")
    if name in curved:
        wide = (x, base.linear.weight, base.linear.bias, base.A, base.B, base.kappa.double())
        truth = mos_linear_per_expert(*wide, gates=base.gates.double(), scaling=2.0, mapping=curved[name])
        assert (y - truth).abs().max() <= (1e-5 if name == providers.GEOOPT else 1e-12) * truth.abs().max()
    elif name != providers.FROZEN:
        assert not torch.allclose(y, base.linear(x))


@pytest.mark.parametrize("name", [n for n, p in providers.BRANCHES.items() if not p.compiled and "Triton" not in n])
def test_branches_are_their_layers_without_the_base(name):
    torch.manual_seed(0)
    setting = providers.Setting(24, 32, 20, torch.float32, CPU, experts=3, rank=2, active=2)
    base, x = providers.Base(setting), torch.randn(20, 24, requires_grad=True)
    arm = providers.BRANCHES[name].make(base)
    y = arm.forward(x, base.gates)
    if name == providers.LORA_BRANCH:
        return
    layer = providers.LAYERS[providers.EXP_LOG if name == providers.EXP_LOG else providers.EAGER].make(base)
    expected = layer.forward(x, base.gates)
    assert (y + base.linear(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    dy = torch.randn_like(y)
    through_base = dy @ base.linear.weight
    (dx,), (dx_layer,) = torch.autograd.grad(y, [x], dy), torch.autograd.grad(expected, [x], dy)
    assert (dx + through_base - dx_layer).abs().max() <= 1e-5 * dx_layer.abs().max()


def test_conversions_go_there_and_back():
    x, kappa = torch.randn(5, 24, dtype=torch.float64), torch.tensor([-0.01, 0.01, 0.0], dtype=torch.float64)
    for mapping in maps.MAPPINGS:
        outputs = maps.convert(x, kappa, (-1.0, 1.0, 0.0), mapping)
        assert len(outputs) == 2 and all((o - x).abs().max() <= 1e-6 for o in outputs)


def test_the_model_is_qwen2():
    transformers = pytest.importorskip("transformers")
    shape = qwen2.Shape(hidden=32, intermediate=48, layers=2, heads=4, kv_heads=2, vocabulary=64)
    theirs = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=64, rope_theta=shape.rope_theta, rms_norm_eps=shape.eps, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    ours = qwen2.build(shape, CPU, torch.float32)
    ours.load_state_dict({n: t for n, t in theirs.state_dict().items() if n != "lm_head.weight"})
    ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert torch.allclose(ours(ids), expected, atol=1e-5)
        cache = theirs(ids[:, :-1], use_cache=True).past_key_values
        caches = ours.caches(2, 9)
        for (keys, values), layer in zip(caches, cache.layers, strict=True):
            keys[:, :, :-1], values[:, :, :-1] = layer.keys, layer.values
        assert torch.allclose(ours(ids[:, -1:], caches), expected[:, -1:], atol=1e-5)


@pytest.mark.parametrize("name", [providers.PEFT_8, providers.FUSED_8, providers.EAGER])
def test_adapters_on_a_model_train_and_leave_the_base(name):
    shape = qwen2.Shape(hidden=32, intermediate=48, layers=1, heads=4, kv_heads=2, vocabulary=64)
    model = qwen2.build(shape, CPU, torch.float32)
    trained = qwen2.adapt(model, name, providers.Setting(32, 48, 1, torch.float32, CPU).config())
    model(torch.randint(0, 64, (1, 5))).sum().backward()
    assert trained and all(p.grad is not None for p in trained)
    assert not any(p.grad is not None for p in model.parameters() if not any(p is t for t in trained))
    assert sum(isinstance(m, nn.Module) for m in model.modules())


def test_the_plans_hold_what_the_design_asks_for():
    for device, mode in (("cpu", "quick"), ("cpu", "full"), ("cuda", "quick"), ("cuda", "full")):
        groups = list(cases.plan(suite.Context(torch.device(device), torch.float32, mode)))
        kinds = {g.kind for g in groups}
        assert kinds >= {
            "layer",
            "steps",
            "branch",
            "ffn",
            "decode",
            "model",
            "dimension",
            "depth",
            "tokens",
            "experts",
        }
        assert kinds >= {"rank", "width", "order", "compiled"} and groups[0].kind == (
            "order" if device == "cuda" else "ffn"
        )
        assert len({g.name for g in groups}) == len(groups)
    gpu = [g for g in groups if g.kind == "layer"]
    assert [(g.shape["d_in"], g.shape["d_out"]) for g in gpu] == [*cases.QWEN2, *cases.LLAMA3]


def test_the_budget_ends_rounds_and_no_row_comes_of_too_few():
    calls = {"slow": lambda: time.sleep(0.05)}
    with pytest.raises(LeftOut, match="after"):
        measure.interleaved(calls, CPU, rounds=9, seconds=60, warmup_s=None, budget=Budget(0.07))
    quick = measure.interleaved(
        {"quick": lambda: None}, CPU, rounds=3, seconds=60, warmup_s=0, budget=Budget(60), least_s=9
    )
    assert len(quick["quick"]) == measure.MAX_ROUNDS
    found = measure.interleaved(calls, CPU, rounds=99, seconds=60, warmup_s=None, budget=Budget(0.4))
    assert measure.MIN_ROUNDS <= len(found["slow"]) < 99


def test_a_call_that_fails_among_others_is_dropped_and_they_are_measured():
    calls = iter(range(9))

    def later() -> None:
        if next(calls):
            raise torch.OutOfMemoryError("CUDA out of memory")

    rows = suite.run_group(group(good=lambda: made(lambda: None), later=lambda: made(later)), CONTEXT, TOP, Budget(60))
    assert [row["status"] for row in rows] == ["ok", "out of memory"] and "median_s" in rows[0]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="counts launches of the Triton backend")
def test_launches_are_counted_and_the_launcher_is_put_back():
    from mos_kernels.backends.triton import launch

    before = launch.launch
    with pytest.raises(RuntimeError):
        measure.launches(lambda: (_ for _ in ()).throw(RuntimeError))
    assert measure.launches(lambda: None) == 0 and launch.launch is before
