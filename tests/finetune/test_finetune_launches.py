"""The command as a process: under torchrun, reporting to TensorBoard, pushing to the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_setup import save_bert, sentences, write_tsv

pytestmark = pytest.mark.full
COMMAND = ("mos_kernels", "finetune")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", *COMMAND)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launches")
    data = write_tsv(folder / "rows.tsv", sentences(24))
    columns = ("--text-column", "sentence", "--label-column", "label")
    options = ("--model", save_bert(folder / "bert"), "--train-file", data, "--eval-size", 0.25, *columns)
    return (*options, "--r", 2, "--epochs", 1, "--batch-size", 3, "--use_cpu")


def launched(*arguments, **environment):
    root, arguments = Path(__file__).parents[2], map(str, arguments)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **environment}
    run = [sys.executable, "-m", *arguments]
    return subprocess.run(run, env=environment, cwd=root, capture_output=True, text=True, timeout=300)


def test_two_processes_share_the_batches_and_one_speaks_and_writes(options, tmp_path):
    done = launched(*TORCHRUN, *options, "--output", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("evaluation:  loss") == done.stdout.count("written: ") - 1 == 1, done.stdout
    assert "find_unused_parameters" not in done.stderr
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics["steps"] == 3  # 18 rows, 3 for each of 2 processes
    assert len((tmp_path / "two" / "predictions.jsonl").read_text().splitlines()) == 6
    assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").is_file()


def test_processes_that_would_each_train_alone_are_refused(options, tmp_path):
    alone = [option for option in options if option != "--use_cpu"]
    done = launched(*TORCHRUN, *alone, "--output", tmp_path / "out", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "written" not in done.stdout, done.stdout  # torchrun's own code
    assert "error: each of the 2 processes would train on all rows by itself: on CPUs give --use_cpu" in done.stderr
    assert not (tmp_path / "out").exists()


def test_tensorboard_gets_the_adapters_numbers(options, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    more = ("--report_to", "tensorboard", "--logging-steps", 2, "--output", tmp_path / "out")
    done = launched(*COMMAND, *options, *more)
    assert done.returncode == 0, done.stderr[-5000:]
    (file,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    found = events.EventAccumulator(str(file))
    found.Reload()
    assert {"train/loss", "eval/accuracy", "train/mos/curvature/hyperbolic_mean"} <= set(found.Tags()["scalars"])


@pytest.mark.parametrize("why", [{"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_a_push_that_cannot_be_is_refused_and_leaves_nothing(options, tmp_path, why):
    push = ("--push_to_hub", "--hub_model_id", "me/adapter", "--output", tmp_path / "out")
    done = launched(*COMMAND, *options, *push, HF_TOKEN="hf_none", **why)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-5000:]
    assert "error: --push_to_hub: " in done.stderr and "or drop the option" in done.stderr
    assert not (tmp_path / "out").exists()
