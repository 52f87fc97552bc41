"""What is run, as data: methods x data set x learning rate x seed, those that decide first."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.study import plan
from benchmarks.study.decoder.problems import DATASETS

SEEDS = (0, 1, 2)
RATES = (1, 3, 10, 30)
"""Multiples of the paper's learning rate. x30 is for the methods that decide: is x10 the best, or the edge?"""
BEST = (10, 3)
"""The two at which most is solved by the runs that decide: there every seed is run, elsewhere the first alone."""


@dataclass(frozen=True)
class Entry:
    """A method with its settings, as `model.adapted` takes them. A low `importance` runs first."""

    name: str
    method: str
    importance: int
    settings: str = "{}"
    """JSON, its keys sorted."""
    rates: tuple[int, ...] = RATES[:3]

    @property
    def options(self) -> dict:
        return json.loads(self.settings)


def _entry(name: str, method: str, importance: int, rates: tuple[int, ...] = RATES[:3], **options) -> Entry:
    return Entry(name, method, importance, json.dumps(options, sort_keys=True), rates)


LORA = _entry("LoRA r=8", "LoraConfig", 0, RATES, r=8, lora_alpha=16)
# r=41 trains 7,793,280 parameters on SmolLM2, MoS 7,788,240; alpha keeps the scaling alpha/r of r=8
LORA_MATCHED = _entry("LoRA r=41 (matched)", "LoraConfig", 0, RATES, r=41, lora_alpha=82)
EUCLIDEAN = _entry("MoS, 8 euclidean", "MoS", 0, RATES, spaces={"euclidean": 8})
MOS = _entry("MoS", "MoS", 0, RATES)
ON_ATTENTION = {"q_proj|k_proj|v_proj|o_proj": {"euclidean": 1}}
ENTRIES = (
    LORA,
    MOS,
    LORA_MATCHED,
    EUCLIDEAN,
    _entry("DoRA r=8", "LoraConfig", 1, r=8, lora_alpha=16, use_dora=True),
    _entry("HydraLoRA", "MoS.hydralora", 1),
    _entry("mixture of LoRA", "MoS.mixture_of_lora", 1),
    _entry("MoS, 8 hyperbolic", "MoS", 1, spaces={"hyperbolic": 8}),
    _entry("MoS, 8 spherical", "MoS", 1, spaces={"spherical": 8}),
    _entry("MoS as printed", "MoS.paper", 1),
    _entry("Lily r=32", "LilyConfig", 1, r=32, stride_A=3, num_B=10),
    _entry("LoRA r=8 on all linears", "LoraConfig", 1, r=8, lora_alpha=16, target_modules="all-linear"),
    _entry("MoS, and a LoRA on attention", "MoS", 1, target_modules="all-linear", spaces_pattern=ON_ATTENTION),
    _entry("HMoRA", "HMoRA", 2, BEST, token=47),  # "?"
    _entry("MoS, a router a linear", "MoS", 2, BEST, router_scope="linear"),
    _entry("MoS, curvature rate x1", "MoS", 2, BEST, curvature_lr_ratio=1.0),  # the default is x30
    # the curvatures' gradient alone can be past the norm at which all gradients are clipped
    _entry("MoS, curvature's gradient bounded", "MoS", 2, BEST, curvature_max_grad_norm=0.01),
)


@dataclass(frozen=True)
class Cell(plan.Cell):
    """One run."""

    entry: Entry

    @property
    def key(self) -> str:
        """What identifies a run, whatever name it goes by."""
        return f"{self.dataset} x{self.rate} seed {self.seed} {self.entry.method} {self.entry.settings}"


def cells(
    datasets: Iterable[str] = DATASETS,
    seeds: Iterable[int] | None = None,
    rates: Iterable[int] = RATES,
    names: Iterable[str] | None = None,
) -> list[Cell]:
    """Every run once. First the entries that decide, at the best rates: their first seed before the second.

    seeds: by default `SEEDS` at the best rates and the first of them at the others.
    """
    datasets, named = list(datasets), SEEDS if seeds is None else tuple(seeds)
    order = (*BEST, *(rate for rate in RATES if rate not in BEST))
    found = [
        (
            (datasets.index(dataset), max(entry.importance, rate not in BEST), named.index(seed), order.index(rate), i),
            Cell(dataset, entry, rate, seed),
        )
        for dataset in datasets
        for i, entry in enumerate(ENTRIES)
        for rate in rates
        for seed in (named if seeds is not None or rate in BEST else named[:1])
        if rate in entry.rates and (names is None or entry.name in names)
    ]
    return [cell for _, cell in sorted(found, key=lambda pair: pair[0])]
