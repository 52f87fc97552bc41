"""torch.compile of whole models: one graph, no more compilations than the frozen model's, and the same numbers."""

import contextlib

import pytest
import torch
import transformers
from balance import adapted, values
from everyday import full_but
from tiny_models import DECODERS, FAMILIES, MATRIX, ids, layers_of, tiny
from tiny_models import batch as labelled
from torch.testing import assert_close
from transformers import StaticCache, Trainer, TrainingArguments

from mos_kernels.huggingface import MoSCallback, routing_report
from mos_kernels.huggingface.modules import adapter_parameters, router_owners
from mos_kernels.huggingface.routing_report import measured_routing

pytestmark = pytest.mark.unpoisoned
STEPS = 10
every_family = pytest.mark.parametrize("family", full_but(("llama",), MATRIX))


@pytest.fixture(autouse=True)
def one_layer(monkeypatch):
    """Graphs of one layer, and nothing left from another test's compilations."""
    for _, _, options in FAMILIES.values():
        if "num_hidden_layers" in options:
            monkeypatch.setitem(options, "num_hidden_layers", 1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that remembers its graphs, and how many operations each has."""

    def __init__(self):
        self.sizes = []

    def __call__(self, graph, inputs):
        self.sizes.append(len(graph.graph.nodes))
        return graph


def batch(i):
    """Another length, and another padding, each time."""
    tokens = ids(i, batch=3, length=7 + i)
    mask = torch.ones_like(tokens)
    mask[0, : 2 + i % 3] = mask[1, -1 - i % 2 :] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


def frozen(family):
    """The model without an adapter, something in which is trained."""
    model = tiny(family, torch.float32).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name.lower())
    return model


def compilations(model, prepare=lambda i: contextlib.nullcontext(), train=True):
    """How many graphs there are after each of ten steps."""
    backend, counts = Counting(), []
    compiled = torch.compile(model, backend=backend)
    for i in range(STEPS):
        with prepare(i), torch.set_grad_enabled(train):
            output = compiled(**batch(i))
        if train:
            output.logits.square().mean().backward()
        counts.append(len(backend.sizes))
    return counts


FIXED_THEN_ANY_LENGTH = [1] + [2] * (STEPS - 1)


@every_family
def test_the_frozen_model_compiles_for_its_first_length_and_for_any(family):
    assert compilations(frozen(family)) == FIXED_THEN_ANY_LENGTH


@pytest.mark.parametrize(
    ("family", "scope"),
    full_but([("llama", "ffn")], [("llama", "ffn"), ("qwen2", "linear"), ("gemma", "ffn"), ("bert", "ffn")]),
)
@pytest.mark.budget(12)
def test_ten_steps_of_training_compile_no_more(family, scope):
    """With what MoSCallback does between them: other aux weights at every step, hooks at some."""
    model, measured = adapted(family=family, router_scope=scope).train(), []

    @contextlib.contextmanager
    def prepare(i):
        for owner in router_owners(model).values():
            owner.mos_aux_weight.fill_(i + 1.0)
        if i % 4 != 1:
            yield
            return
        with measured_routing(model) as statistics:
            yield
        measured.append((i, statistics))

    counts = compilations(model, prepare)
    assert max(counts) == 2 and counts[2] == 2, "the second step is measured, and compiles nothing"
    assert [i for i, _ in measured] == [1, 5, 9]
    for i, statistics in measured:
        assert {s.tokens for s in statistics.values()} <= {int(batch(i)["attention_mask"].sum()), 3}  # BERT's pooler: 3


@every_family
@pytest.mark.budget(6)
def test_ten_steps_of_evaluation_compile_no_more(family):
    assert compilations(adapted(family=family).eval(), train=False) == FIXED_THEN_ANY_LENGTH


@pytest.mark.parametrize(
    ("family", "scope"),
    full_but([("bert", "ffn")], [("llama", "linear"), ("qwen2", "ffn"), ("gemma", "ffn"), ("bert", "ffn")]),
)
@pytest.mark.budget(10)
def test_one_graph_with_the_gradients_of_eager(family, scope):
    """Masks that change from step to step are in them: none is stale."""
    model = adapted(family=family, router_scope=scope).train()
    backend = "aot_eager" if family == "llama" else "eager"  # which traces no backward, and takes a third of the time
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for i in range(3):
        found = []
        for call in (model, compiled):
            model.zero_grad()
            call(**batch(i)).logits.square().mean().backward()
            found.append({name: p.grad.clone() for name, p in adapter_parameters(model).items()})
        for name, gradient in found[0].items():
            error = (found[1][name] - gradient).abs().max()
            assert error <= 1e-5 * gradient.abs().max() + 1e-9, f"{i} {name}: {error}"


@every_family
@pytest.mark.budget(10)
def test_layers_compiled_one_by_one_see_the_mask_too(family):
    """Then the note is taken outside the graphs, whose input the mask is."""
    model = adapted(family=family).train()
    expected = []
    for i in range(3):
        model.zero_grad()
        model(**batch(i)).logits.square().mean().backward()
        expected.append({name: p.grad.clone() for name, p in adapter_parameters(model).items()})
    backend = Counting()
    for layer in layers_of(model):
        layer.compile(backend=backend, fullgraph=True)
    for i in range(3):
        model.zero_grad()
        model(**batch(i)).logits.square().mean().backward()
        for name, gradient in expected[i].items():
            error = (dict(model.named_parameters())[name].grad - gradient).abs().max()
            assert error <= 1e-5 * gradient.abs().max() + 1e-9, f"{i} {name}: {error}"
    assert len(backend.sizes) == 2


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.budget(8)
def test_generation_with_a_static_cache(family):
    """Greedy decoding through compiled steps finds what generate does; one graph to read the prompt, one a token."""
    counts = []
    for model in (tiny(family, torch.float32), adapted(family=family).eval()):
        torch._dynamo.reset()
        tokens = ids(0, batch=2, length=6)
        expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False,
                                  min_new_tokens=6)  # fmt: skip
        backend, cache = Counting(), StaticCache(config=model.config, max_cache_len=16)
        compiled, found = torch.compile(model, backend=backend, fullgraph=True), tokens
        with torch.no_grad():
            for _ in range(6):
                step = found if found is tokens else found[:, -1:]
                start = found.shape[1] - step.shape[1]
                positions = torch.arange(start, found.shape[1]).unsqueeze(0)
                try:
                    output = compiled(step, past_key_values=cache, position_ids=positions, use_cache=True)
                except torch._dynamo.exc.InternalTorchDynamoError:
                    if counts:
                        raise
                    pytest.skip(f"transformers {transformers.__version__} does not compile {family} without an adapter")
                logits = output.logits[:, -1]
                logits[:, model.config.eos_token_id] = -torch.inf
                found = torch.cat([found, logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(found, expected)
        counts.append(len(backend.sizes))
    assert counts[1] <= counts[0]


@every_family
@pytest.mark.full
def test_a_compiled_trainer_measures_and_logs(tmp_path, family):
    """torch_compile=True with a log at every step: the routing of one step in ten, the rest stays compiled."""
    samples = [{name: values[0] for name, values in labelled(family, i, 1, 6).items()} for i in range(12)]
    after = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = adapted(family=family)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=1, use_cpu=True, report_to=[], disable_tqdm=True,
            num_train_epochs=1, logging_steps=1, save_strategy="no", learning_rate=1e-2, torch_compile=compiled,
            torch_compile_backend="eager" if compiled else None,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=samples)
        MoSCallback.add_to(trainer)
        trainer.train()
        after.append(values(model))
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        measured = [entry["step"] for entry in logs if "mos/entropy" in entry]
        assert measured == ([1, 11] if compiled else list(range(1, 13)))
        assert all("mos/curvature/spherical_mean" in entry for entry in logs)
    for name, value in after[0].items():
        assert_close(after[1][name], value, rtol=1e-3, atol=1e-4)


@every_family
def test_routing_report_of_a_compiled_model(family):
    model = adapted(family=family).eval()
    expected = routing_report(model, **batch(0))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(**batch(0))
    found = routing_report(compiled, **batch(0))
    assert [row["share"] for row in found] == [row["share"] for row in expected]
