"""An adapter's folder is written whole, whatever interrupts it; what a killed save left is removed."""

import contextlib
import os
import signal

import pytest
import torch
from tiny_models import ids, mos, snapshot, tiny
from torch.testing import assert_close

from mos_kernels.huggingface import apply_mos, atomic, load_adapter, save_adapter

CONFIG, WEIGHTS = atomic.CONFIG_NAME, atomic.WEIGHTS_NAME


def saved(folder):
    """A model with an adapter, which is saved in `folder`."""
    model = tiny("llama", torch.float64)
    apply_mos(model, mos(model))
    save_adapter(model, folder)
    return model


@pytest.mark.parametrize("stop_at", range(12))
def test_an_interrupted_save_never_leaves_a_mixture(tmp_path, monkeypatch, stop_at):
    old = saved(tmp_path)
    calls = []

    def interrupting(name):
        original = getattr(os, name)

        def call(*args):
            calls.append(name)
            if len(calls) > stop_at:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(os, name, call)

    new = tiny()
    apply_mos(new, mos(new, lora_alpha=5.0))
    for name in ("replace", "fsync"):
        interrupting(name)
    try:
        save_adapter(new, tmp_path)
        finished = True
    except KeyboardInterrupt:
        finished = False
    monkeypatch.undo()
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    fresh = tiny()
    if (tmp_path / CONFIG).exists():
        load_adapter(fresh, tmp_path)
        expected = new if finished or fresh(ids()).logits.equal(new(ids()).logits) else old
        assert_close(fresh(ids()).logits, expected(ids()).logits, rtol=0, atol=0)
    else:
        assert not finished
        before = snapshot(fresh)
        with pytest.raises(FileNotFoundError, match="interrupted"):
            load_adapter(fresh, tmp_path)
        assert snapshot(fresh) == before


# what interrupted saves leave


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed save is forked, and this system has no fork")
def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    process = os.fork()
    if process == 0:
        atomic._staged(contextlib.ExitStack(), tmp_path / WEIGHTS, b"much of it")
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    saved(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([CONFIG, WEIGHTS, "README.md"])


def test_two_saves_at_once_leave_each_others_files_alone(tmp_path, monkeypatch):
    original = atomic._staged

    def interleaved(stack, path, content):
        staged = original(stack, path, content)
        atomic._remove_abandoned(tmp_path)
        assert staged.read_bytes() == content
        return staged

    monkeypatch.setattr(atomic, "_staged", interleaved)
    model = saved(tmp_path)
    fresh = tiny()
    load_adapter(fresh, tmp_path)
    assert_close(fresh(ids()).logits, model(ids()).logits, rtol=0, atol=0)


def test_where_files_cannot_be_locked_nothing_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "fcntl", None)
    left = tmp_path / f".{WEIGHTS}.0.tmp"
    left.write_bytes(b"x")
    saved(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([left.name, CONFIG, WEIGHTS, "README.md"])


def test_a_file_in_place_of_the_folder_is_said(tmp_path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(FileExistsError, match="adapter is a file: name a folder"):
        saved(tmp_path / "adapter")
    assert (tmp_path / "adapter").read_text() == "mine"


def test_a_file_or_a_link_to_nothing_above_the_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file is a file, in which no folder can be"):
        saved(tmp_path / "file" / "adapter")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="link is a link to nothing: name a folder"):
        saved(tmp_path / "link")
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]
