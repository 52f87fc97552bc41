"""Which tokens of a batch are real: the attention mask of a model's forward, for the routers inside the model.

Nothing between a model and its FFN blocks hands the mask on, so a pre-hook of the model notes it and the routers ask
for it when they run. What autograd saved keeps the mask it was made with; only a part that reentrant checkpointing
runs again asks anew, after its forward is over.
"""

from __future__ import annotations

import inspect
import threading

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mos_kernels.huggingface.balance import warn_without_factor
from mos_kernels.huggingface.modules import PreHook, router_owners

NAME = "attention_mask"
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
            getattr(module, _ATTRIBUTE).detach(module)
            delattr(module, _ATTRIBUTE)


def _innermost(masks: dict[str, TokenMask], name: str) -> TokenMask | None:
    """The mask of the module itself, or of the nearest one around it."""
    while name not in masks and name:
        name = name.rpartition(".")[0]
    return masks.get(name)


class TokenMask(PreHook):
    """The attention mask that the latest forward of `module` was given; itself the module's forward pre-hook.

    A thread sees the mask of its own latest forward with gradients on. CUDA runs backward in threads of its own, which
    see the latest mask on their device. Copies and pickles of the module have a copy of this, empty.
    """

    def __init__(self, module: nn.Module, outer: TokenMask | None = None):
        """outer: of a module around this one, asked where this module gets a mask that is not one entry a token."""
        parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        self.position = parameters.index(NAME) if NAME in parameters else None
        self.outer = outer
        self._forget()
        self.attach(module, with_kwargs=True)

    def of(self, x: Tensor) -> Tensor | None:
        """Which of the tokens x (..., d) are real, bool (...); None where no mask is known, or one of another shape."""
        mask = self._current(x.device)
        if mask is None or mask.shape != x.shape[:-1]:
            return None
        mask = mask.to(x.device, non_blocking=True)
        return mask if mask.dtype == torch.bool else mask != 0

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not torch.is_grad_enabled():  # no backward follows, and what an earlier forward left is still wanted
            return
        if not torch.compiler.is_compiling() and self._is_first and self.outer is None and module.training:
            self._is_first = False
            warn_without_factor(module)
        mask = kwargs.get(NAME)
        if mask is None and self.position is not None and len(args) > self.position:
            mask = args[self.position]
        if isinstance(mask, Tensor) and mask.dim() == 2:
            # compiled, this hook may be a graph of its own: without an operation it is none
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
        if torch.compiler.is_compiling():  # an attribute: where the note was taken outside the graph, the graph's input
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
