"""Which backend runs, and what cannot be had."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

import mos_kernels
from mos_kernels import MoSConfig, MoSLinear, MoSRouter, doctor
from mos_kernels.backends import BACKENDS, load_backend, resolve_backend, selected_backend, why_not_triton

X = torch.ones(2, 4)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_auto_is_eager_on_the_cpu(no_interpreter):
    assert selected_backend() == "auto"
    assert resolve_backend("auto", X) == "eager"
    assert load_backend("eager").__name__ == "mos_kernels.backends.eager"


def test_auto_stays_eager_on_the_cpu_also_where_the_interpreter_is_on(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("auto", X) == "eager"


@pytest.mark.parametrize("select", ["set_backend", "MOS_BACKEND"])
def test_a_selection_holds_for_calls_that_choose_none(monkeypatch, no_interpreter, select):
    if select == "set_backend":
        mos_kernels.set_backend("triton")
    else:
        monkeypatch.setenv("MOS_BACKEND", "triton")
    assert selected_backend() == "triton"
    with pytest.raises(ValueError, match="backend='triton' cannot run this input"):
        resolve_backend("auto", X)
    assert resolve_backend("eager", X) == "eager"
    layer = MoSLinear(4, 3, config=MoSConfig(router_scope="linear"))
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        layer(X)
    assert layer(X, backend="eager").shape == (2, 3)


def test_set_backend_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("MOS_BACKEND", "triton")
    mos_kernels.set_backend("eager")
    assert resolve_backend("auto", X) == "eager"
    mos_kernels.set_backend("auto")
    assert resolve_backend("auto", X) == "eager"


@pytest.mark.parametrize("name", ["cuda", "", "Triton", None])
def test_an_unknown_backend_is_refused(monkeypatch, name):
    for attempt in (lambda: mos_kernels.set_backend(name), lambda: resolve_backend(name, X)):
        with pytest.raises(ValueError, match="is no backend") as error:
            attempt()
        assert all(choice in str(error.value) for choice in BACKENDS)
    assert selected_backend() == "auto"
    if name is not None:
        monkeypatch.setenv("MOS_BACKEND", name)
        with pytest.raises(ValueError, match="MOS_BACKEND"):
            selected_backend()


def test_triton_on_a_cpu_tensor_needs_the_interpreter(no_interpreter):
    with pytest.raises(ValueError, match="is on cpu, and TRITON_INTERPRET=1") as error:
        resolve_backend("triton", X)
    assert "Use backend='eager' or 'auto'" in str(error.value)


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_float64_on_triton_is_refused(monkeypatch, interpret):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(ValueError, match="is float64"):
        resolve_backend("triton", X.double())
    layer = MoSLinear(4, 3, config=MoSConfig(router_scope="linear"), dtype=torch.float64)
    router = MoSRouter(4, MoSConfig())
    for call in (layer, router):
        with pytest.raises(ValueError, match="is float64"):
            call(X.double(), backend="triton")


@needs_triton
def test_with_the_interpreter_a_cpu_tensor_is_refused_only_for_want_of_kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reason = why_not_triton(X)
    assert reason is None or "has no Triton kernels" in reason


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find_spec(name, *a))
    with pytest.raises(ValueError, match="pip install triton"):
        resolve_backend("triton", X)


def test_importing_the_package_needs_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import mos_kernels; new = set(sys.modules) - before; "
        "print(sorted({name.split('.')[0] for name in new} & {'triton', 'transformers', 'peft', 'accelerate'}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_doctor_names_a_backend_that_does_not_exist(monkeypatch, capsys):
    monkeypatch.setenv("MOS_BACKEND", "cuda")
    assert doctor.run() == 1
    assert "MOS_BACKEND: 'cuda' is no backend" in capsys.readouterr().out


@needs_triton
def test_doctor_tries_every_backend_that_it_says_can_run(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("MOS_BACKEND", raising=False)
    tried = []
    monkeypatch.setattr(doctor, "_check", lambda device, dtype, backend: tried.append(backend) or 0)
    assert doctor.run() == 0
    assert "triton: can run here" in capsys.readouterr().out
    assert set(tried) == {"eager", "triton"}
