"""`python -m mos_kernels report`: what is read, one self-contained page that says it, and a browser that opens it."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

import pytest

from mos_kernels import MoSConfig
from mos_kernels.__main__ import main
from mos_kernels.run_report.charts import COLORS, _apart, number, padded_range, smooth, thinned, ticks
from mos_kernels.run_report.log import HISTORY, RunError, last_complete_checkpoint, read_run, write_lines

LAYERS, PROJECTIONS = 3, ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "firefox")


def entries(steps=40, every=2, config=None):
    """A history as MoSCallback writes it."""
    rng, config = random.Random(0), config or MoSConfig(r=2)
    names = [f"model.layers.{i}.{part}" for i in range(LAYERS) for part in PROJECTIONS]
    routers = [f"model.layers.{i}.mlp.mos_router" for i in range(LAYERS)]
    start = [0.3 * sign for sign in config.curvature_signs]
    found = [
        {"step": 0, "adapter": config.to_dict(), "settings": {"model": "Tiny<&>", "learning_rate": 3e-4},
         "curvature": dict.fromkeys(names, start)}
    ]  # fmt: skip
    for step in range(every, steps + 1, every):
        weights = [rng.random() + 0.1 for _ in start]
        entry = {"step": step, "loss": 2 / step, "learning_rate": 3e-4 * (1 - step / steps), "grad_norm": rng.random()}
        for space in ("hyperbolic", "spherical"):
            entry |= {f"mos/curvature/{space}_{kind}": rng.random() for kind in ("mean", "min", "max")}
        entry |= {f"mos/share/{space}": rng.random() for space in COLORS}
        entry |= {"mos/share/max": 0.3, "mos/entropy": 1.2, "mos/aux_loss": 1.1}
        entry["curvature"] = {name: [k + step * 1e-3 * rng.gauss(0, 1) for k in start] for name in names}
        entry["share"] = {name: [w / sum(weights) for w in weights] for name in routers}
        entry["entropy"] = {name: rng.random() for name in routers}
        found.append(entry)
    return [*found, {"step": steps, "eval_loss": 0.5, "eval_accuracy": 0.75, "eval_runtime": 1.0}]


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "my run"
    folder.mkdir()
    write_lines(folder / HISTORY, entries())
    return folder


def drawn(folder):
    """The page, parsed; it must be well-formed and fetch nothing."""
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]|src=|@import|url\(|<script|<link", text)
    assert not re.search(r"[ >\"](nan|inf|None)\b", text)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".report")] == []
    return ElementTree.fromstring(text)


def found(root, css):
    return [e for e in root.iter() if css in (e.get("class") or "").split()]


def captions(root):
    return ["".join(e.itertext()) for e in root.iter("figcaption")]


def test_the_page_of_a_history(run_folder, capsys):
    root = drawn(run_folder)
    assert "report.html" in capsys.readouterr().out
    panels = [e for e in root.iter("svg") if e.get("class") == "panel"]
    assert len(panels) == LAYERS * len(PROJECTIONS)
    for panel in panels:
        lines = found(panel, "line")
        assert [next(s for s in COLORS if s in e.get("class")) for e in lines] == list(MoSConfig().expert_spaces)
        assert len({e.get("class") for e in lines}) == 8 and all(
            len(re.findall("[ML]", e.get("d"))) == 21 for e in lines
        )
    assert len(found(root, "cell")) == LAYERS * 8
    text = captions(root)
    for name in ("loss", "learning rate", "gradient norm", "evaluation: accuracy", "entropy", "load-balancing", "κ̂"):
        assert any(name in caption for caption in text), name
    assert len(text) == 11 and "".join(root.find("head/title").itertext()) == "my run"
    settings = {row[0].text: row[1].text for row in next(e for e in root.iter() if e.get("class") == "settings")}
    assert settings["model"] == "Tiny<&>" and settings["learning_rate"] == "3e-4" and settings["adapter.r"] == "2"
    assert settings["adapter.spaces"] == "hyperbolic: 3, spherical: 3, euclidean: 2"


def test_the_charts_are_files_of_their_own_too(run_folder, tmp_path):
    drawn(run_folder)
    files = {name: run_folder / f"report-{name}.svg" for name in ("loss", "curvature", "routing")}
    assert {path.name for path in run_folder.glob("*.svg")} == {path.name for path in files.values()}
    for path in files.values():
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and float(root.get("width")) > 300
        assert "--c:#2171b5" in root[0].text and not re.search(r"[ >\"](nan|inf|None)\b", path.read_text())
        assert float(root.get("height")) == float(root.get("viewBox").split()[3])
    panels = [e for e in ElementTree.parse(files["curvature"]).iter() if e.get("class") == "panel"]
    assert len(panels) == LAYERS * len(PROJECTIONS) and len({(e.get("x"), e.get("y")) for e in panels}) == len(panels)
    assert main(["report", str(run_folder), "--output", str(tmp_path / "page.html")]) == 0
    assert len(list(tmp_path.glob("page-*.svg"))) == 3


def test_colours_in_light_and_dark(run_folder):
    drawn(run_folder)
    light, dark = (run_folder / "report.html").read_text().split("prefers-color-scheme: dark")
    for space, shades in COLORS.items():
        for i, shade in enumerate(shades):
            assert f".{space}.s{i}{{--c:{shade}}}" in light
            (darkened,) = re.findall(rf"\.{space}\.s{i}{{--c:(#\w+)}}", dark)
            assert darkened in shades[2:], "as dark as the ground"


def test_a_killed_run_and_numbers_that_are_none(run_folder):
    path = run_folder / HISTORY
    lines = path.read_text().splitlines()
    broken = json.loads(lines[5]) | {"loss": math.nan, "grad_norm": math.inf, "mos/entropy": math.nan}
    path.write_text("\n".join([*lines[:5], json.dumps(broken), *lines[6:10], lines[10][:70]]))
    assert read_run(run_folder).entries[-1]["step"] == 18
    assert len([e for e in drawn(run_folder).iter("svg") if e.get("class") == "panel"]) == 9


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_run_that_went_astray_says_so_and_its_lowest_loss_is_a_number(bad, run_folder):
    history = [{"step": 0}, {"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": bad}, {"step": 2, "eval_loss": 0.5}]
    write_lines(run_folder / HISTORY, [*history, {"step": 3, "loss": bad, "grad_norm": bad}])
    assert main(["report", str(run_folder)]) == 0
    facts = dict(re.findall("<div><b>(.*?)</b><span>(.*?)</span>", (run_folder / "report.html").read_text()))
    assert {text: value for value, text in facts.items()} == {
        "steps": "3", "training loss at the end": str(bad), "lowest evaluation loss, at step 2": "0.5"
    }  # fmt: skip


def test_a_checkpoint_shows_the_run_up_to_its_step(run_folder):
    checkpoint = run_folder / "checkpoint-10"
    checkpoint.mkdir()
    assert [e["step"] for e in read_run(checkpoint).entries] == [0, 2, 4, 6, 8, 10]


def test_a_trainer_without_the_callback(tmp_path):
    log = [{"step": s, "loss": 1 / s, "learning_rate": 1e-3} for s in (1, 2, 3)]
    for step, text in ((2, json.dumps({"global_step": 2, "log_history": log[:2]})), (3, '{"global_step": 3, "log_h')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-2"
    assert read_run(tmp_path).curve("loss") == [(1, 1.0), (2, 0.5)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 3, "max_steps": 3, "log_history": log}))
    assert len(read_run(tmp_path).curve("loss")) == 3
    root = drawn(tmp_path)
    assert captions(root) == ["loss (nats)", "learning rate"]


def test_a_finetune_folder(tmp_path):
    first, *rest = entries(config=MoSConfig.hydralora(4))
    settings = {"model": "base", "method": "hydralora", "adapter": first["adapter"]}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    write_lines(tmp_path / "log.jsonl", [{"step": 0, "curvature": first["curvature"]}, *rest])
    run = read_run(tmp_path)
    assert run.adapter == MoSConfig.hydralora(4) and run.settings["method"] == "hydralora"
    assert run.settings["adapter.num_experts_per_tok"] == 4
    assert "settings" in [e.get("class") for e in drawn(tmp_path).iter()]
    (tmp_path / "settings.json").write_text(json.dumps({"method": "lora", "adapter": {"r": 8}}))
    write_lines(tmp_path / "log.jsonl", [{"step": 1, "loss": 1.0}])
    assert read_run(tmp_path).adapter is None and captions(drawn(tmp_path)) == ["loss (nats)"]


def test_what_is_no_run_is_said(tmp_path, capsys):
    cases = {"is no folder": tmp_path / "absent", "holds no run": tmp_path}
    for message, folder in cases.items():
        assert main(["report", str(folder)]) == 2
        error = capsys.readouterr().err
        assert message in error and str(folder) in error
    (tmp_path / "log.jsonl").write_text("")
    (tmp_path / "settings.json").write_text('{"method"')
    with pytest.raises(RunError, match="settings.json is damaged"):
        read_run(tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({"adapter": {"spaces": {"flat": 1}}}))
    with pytest.raises(RunError, match="configuration cannot be read"):
        read_run(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_output_elsewhere_and_nothing_left_behind(run_folder, tmp_path, capsys):
    assert main(["report", str(run_folder), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file() and not (run_folder / "report.html").exists()
    assert main(["report", str(run_folder), "--output", str(tmp_path / "no folder" / "page.html")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_the_command_needs_no_transformers(run_folder):
    code = f"import sys; from mos_kernels.__main__ import main; assert main(['report', {str(run_folder)!r}]) == 0; "
    code += "assert not {'transformers', 'peft', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


def test_opened_in_a_browser(run_folder):
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on the PATH: apt-get install chromium")
    drawn(run_folder)
    page, shot = run_folder / "report.html", run_folder / "shot.png"
    with tempfile.TemporaryDirectory() as profile:
        if "firefox" in browser:
            command = [browser, "--headless", "--no-remote", "--profile", profile, "--screenshot", str(shot)]
        else:
            flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--window-size=1240,2600"]
            command = [browser, "--headless", *flags, f"--user-data-dir={profile}", f"--screenshot={shot}"]
        subprocess.run([*command, page.as_uri()], check=True, timeout=120, capture_output=True)
        if "firefox" not in browser:
            command[-1] = "--dump-dom"
            dom = subprocess.run(
                [*command, page.as_uri()], check=True, timeout=120, capture_output=True, text=True
            ).stdout
            assert dom.count('class="panel"') == LAYERS * len(PROJECTIONS) and dom.count('class="cell ') == LAYERS * 8
    pixels = pytest.importorskip("matplotlib.image").imread(shot)[::4, ::4, :3]
    shown = {tuple(round(255 * float(v)) for v in pixel) for row in pixels for pixel in row}
    assert len(shown) > 100, "a blank page"
    blue = [c for c in shown if c[2] > c[0] + 60]
    orange = [c for c in shown if c[0] > c[2] + 90]
    assert len(blue) > 10 and len(orange) > 10


# charts


def test_ticks_and_numbers():
    assert ticks(0, 1, 4) == [0, 0.25, 0.5, 0.75, 1.0] and ticks(-0.31, 0.3, 3) == [-0.25, 0.0, 0.25]
    assert [str(t) for t in ticks(-0.1, 0.1, 2)] == ["-0.1", "0.0", "0.1"]
    assert padded_range([0.0, 0.0]) == (-0.1, 0.1) and padded_range([math.nan]) == (-0.06, 1.06)
    assert padded_range([3e-4]) == pytest.approx((2.4e-4, 3.6e-4))
    assert ticks(5, 5, 3) == [5] and len(ticks(0, 3e-4, 5)) in (4, 5, 6, 7)
    assert [number(v) for v in (0.25, 1e-4, 3e-4, 12000, 0, -0.5, 1234567)] == [
        "0.25", "1e-4", "3e-4", "12,000", "0", "-0.5", "1.23e6",
    ]  # fmt: skip


def test_labels_keep_apart_and_points_are_thinned():
    placed = _apart([10.0, 10.0, 11.0, 200.0], 14, 4, 200)
    assert all(b - a >= 14 for a, b in zip(placed[:3], placed[1:3], strict=False)) and placed[3] == 200
    assert max(_apart([199.0, 200.0, 200.0], 14, 4, 200)) == 200
    points = [(i, float(i)) for i in range(1000)]
    assert len(thinned(points)) == 160 and thinned(points)[0] == points[0] and thinned(points)[-1] == points[-1]
    assert smooth([(0, 1.0), (1, math.nan), (2, 3.0)]) == [(0, 2.0), (2, 2.0)]


@pytest.mark.parametrize("state", ["[]", "{}", '{"global_step": null}', '{"global_step": "5", "log_history": 3}', "3"])
def test_json_that_is_no_trainer_state_is_no_run(state, tmp_path, capsys):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text(state)
    (tmp_path / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) is None
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("logged", [3, [{"step": 1, "loss": 2.0}, {"step": None}, 3, {"step": 4, "loss": "x"}]])
def test_entries_of_a_trainer_state_that_are_none_are_left_out(logged, tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 5, "log_history": logged}))
    assert len(read_run(tmp_path).entries) == (0 if logged == 3 else 2)
    drawn(tmp_path)
