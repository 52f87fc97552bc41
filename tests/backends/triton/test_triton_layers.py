"""Layers of every kind, drawn from seeds, by the criterion of cases.py; and the kinds that the seeds reach."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import DTYPES, LAYOUTS, UPSTREAM_LAYOUTS, RouterTrial, Trial, compare, error, everyday_seeds, kinds
from everyday import full_but

from mos_kernels import MoSConfig
from mos_kernels.backends.triton import launch

SEEDS, ROUTER_SEEDS = range(100), (*range(40), 175959192)  # the last: one expert takes all but 1e-6
EVERYDAY, ROUTER_EVERYDAY = everyday_seeds(Trial, SEEDS), everyday_seeds(RouterTrial, ROUTER_SEEDS[:-1])


@pytest.mark.parametrize("seed", full_but(EVERYDAY, SEEDS))
@pytest.mark.budget(5)
def test_a_drawn_layer(seed):
    trial = Trial.drawn(seed)
    assert not trial.failures(), str(trial)


@pytest.mark.parametrize("seed", full_but((*ROUTER_EVERYDAY, ROUTER_SEEDS[-1]), ROUTER_SEEDS))
def test_a_drawn_router(seed):
    trial = RouterTrial.drawn(seed)
    assert not trial.failures(), str(trial)


def test_the_seeds_reach_every_kind_of_layer():
    trials = [Trial.drawn(seed) for seed in SEEDS]

    def reached(*choices, of):
        return set(itertools.product(*choices)) <= {of(trial) for trial in trials}

    both = (True, False)
    assert reached(("identity", "tanh", "silu", "gelu"), DTYPES, of=lambda t: (t.config.activation, t.dtype))
    mappings = (("stereographic", "ball"), ("stereographic", "raw"), ("exp_log", "ball"))
    assert reached(mappings, both, of=lambda t: ((t.config.mapping, t.config.domain), t.own_router))
    assert reached(both, both, both, of=lambda t: (t.config.share_a, t.config.norm_topk_prob, t.own_router))
    assert reached((1, 2, 3, 4, 5, 8, 16, 17, 32, 64, 100, 128), of=lambda t: (t.config.r,))
    assert reached((1, 64), of=lambda t: (t.config.num_experts,))
    assert reached(LAYOUTS, of=lambda t: (t.x_layout,)) and reached(UPSTREAM_LAYOUTS, of=lambda t: (t.upstream_layout,))
    assert reached((0, 1, 64, 65, 134), of=lambda t: (torch.Size(t.tokens).numel(),))
    assert reached(DTYPES, (0.0, 0.3), of=lambda t: (t.dtype, t.dropout_p))
    assert reached((None, *DTYPES), ("identity", "silu"), of=lambda t: (t.base_dtype, t.config.activation))


@pytest.mark.parametrize(
    ("kind", "seeds", "chosen"), [(Trial, SEEDS, EVERYDAY), (RouterTrial, ROUTER_SEEDS[:-1], ROUTER_EVERYDAY)]
)
def test_the_everyday_seeds_reach_what_all_of_them_do(kind, seeds, chosen):
    reached, everything = (set().union(*(kinds(kind.drawn(seed)) for seed in some)) for some in (chosen, seeds))
    assert reached == everything and len(everything) >= 60
    assert set(chosen) < set(seeds)


@pytest.mark.shipped_settings
@pytest.mark.budget(20)
@pytest.mark.parametrize(
    ("dtype", "activation"),
    [
        (torch.float32, "identity"), pytest.param(torch.bfloat16, "identity", marks=pytest.mark.full),
        pytest.param(torch.float16, "gelu", marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_several_tiles_of_everything(dtype, activation):
    """More tokens, inputs, outputs and columns of rank than one tile holds, and more than one part of each split."""
    config = MoSConfig(r=20, activation=activation, router_scope="linear", num_experts_per_tok=3)
    trial = Trial(config, tokens=(131,), d_in=145, d_out=139, dtype=dtype)
    assert not trial.failures()


@pytest.mark.budget(8)
@pytest.mark.parametrize("share_a", [pytest.param(True, marks=pytest.mark.full), False])
def test_more_columns_than_a_tile_holds(share_a):
    """R + E > 128 columns in shrink, E·r > 128 in expand."""
    few = {"r": 128, "spaces": {"hyperbolic": 1, "spherical": 1, "euclidean": 2}, "num_experts_per_tok": 2}
    config = MoSConfig(**(few if share_a else {"r": 24}), share_a=share_a, router_scope="linear")
    assert not Trial(config, tokens=(7,), d_in=37, d_out=35).failures()


def test_backward_in_chunks_of_tokens(monkeypatch):
    """Tokens in several chunks, the last one short, as a large dy is walked through."""
    stored = launch.stored_settings

    def small_chunks(kernel, device, T):
        found = stored(kernel, device, T)
        return {**found, "CHUNK_ROWS": 64} if kernel == "expand_backward" else found

    monkeypatch.setattr(launch, "settings", small_chunks)
    assert not Trial(MoSConfig(r=3, router_scope="linear"), tokens=(150,)).failures()


def test_the_criterion_can_fail():
    truth = {"y": torch.ones(4, dtype=torch.float64)}
    by_torch = {"y": torch.ones(4) + 1e-5}
    assert not compare({"y": torch.ones(4) + 1.9e-5}, by_torch, truth)
    for wrong in (torch.ones(4) + 2.3e-5, torch.tensor([1, 1, 1, torch.nan]), torch.ones(3), torch.ones(4).half()):
        assert compare({"y": wrong}, by_torch, truth)
    assert compare({}, {}, truth) and compare({**truth, "x": truth["y"]}, by_torch, truth)
    assert error(torch.tensor([torch.inf]), torch.tensor([torch.inf])) == 0


def test_an_output_that_nobody_writes_is_seen(monkeypatch):
    run = launch.launch

    def all_but_shrink(kernel, *args, **constants):
        if kernel.fn.__name__ != "shrink_kernel":
            run(kernel, *args, **constants)

    monkeypatch.setattr(launch, "launch", all_but_shrink)
    assert Trial(MoSConfig(r=2)).failures()
