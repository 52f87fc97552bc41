"""What the study runs, as data: entries (methods and settings) x data set x learning rate x seed, by importance.

The tables name entries; an entry's options are those of the finetune command. The same options in several tables are
one entry's, and so run once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.study.split import split_file

PAPER_RATE = 3e-4
DTYPE = "bfloat16"
"""Of the frozen model, under autocast, as most fine-tuning is done; what is trained stays in float32."""
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Dataset:
    """The options that read a data set in `folder`, and how it is trained on."""

    name: str
    columns: tuple[str, ...]
    train: str
    evaluation: tuple[str, ...] = ()
    metric: str = field(default="accuracy", kw_only=True)
    """A column of the rows, the one that tells methods apart."""
    delay: Mapping[int, int] = field(kw_only=True)
    """How much later a learning rate runs: first the one at which most methods leave the majority class."""
    compared: tuple[int, int] = field(kw_only=True)
    """The two learning rates at which settings are compared: those with the most runs off the majority class.

    Chosen once that was known.
    """
    least_important: Mapping[int, int] = field(default_factory=dict, kw_only=True)
    """At these learning rates only entries up to this importance: there every method stays at the majority class."""

    @property
    def main_rate(self) -> int:
        """The learning rate that runs first."""
        return min(self.delay, key=self.delay.__getitem__)

    def has(self, entry: Entry, rate: int) -> bool:
        """Whether an entry is planned at this learning rate."""
        return rate in entry.rates and entry.importance <= self.least_important.get(rate, entry.importance)

    def options(self, data: Path, outputs: Path) -> list[str]:
        """Those that read it. Without evaluation files of its own it is split, into files in `outputs`."""
        train, evaluation = data / self.name / self.train, [data / self.name / name for name in self.evaluation]
        if not evaluation:
            label = self.columns[self.columns.index("--label-column") + 1]
            renames = dict(text.split("=") for text in self.columns if "=" in text)
            train, *evaluation = split_file(train, label, renames, outputs / self.name)
        files = ["--train-file", str(train), "--eval-file", *map(str, evaluation)]
        return [*files, *self.columns, "--group-by-length"]


DATASETS = {
    "svamp": Dataset(
        "svamp",
        ("--text-column", "Body", "Question", "--label-column", "Type",
         "--rename-label", "Common-Divison=Common-Division"),
        "SVAMP.json",
        delay={10: 0, 3: 1, 30: 2, 1: 4},  # at x1 LoRA and MoS stay at the majority class with every seed
        compared=(3, 10),
    ),
    "cola": Dataset(
        "cola",
        ("--column-names", "source,label,mark,sentence", "--text-column", "sentence", "--label-column", "label"),
        "in_domain_train.tsv",
        ("in_domain_dev.tsv", "out_of_domain_dev.tsv"),
        metric="matthews_correlation",  # 69% of it is one class
        delay={3: 0, 1: 1, 10: 2, 30: 3},
        compared=(1, 3),
        least_important={10: 1, 30: 0},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A method with its settings. `rates`: multiples of the paper's learning rate. A low `importance` runs first."""

    name: str
    options: tuple[str, ...]
    importance: int
    rates: tuple[int, ...] = (10, 3, 1)


def _mos(name: str, importance: int, *options: str, rates: tuple[int, ...] = (10, 3, 1)) -> Entry:
    return Entry(name, ("--method", "mos", *options), importance, rates)


def _geometry(domain: str, unit: str, curvature: str, importance: int) -> Entry:
    unit_name = "√d" if unit == "sqrt_dim" else unit
    options = () if domain == "ball" else ("--domain", domain)
    options += () if unit == "sqrt_dim" else ("--length-unit", unit)
    options += () if curvature == "0.3" else ("--curvature-init", curvature)
    return _mos(f"MoS {domain}, unit {unit_name}, κ̂ {curvature}", importance, *options)


