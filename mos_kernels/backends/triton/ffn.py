"""A gated FFN with its adapters as one operation, forward and backward, through the kernels.

The equations stand at `eager_ffn`. The linears that read x share the launch of every step, `activate` stands between
them and the last one, and for a few tokens bridge and expand are one launch. Where `eager_ffn` says T tokens, p, n and
logits are planes here (S, T, …).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mos_kernels.backends.interface import Prepared
from mos_kernels.backends.triton import factor, route_bytes, rows, shares_launches
from mos_kernels.backends.triton.activate import activate_backward_launch, activate_launch
from mos_kernels.backends.triton.bridge import (
    bridge_backward_parts_launch,
    bridge_launch,
    bridge_pair_launch,
    bridge_reduces_launch,
    bridge_sums_launch,
)
from mos_kernels.backends.triton.decode import bridge_expand_launch, bridge_expand_pair_launch
from mos_kernels.backends.triton.expand import (
    expand_backward_launch,
    expand_backward_pair_launch,
    expand_launch,
    expand_pair_launch,
    gram_launch,
    norm_gradient_launch,
    norm_gradients_launch,
)
from mos_kernels.backends.triton.shrink import shrink_backward_launch, shrink_launch, stacked
from mos_kernels.call import Adapted, FFNPlan, FFNTensors, flat, shaped


class FFNSaved(NamedTuple):
    """What forward leaves for backward besides its arguments; h stands for what the last linear reads."""

    p: Tensor  # (2, 1, T, R) of two linears that read x, or (1, T, R)
    n: Tensor  # (1, T)
    logits: Tensor | None  # (1, T, E or 2E)
    p_h: Tensor  # (1, T, R)
    n_h: Tensor  # (1, T)
    z: Tensor  # (2, T, E·r) or (T, E·r)
    z_h: Tensor  # (T, E·r)
    grams: tuple[Tensor, ...]  # (E, r, r), of those that read x and of the last linear
    outputs: tuple[Tensor, ...]  # (T, d) of those that read x

    @property
    def flat(self) -> tuple[Tensor | None, ...]:
        return (*self[:7], *self.grams, *self.outputs)

    @classmethod
    def of(cls, flat: Sequence, reads: int) -> FFNSaved:
        return cls(*flat[:7], tuple(flat[7 : 8 + reads]), tuple(flat[8 + reads :]))


def constants(t: FFNTensors, plan: FFNPlan) -> Tensor:
    """The stack for shrink."""
    return stacked(_stacks(t.reads), _dense(t.router), t.x.dtype)


def ffn_forward(t: FFNTensors, plan: FFNPlan) -> tuple[Tensor, FFNSaved]:
    """y (..., d_out), and what backward wants."""
    x, dtype, config, down = rows(flat(t.x)), t.x.dtype, plan.config, t.down
    (*made, made_h), stack = _prepared(t, plan)
    p, n, logits = _shrink_reads(x, t, stack, splits_allowed=False)
    routed, own_router = _routed(t, logits)
    kappas, grams = _kappas(t.reads), [each.gram for each in made]
    if len(made) == 2:
        z = bridge_pair_launch(p, n, routed, own_router, kappas, grams, dtype, config)
    else:
        z = bridge_launch(p, n, routed, own_router, kappas[0], grams[0], dtype, config)
    outputs = _expand_reads(z, made, t.reads)
    for y, linear in zip(outputs, t.reads, strict=True):
        y.addmm_(x, linear.weight.t())

    h, p_h, n_h = activate_launch(outputs, down.A, plan)
    (kappa,) = _kappas([down])
    z_h, p_h, n_h = bridge_sums_launch(p_h, n_h, routed, own_router, kappa, made_h.gram, dtype, plan.down_config)
    y = expand_launch(z_h, made_h.B, _dense(down.bias)).addmm_(h, down.weight.t())
    saved = FFNSaved(p, n, logits, p_h, n_h, z, z_h, (*grams, made_h.gram), tuple(outputs))
    return shaped(y, t.x), saved


def ffn_inference(t: FFNTensors, plan: FFNPlan) -> Tensor:
    """y (..., d_out) where no backward follows; few tokens in few launches."""
    x, config, down = rows(flat(t.x)), plan.config, t.down
    if not all(shares_launches(x.shape[0], options) for options in (config, plan.down_config)) or not _are_alike(
        [linear.bias for linear in t.reads]
    ):
        return ffn_forward(t, plan)[0]
    (*made, made_h), stack = _prepared(t, plan)
    p, n, logits = _shrink_reads(x, t, stack, splits_allowed=True)
    routed, own_router = _routed(t, logits)
    linears = [
        (kappa, each.gram, each.B, _dense(linear.bias))
        for kappa, each, linear in zip(_kappas(t.reads), made, t.reads, strict=True)
    ]
    if len(made) == 2:
        outputs = list(bridge_expand_pair_launch(p, n, routed, own_router, linears, config).unbind())
    else:
        outputs = [bridge_expand_launch(p, n, routed, own_router, *linears[0], config)]
    for y, linear in zip(outputs, t.reads, strict=True):
        y.addmm_(x, linear.weight.t())
    h, p, n = activate_launch(outputs, down.A, plan)
    (kappa,), bias = _kappas([down]), _dense(down.bias)
    y = bridge_expand_launch(p, n, routed, own_router, kappa, made_h.gram, made_h.B, bias, plan.down_config)
    return shaped(y.addmm_(h, down.weight.t()), t.x)


def ffn_backward(dy: Tensor, t: FFNTensors, saved: FFNSaved, plan: FFNPlan, needs: FFNTensors) -> FFNTensors:
    """The gradients of the tensors, each in its tensor's dtype, where `needs` asks for them; else None."""
    x, dy, config, down, m = rows(flat(t.x)), rows(flat(dy)), plan.config, t.down, len(t.reads)
    routed, own_router = _routed(t, saved.logits)
    wide, _, _ = gram_launch(_Bs(t), x.dtype, needs_gram=False)
    *grams, gram_h = saved.grams

    dz, dB_h = expand_backward_launch(dy, saved.z_h, wide[-1], needs.down.B)
    dz, kappas = dz[None], _kappas([down])
    dgates, dn, dp, sums_h = bridge_backward_parts_launch(
        dz, saved.p_h, saved.n_h, routed, own_router, kappas, [gram_h], None, None, plan.down_config, gates_only=True
    )
    dh = dy @ down.weight
    d_outputs, dA_h = activate_backward_launch(dh, saved.outputs, down.A, dp, dn, plan, needs.down.A)
    del dz, dh

    needs_dB = any(linear.B for linear in needs.reads)
    if m == 2:
        dz, dBs = expand_backward_pair_launch(d_outputs, saved.z, wide[:2], needs_dB)
    else:
        dz, dB = expand_backward_launch(d_outputs[0], saved.z, wide[0], needs_dB)
        dz, dBs = dz[None], None if dB is None else dB[None]
    aux_weight = t.aux_weight if needs.router else None
    mask = None if t.token_mask is None or aux_weight is None else route_bytes(t.token_mask.reshape(-1))
    drouted, dn, dp, sums = bridge_backward_parts_launch(
        dz, saved.p, saved.n, routed, own_router, _kappas(t.reads), grams, aux_weight, mask, config, dgates
    )
    del dz
    dkappas, dkappa_h, Ms = bridge_reduces_launch(sums, sums_h)
    d_Bs = _norm_gradients([*(dBs if needs_dB else [None] * m), dB_h], _Bs(t), Ms, needs)

    As, router = _stacks(t.reads), None if t.router is None or not own_router else t.router.contiguous()
    needs_dw = needs.router or any(linear.A for linear in needs.reads)
    dx, dw = shrink_backward_launch(
        x, As[0], router, dp, dn, drouted if own_router else None, None, 0.0, needs.x, needs_dw, *As[1:]
    )
    if needs.x:
        for d_output, linear in zip(d_outputs, t.reads, strict=True):
            dx.addmm_(d_output, linear.weight)
    dAs, drouter = [None] * m, None
    if dw is not None:
        *dAs, drouter = dw.split([*(A.shape[0] for A in As), dw.shape[0] - sum(A.shape[0] for A in As)])
    reads = list(zip(dAs, d_Bs[:-1], dkappas, strict=True))
    return t.gradients(needs, dx, drouted, drouter, (dA_h, d_Bs[-1], dkappa_h), reads)


