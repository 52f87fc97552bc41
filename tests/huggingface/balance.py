"""What a trainer injects, by hand: the gradient of the load-balancing loss of the batches that it really ran."""

import contextlib

import torch
from tiny_models import mos, tiny
from torch import nn

from mos_kernels.huggingface import apply_mos
from mos_kernels.huggingface.modules import adapter_parameters, router_owners
from mos_kernels.routing import load_balancing_loss

COEFFICIENT = 5.0


def adapted(coefficient=COEFFICIENT, family="llama", **options):
    """A float32 model that starts the same whatever the coefficient is."""
    model = tiny(family, torch.float32)
    apply_mos(model, mos(model, router_aux_loss_coef=coefficient, **options))
    return model


def values(model):
    return {name: p.detach().clone() for name, p in adapter_parameters(model).items()}


def batches_seen(model):
    """The arguments of every forward in training mode, filled while the model trains."""
    seen = []

    def note(module, args, kwargs):
        if module.training and torch.is_grad_enabled():
            seen.append({k: v for k, v in kwargs.items() if k in ("input_ids", "attention_mask", "position_ids")})

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def balance_gradients(batches, autocast=False, family="llama", **options):
    """Of COEFFICIENT times the mean over routers of E·Σ f·P over real tokens, averaged over the batches."""
    model, terms = adapted(0.0, family, **options).train(), []
    owners, mask = router_owners(model), [None]

    def measure(owner, args, output):
        weight = getattr(owner, "mos_router", None)
        with torch.autocast("cpu", enabled=False):
            logits = nn.functional.linear(args[0].float(), owner.weight if weight is None else weight)
        kept = logits.flatten(0, -2) if mask[0] is None else logits[mask[0] != 0]
        terms.append(load_balancing_loss(kept, owner.config.num_experts_per_tok) / len(owners) / len(batches))

    for owner in owners.values():
        owner.register_forward_hook(measure)
    for batch in batches:
        mask[0] = batch.get("attention_mask")
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            model(**batch)
    (COEFFICIENT * sum(terms)).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in adapter_parameters(model).items()}


def assert_injected(with_balance, without, expected, lr, bf16):
    """After one step of SGD the two models differ by lr times the gradient that is to be injected.

    In bf16 only the routers' is looked at: the others' is small beside what the loss's own varies by from run to run.
    """
    tolerance = 0.1 if bf16 else 1e-3
    expected = {name: gradient for name, gradient in expected.items() if not bf16 or "mos_router" in name}
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        difference, wanted = (without[name] - with_balance[name]) / lr, gradient.abs().max()
        error = (difference - gradient).abs().max()
        assert error <= tolerance * (wanted + largest / 100) + 1e-6, f"{name}: {error:.3g} of {wanted:.3g}"
    assert any(gradient.abs().max() > 1e-3 for name, gradient in expected.items() if "mos_router" in name)
