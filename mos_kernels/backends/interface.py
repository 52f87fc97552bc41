"""The interface of a backend: modules with the functions of `Backend` and `FFNBackend`, and the tuples they use.

T tokens of width d_in; E experts of rank r. "Compute dtype" is float64 for float64 input and float32 otherwise. Each
backend chooses the shapes of p, n and logits (`Backend.saved_shapes`): (T, …) in the eager backend, planes (S, T, …) in
the kernels. `eager` documents each function with its equations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mos_kernels.config import MoSConfig

if TYPE_CHECKING:
    from mos_kernels.call import FFNPlan, FFNTensors

Shape = tuple[int, ...]


class Dropout(NamedTuple):
    """A draw of dropout: state of the backend's own, and the probability of dropping an element of x."""

    state: Tensor
    p: float


class ShrinkWeights(NamedTuple):
    """What `shrink` multiplies x by, and the dtype of x."""

    A: Tensor  # (r, d_in) or (E, r, d_in)
    router: Tensor | None  # (E, d_in)
    dtype: torch.dtype


class Prepared(NamedTuple):
    """What depends on the parameters alone: B in the dtype of the wide products, and G = BᵀB of each expert.

    With an activation, q cannot be computed from G, and there is no G. The eager backend uses G as its trace and
    G / trace, so that a huge B does not overflow. The kernels divide during their products. They cast A and a router
    into one stack, if `prepare` was given them.
    """

    B: Tensor  # (d_out, E, r)
    gram: Tensor | None  # (E, r, r)
    unit_gram: Tensor | None = None  # (E, r, r)
    trace: Tensor | None = None  # (E,)
    stack: Tensor | None = None  # as `shrink` reads it, in the dtype of x


class Saved(NamedTuple):
    """The tensors that a linear's forward saves for its backward besides its arguments."""

    p: Tensor
    n: Tensor
    logits: Tensor | None  # of a router of its own
    gram: Tensor | None  # (E, r, r)
    z: Tensor | None  # (T, E·r) in y's dtype, of a backend with KEEPS_Z and no activation


class BridgeInputs(NamedTuple):
    """What the bridge reads of a linear: what `shrink` made of x, what routes it, and what its parameters make."""

    p: Tensor
    n: Tensor
    routed: Tensor  # the gates (T, E), or with own_router the logits of a router in the backend's shape
    own_router: bool
    kappa: Tensor  # (E,)
    prepared: Prepared


class BridgeGradients(NamedTuple):
    routed: Tensor  # dlogits or dgates (T, E)
    kappa: Tensor  # (E,)
    n: Tensor  # (T,)
    p: Tensor  # (T, r) or (T, E, r)
    M: Tensor  # (E, r, r): Σ_T dq h hᵀ


class BridgeExpandGradients(NamedTuple):
    routed: Tensor  # dlogits or dgates (T, E)
    kappa: Tensor  # (E,)
    n: Tensor  # (T,)
    p: Tensor  # (T, r) or (T, E, r)
    B: Tensor  # (d_out, E, r)


class Backend(Protocol):
    """The steps.

    KEEPS_Z: whether a forward's z is saved. `bridge_backward` then does not need what `bridge` returns beside z.
    """

    KEEPS_Z: bool

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype: ...

    def operand(self, t: Tensor, dtype: torch.dtype) -> Tensor: ...

    def saved_shapes(
        self, tokens: int, dtype: torch.dtype, A: Tensor | None, router: Tensor | None
    ) -> tuple[Shape | None, Shape | None, Shape | None]:
        """The shapes of p, n and logits of a differentiable `shrink` of x (tokens, d_in) of `dtype`."""

    def draw_dropout(self, x: Tensor, p: float) -> Dropout: ...

    def shrink(
        self, x: Tensor, A: Tensor, router: Tensor | None, dropout: Dropout | None, differentiable: bool,
        stack: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]: ...  # fmt: skip

    def shrink_backward(
        self, x: Tensor, A: Tensor, router: Tensor | None, dp: Tensor, dn: Tensor, dlogits: Tensor | None,
        dropout: Dropout | None, needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...  # fmt: skip

    def routing_logits(self, x: Tensor, router: Tensor, differentiable: bool = True) -> Tensor: ...

    def routing_logits_backward(
        self, x: Tensor, router: Tensor, dlogits: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]: ...

    def route(self, logits: Tensor, config: MoSConfig) -> Tensor: ...

    def route_backward(
        self, dgates: Tensor, logits: Tensor, aux_weight: Tensor | None, token_mask: Tensor | None, config: MoSConfig
    ) -> Tensor: ...

    def prepare(
        self, B: Tensor, dtype: torch.dtype, config: MoSConfig, gram: Tensor | None = None,
        weights: ShrinkWeights | None = None,
    ) -> Prepared: ...  # fmt: skip

    def bridge(self, t: BridgeInputs, config: MoSConfig) -> tuple[Tensor, Any]: ...

    def bridge_backward(
        self, dz: Tensor, bridged: Any, t: BridgeInputs, aux_weight: Tensor | None, token_mask: Tensor | None,
        config: MoSConfig,
    ) -> BridgeGradients: ...  # fmt: skip

    def expand(self, z: Tensor, prepared: Prepared, added: Tensor | None, dtype: torch.dtype) -> Tensor: ...

    def expand_backward(
        self, dy: Tensor, z: Tensor, prepared: Prepared, needs_dB: bool
    ) -> tuple[Tensor, Tensor | None]: ...

    def add_norm_gradient(self, dB: Tensor, B: Tensor, M: Tensor) -> Tensor: ...

    def bridge_expand(self, t: BridgeInputs, added: Tensor | None, dtype: torch.dtype, config: MoSConfig) -> Tensor: ...

    def bridge_expand_backward(
        self, dy: Tensor, t: BridgeInputs, aux_weight: Tensor | None, token_mask: Tensor | None, config: MoSConfig
    ) -> BridgeExpandGradients: ...


class FFNBackend(Protocol):
    """An FFN block as one operation.

    FFNSaved: the tensors that forward saves for backward, with `flat` and `of` as in `FFNTensors`.
    """

    FFNSaved: Any

    def constants(self, t: FFNTensors, plan: FFNPlan) -> Any:
        """What inference makes of the parameters together, to be kept as `plan.constants`; or None."""

    def ffn_forward(self, t: FFNTensors, plan: FFNPlan) -> tuple[Tensor, Any]: ...

    def ffn_inference(self, t: FFNTensors, plan: FFNPlan) -> Tensor: ...

    def ffn_backward(self, dy: Tensor, t: FFNTensors, saved: Any, plan: FFNPlan, needs: FFNTensors) -> FFNTensors: ...
