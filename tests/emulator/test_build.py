"""The interpreter is built once, whoever asks; what cannot be built or read is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import build, by_hand, encode, ptx


def test_a_machine_without_a_compiler_is_told_what_is_missing(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "g++ is not installed" in build.missing()


@pytest.mark.full
def test_processes_that_build_at_once_all_find_the_interpreter(tmp_path):
    command = [sys.executable, "-c", "from emulator import build; print(len(build.elementwise()))"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert {process.communicate()[0].strip() for process in both} == {str(len(build.elementwise()))}
    (folder,) = tmp_path.iterdir()
    assert [path.suffix for path in folder.iterdir()] == [".so"]


@pytest.mark.parametrize(
    "line",
    [
        "atom.global.add.f32 %r1, [%d1], %r2;", "bar.sync 1, 64;", "cp.async.bulk.commit_group;", "call foo;",
        "ld.local.b32 %r1, [%d1];", "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r2}, {%r3}, {%r4};",
        "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%r1}, %d5, %d6, 1, 1, 1;", "add.f32 %r1, %r2, nosuch;",
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_with_its_line(line):
    with pytest.raises(ptx.Unsupported, match="line [0-9]+"):
        encode.program(by_hand.module(line, 1))


def test_a_module_of_several_kernels_is_refused():
    one = by_hand.module("", 1)
    with pytest.raises(ptx.Unsupported, match="one kernel"):
        encode.program(one + one)


def test_what_triton_inlines_is_named_by_the_line_that_calls_it():
    files = '.file 1 "/here/mine.py"\n.file 2 "/there/triton/language/standard.py"\n'
    places = ".loc 2 293 36 // standard.py:293:36 @[ mine.py:64:20 ]\nbar.sync 0;\n.loc 1 7 0\nbar.sync 0;\n"
    barriers = [one for one in ptx.read(by_hand.module(places, 1) + files).statements if one.name == "bar.sync"]
    assert [one.source for one in barriers] == ["mine.py:64", "mine.py:7"]
