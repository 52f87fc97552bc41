"""The four steps composed: shrink, route, bridge, expand and the base product, forward and backward, without autograd.

The adapter runs first. expand writes y₀, and the base product is accumulated into y₀. Backward writes dx₀, and the
base's dy·W is accumulated into dx₀. So no buffer is read twice, and there is one rounding fewer than in base + adapter.

A base that is not a dense product runs before (see `LinearTensors`), and expand writes the sum. Products with d_out are
computed in the dtype of y, which is that of the base's output; products with d_in in the dtype of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mos_kernels.backends import load_backend
from mos_kernels.backends.interface import Backend, BridgeInputs, Dropout, Prepared, Saved, ShrinkWeights
from mos_kernels.call import LinearTensors, Plan, RouteTensors, flat, shaped


def linear_forward(t: LinearTensors, plan: Plan) -> tuple[Tensor, Saved]:
    """y, and what backward needs besides the tensors."""
    steps = load_backend(plan.backend)
    x, dtype = flat(t.x), _output_dtype(t)
    dropout, prepared = _dropout(t, plan), _prepared(t, plan, steps)
    p, n, logits = steps.shrink(x, t.A, t.router, dropout, plan.differentiable, prepared.stack)
    added = t.added if t.weight is not None else flat(t.added)
    curved, z = _bridge_inputs(t, p, n, logits, prepared, steps), None
    if plan.differentiable and keeps_z(plan):
        z, _ = steps.bridge(curved, plan.config)
        y = steps.expand(z, prepared, added, dtype)
    else:
        y = steps.bridge_expand(curved, added, dtype, plan.config)
    if t.weight is not None:
        y.addmm_(x, t.weight.t())
    return shaped(y, t.x), Saved(p, n, logits, prepared.gram, z)


def keeps_z(plan: Plan) -> bool:
    """Whether z is among what forward saves."""
    return load_backend(plan.backend).KEEPS_Z and plan.config.activation == "identity"


def linear_backward(dy: Tensor, t: LinearTensors, saved: Saved, plan: Plan, needs: LinearTensors) -> LinearTensors:
    """The gradients of the tensors, each in its tensor's dtype; None if `needs` does not ask for it.

    The gradient of a base's output is dy itself.
    """
    steps, config = load_backend(plan.backend), plan.config
    compute, dropout = steps.compute_dtype(t.x.dtype), _dropout(t, plan)
    x, upstream, dy = flat(t.x), dy, flat(dy)
    p, n, logits, gram, z = saved
    aux_weight = t.aux_weight if needs.router else None
    mask = None if t.token_mask is None or aux_weight is None else t.token_mask.reshape(-1)

    # B is cast again: kept, it would be d_out·E·r numbers a linear, to spare a copy of as many
    prepared = steps.prepare(t.B, dy.dtype, config, gram)
    curved = _bridge_inputs(t, p, n, logits, prepared, steps)
    if config.activation == "identity":
        bridged = None
        if z is None:
            z, bridged = steps.bridge(curved, config)
        dz, dB = steps.expand_backward(dy, z, prepared, needs.B)
        d = steps.bridge_backward(dz, bridged, curved, aux_weight, mask, config)
        del z, dz, bridged  # before dx is allocated
        dB = steps.add_norm_gradient(dB, t.B, d.M) if needs.B else None
    else:
        d = steps.bridge_expand_backward(dy, curved, aux_weight, mask, config)
        dB = d.B
    dlogits = d.routed if curved.own_router else None
    dx, dA, drouter = steps.shrink_backward(
        x, t.A, t.router, d.p, d.n, dlogits, dropout, (needs.x, needs.A, needs.router)
    )
    if needs.x:
        dx = (dx if t.weight is None else dx.addmm_(dy, t.weight)).view(t.x.shape)
    dadded = None
    if needs.added:
        dadded = upstream if t.weight is None else dy.sum(0, dtype=compute).to(t.added.dtype)
    return LinearTensors(
        x=dx,
        weight=(dy.t() @ x).to(t.weight.dtype) if needs.weight else None,
        added=dadded,
        A=dA.to(t.A.dtype) if needs.A else None,
        B=dB.to(t.B.dtype) if needs.B else None,
        kappa=d.kappa.to(t.kappa.dtype) if needs.kappa else None,
        gates=d.routed.view(t.gates.shape).to(t.gates.dtype) if needs.gates else None,
        router=drouter.to(t.router.dtype) if needs.router else None,
    )


def route_forward(t: RouteTensors, plan: Plan) -> tuple[Tensor, Tensor]:
    """The gates of a router, and its logits."""
    steps = load_backend(plan.backend)
    logits = steps.routing_logits(flat(t.x), t.router, plan.differentiable)
    return shaped(steps.route(logits, plan.config), t.x), logits


def route_backward(dgates: Tensor, t: RouteTensors, logits: Tensor, plan: Plan, needs: RouteTensors) -> RouteTensors:
    """The gradients of x and router, if `needs` asks for them."""
    steps = load_backend(plan.backend)
    mask = None if t.token_mask is None else t.token_mask.reshape(-1)
    aux_weight = t.aux_weight if needs.router else None
    dlogits = steps.route_backward(flat(dgates), logits, aux_weight, mask, plan.config)
    dx, drouter = steps.routing_logits_backward(flat(t.x), t.router, dlogits, (needs.x, needs.router))
    return RouteTensors(
        x=dx.view(t.x.shape) if needs.x else None, router=drouter.to(t.router.dtype) if needs.router else None
    )


def _output_dtype(t: LinearTensors) -> torch.dtype:
    return t.x.dtype if t.weight is not None else t.added.dtype


def _dropout(t: LinearTensors, plan: Plan) -> Dropout | None:
    return None if t.dropout_state is None else Dropout(t.dropout_state, plan.dropout_p)


def _prepared(t: LinearTensors, plan: Plan, steps: Backend) -> Prepared:
    if plan.prepared is not None:
        return plan.prepared
    weights = None if t.dropout_state is not None else ShrinkWeights(t.A, t.router, t.x.dtype)
    return steps.prepare(t.B, _output_dtype(t), plan.config, weights=weights)


def _bridge_inputs(
    t: LinearTensors, p: Tensor, n: Tensor, logits: Tensor | None, prepared: Prepared, steps: Backend
) -> BridgeInputs:
    compute = steps.compute_dtype(t.x.dtype)
    routed = logits if t.gates is None else flat(t.gates).to(compute)
    return BridgeInputs(p, n, routed, t.gates is None, t.kappa.to(compute), prepared)
