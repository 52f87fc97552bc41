"""The offline tuner and the warm-up, with a clock of our own: nothing here is about speed."""

from __future__ import annotations

import json

import pytest
import torch
from everyday import full_but
from torch import nn

import mos_kernels
from mos_kernels import MoSConfig, MoSLinear, MoSRouter, MoSWrapped
from mos_kernels.backends.triton import launch, tune

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def calls():
    return tune.steps(MoSConfig(r=2), 70, 20, 24, torch.bfloat16, CPU)


def test_every_kernel_of_the_table_can_be_tuned_and_its_constants_have_candidates(calls):
    few = tune.steps(MoSConfig(r=2), 5, 20, 24, torch.bfloat16, CPU)
    for kernel, buckets in launch.table()["default"].items():
        assert ("train" not in buckets or kernel in calls) and ("decode" not in buckets or kernel in few)
    for buckets in launch.table()["default"].values():
        for constants in buckets.values():
            assert list(tune.neighbours(constants))


@pytest.mark.parametrize(
    "kernel", full_but(("shrink", "expand"), ("shrink", "shrink_backward", "expand", "expand_backward"))
)
def test_the_search_takes_what_the_clock_prefers(calls, kernel, monkeypatch):
    monkeypatch.setitem(tune.TOKENS, "train", 70)
    start = launch.settings(kernel, CPU, 70)

    def clock(call) -> float:  # prefers the smallest tile of tokens, whatever else
        return launch.settings(kernel, CPU, 70)["BLOCK_T"] / 16 + 1

    seed = tune.SEEDS.get(kernel, {}).get("train", start)
    found, time, before = tune.tune_kernel(kernel, "train", [calls[kernel]], CPU, clock)
    assert found == {**min(start, seed, key=lambda s: s["BLOCK_T"]), "BLOCK_T": 16}
    assert (time, before) == (2.0, start["BLOCK_T"] / 16 + 1)
    assert launch.settings(kernel, CPU, 70) == start  # nothing is left in force


def test_a_candidate_with_other_numbers_is_not_taken(monkeypatch):
    monkeypatch.setitem(tune.TOKENS, "train", 70)

    def step():
        return (torch.full((3,), float(launch.settings("expand", CPU, 70)["num_warps"])),)

    start = launch.settings("expand", CPU, 70)
    found, *_ = tune.tune_kernel("expand", "train", [step], CPU, lambda call: 1 / call()[0][0].item())
    assert found["num_warps"] == start["num_warps"]


@pytest.mark.parametrize("kernel", full_but(("gram", "bridge_reduce"), tuple(tune.SEEDS)))
def test_the_seeds_give_the_numbers_of_the_table(calls, kernel):
    seed, table = tune.SEEDS[kernel]["train"], launch.table()["default"][kernel]["train"]
    assert seed.keys() == table.keys() and all(seed[name] in tune.CANDIDATES[name] for name in seed if seed != table)
    before = calls[kernel]()
    with tune.overridden({kernel: seed}):
        assert tune.agree(calls[kernel](), before)


@pytest.mark.parametrize("wins", [True, False])
def test_the_search_goes_on_from_a_seed_that_is_faster(wins):
    """Two steps away, past settings that are slower than both."""
    times = {(4, 1): 2.0, (8, 1): 3.0, (4, 2): 3.0, (8, 2): 1.0 if wins else 2.5, (8, 3): 0.5}
    start, seed = {"num_warps": 4, "num_stages": 1}, {"num_warps": 8, "num_stages": 2}
    found, time, before = tune.search(start, lambda s: times.get(tuple(s.values())), seed=seed)
    assert (found, time, before) == (({"num_warps": 8, "num_stages": 3}, 0.5, 2.0) if wins else (start, 2.0, 2.0))


def test_decoding_alone_tunes_the_splits_of_shrink():
    assert "SPLITS" in tune._FIXED["shrink", "train"] and "SPLITS" not in tune._FIXED["shrink", "decode"]
    assert not any(s["SPLITS"] != 1 for s in tune.neighbours({"SPLITS": 1, "num_warps": 4}, frozenset({"SPLITS"})))


def test_what_keeps_sm_90_from_a_race_is_not_tuned():
    for bucket in ("train", "decode"):
        assert "AHEAD" in tune._FIXED["shrink", bucket] and "num_stages" in tune._FIXED["activated_weight", bucket]
        assert launch.architecture_settings("activated_weight", "sm_90", tune.TOKENS[bucket])["num_stages"] == 1
        assert launch.architecture_settings("shrink", "sm_90", tune.TOKENS[bucket])["AHEAD"] == 1


def test_the_table_is_written_whole_and_read_back(tmp_path, monkeypatch):
    path = tmp_path / "settings.json"
    path.write_text(launch.SETTINGS_FILE.read_text())
    monkeypatch.setattr(launch, "SETTINGS_FILE", path)
    launch.table.cache_clear()
    before = json.loads(path.read_text())
    try:
        tune.write("sm_89", {"expand": {"train": {"BLOCK_T": 32}}})
        tune.write("sm_89", {"expand": {"decode": {"BLOCK_T": 16}}})
        stored = {"train": {"BLOCK_T": 32}, "decode": {"BLOCK_T": 16}}
        assert launch.table() == {**before, "sm_89": {"expand": stored}}
        assert [p.name for p in tmp_path.iterdir()] == ["settings.json"]
        assert json.loads(tune.render(launch.table())) == launch.table()
    finally:
        monkeypatch.undo()
        launch.table.cache_clear()


