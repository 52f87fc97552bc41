"""The benchmark suite: where we stand against the exp/log maps and what users would pick, the ceiling beside every row.

    providers.py   every peer under one interface        maps.py       the two mappings on full-width vectors
    qwen2.py       a model of Qwen2's shape              cases.py      what is measured, in the order of importance
    gate.py        correctness, before any timing        ceilings.py   what the machine can do
    measure.py     clocks, rotation, memory              suite.py      groups of variants -> rows
    store.py       rows on disk                          regression.py what got slower
    targets.py     the targets, as data                  report.py     tables.py and plots.py -> report, README

`python -m benchmarks run | report | compare`; `pytest benchmarks` gives the same groups to pytest-benchmark.
"""