def _norm_gradients(planes: list, Bs: list[Tensor], Ms: list[Tensor], needs: FFNTensors) -> list[Tensor | None]:
    """dB of each linear, the last of them last."""
    wanted = [linear.B for linear in (*needs.reads, needs.down)]
    if all(wanted):
        return norm_gradients_launch(planes, Bs, Ms)
    return [norm_gradient_launch(*each) if want else None for want, *each in zip(wanted, planes, Bs, Ms, strict=True)]


def _prepared(t: FFNTensors, plan: FFNPlan) -> tuple[list[Prepared], Tensor | None]:
    """Of the linears that read x and of the last one, kept or made now; and with what is made the stack for shrink."""
    kept_h, *kept = plan.prepared or (None,) * (1 + len(t.reads))
    if None not in (kept_h, *kept):
        return [*kept, kept_h], plan.constants
    wide, grams, stack = gram_launch(_Bs(t), t.x.dtype, True, _stacks(t.reads), _dense(t.router), t.x.dtype)
    return [Prepared(*each) for each in zip(wide, grams, strict=True)], stack


def _Bs(t: FFNTensors) -> list[Tensor]:
    return [factor(linear.B) for linear in (*t.reads, t.down)]


def _stacks(linears: Sequence[Adapted]) -> list[Tensor]:
    """A of each linear as rows (R, d_in), of one dtype."""
    As = [linear.A.flatten(0, -2).contiguous() for linear in linears]
    if len({A.dtype for A in As}) > 1:
        As = [A.float() for A in As]
    return As


def _shrink_reads(
    x: Tensor, t: FFNTensors, stack: Tensor | None, splits_allowed: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Planes p (2, S, T, R) of two linears or (S, T, R) of one, n (S, T) and logits (S, T, E or 2E) or None."""
    As = _stacks(t.reads)
    router = _dense(t.router)
    p, n, logits = shrink_launch(x, As[0], router, None, 0.0, splits_allowed, *(As[1:] or [None]), stack)
    return p, n, None if router is None else logits


def _expand_reads(z: Tensor, made: list[Prepared], linears: Sequence[Adapted]) -> list[Tensor]:
    """y₀ (T, d_out) of each."""
    Bs, biases = [each.B for each in made], [_dense(linear.bias) for linear in linears]
    if len(made) == 1:
        return [expand_launch(z, Bs[0], biases[0])]
    if _are_alike(biases):
        return list(expand_pair_launch(z, Bs, biases).unbind())
    return [expand_launch(*each) for each in zip(z, Bs, biases, strict=True)]


def _are_alike(biases: Sequence[Tensor | None]) -> bool:
    return len({None if bias is None else bias.dtype for bias in biases}) == 1


def _routed(t: FFNTensors, logits: Tensor | None) -> tuple[Tensor, bool]:
    """What the bridge routes by, and whether that is the router's logits."""
    return (logits, True) if t.gates is None else (flat(t.gates).float().contiguous(), False)


def _kappas(linears: Sequence[Adapted]) -> list[Tensor]:
    return [linear.kappa.float() for linear in linears]


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
