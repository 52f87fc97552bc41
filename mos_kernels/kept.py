"""The cache of what depends only on an adapter's parameters: κ, G, and the factors and router in the base's dtype.

It is used in eval mode without gradients. It is valid as long as the parameters are the same tensors, at the same
address and version. These events end it: a change in place, another tensor in place of a parameter (`functional_call`,
`load_state_dict`, `swap_tensors`, an assignment to the parameter or to its `.data`), a backward through any adapter of
the process, a step of any optimizer of the process, `model.train()` and `model.eval()`.

A write through `.data` (`p.data.copy_(...)`) or through numpy cannot be noticed: call `model.eval()` after it. Torch's
fused optimizers change no version either, which is why backwards and steps are counted. A step of an optimizer that
torch.compile has compiled is not counted, so nothing is cached while a parameter has a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook

from mos_kernels.config import MoSConfig
from mos_kernels.sharded import is_zero3

_generation = 0
"""The number of backwards and optimizer steps so far. A fused optimizer, or one that writes in backward, changes no
version."""


class Use(NamedTuple):
    """The use that the factors are computed for."""

    backend: str
    x_dtype: torch.dtype  # A's
    y_dtype: torch.dtype  # B's
    config: MoSConfig


class Factors(NamedTuple):
    """The tensors that a call needs and that depend only on the parameters."""

    kappa: Tensor
    A: Tensor
    prepared: Any  # what the backend prepares of B; None: the call prepares it


class Seen(NamedTuple):
    """Tensors, and how they were when the cache was filled."""

    tensors: tuple[Tensor, ...]
    marks: tuple[tuple, ...]
    storages: tuple[torch.UntypedStorage, ...]  # kept alive, so that no other tensor gets the same address
    generation: int

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...]) -> Seen | None:
        """None if a change of the tensors could not be noticed. Compute the cached values after this call."""
        if not all(map(shows_changes, tensors)):
            return None
        _watch_optimizers()
        return cls(tensors, tuple(map(mark, tensors)), tuple(t.untyped_storage() for t in tensors), _generation)

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, unchanged, and without gradients, which a step may follow."""
        if self.generation != _generation or len(tensors) != len(self.tensors):
            return False
        for t, before, (address, version, dtype, shape, stride) in zip(tensors, self.tensors, self.marks, strict=True):
            if t is not before or t._version != version or t.data_ptr() != address or t.grad is not None:
                return False
            if t.stride() != stride or t.shape != shape or t.dtype != dtype:
                return False
        return True


class Kept(NamedTuple):
    """Cached factors, and what they are valid for."""

    factors: Factors
    use: Use
    seen: Seen
    frozen: bool  # made by freeze_for_inference: a CUDA graph may capture it
    joint: list  # if frozen, what a block made of this and more, with what it is valid for: a graph may read that too

    @classmethod
    def make(
        cls, tensors: tuple[Tensor, ...], use: Use, form: Callable[[], Factors], frozen: bool = False
    ) -> Kept | None:
        """The result of `form`, or None if a change of the tensors could not be noticed."""
        seen = Seen.of(tensors)
        if seen is None:
            return None
        with torch.inference_mode(False), torch.no_grad():
            return cls(form(), use, seen, frozen, [])

    def is_valid(self, tensors: tuple[Tensor, ...], use: Use) -> bool:
        return self.use == use and self.seen.are(tensors)


def expire(*_: Any) -> None:
    """End every cache: a backward or an optimizer's step may change parameters without being noticed."""
    global _generation
    if not torch.compiler.is_compiling():
        _generation += 1


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(expire)


def is_plain(x: Tensor) -> bool:
    """Whether x is a plain tensor, and operations on it are not recorded, differentiated or transformed."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or type(x) not in (Tensor, nn.Parameter)  # fx traces with proxies, others with tensor subclasses
        or is_transformed()
    )


def is_transformed() -> bool:
    """Whether torch.jit is tracing, torch.func is transforming, or forward-mode differentiation is on."""
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured. Tensors computed now get their values only when it is replayed."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def mark(t: Tensor) -> tuple:
    """A tuple that changes when t changes."""
    return t.data_ptr(), t._version, t.dtype, t.shape, t.stride()


def shows_changes(t: Tensor) -> bool:
    """Whether a change of t can be noticed. Not if t has a gradient, is an inference tensor, or is gathered by ZeRO, or
    if its memory is shared by processes."""
    return (
        type(t) in (Tensor, nn.Parameter)
        and t.is_leaf  # else each call has another tensor
        and t.grad is None
        and not (t.is_meta or t.is_inference() or is_zero3(t))
        and not (t.device.type == "cpu" and t.is_shared())
    )
