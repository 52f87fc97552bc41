"""Which tokens of a batch are not padding: the attention mask of a model's forward, for the routers inside the model.

The modules between a model and its FFN blocks do not pass the mask on. So a forward pre-hook of the model stores it,
and the routers read it when they run. Autograd keeps the mask of each forward. Only layers that reentrant checkpointing
runs again read the mask again, after the model's forward has ended.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mos_kernels.huggingface.balance import warn_without_factor
from mos_kernels.huggingface.modules import PreHook, plain_name, router_owners

NAME = "attention_mask"
_ATTRIBUTE = "_mos_token_mask"
_READS_ENCODER = re.compile(
    r"(EncDecAttention|encoder_attn|cross_?attn|cross_?attention)\."
    r"(.*\.)?(k|v|key|value|k_proj|v_proj|key_proj|value_proj|c_attn)(\.mos_adapter\..*)?$"
)
"""The keys and values of cross-attention, by the names that transformers gives them."""


def follow_attention_mask(model: nn.Module) -> None:
    """Let every router of `model` read the attention mask of the transformers model that it is in.

    A router reads the mask of the innermost such model: an encoder's routers see the encoder's mask, a decoder's
    routers the decoder's. The keys and values of cross-attention read the encoder's states, so theirs is the mask of
    `model`. A part of the model may also be called alone (`model.model`). `model` itself counts as a transformers
    model, whatever its class. Call this again after routers were added.
    """
    owners = set(router_owners(model, inactive=True).values())  # inactive ones may be set active later
    masks: dict[str, TokenMask] = {}
    for name, module in model.named_modules():
        outer = _innermost(masks, name)
        if (module is model or isinstance(module, PreTrainedModel)) and not owners.isdisjoint(module.modules()):
            if _ATTRIBUTE not in vars(module):
                setattr(module, _ATTRIBUTE, TokenMask(module, outer))
            masks[name] = getattr(module, _ATTRIBUTE)
        if module in owners:
            module.token_mask = _innermost(masks, "" if _READS_ENCODER.search(plain_name(name)) else name)


def forget_attention_mask(model: nn.Module) -> None:
    """Undo `follow_attention_mask`."""
    for module in model.modules():
        if _ATTRIBUTE in vars(module):
            getattr(module, _ATTRIBUTE).detach(module)
            delattr(module, _ATTRIBUTE)


def _innermost(masks: dict[str, TokenMask], name: str) -> TokenMask | None:
    """The mask of the module itself, or of the nearest one around it."""
    while name not in masks and name:
        name = name.rpartition(".")[0]
    return masks.get(name)


def mask_names(model: nn.Module) -> Callable[[str, nn.Module], tuple[str, ...]]:
    """A function from a module of `model`, by name, to the model's arguments that may be the mask of its input."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return lambda name, module: (NAME,)
    encoder = set(getattr(model, "get_encoder", lambda: model)().modules())
    if model in encoder:
        return lambda name, module: (NAME, f"decoder_{NAME}")
    return lambda name, module: (NAME if module in encoder or _READS_ENCODER.search(name) else f"decoder_{NAME}",)


def of_tokens(mask: Tensor, x: Tensor) -> Tensor | None:
    """The mask as bool (...) of x (..., d); None if it is of another shape.

    Some models give their FFNs the tokens of all sequences in rows (batch·sequence, d).
    """
    if x.dim() == 2 == mask.dim() and mask.numel() == x.shape[0]:
        mask = mask.reshape(-1)
    if mask.shape != x.shape[:-1]:
        return None
    mask = mask.to(x.device, non_blocking=True)
    return mask if mask.dtype == torch.bool else mask != 0


def fitting(masks: Iterable[Tensor | None], x: Tensor) -> Tensor | None:
    """The first of the masks that is of the tokens of x (..., d), as in `of_tokens`; None if none is."""
    found = (of_tokens(mask, x) for mask in masks if isinstance(mask, Tensor))
    return next((mask for mask in found if mask is not None), None)


class TokenMask(PreHook):
    """The attention mask of the latest forward of `module`. This object is the forward pre-hook that stores it.

    A thread sees the mask of its own latest forward with gradients. CUDA runs backward in other threads, which see the
    latest mask on their device. Copies and pickles of the module have a copy of this object without a mask.
    """

    def __init__(self, module: nn.Module, outer: TokenMask | None = None):
        """outer: the mask of a module around this one, used if this one gets a mask that is not (batch, sequence)."""
        parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        self.position = parameters.index(NAME) if NAME in parameters else None
        self.outer = outer
        self._forget()
        self.attach(module, with_kwargs=True)

    def of(self, x: Tensor) -> Tensor | None:
        """Which tokens of x (..., d) are not padding, bool (...); None without a mask, or with one of another shape."""
        mask = self._current(x.device)
        return None if mask is None else of_tokens(mask, x)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not torch.is_grad_enabled():  # no backward follows; the backward of an earlier forward may need its mask
            return
        if not torch.compiler.is_compiling() and self._is_first and self.outer is None and module.training:
            self._is_first = False
            warn_without_factor(module)
        mask = kwargs.get(NAME)
        if mask is None and self.position is not None and len(args) > self.position:
            mask = args[self.position]
        if isinstance(mask, Tensor) and mask.dim() == 2:
            # under compile this hook may become a graph of its own; without an operation it does not
            self._note(mask if torch.compiler.is_compiling() else mask != 0)
        elif mask is None or self.outer is None:
            self._note(None)
        else:
            self._note(self.outer._current(None))

    def _note(self, mask: Tensor | None) -> None:
        self._traced = mask
        if torch.compiler.is_compiling():
            return
        task = torch._C._current_graph_task_id()  # -1 outside of backward
        self._thread.noted = task, mask
        if task == -1:
            others = {} if mask is None else {d: m for d, m in self._latest.items() if d != mask.device}
            self._latest = others if mask is None else {**others, mask.device: mask}

    def _current(self, device: torch.device | None) -> Tensor | None:
        if torch.compiler.is_compiling():  # an attribute becomes an input of the graph if it was set outside the graph
            return self._traced
        task, mask = getattr(self._thread, "noted", (None, None))
        if task in (-1, torch._C._current_graph_task_id()):
            return mask
        return self._latest.get(device) if device in self._latest else next(reversed(self._latest.values()), None)

    def _forget(self) -> None:
        self._thread = threading.local()
        self._latest: dict[torch.device, Tensor] = {}
        self._traced: Tensor | None = None
        self._is_first = True

    def __getstate__(self) -> dict:
        return {"position": self.position, "outer": self.outer, "_number": self._number}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forget()