STABLE = (10, 3, 1, 30)
BASE = Entry("head alone", ("--method", "frozen"), 3, STABLE)
LORA = Entry("LoRA r=8", ("--method", "lora"), 0, STABLE)
# r=40 trains 921,600 parameters on MiniLM, MoS 921,696; alpha keeps the scaling alpha/r of r=8
LORA_MATCHED = Entry("LoRA r=40 (matched)", ("--method", "lora", "--r", "40", "--lora-alpha", "80"), 0, STABLE)
DORA = Entry("DoRA r=8", ("--method", "dora"), 1, STABLE)
ADALORA = Entry("AdaLoRA r=8", ("--method", "adalora"), 1, STABLE)
MELORA = Entry("MELoRA 4x8", ("--method", "melora"), 1, STABLE)
HYDRALORA = Entry("HydraLoRA", ("--method", "hydralora"), 1, STABLE)
MIXTURE_OF_LORA = Entry("mixture of LoRA", ("--method", "mixture_of_lora"), 1, STABLE)
MOS = _mos("MoS", 0, rates=STABLE)
PAPER = _mos("MoS as printed", 0, "--preset", "paper", rates=STABLE)
RAW_UNITS = _mos("MoS ball, unit 1, κ̂ 1", 0, "--length-unit", "1", "--curvature-init", "1", rates=STABLE)

_TABLE_2 = tuple(
    _mos(f"MoS, curvature rate x{ratio}", importance, "--curvature-lr-ratio", str(ratio))
    for ratio, importance in ((1, 1), (10, 3), (100, 2))
)
FIXED = _mos("MoS, curvature not learned", 3, "--no-learn-curvature")
_TABLE_3 = tuple(_mos(f"MoS, 8 {space}", 1, "--spaces", f"{space}=8") for space in ("hyperbolic", "spherical"))
# all that acts on curvature is without effect here
EUCLIDEAN = _mos("MoS, 8 euclidean", 0, "--spaces", "euclidean=8")

_GRID = {  # (domain, unit, |κ̂|): importance; the default, the printed setting and raw units under a ball are above
    ("raw", "sqrt_dim", "0.3"): 2,
    ("ball", "sqrt_dim", "0.1"): 3, ("ball", "sqrt_dim", "1"): 2,
    ("raw", "sqrt_dim", "0.1"): 4, ("raw", "sqrt_dim", "1"): 4,
    ("ball", "1", "0.1"): 4, ("ball", "1", "0.3"): 4, ("raw", "1", "0.1"): 4, ("raw", "1", "0.3"): 4,
}  # fmt: skip
GRID = tuple(_geometry(*choice, importance) for choice, importance in _GRID.items())
# on MiniLM the same layers as the default: BERT's FFN is two modules, so each linear has its own router either way
PER_LINEAR = _mos("MoS, a router a linear", 9, "--router-scope", "linear", rates=(10,))
NOT_RENORMALISED = _mos("MoS, gates not renormalised", 2, "--no-norm-topk-prob")
BOUNDARY = tuple(
    _mos(
        f"MoS ball, unit 1, κ̂ 1, ε {eps}",
        importance,
        "--length-unit",
        "1",
        "--curvature-init",
        "1",
        "--boundary-eps",
        eps,
    )
    for eps, importance in (("0.04", 3), ("0.4", 2))
)


def _at(domain: str, unit: str, curvature: str) -> Entry:
    """The entry of these three, whatever name it goes by."""
    named = {("ball", "√d", "0.3"): MOS, ("raw", "1", "1"): PAPER, ("ball", "1", "1"): RAW_UNITS}
    grid = {entry.name: entry for entry in GRID}
    return named.get((domain, unit, curvature)) or grid[f"MoS {domain}, unit {unit}, κ̂ {curvature}"]


