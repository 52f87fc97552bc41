"""Counts: of accesses by hand, and of the kernels against the stored table."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch

from mos_kernels.__main__ import main

from . import by_hand, counts

SHARED = "mov.b32 %r1, global_smem;\nmad.lo.s32 %r1, %r0, {stride}, %r1;\n"


def counted(body: str, **options) -> dict[str, float]:
    return counts.summary(by_hand.run(body, [torch.zeros(4096, dtype=torch.int32)], **options))


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (32, 32), (128, 32), (0, 1)])
def test_sectors_of_a_warp(stride, sectors):
    found = counted(by_hand.own_part(1, stride) + "ld.global.b32 %r4, [%d51];\n")
    assert found["loaded sectors"] == sectors
    assert found["loaded useful bytes"] == (128 if stride else 4)


@pytest.mark.parametrize(("stride", "wavefronts"), [(4, 1), (8, 2), (12, 1), (64, 16), (128, 32), (0, 1)])
def test_wavefronts_of_a_warp(stride, wavefronts):
    found = counted(SHARED.format(stride=stride) + "st.shared.b32 [%r1], %r0;\n", shared_bytes=4096)
    assert found["wavefronts"] == wavefronts and found["least wavefronts"] == 1


@pytest.mark.parametrize(("stride", "wavefronts"), [(16, 4), (32, 8), (128, 32), (144, 4)])
def test_wavefronts_of_sixteen_bytes_a_lane(stride, wavefronts):
    """Eight lanes at a time."""
    body = SHARED.format(stride=stride) + "st.shared.v4.b32 [%r1], {%r0, %r0, %r0, %r0};\n"
    found = counted(body, shared_bytes=32 * 144)
    assert found["wavefronts"] == wavefronts and found["least wavefronts"] == 4


def test_every_instruction_has_a_class():
    found = counted("mov.b32 %r4, 1;\nfma.rn.f32 %r5, %r4, %r4, %r4;\nbar.sync 0;\nex2.approx.f32 %r6, %r5;\n")
    assert {name: found[name] for name in ("float", "barrier", "special", "move")} == {
        "float": 1, "barrier": 1, "special": 1, "move": 2,
    }  # fmt: skip


def row(**fields) -> counts.Row:
    return counts.Row(
        "shrink E=8",
        (1, 1, 1),
        {name: 1.0 for name, _ in counts.CLASSES},
        **{**dict.fromkeys(counts.HELD, 100.0), "waste": ("here",), **fields},
    )


def test_a_kernel_that_fetches_or_conflicts_more_is_named():
    kept = {"shrink E=8": row().stored()}
    assert counts.worse([row()], kept) == [] == counts.worse([row(sectors=50.0)], kept)
    assert counts.worse([row(sectors=102.0)], kept) == ["shrink E=8: 102 sectors instead of 100", "here"]
    assert counts.worse([row(wavefronts=200.0)], kept) == ["shrink E=8: 200 wavefronts instead of 100", "here"]
    other = dataclasses.replace(row(), key="shrink E=9")
    assert len(counts.worse([other], kept)) == 2


def test_the_page_names_the_kernels_that_fetch_or_conflict_half_again():
    page = (Path(__file__).parents[2] / "docs" / "compiled-code.md").read_text()
    _, named = page.split("at least half again of what would do")
    named, _ = named.split("\n## ", 1)
    rows = [
        (key.split()[0], kept) for of in counts.stored().values() for some in of.values() for key, kept in some.items()
    ]
    wasteful = {
        name
        for name, kept in rows
        if 32 * kept["sectors"] >= 1.5 * kept["useful_bytes"]
        or kept["wavefronts"] >= 1.5 * kept["least_wavefronts"] > 0
    }
    assert {name for name, _ in rows if f"`{name}`" in named} == wasteful


def test_the_command(monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    monkeypatch.setattr("tests.emulator.counts.rows", lambda architecture, T: [row()])
    assert main(["kernels", "--counts", "sm_90"]) == 0
    assert re.search(r"sm_90, 16 tokens.*\n.*shrink E=8\n +here", capsys.readouterr().out)
    assert main(["kernels", "--counts", "gfx942"]) == 2
    assert "gfx942" in capsys.readouterr().err
    with monkeypatch.context() as without:
        without.setenv("PATH", "")
        assert main(["kernels", "--counts"]) == 2
    assert "g++ is not installed" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tests.emulator", None)
    assert main(["kernels", "--counts"]) == 2
    assert "checkout" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("T", counts.TOKENS)
@pytest.mark.parametrize("architecture", counts.ARCHITECTURES)
def test_kernels_fetch_and_conflict_no_more_than_the_stored_table_says(architecture, T):
    """`make kernel-counts` shows what has changed; `python -m tests.emulator.counts --write` accepts it."""
    assert counts.worse(counts.rows(architecture, T), counts.stored()[architecture][str(T)]) == []
