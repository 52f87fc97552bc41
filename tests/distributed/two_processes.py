"""What the checks share: the models, this process's part of a batch, and the truth from one process."""

from __future__ import annotations

import copy
import functools

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from tiny_models import ids, mos, tiny
from torch import Tensor, nn

from mos_kernels import routing
from mos_kernels.ffn_node import Observer
from mos_kernels.huggingface import MoSPeftConfig, apply_mos
from mos_kernels.huggingface.modules import mos_adapters, router_owners

BATCH = 4


def plain(family: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny(family, dtype)
    if family == "bert":  # takes num_items_in_batch and leaves it unused: Trainer must do the dividing
        model.accepts_loss_kwargs = False
    return model


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """The same model in every process, in training mode."""
    model = plain(family, dtype)
    apply_mos(model, mos(model, **options))
    return model.train()


def with_peft(family: str = "llama", **options) -> PeftModel:
    """As `adapted`, with peft's get_peft_model."""
    model = plain(family)
    torch.manual_seed(0)
    return get_peft_model(model, MoSPeftConfig(**mos(model, **options).to_dict())).train()


def inputs(batch: int = BATCH, seed: int = 0, family: str = "llama") -> dict[str, Tensor]:
    tokens = ids(seed, batch=batch)
    if family == "bert":
        return {"input_ids": tokens, "labels": (torch.arange(batch) + seed) % 2}
    labels = tokens.clone()
    labels[:, 0] = -100  # never predicted, and the Trainer of transformers 5.0 counts it
    return {"input_ids": tokens, "labels": labels}


def own_part(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's half of a batch."""
    return {name: value.chunk(dist.get_world_size())[dist.get_rank()] for name, value in values.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by name, those of a sharded model gathered."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: whole(gradient) for name, gradient in found.items()}


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def truth(
    model: nn.Module, batches: list[dict[str, Tensor]], coefficient: float = 0.0, by_linears: bool = False
) -> dict[str, Tensor]:
    """Gradients of one process, by autograd alone: the mean loss of all batches plus the load-balancing loss, which is

        coefficient · mean over batches and routers of E·Σ f·P, f and P over that batch's tokens.

    model: of this process alone; its own injected gradient is switched off. by_linears: an FFN block calls its linears
    one by one, as where each is sharded by itself: in bfloat16 the two round in other places.
    """
    model = copy.deepcopy(model)
    model.zero_grad()
    terms = []
    if by_linears:
        for adapter in mos_adapters(model).values():
            adapter.register_forward_hook(lambda *_: None)

    def measure(owner, x):
        router = owner.weight if owner.config.router_scope == "ffn" else owner.mos_router
        logits = nn.functional.linear(x.to(router.dtype), router).flatten(0, -2)
        terms.append(routing.load_balancing_loss(logits, owner.config.num_experts_per_tok))

    for owner in router_owners(model).values():
        owner.mos_aux_weight.zero_()
        owner.register_forward_hook(Observer(functools.partial(measure, owner)), with_kwargs=True)
    loss = sum(model(**batch).loss for batch in batches) / len(batches)
    (loss + coefficient * sum(terms) / len(terms)).backward()
    return gradients(model)


def halves(values: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    parts = {name: value.chunk(dist.get_world_size()) for name, value in values.items()}
    return [dict(zip(parts, part, strict=True)) for part in zip(*parts.values(), strict=True)]


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Within `tolerance` of the largest gradient of each tensor in float64, of 1 or that in float32."""
    assert found.keys() == expected.keys() and found
    is_double = torch.float64 in {value.dtype for value in expected.values()}
    for name, value in expected.items():
        error, largest = (found[name] - value).abs().max().item(), value.abs().max().item()
        assert error <= tolerance * (largest if is_double else max(largest, 1.0)), (name, error, largest)
