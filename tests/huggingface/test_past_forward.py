"""Linears whose weight is read past their forward: refused through both doors, and none in transformers is missed."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from tiny_models import snapshot, tiny
from torch import nn
from transformers import BloomConfig, BloomModel, MambaConfig, MambaModel, RwkvConfig, RwkvModel

from mos_kernels import MoSConfig
from mos_kernels.huggingface import MoSPeftConfig, apply_mos
from mos_kernels.huggingface.past_forward import _READERS, why_past_forward

CALLED_TOO = {
    # called, after its weight's dtype was asked for
    *(
        (f"{name}DenseActDense", "wo")
        for name in ["T5", "MT5", "UMT5", "LongT5", "Udop", "Pop2Piano", "SwitchTransformers"]
    ),
    *((f"{name}DenseGatedActDense", "wo") for name in ["T5", "MT5", "UMT5", "Udop", "Pop2Piano", "Pix2StructText"]),
    ("Pix2StructVisionMlp", "wo"),
    ("Kosmos2_5VisionMlp", "wo"),
    ("NllbMoeDenseActDense", "fc2"),
    ("SeamlessM4TFeedForwardNetwork", "fc2"),
    ("SeamlessM4Tv2FeedForwardNetwork", "fc2"),
    # read in a branch that pretraining alone takes
    ("DisentangledSelfAttention", "in_proj"),
}


def refused(model, door, **options) -> str:
    before = snapshot(model)
    with pytest.raises(TypeError) as caught:
        door(model, **options)
    assert snapshot(model) == before
    return str(caught.value)


def own(model, **options):
    apply_mos(model, MoSConfig(r=2, **options))


def through_peft(model, **options):
    get_peft_model(model, MoSPeftConfig(r=2, **options))


@pytest.mark.parametrize("door", [own, through_peft])
@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["linear2"], ["out_proj"], "all-linear"])
def test_torchs_encoder_layer(door, targets):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    message = refused(model, door, target_modules=targets)
    assert "Leave it out with exclude_modules" in message
    if "out_proj" not in targets and targets != "all-linear":
        assert "TransformerEncoderLayer reads its weight itself in inference" in message


@pytest.mark.parametrize("door", [own, through_peft])
@pytest.mark.parametrize("target", ["x_proj", "dt_proj", "out_proj"])
def test_mamba(door, target):
    model = MambaModel(MambaConfig(vocab_size=8, hidden_size=8, state_size=4, num_hidden_layers=1))
    message = refused(model, door, target_modules=[target])
    assert f"layers.0.mixer.{target}'" in message and "MambaMixer hands its weight to fused kernels" in message


def test_mambas_other_linear_is_adapted():
    model = MambaModel(MambaConfig(vocab_size=8, hidden_size=8, state_size=4, num_hidden_layers=1))
    assert apply_mos(model, MoSConfig(r=2, target_modules=["in_proj"])) == ["layers.0.mixer.in_proj"]


def test_rwkv_divides_its_weights_in_inference():
    model = RwkvModel(RwkvConfig(vocab_size=8, hidden_size=8, num_hidden_layers=2))
    assert "RwkvFeedForward divides its weight" in refused(model, own, target_modules=["feed_forward.value"])
    apply_mos(model, MoSConfig(r=2, target_modules=["attention.value"]))


def test_bloom_only_where_it_slices():
    options = {"vocab_size": 8, "hidden_size": 8, "n_layer": 1, "n_head": 2}
    targets = ["dense_h_to_4h", "dense_4h_to_h"]
    sliced = BloomModel(BloomConfig(**options, pretraining_tp=2, slow_but_exact=True))
    assert "BloomMLP multiplies by slices" in refused(sliced, own, target_modules=targets)
    assert len(apply_mos(BloomModel(BloomConfig(**options)), MoSConfig(r=2, target_modules=targets))) == 2


def test_a_class_of_the_same_name_elsewhere_is_not_meant():
    class TransformerEncoderLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear1 = nn.Linear(4, 4)

    class Mine(nn.TransformerEncoderLayer):
        pass

    assert why_past_forward(TransformerEncoderLayer(), "linear1") is None
    assert "Mine reads" in why_past_forward(Mine(4, 2, 8), "linear1")
    assert why_past_forward(tiny().model.layers[0].mlp, "up_proj") is None


def test_torchs_encoder_layer_still_does():
    """Where it stops, the table may let it go: here the fast path skips the forward of its linears."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    called = []
    layer.linear1.forward = lambda x: called.append(x)
    with torch.no_grad():
        layer(torch.zeros(1, 3, 16))
    assert not called


READ = re.compile(r"self\.(\w+)\.(?:weight|bias)\b(?!\.(?:dtype|device|shape|data)\b)")
MADE = re.compile(r"self\.(\w+) = (?:nn\.)?(?:Linear|Conv1D)\(")


def read_past_forward(source: str) -> Iterator[tuple[str, str]]:
    """(class, linear) for linears of a class whose weight or bias a method reads that does not draw it."""
    for kind in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        linears = set(MADE.findall(ast.unparse(kind)))
        for method in (node for node in kind.body if isinstance(node, ast.FunctionDef) and "init" not in node.name):
            yield from ((kind.name, name) for name in linears.intersection(READ.findall(ast.unparse(method))))


def test_none_in_the_installed_transformers_is_missed():
    found = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        source = path.read_text(encoding="utf-8")
        if not set(MADE.findall(source)).isdisjoint(READ.findall(source)):
            found |= set(read_past_forward(source))
    known = {(kind, child) for kind, (children, _) in _READERS.items() for child in children.split()}
    assert found - known - CALLED_TOO == set()
    assert len(found & known) > 20
