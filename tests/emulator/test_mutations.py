"""What the emulator looks for is seen: the kernels' barriers, waits and fences, each taken out."""

from __future__ import annotations

import random

import pytest
import torch

from . import by_hand, encode, machine, mutations
from .mutations import NOTICED, REDUNDANT, UNEXPLAINED
from .test_races import OTHERS, OWN, PLANTED
from .trials import mutated


def became_of(body: str, number: int) -> tuple[str, str]:
    """The verdict on a program by hand without the site of this number, and why that site would be redundant."""
    program = encode.program(by_hand.module(OWN + OTHERS + body, 1))
    (memory,) = arguments = [torch.zeros(64, dtype=torch.int32)]

    def launch(program: encode.Program, *schedule, **options) -> machine.Result:
        memory.zero_()
        return machine.run(program, (1,), 2, 2048, arguments, *schedule, **options)

    site = mutations.sites(program)[number]
    taken_out = mutations.verdict_on(mutations.without(program, site), launch)
    return taken_out, mutations.why_redundant(program, site, launch)


@pytest.mark.parametrize("name", PLANTED)
def test_what_mends_a_race_is_noticed_when_taken_out_and_redundant_when_doubled(name):
    body, mending, _ = PLANTED[name]
    sites = mutations.sites(encode.program(by_hand.module(OWN + OTHERS + body.split("{}")[0].format(), 1)))
    assert became_of(body.format(mending), len(sites))[0] == NOTICED
    for which in range(2):  # of a doubled wait the second has nothing to wait for; of a doubled barrier either would do
        verdict, why = became_of(body.format(mending + "\n" + mending), len(sites) + which)
        assert verdict == REDUNDANT and why != UNEXPLAINED


def test_no_reason_is_given_for_a_barrier_that_is_needed():
    body, mending, _ = PLANTED["read what another warp wrote"]
    assert became_of(body.format(mending), 0) == (NOTICED, UNEXPLAINED)


@pytest.mark.full
@pytest.mark.parametrize("architecture", ["sm_90", "sm_80"])
def test_a_barrier_that_is_taken_out_is_noticed_or_was_redundant(architecture):
    """One in twelve, drawn, and of each instruction all up to the first that is noticed: of some there are few.

    `python -m tests.emulator.mutations` tries them all. Not every twelfth: unrolled loops repeat their sites, and a
    step through them meets the same ones again.
    """
    seen: set[str] = set()

    def chosen(number: int, instruction: str) -> bool:
        return instruction not in seen or random.Random(number).random() < 1 / 12

    def note(site: mutations.Site) -> None:
        if site.verdict == NOTICED:
            seen.add(site.instruction)

    found = mutations.tried(architecture, mutated(), chosen, note)
    noticed, redundant = ([site for site in found if site.verdict == verdict] for verdict in (NOTICED, REDUNDANT))
    # the machine and the slow judge agree on every one: neither sees what the other does not
    assert [str(site) for site in found if site.verdict not in (NOTICED, REDUNDANT)] == []
    # and a third way of seeing why, for each that both call redundant
    assert [str(site) for site in redundant if site.why == UNEXPLAINED] == []
    # so that none of the three is blind: most are noticed, and some of every instruction
    assert len(noticed) >= 20 and len(noticed) >= 4 * len(redundant)
    assert {site.instruction for site in found} == {site.instruction for site in noticed}
