"""Gradients through adapted models: equal with and without both kinds of checkpointing, at every place for it."""

import pytest
import torch
from tiny_models import ids, mos, tiny
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from mos_kernels.huggingface import apply_mos
from mos_kernels.huggingface.modules import router_owners
from mos_kernels.layer import MoSLayer
from mos_kernels.routing import load_balancing_loss


class Checkpointed(nn.Module):
    def __init__(self, module, use_reentrant):
        super().__init__()
        self.module, self.use_reentrant = module, use_reentrant

    def forward(self, *args):
        return checkpoint(self.module, *args, use_reentrant=self.use_reentrant)


def adapted(family, **options):
    model = tiny(family)
    apply_mos(model, mos(model, router_aux_loss_coef=0.5, **options))
    return model.train()


def gradients(model):
    """Of a loss on fixed tokens, by name; the names that checkpointing wrappers add are taken out."""
    torch.manual_seed(7)
    model.zero_grad()
    embedded = model.get_input_embeddings()(ids()).detach().requires_grad_()
    output = model(inputs_embeds=embedded).logits
    (output.square().mean() + output.mean()).backward()
    found = {name.replace(".module.", "."): p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    return {**found, "input": embedded.grad}


def wrap_layers(model, use_reentrant):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model


def wrap_blocks(model, use_reentrant):
    for layer in model.model.layers if hasattr(model, "model") else model.transformer.h:
        layer.mlp = Checkpointed(layer.mlp, use_reentrant)
    return model


def wrap_one_linear(model, use_reentrant):
    block = (model.model.layers if hasattr(model, "model") else model.transformer.h)[0].mlp
    name = "down_proj" if hasattr(block, "down_proj") else "c_fc"
    setattr(block, name, Checkpointed(getattr(block, name), use_reentrant))
    return model


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("wrap", [wrap_layers, wrap_blocks, wrap_one_linear])
@pytest.mark.parametrize(
    "family, scope",
    [("llama", "ffn"), ("llama", "linear"), ("qwen2", "ffn"), ("gemma", "linear"), ("phi3", "ffn"), ("gpt2", "ffn")],
)
def test_checkpointing_changes_no_gradient(family, scope, wrap, use_reentrant):
    plain = gradients(adapted(family, router_scope=scope, lora_dropout=0.2))
    model = wrap(adapted(family, router_scope=scope, lora_dropout=0.2), use_reentrant)
    runs, target = [], "c_fc" if family == "gpt2" else "down_proj"
    inner = next(m for name, m in model.named_modules() if target in name and isinstance(m, MoSLayer))
    inner.register_forward_pre_hook(lambda *_: runs.append(1))
    assert_close(gradients(model), plain, rtol=1e-9, atol=1e-12)
    assert len(runs) == 2  # it did run again in backward


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_bert(use_reentrant):
    plain = gradients(adapted("bert"))
    assert_close(gradients(wrap_layers(adapted("bert"), use_reentrant)), plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "family, scope",
    [("llama", "ffn"), ("llama", "linear"), ("qwen2", "ffn"), ("gemma", "ffn"), ("gpt2", "ffn"), ("bert", "ffn")],
)
def test_the_injected_gradient_is_that_of_the_mean_load_balancing_loss(family, scope):
    coefficient = 0.5
    injected = gradients(adapted(family, router_scope=scope))

    model = tiny(family)
    apply_mos(model, mos(model, router_aux_loss_coef=0.0, router_scope=scope))
    without = gradients(model.train())
    owners, losses = router_owners(model), []

    def measure(owner, args, output):
        weight = getattr(owner, "mos_router", None)
        logits = nn.functional.linear(args[0], owner.weight if weight is None else weight).flatten(0, -2)
        losses.append(load_balancing_loss(logits, owner.config.num_experts_per_tok))

    for owner in owners.values():
        owner.register_forward_hook(measure)
    model.zero_grad()
    embedded = model.get_input_embeddings()(ids()).detach().requires_grad_()
    output = model(inputs_embeds=embedded).logits
    loss = output.square().mean() + output.mean() + coefficient * sum(losses) / len(owners)
    loss.backward()
    explicit = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(losses) == len(owners)
    assert_close(injected, {**explicit, "input": embedded.grad}, rtol=1e-6, atol=1e-9)
    router = next(name for name in explicit if "mos_router" in name)
    assert not torch.allclose(without[router], injected[router])


def test_no_load_balancing_in_eval_mode():
    model = tiny()
    apply_mos(model, mos(model, router_aux_loss_coef=0.0))
    assert_close(gradients(adapted("llama").eval()), gradients(model), rtol=0, atol=0)
