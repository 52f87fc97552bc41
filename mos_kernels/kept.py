"""What follows from an adapter's parameters alone, κ, G and the factors in the base's dtype, kept between calls.

It is kept in eval mode without gradients, and valid for the very tensors that it was made from, at the same address and
version. A change in place, a tensor in another's place (`functional_call`, `load_state_dict`, `swap_tensors`, an
assignment to the parameter or to its `.data`), a backward through any adapter of the process, a step of any of its
optimizers, `model.train()` and `model.eval()` end it.

A write through `.data` (`p.data.copy_(...)`) or through numpy leaves no trace in a tensor: call `model.eval()` after
it. Torch's fused optimizers leave none either, which is why backwards and steps count. The step of an optimizer that
torch.compile has compiled does not; so a parameter with a gradient is never kept from.
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
"""How many backwards and steps have run: a fused optimizer changes no version, nor does one that writes in backward."""


class Use(NamedTuple):
    """What the factors are made for."""

    backend: str
    x_dtype: torch.dtype  # A's
    y_dtype: torch.dtype  # B's
    config: MoSConfig


class Factors(NamedTuple):
    """What a call wants of the parameters."""

    kappa: Tensor
    A: Tensor
    prepared: Any  # the backend's, of B; None where the call makes it


class Seen(NamedTuple):
    """Tensors as they were."""

    tensors: tuple[Tensor, ...]
    marks: tuple[tuple, ...]
    storages: tuple[torch.UntypedStorage, ...]  # held, or another tensor might be put at the same address
    generation: int

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...]) -> Seen | None:
        """None where a change of them would not be seen. What is made of them has to be made afterwards."""
        if not all(map(shows_changes, tensors)):
            return None
        _watch_optimizers()
        return cls(tensors, tuple(map(mark, tensors)), tuple(t.untyped_storage() for t in tensors), _generation)

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the very tensors, with the very marks, and no optimizer's step is to come."""
        if self.generation != _generation:
            return False
        for t, before, (address, version, dtype, shape, stride) in zip(tensors, self.tensors, self.marks, strict=True):
            if t is not before or t._version != version or t.data_ptr() != address or t.grad is not None:
                return False
            if t.stride() != stride or t.shape != shape or t.dtype != dtype:
                return False
        return True


class Kept(NamedTuple):
    """Factors, and what they are valid for."""

    factors: Factors
    use: Use
    seen: Seen
    frozen: bool  # asked for by name: what a CUDA graph may capture

    @classmethod
    def make(
        cls, tensors: tuple[Tensor, ...], use: Use, form: Callable[[], Factors], frozen: bool = False
    ) -> Kept | None:
        """What `form` makes of the tensors, or None where a change of them would not be seen."""
        seen = Seen.of(tensors)
        if seen is None:
            return None
        with torch.inference_mode(False), torch.no_grad():
            return cls(form(), use, seen, frozen)

    def is_valid(self, tensors: tuple[Tensor, ...], use: Use) -> bool:
        return self.use == use and self.seen.are(tensors)


def expire(*_: Any) -> None:
    """A backward or an optimizer's step runs: the parameters of any adapter may change without a trace."""
    global _generation
    if not torch.compiler.is_compiling():
        _generation += 1


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(expire)


def is_plain(x: Tensor) -> bool:
    """Whether x is a plain tensor, and what is done to it is neither recorded, differentiated nor transformed."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or type(x) not in (Tensor, nn.Parameter)  # fx traces with proxies, and others with tensors of their own
        or is_transformed()
    )


def is_transformed() -> bool:
    """Whether what runs now is traced by torch.jit, transformed by torch.func or differentiated forwards."""
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured: what is computed now holds numbers at a replay alone."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def mark(t: Tensor) -> tuple:
    """What differs after a change of t."""
    return t.data_ptr(), t._version, t.dtype, t.shape, t.stride()


def shows_changes(t: Tensor) -> bool:
    """Whether a change of t is seen: not by an optimizer's step to come, of an inference tensor, of memory shared by
    processes, or of what ZeRO gathers anew."""
    return (
        type(t) in (Tensor, nn.Parameter)
        and t.is_leaf  # else a call brings another one each time
        and t.grad is None
        and not (t.is_meta or t.is_inference() or is_zero3(t))
        and not (t.device.type == "cpu" and t.is_shared())
    )
