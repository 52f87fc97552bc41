"""φ and φ' of every activation against float64; tests/emulator runs the same as compiled."""

from __future__ import annotations

import activations
import pytest


@pytest.mark.parametrize("name", list(activations.CODES))
def test_activations_are_as_near_to_float64_as_those_of_torch(name):
    assert activations.failures(name) == []
