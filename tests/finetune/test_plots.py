"""The plots of a run: written, not blank, and drawn from what they are given."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")
from finetune_setup import colours
from matplotlib.image import imread

from mos_kernels.finetune import plots

SPACES = ("hyperbolic", "hyperbolic", "spherical", "euclidean")


def curvature_log(layers, projections, steps=(0, 10, 20)):
    names = [f"bert.encoder.layer.{i}.{p}" for i in range(layers) for p in projections]
    return [{"step": s, "curvature": {name: [-0.3 - s / 100, -0.3, 0.3 + s / 50, 0] for name in names}} for s in steps]


def test_loss(tmp_path):
    log = [{"step": s, "loss": 1 / (s + 1)} for s in range(1, 40)] + [{"step": 40, "eval_loss": 0.4}]
    plots.plot_loss(log, tmp_path / "a.png")
    plots.plot_loss([entry for entry in log if "loss" in entry], tmp_path / "b.png")
    assert colours(tmp_path / "a.png") > 10
    assert (imread(tmp_path / "a.png") != imread(tmp_path / "b.png")).any()


@pytest.mark.parametrize(("layers", "projections"), [(1, ["fc"]), (2, ["a.dense", "b.dense"]), (28, ["up"])])
def test_curvature(tmp_path, layers, projections):
    plots.plot_curvature(curvature_log(layers, projections), SPACES, tmp_path / "c.png")
    assert colours(tmp_path / "c.png") > 10


def test_curvature_of_linears_without_a_layer_index(tmp_path):
    log = [{"step": s, "curvature": {"up": [-0.3, -s, 0.3, 0.0], "down": [-0.3, s, 0.3, 0.0]}} for s in range(3)]
    plots.plot_curvature(log, SPACES, tmp_path / "c.png")
    assert colours(tmp_path / "c.png") > 10


@pytest.mark.parametrize("routers", [1, 70])
def test_routing(tmp_path, routers):
    shares = {f"model.layers.{i}.mlp.mos_router": [1.0, 0.5, 0.3, 0.2] for i in range(routers)}
    plots.plot_routing(shares, SPACES, tmp_path / "r.png")
    assert colours(tmp_path / "r.png") > 10
