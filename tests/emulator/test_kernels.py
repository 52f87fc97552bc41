"""Every kernel of the package as compiled for NVIDIA GPUs: right, the same in two schedules, and without a race."""

from __future__ import annotations

import re
from pathlib import Path

import activations
import pytest

from mos_kernels.backends import triton as backend

from . import launched, machine
from .trials import FP16, FP32, LISTS, few, mutated

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
OF_SM_100 = ("few", "defaults", "options")
"""The lists that run for sm_100 too, whose emulation is younger."""


def in_turn(number: int) -> str:
    return ("sm_80", "sm_90")[(number + number // 4) % 2]


def architectures(name: str, number: int, trial) -> tuple[str, ...]:
    """What a trial of a list runs for.

    Compiling is most of the time. So in turn, for one of two architectures, run the drawn layers, float16 where it is
    beside bfloat16, and float32 of large ranks: each architecture meets every option, and every dtype, in other trials.
    """
    if name == "drawn" or trial.dtype is FP16 and name != "few" or trial.dtype is FP32 and name == "large":
        return (in_turn(number),)
    return ARCHITECTURES if name in OF_SM_100 else ("sm_80", "sm_90")


def trials(*lists: str) -> list:
    """(trial, architecture) of the lists; all but the few are for `make test-full`."""
    full = {name: () if name == "few" else pytest.mark.full for name in lists}
    return [
        pytest.param(trial, architecture, id=f"{name}-{number}-{architecture}", marks=full[name])
        for name in lists
        for number, trial in enumerate(LISTS[name]())
        for architecture in architectures(name, number, trial)
    ]


@pytest.mark.budget(15)
@pytest.mark.parametrize(("trial", "architecture"), trials(*LISTS))
def test_compiled_kernels(trial, architecture):
    with launched.emulated(architecture) as log:
        failures = trial.failures()
    assert failures + problems(log, architecture) == [], str(trial)


def problems(log: launched.Log, architecture: str) -> list[str]:
    """What the launches did wrong, but for early reads of tensor memory in four kernels (docs/compiled-code.md)."""
    early = tuple(
        f"activated_{name}: a register touched while a wgmma, or a load of tensor memory, uses it"
        for name in ("norm", "expand", "input", "weight")
    )
    return [problem for problem in log.problems if architecture != "sm_100" or not problem.startswith(early)]


@pytest.mark.full
@pytest.mark.parametrize(("number", "trial"), list(enumerate(LISTS["options"]())))
def test_results_hold_where_instructions_are_as_inexact_as_they_may_be(number, trial):
    with launched.emulated(in_turn(number), [machine.Schedule(rough=True)]) as log:
        failures = trial.failures()
    assert failures + log.problems == [], str(trial)


@pytest.mark.full
@pytest.mark.parametrize("trial", [trial for trial in LISTS["dropout"]() if trial.dtype is FP32], ids=str)
def test_float32_with_dropout_on_sm_100(trial):
    """TF32, to which Triton 3.6 takes a product of a tile that a reshape laid out, is refused by the emulator."""
    with launched.emulated("sm_100") as log:
        failures = trial.failures()
    assert failures + log.problems == []


@pytest.mark.parametrize("trials", [few, pytest.param(mutated, marks=pytest.mark.full)])
def test_every_kernel_of_the_package_is_launched(trials):
    sources = Path(backend.__file__).parent.glob("*.py")
    defined = {name for path in sources for name in re.findall(r"@triton.jit.*\ndef (\w+)_kernel\(", path.read_text())}
    names = set()

    def note(kernel, grid, arguments, constants):
        names.add(kernel.fn.__name__.removesuffix("_kernel"))

    with launched.on_cpu("sm_90", note):
        for trial in trials():
            trial.failures()
    assert names == defined


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", list(activations.CODES))
def test_activations_as_compiled(name, architecture):
    with launched.emulated(architecture) as log:
        assert activations.failures(name) == []
    assert log.problems == []