def test_what_an_architecture_lacks_is_the_defaults(monkeypatch):
    default = launch.table()["default"]
    ours = {**default["expand"]["decode"], "num_warps": 2}
    monkeypatch.setattr(launch, "table", lambda: {"default": default, "sm_89": {"expand": {"decode": ours}}})
    assert launch.architecture_settings("expand", "sm_89", 1) == ours
    assert launch.architecture_settings("expand", "sm_89", 1000) == default["expand"]["train"]
    assert launch.architecture_settings("expand", "sm_80", 1) == default["expand"]["decode"]
    assert launch.architecture_settings("gram", "sm_89", 1) == default["gram"]["train"]


@pytest.mark.budget(10)
def test_a_run_on_a_gpu_tunes_each_bucket_and_goes_on_from_what_it_wrote(tmp_path, monkeypatch, capsys):
    """On the CPU, which stands for the GPU: a first run is stopped, and the table that it left serves the second."""
    path = tmp_path / "settings.json"
    path.write_text(launch.SETTINGS_FILE.read_text())
    monkeypatch.setattr(launch, "SETTINGS_FILE", path)
    monkeypatch.setattr(tune, "TOKENS", {"train": 65, "decode": 5})
    monkeypatch.setattr(tune, "QWEN2_1_5B", ((20, 24),))
    made = tune.steps
    monkeypatch.setattr(
        tune, "steps", lambda config, T, d_in, d_out, dtype, _: made(config, T, d_in, d_out, dtype, CPU)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_89")
    monkeypatch.setattr(launch, "_architecture", lambda device: "sm_89")

    def tuned(kernel, bucket, calls, device, timer):
        return {**launch.settings(kernel, device, tune.TOKENS[bucket]), "num_stages": 4}, 1.0, 2.0

    monkeypatch.setattr(tune, "tune_kernel", tuned)
    launch.table.cache_clear()
    try:
        default = launch.table()["default"]
        assert tune.run(["expand", "gram"], ["decode"], torch.bfloat16, dry_run=False) == 0
        assert set(launch.table()["sm_89"]) == {"expand"} and set(launch.table()["sm_89"]["expand"]) == {"decode"}
        assert tune.run([], [], torch.bfloat16, dry_run=False) == 0
        stored = launch.table()["sm_89"]
        assert {k: set(b) for k, b in stored.items()} == {k: set(b) for k, b in default.items()}
        assert all(c["num_stages"] == 4 for buckets in stored.values() for c in buckets.values())
    finally:
        monkeypatch.undo()
        launch.table.cache_clear()


def test_tune_without_a_gpu_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert tune.run([], [], torch.bfloat16, dry_run=True) == 2
    assert "error: tune times kernels on a CUDA or ROCm device" in capsys.readouterr().err


@pytest.mark.parametrize("scope", ["linear", "ffn"])
def test_after_warmup_a_frozen_layer_launches_nothing_new(scope, described):
    mos_kernels.set_backend("triton")
    config = MoSConfig(r=2, spaces={"hyperbolic": 1, "spherical": 1}, num_experts_per_tok=1, router_scope=scope)
    layer = MoSLinear(32, 16, config=config, dtype=torch.bfloat16).freeze_for_inference()
    assert mos_kernels.warmup(layer) == 1
    warm = set(described)
    with torch.no_grad():
        for tokens in (4, 70):
            gates = torch.full((tokens, 2), 0.5) if scope == "ffn" else None
            layer(torch.ones(tokens, 32, dtype=torch.bfloat16), gates)
    assert described == warm


def test_after_warmup_a_router_launches_nothing_new_in_the_dtype_of_the_base(described):
    mos_kernels.set_backend("triton")
    config = MoSConfig(r=2, spaces={"hyperbolic": 1, "spherical": 1}, num_experts_per_tok=1)
    linear = MoSWrapped(nn.Linear(32, 16, dtype=torch.bfloat16), config)
    model = nn.ModuleList([MoSRouter(32, config), linear]).eval()
    assert mos_kernels.warmup(model) == 2
    warm = set(described)
    with torch.no_grad():
        for tokens in (4, 70):
            x = torch.ones(tokens, 32, dtype=torch.bfloat16)
            linear(x, model[0](x))
    assert described == warm


@pytest.mark.budget(12)
def test_warmup_runs_each_distinct_module_and_leaves_no_trace(launched):
    config = MoSConfig(r=2, spaces={"hyperbolic": 1, "spherical": 1}, num_experts_per_tok=1)
    own = MoSConfig(r=2, spaces={"euclidean": 2}, num_experts_per_tok=1, router_scope="linear", lora_dropout=0.5)
    model = nn.ModuleList(
        [
            MoSLinear(8, 6, config=config),
            MoSLinear(8, 6, config=config),
            MoSLinear(8, 6, config=own),
            MoSRouter(8, config),
        ]
    )
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert mos_kernels.warmup(model) == 0  # the eager backend has nothing to compile
    mos_kernels.set_backend("triton")
    assert mos_kernels.warmup(model) == 3
    assert {"shrink", "shrink_backward", "route", "bridge"} <= set(launched)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
