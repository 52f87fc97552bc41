"""Padding left out of load balancing: the routers of a model learn its attention mask."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from mos_kernels.huggingface.plan import router_owners
from mos_kernels.token_mask import TokenMask

_ATTRIBUTE = "_mos_token_mask"


def follow_attention_mask(model: nn.Module) -> None:
    """Let every router of `model` read the attention mask of the transformers model that it is in.

    That is the innermost one: an encoder's routers see the encoder's mask, a decoder's the decoder's, and calling a
    part alone (`model.model`) works too. `model` itself counts as one whatever its class. Calling this again adds what
    is new.
    """
    owners = set(router_owners(model, inactive=True).values())  # which may be set active later
    masks: dict[str, TokenMask] = {}
    for name, module in model.named_modules():
        outer = _innermost(masks, name)
        if (module is model or isinstance(module, PreTrainedModel)) and not owners.isdisjoint(module.modules()):
            if _ATTRIBUTE not in vars(module):
                setattr(module, _ATTRIBUTE, TokenMask(module, outer))
            masks[name] = getattr(module, _ATTRIBUTE)
        if module in owners:
            module.token_mask = _innermost(masks, name)


def forget_attention_mask(model: nn.Module) -> None:
    """Take away what `follow_attention_mask` put on the models."""
    for module in model.modules():
        if _ATTRIBUTE in vars(module):
            getattr(module, _ATTRIBUTE).remove()
            delattr(module, _ATTRIBUTE)


def _innermost(masks: dict[str, TokenMask], name: str) -> TokenMask | None:
    """The mask of the module itself, or of the nearest one around it."""
    while name not in masks and name:
        name = name.rpartition(".")[0]
    return masks.get(name)
