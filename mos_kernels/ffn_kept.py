"""What an FFN block keeps in eval mode without gradients, so that a token does not wait until all is asked again."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mos_kernels.backends import load_ffn, resolve_backend
from mos_kernels.backends.eager import is_observed
from mos_kernels.call import Adapted, FFNPlan, FFNTensors, is_autocast
from mos_kernels.config import MoSConfig
from mos_kernels.ffn_node import (
    FFNForm,
    Part,
    Parts,
    active_router,
    called_modules,
    calls_its_own,
    is_called_plainly,
    phi_of,
)
from mos_kernels.kept import Kept, Seen, is_capturing, is_transformed
from mos_kernels.layer import MoSRouter, is_conv1d


class Standing(NamedTuple):
    """What a block was found to be in eval mode without gradients, and is as long as nothing of it changes.

    The block's router holds it (`RoutesBlock`). No module and no weight of a base is kept alive. A weight of a base has
    no weak reference either: `torch.utils.swap_tensors` refuses a tensor that has one.
    """

    use: tuple  # the dtype, device and width of x
    device_type: str
    hooks: int  # the number of the next hook of the process: a new one may be on one of the modules
    children: tuple[tuple[str, weakref.ref, type], ...]  # the block's, whose calls one operation replaces
    inner: tuple[weakref.ref, ...]  # of the peft method: the router, and adapter and base of each linear
    linears: tuple[tuple, ...]  # of each: adapter, base; how its weight and bias look; what is kept; is it transposed
    routing: MoSConfig  # the router's
    seen: Seen  # the router's weight, and of each linear what is kept from
    plan: FFNPlan
    frozen: bool  # all linears, by freeze_for_inference: a CUDA graph may capture what is kept


def looked_up(block: nn.Module, form: FFNForm, x: Tensor, backend: str) -> tuple[FFNTensors, FFNPlan] | None:
    """`as_one`, looked up where nothing has changed of what it asks for; None where it has to be asked.

    A token of a small model waits for this: as little is looked at as will do.
    """
    before = getattr(block._modules.get("mos_router"), "_standing", None)
    if (
        before is None
        or torch.is_grad_enabled()
        or is_transformed()
        or before.hooks != RemovableHandle.next_id
        or before.use != (x.dtype, x.device, x.shape[-1:])
        or before.plan.backend != resolve_backend(backend, x)
        or torch.is_autocast_enabled(before.device_type)
        or not before.frozen
        and is_capturing(x)
    ):
        return None
    children, plan, module = block._modules, before.plan, None
    for name, reference, kind in before.children:
        module = children.get(name)
        if module is not reference() or type(module) is not kind or calls_its_own(module):
            return None
    router = _is_inside(children, form, before.inner) if before.inner else module  # the last of them
    if router is None or router.config is not before.routing or router.training:
        return None
    for name in form.hidden:
        if children[name].training:
            return None
    if plan.activation != "silu" and phi_of(block, form) != plan.activation:
        return None
    weight = router._parameters.get("weight")
    tensors, adapted = [weight], []
    for adapter, base, look_w, look_b, kept, transposed in before.linears:
        adapter, own = adapter(), base()._parameters
        w, b, config = own.get("weight"), own.get("bias"), kept.use.config
        if adapter.training or adapter._kept is not kept or adapter.config is not config:
            return None
        if _look(w) != look_w or (b is not None or look_b is not None) and _look(b) != look_b:
            return None
        tensors += adapter._kept_from()  # B is the last, since the router is the block's
        kappa, A, _ = kept.factors
        adapted.append(Adapted(w.t() if transposed else w, b, A, tensors[-1], kappa))
    if not before.seen.are(tensors):
        return None
    return FFNTensors(x, None, weight, None, None, adapted[-1], tuple(adapted[:-1])), plan


def _is_inside(children: dict, form: FFNForm, inner: Sequence[weakref.ref]) -> MoSRouter | None:
    """The router of the active adapter, where that and the linears' own adapters and bases are those of `inner`."""
    linears = [children[name] for name in form.linears]
    parts = [Part.of(linear) for linear in linears]
    router = None if None in parts else active_router(children["mos_router"], linears)
    found = (router, *(module for part in parts if part is not None for module in part))
    if len(found) != len(inner):
        return None
    same = all(
        module is reference() and not calls_its_own(module) for module, reference in zip(found, inner, strict=True)
    )
    return router if same else None


def remembered(block: nn.Module, form: FFNForm, parts: Parts, tensors: FFNTensors, plan: FFNPlan) -> FFNPlan:
    """The plan, with what the backend makes of the parameters; and noted for `looked_up`.

    Only where nothing but the parameters decides, and every change of them is seen. A graph that is being captured
    computes its own, which a call before it may have made.
    """
    x, weight, adapters = tensors.x, parts.router.weight, [part.adapter._kept for part in parts.all]
    called, hooks = called_modules(block, form, parts), RemovableHandle.next_id
    bases = [(part.base._parameters.get("weight"), part.base._parameters.get("bias")) for part in parts.all]
    if (
        plan.differentiable
        or is_capturing(x)
        or is_observed()
        or is_autocast(x)
        or tensors.gates is not None
        or any(made is None for made in (*plan.prepared, *adapters))
        or not all(part.adapter._is_kept(kept) for part, kept in zip(parts.all, adapters, strict=True))
        or any(module.training or not is_called_plainly(module) for module in called.values())
        or any(w is None or w.dtype != x.dtype or b is not None and b.dtype != x.dtype for w, b in bases)
    ):
        return plan
    seen = Seen.of((weight, *(tensor for kept in adapters for tensor in kept.seen.tensors)))
    if seen is None:
        return plan
    plan = plan._replace(constants=_constants(adapters[0], seen, tensors, plan))
    inside = () if parts.router is called["mos_router"] else (parts.router, *(m for part in parts.all for m in part))
    ref = weakref.ref
    block.mos_router._standing = Standing(
        (x.dtype, x.device, x.shape[-1:]), x.device.type, hooks,
        tuple((name, ref(child), type(child)) for name, child in called.items() if name in block._modules),
        tuple(map(ref, inside)),
        tuple(
            (ref(part.adapter), ref(part.base), _look(w), _look(b), kept, is_conv1d(part.base))
            for part, (w, b), kept in zip(parts.all, bases, adapters, strict=True)
        ),
        parts.router.config, seen, plan, all(kept.frozen for kept in adapters),
    )  # fmt: skip
    return plan


def _constants(kept: Kept, seen: Seen, tensors: FFNTensors, plan: FFNPlan) -> Any:
    """The backend's, of a block with the linear of `kept`. If that is frozen, a CUDA graph may read them as long."""
    use = plan._replace(prepared=(), constants=None)
    for used, before, made in kept.joint:
        if used == use and before.are(seen.tensors):
            return made
    with torch.inference_mode(False), torch.no_grad():
        made = load_ffn(plan.backend).constants(tensors, plan)
    if kept.frozen:
        kept.joint[:] = [(use, seen, made)]
    return made


_FACTS = operator.attrgetter("__class__", "shape", "dtype", "device")


def _look(t: Tensor | None) -> tuple | None:
    """What decides whether a tensor goes together with others."""
    return None if t is None else _FACTS(t)
