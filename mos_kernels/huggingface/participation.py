"""Whether every tensor of an adapter has an effect: `python -m mos_kernels doctor --model FOLDER`.

An adapter can be on a model without an effect: a loader may have rebuilt the linears, a forward may read a weight
without calling the linear, or the model may not use a module. One training step shows this.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mos_kernels.huggingface.base import load_base
from mos_kernels.huggingface.files import load_adapter, refuse_meta
from mos_kernels.huggingface.modules import (
    adapter_parameters,
    mos_adapters,
    mos_modules,
    own_adapter_parameters,
    unwrap,
)
from mos_kernels.huggingface.state import require_all_adapted
from mos_kernels.layer import MoSRouter, evaluating

LENGTH = 32
"""Of the sequence that the command runs."""


class Idle(NamedTuple):
    """A tensor of the adapter, or a linear, and why it does nothing."""

    name: str
    why: str


def idle_tensors(model: nn.Module, **inputs) -> list[Idle]:
    """Run one step of model(**inputs), and list the tensors of the active adapter that got no gradient or do nothing.

    The loss is that of the model if `inputs` have labels, else the mean of ‖y‖² over the vectors y of its first output.
    If B = 0, as at the start of training, A, router and curvature have no gradient yet; then the linear is listed once.
    Nor has the curvature if the B of all curved experts is 0, as after `start_from_lora`. Parameters, gradients and
    modes are unchanged afterwards. Raises ValueError if the model has no active adapter, if a linear has lost its
    adapter, if the model's weights were made under torch.inference_mode, if those of the adapter are on the meta
    device, or if the loss is not finite.
    """
    modules = mos_modules(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} has no active MoS adapter: load one first")
    frozen = next((name for name, tensor in model.named_parameters() if tensor.is_inference()), None)
    refuse_meta([], adapter_parameters(model))
    require_all_adapted(unwrap(model), within=True)
    if frozen is not None:
        raise ValueError(
            f"{frozen!r} was made under torch.inference_mode, and can have no gradient: load the model and its adapter "
            "outside of it"
        )
    ran: set[str] = set()
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: ran.add(name))
        for name, module in modules.items()
    ]
    try:
        with _one_step(model):
            output = model(**tree_map_only(Tensor, _outside_inference, inputs))
            loss = output.get("loss") if isinstance(output, dict) else None
            if not isinstance(loss, Tensor):
                parts = output.values() if isinstance(output, dict) else output
                first = output if isinstance(output, Tensor) else next(iter(parts))
                # of a mean over a large vocabulary, float16 holds no gradient
                loss = first.float().square().sum(-1).mean()
            if not loss.isfinite().all():
                raise ValueError(
                    f"the loss is {float(loss.detach())}: give inputs with labels that are not all ignored"
                )
            if loss.requires_grad:
                loss.backward()
            gradients = {id(p): p.grad for p in adapter_parameters(model).values()}
    finally:
        for handle in handles:
            handle.remove()
    idle, empty = [], {name for name, adapter in mos_adapters(model).items() if not adapter.mos_lora_B.any()}
    for name, module in modules.items():
        if name not in ran:
            idle.append(Idle(name, "never ran: the model's forward does not use this module"))
            continue
        if name in empty:
            idle.append(Idle(name, "adds nothing: B is zero, as before training"))
        for parameter, tensor in own_adapter_parameters(module).items():
            if parameter == "mos_curvature" and not any(module.config.curvature_signs):
                continue  # with Euclidean experts only, curvature has no effect
            expected = name in empty and parameter != "mos_lora_B"
            if parameter == "mos_curvature":
                curved = [sign != 0 for sign in module.config.curvature_signs]
                expected |= not module.mos_lora_B[:, curved].any()
            if isinstance(module, MoSRouter):
                expected = empty == set(mos_adapters(model))
            used = module.config.num_experts_per_tok if module.config.norm_topk_prob else module.config.num_experts
            if used == 1 and parameter in ("mos_router", "weight"):
                continue  # the one gate is 1
            gradient = gradients[id(tensor)]
            if not expected and (gradient is None or not gradient.any()):
                idle.append(Idle(f"{name}.{parameter}", "got no gradient"))
    return idle


@contextlib.contextmanager
def _one_step(model: nn.Module) -> Iterator[None]:
    """A context in eval mode in which only the adapter gets gradients. Everything is restored at the end."""
    adapter = list(adapter_parameters(model).values())
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(False)
        for parameter in adapter:
            parameter.requires_grad_(True)
        eager = torch.compiler.set_stance("force_eager")
        with evaluating(model), torch.inference_mode(False), torch.enable_grad(), eager:
            yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _outside_inference(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made under torch.inference_mode, which backward would refuse."""
    return tensor.clone() if tensor.is_inference() else tensor


def run(folder: Path, base: str | None = None) -> int:
    """`doctor --model FOLDER`. Returns 0 if every tensor of the adapter takes part, 1 if some do not, 2 for errors.

    folder: written by save_adapter, finetune or peft; it may also be the folder of the base model. base: the base
    model, if the folder does not name it.
    """
    try:
        model = load_base(folder, base)
        if not mos_modules(model):
            load_adapter(model, folder)
    except (OSError, ValueError) as error:
        print(f"error: {error}")
        return 2
    try:
        idle = idle_tensors(model, **_tokens(model))
    except Exception as error:  # of any type: a model may need other inputs than tokens
        own = f"call mos_kernels.huggingface.idle_tensors(model, **batch) with a batch of a {type(model).__name__}"
        print(f"error: a step on random tokens failed: {type(error).__name__}: {error}. Instead, {own}")
        return 2
    tensors = len(adapter_parameters(model))
    if not idle:
        print(f"{folder}: all {tensors} tensors of the adapter, on {len(mos_adapters(model))} linears, take part")
        return 0
    print(f"{folder}: of the {tensors} tensors of the adapter, these do not take part:")
    for name, why in idle:
        print(f"  {name}: {why}")
    return 1


def _tokens(model: nn.Module) -> dict[str, Tensor]:
    """Inputs of a language model or of a classifier of text: one sequence, with an end where the model knows one."""
    config = model.config.get_text_config()
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    ids = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    end = config.eos_token_id
    end = end[0] if isinstance(end, (list, tuple)) else end
    if end is not None:
        ids[:, -1] = end
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = ids
    return inputs
