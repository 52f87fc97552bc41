"""The benchmark suite: where we stand against the exp/log maps and what users would pick, the ceiling beside every row.

    providers.py   every peer under one interface        maps.py       the two mappings on full-width vectors
    qwen2.py       a model of Qwen2's shape              cases/        what is measured, in the order of importance
    gate.py        correctness, before any timing        ceilings.py   what the machine can do
    measure.py     clocks, rotation, memory              suite.py      groups of variants -> rows
    machine.py     where a run was made                  store.py      rows on disk
    targets.py     the targets, as data                  regression.py what got slower
    report.py      tables.py and plots.py -> report.md, docs/performance.md, README.md

`python -m benchmarks run | report | compare`; `pytest benchmarks` gives the same groups to pytest-benchmark. study/ is
apart: what training with each method comes to, not how fast it is.
"""
