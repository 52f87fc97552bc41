"""Which forwards count as an FFN block, and that a recognised form computes the same as the class's own forward."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import DistilBertConfig, Gemma3nTextConfig, GPTJConfig, ModernBertConfig, T5Config
from transformers.models.distilbert.modeling_distilbert import FFN
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP
from transformers.models.gptj.modeling_gptj import GPTJMLP
from transformers.models.modernbert.modeling_modernbert import ModernBertMLP
from transformers.models.t5.modeling_t5 import T5DenseActDense

from mos_kernels.ffn import ffn_forward
from mos_kernels.huggingface.blocks import recognise

WIDTH = 4


class NoRouter(nn.Module):
    def forward(self, x):
        return None


def computed_by_form(block, form, x):
    block.mos_router = NoRouter()
    return ffn_forward(block, form, x)


@pytest.mark.parametrize(
    "family, inputs, down",
    [
        ("llama", ("gate_proj", "up_proj"), "down_proj"),
        ("gemma2", ("gate_proj", "up_proj"), "down_proj"),
        ("phi3", ("gate_up_proj",), "down_proj"),
        ("gpt2", ("c_fc",), "c_proj"),
        ("phi", ("fc1",), "fc2"),
        ("gpt_neox", ("dense_h_to_4h",), "dense_4h_to_h"),
    ],
)
def test_known_blocks(family, inputs, down):
    model = tiny(family)
    block = next(module for module in model.modules() if type(module).__name__.endswith("MLP"))
    form = recognise(block)
    assert form.inputs == inputs and form.down == down and form.fused == (family == "phi3")


def test_blocks_with_dropout_in_the_middle_and_methods():
    modern = ModernBertMLP(ModernBertConfig(hidden_size=8, intermediate_size=16, mlp_dropout=0.5))
    form = recognise(modern)
    assert form.fused and form.hidden == ("drop",) and form.down == "Wo"
    distil = FFN(DistilBertConfig(dim=8, hidden_dim=16))
    assert recognise(distil).output == ("dropout",)
    distil.chunk_size_feed_forward = 2  # then it looks at the input's shape
    assert recognise(distil) is None
    assert recognise(GPTJMLP(16, GPTJConfig(n_embd=8, n_head=2, rotary_dim=2))).linears == ("fc_in", "fc_out")
    assert recognise(T5DenseActDense(T5Config(d_model=8, d_ff=16))) is None  # casts by the input's dtype


def test_activation_sparsity_is_not_dropped():
    def block(sparsity):
        config = Gemma3nTextConfig(
            hidden_size=8, intermediate_size=[16], num_hidden_layers=1, activation_sparsity_pattern=[sparsity]
        )
        return Gemma3nTextMLP(config)

    assert recognise(block(0.0)) is not None
    assert recognise(block(0.95)) is None


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)
        self.noise = 0.0

    def forward(self, x):
        return self.second(self.act(self.first(x)))


def variant(forward):
    return type("Variant", (Plain,), {"forward": forward})()


def _swallowed(self, x):
    with contextlib.suppress(Exception):
        x = x + 1
    return self.second(self.act(self.first(x)))


def _remembers(self, x):
    self.last = x
    return self.second(self.act(self.first(x)))


def _swallows_what_cannot_be_asked(self, x):
    with contextlib.suppress(Exception):
        x = self.act(x) if len(x) > 1 else x
    return self.second(self.act(self.first(x)))


def _adds_in_place(self, x):
    x.add_(1)
    return self.second(self.act(self.first(x)))


def _multiplies_in_place(self, x):
    hidden = self.first(x)
    gate = hidden
    gate *= self.act(x)
    return self.second(hidden)


def _counts(self, x):
    self.calls = 1
    return self.second(self.act(self.first(x)))


def _calls_for_nothing(self, x):
    self.act(x)
    return self.second(self.act(self.first(x)))


@pytest.mark.parametrize(
    "forward",
    [
        _swallows_what_cannot_be_asked,
        _adds_in_place,
        _multiplies_in_place,
        _counts,
        _calls_for_nothing,
        lambda self, x: self.second(self.act(self.first(*x))),
        lambda self, x: self.second(self.act(self.first(x))) + x,
        lambda self, x: self.second(self.act(self.first(x)) * 2),
        lambda self, x: self.second(2 * self.act(self.first(x))),
        lambda self, x: self.second(self.act(self.first(x) * self.first.weight.mean())),
        lambda self, x: self.second(self.act(self.first(x if x.mean() > 0 else -x))),
        lambda self, x: self.second(self.act(self.first(x if x == 1 else x))),
        lambda self, x: self.second(self.act(self.first(x if x.shape[0] > 1 else x))),
        lambda self, x: self.second(self.act(self.first(x if not isinstance(x, torch.Tensor) else x * x))),
        lambda self, x: self.second(self.act(self.first(nn.functional.dropout(x, 0.5, self.training)))),
        lambda self, x: self.second(self.act(self.first(x)) if self.training else self.first(x)),
        lambda self, x: self.second(self.first(x) if self.training else self.act(self.first(x))),
        lambda self, x: self.second(self.act(self.first(getattr(x, "half", x)))),
        lambda self, x: self.second(self.act(self.first(torch.relu(x)))),
        lambda self, x: self.second(self.act(nn.functional.linear(x, self.first.weight))),
        lambda self, x: self.second(self.act(self.first(torch.ones(4) * x))),
        lambda self, x: self.second(self.act(self.first(torch.cat([x, x])))),
        lambda self, x: self.second(self.act(checkpoint(self.first, x, use_reentrant=False))),
        lambda self, x: (self.second(self.act(self.first(x))),),
        lambda self, x: self.first(x),
        lambda self, x, scale=1.0: self.second(self.act(self.first(x))) * scale,
        lambda self, *x: self.second(self.act(self.first(x[0]))),
        _swallowed,
        _remembers,
    ],
)
def test_anything_else_in_the_forward_is_refused(forward):
    block = variant(forward)
    attributes = sorted(vars(block))
    assert recognise(block) is None and sorted(vars(block)) == attributes
    assert recognise(variant(lambda self, x: self.second(self.act(self.first(x))))) is not None


def test_a_patched_instance_is_refused():
    block = Plain()
    assert recognise(block) is not None
    block.forward = lambda x: x
    assert recognise(block) is None


class Same(Plain):
    def forward(self, x):
        return super().forward(x)


class Doubled(Plain):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_forward_through_super_is_seen_through():
    assert recognise(Same()) is not None
    assert recognise(Doubled()) is None


# any composition of children, products and halves: what is recognised computes the same


class Composed(nn.Module):
    """A block whose forward evaluates an expression over its children."""

    def __init__(self, expression):
        super().__init__()
        for name in ("a", "b", "c", "d"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, dtype=torch.float64))
        self.wide = nn.Linear(WIDTH, 2 * WIDTH, dtype=torch.float64)
        self.tanh, self.sigmoid = nn.Tanh(), nn.Sigmoid()
        self.expression = expression

    def forward(self, hidden_states):
        return self.evaluate(self.expression, hidden_states)

    def evaluate(self, expression, x):
        kind, *parts = expression
        if kind == "x":
            return x
        if kind == "mul":
            return self.evaluate(parts[0], x) * self.evaluate(parts[1], x)
        if kind == "halves":  # first · second of a wide linear, one of them activated
            gate, up = self.wide(self.evaluate(parts[0], x)).chunk(2, dim=-1)
            gate, up = (up, gate) if parts[1] else (gate, up)
            return self.tanh(gate) * up
        return getattr(self, kind)(self.evaluate(parts[0], x))


def expressions():
    leaf = st.just(("x",))
    one = ("a", "b", "c", "d", "tanh", "sigmoid")
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.tuples(st.sampled_from(one), inner),
            st.tuples(st.just("mul"), inner, inner),
            st.tuples(st.just("halves"), inner, st.booleans()),
        ),
        max_leaves=4,
    )


def ffn_like():
    """Expressions close to the forms, so that many are recognised."""
    act = st.sampled_from([(), ("tanh",), ("sigmoid", "tanh"), ("c",)])
    names = st.sampled_from(["a", "b", "c", "d", "tanh"])

    def build(gate, up, on_gate, on_up, hidden, down, after, shape, swap):
        x = ("x",)

        def through(modules, value):
            for module in modules:
                value = (module, value)
            return value

        if shape == "halves":
            core = ("halves", x, swap)
        elif shape == "plain":
            core = through(on_gate, (gate, x))
        else:
            sides = (through(on_gate, (gate, x)), through(on_up, (up, x)))
            core = ("mul", *(reversed(sides) if swap else sides))
        return through((*hidden, down, *after), core)

    shape = st.sampled_from(["halves", "plain", "gated"])
    return st.builds(build, names, names, act, act, act, names, act, shape, st.booleans())


@settings(max_examples=300, deadline=None)
@given(expression=st.one_of(ffn_like(), expressions()), seed=st.integers(0, 9))
def test_what_is_recognised_computes_the_same(expression, seed):
    torch.manual_seed(seed)
    block = Composed(expression)
    form = recognise(block)
    if form is not None:
        x = torch.randn(3, WIDTH, dtype=torch.float64)
        assert len(set(form.linears)) == len(form.linears)
        assert_close(computed_by_form(block, form, x), block(x), rtol=0, atol=0)


def test_the_property_above_meets_every_form():
    x = ("x",)
    gated = ("d", ("tanh", ("mul", ("b", x), ("sigmoid", ("a", x)))))
    assert recognise(Composed(gated)).inputs == ("a", "b")
    assert recognise(Composed(("tanh", ("d", ("halves", x, False))))).fused
    assert recognise(Composed(("d", ("halves", x, True)))) is None  # gate is the second half
    assert recognise(Composed(("d", ("tanh", ("a", x))))).linears == ("a", "d")