_DOMAINS, _CURVATURES = ("ball", "raw"), ("0.1", "0.3", "1")
COMPARISONS: dict[str, tuple[tuple[Entry, Entry], ...]] = {
    **{
        f"{entry.name} − {EUCLIDEAN.name}": ((entry, EUCLIDEAN),)
        for entry in (MOS, FIXED, *_TABLE_2[:2], _at("raw", "√d", "0.3"), *_TABLE_3[::-1], MIXTURE_OF_LORA)
    },
    f"{MOS.name} − {RAW_UNITS.name}": ((MOS, RAW_UNITS),),
    **{f"{entry.name} − x30": ((entry, MOS),) for entry in (FIXED, *_TABLE_2)},
    "unit √d − unit 1 (domains and κ̂)": tuple(
        (_at(domain, "√d", curvature), _at(domain, "1", curvature)) for domain in _DOMAINS for curvature in _CURVATURES
    ),
    **{
        f"unit √d − unit 1, {domain} (κ̂)": tuple((_at(domain, "√d", c), _at(domain, "1", c)) for c in _CURVATURES)
        for domain in _DOMAINS
    },
    "raw − ball at √d (κ̂)": tuple((_at("raw", "√d", c), _at("ball", "√d", c)) for c in _CURVATURES),
    "κ̂ 0.1 − 0.3 at √d (domains)": tuple((_at(d, "√d", "0.1"), _at(d, "√d", "0.3")) for d in _DOMAINS),
    "κ̂ 1 − 0.3 at √d (domains)": tuple((_at(d, "√d", "1"), _at(d, "√d", "0.3")) for d in _DOMAINS),
    "gates not renormalised − renormalised": ((NOT_RENORMALISED, MOS),),
}
"""Settings against each other, where the tables compare with LoRA: pairs of entries, all pairs of runs together."""

TABLES: dict[str, tuple[Entry, ...]] = {
    "table1": (BASE, LORA, LORA_MATCHED, DORA, ADALORA, MELORA, HYDRALORA, MIXTURE_OF_LORA, MOS, PAPER),
    "table2": (FIXED, *_TABLE_2[:2], MOS, _TABLE_2[2]),
    "table3": (_TABLE_3[1], _TABLE_3[0], EUCLIDEAN, MOS),
    "units": (MOS, *GRID, RAW_UNITS, PAPER),
    "boundary": (RAW_UNITS, *BOUNDARY),
    "routing": (MOS, PER_LINEAR, NOT_RENORMALISED),
    "stability": (BASE, LORA, LORA_MATCHED, DORA, ADALORA, MELORA, HYDRALORA, MIXTURE_OF_LORA, MOS, PAPER, RAW_UNITS),
}
TITLES = {
    "table1": "Table 1: methods",
    "table2": "Table 2: the curvature's own learning rate (the default is x30)",
    "table3": "Table 3: one space, or a mixture",
    "units": "Open choice: domain, unit of length, curvature at the start",
    "boundary": "The distance kept from the ball's boundary (the default is 0.004)",
    "routing": "Open choice: routing",
    "stability": "Stability",
}


@dataclass(frozen=True)
class Cell:
    """One run."""

    dataset: str
    entry: Entry
    rate: int
    seed: int

    @property
    def key(self) -> str:
        """What identifies a run, whatever tables and names it goes by."""
        return key_of(self.dataset, self.entry.options, self.rate, self.seed)

    @property
    def folder(self) -> str:
        digest = hashlib.sha256(self.key.encode()).hexdigest()[:10]
        return f"{self.dataset}-x{self.rate}-seed{self.seed}-{digest}"


def key_of(dataset: str, options: Iterable[str], rate: int, seed: int) -> str:
    return f"{dataset} x{rate} seed {seed} {' '.join(options)}"


def entries(tables: Iterable[str] = TABLES) -> list[Entry]:
    """The entries of the tables, each set of options once."""
    found = {entry.options: entry for table in tables for entry in TABLES[table]}
    return list(found.values())


def cells(
    datasets: Iterable[str] = DATASETS,
    tables: Iterable[str] = TABLES,
    seeds: Iterable[int] = SEEDS,
    rates: Iterable[int] | None = None,
    names: Iterable[str] | None = None,
) -> list[Cell]:
    """Every run of these tables, once each, the most important first: of each data set in turn, seeds together.

    rates, names: of the learning rates and the entries, these alone.
    """
    listed = [
        (
            entry.importance + DATASETS[dataset].delay[rate],
            entry.importance,
            position,
            rank,
            Cell(dataset, entry, rate, seed),
        )
        for position, dataset in enumerate(datasets)
        for rank, entry in enumerate(entries(tables))
        for rate in entry.rates
        for seed in seeds
        if DATASETS[dataset].has(entry, rate)
        and (rates is None or rate in rates)
        and (names is None or entry.name in names)
    ]
    return [cell for *_, cell in sorted(listed, key=lambda item: item[:-1])]
