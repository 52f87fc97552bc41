"""Which FFN blocks run as one operation, and the inputs of that operation.

The adapted linears of a block run as one operation unless something needs the call of a single linear. Then they are
called one by one, with equal results up to rounding.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from mos_kernels.backends import load_ffn, resolve_backend
from mos_kernels.backends.eager import is_observed
from mos_kernels.backends.interface import Prepared
from mos_kernels.call import Adapted, FFNPlan, FFNTensors, autocast_dtype, is_autocast
from mos_kernels.config import MoSConfig
from mos_kernels.functional import require_gates
from mos_kernels.kept import Factors, Kept, Seen, is_capturing, is_transformed
from mos_kernels.layer import (
    MoSAdapter,
    MoSConv1D,
    MoSLayer,
    MoSLinear,
    MoSRouter,
    balancing,
    dense_weight,
    is_conv1d,
    is_dense,
    parameter_of,
)
from mos_kernels.sharded import is_dtensor


@dataclass(frozen=True)
class FFNForm:
    """The form of an FFN block, by the names of its children.

    inputs: the linears that read the block's input: (gate, up), (fused gate_up,) or (up,). fused: whether a single
    input linear computes gate and up, in this order. activation: the modules on the gate (or on the single input).
    hidden: the modules before `down`. output: the modules after it. routed: the linears that take gates.
    """

    inputs: tuple[str, ...]
    fused: bool
    activation: tuple[str, ...]
    hidden: tuple[str, ...]
    down: str
    output: tuple[str, ...]
    routed: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.inputs, self.down)


class Observer:
    """A forward hook of a router that only reads the router's input.

    A block that runs as one operation calls it, so the block need not run linear by linear to be measured. This matters
    for checkpointing: its recomputation, after the measurement, must save the same tensors as the forward did.
    """

    def __init__(self, observe: Callable[[Tensor], None]):
        self.observe = observe

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        self.observe(args[0] if args else next(iter(kwargs.values())))


class _Part(NamedTuple):
    """An adapted linear: its adapter, and the module that has the base's weight and bias."""

    adapter: MoSAdapter
    base: nn.Module

    @classmethod
    def of(cls, linear: nn.Module) -> _Part | None:
        """The parts of a dense linear with exactly one active adapter; None for any other linear."""
        if isinstance(linear, MoSLayer):
            return cls(linear, linear) if type(linear) in (MoSLinear, MoSConv1D) else None
        adapters = linear._modules.get("mos_adapter")  # of the peft method
        if not isinstance(adapters, nn.ModuleDict) or linear.disable_adapters or not is_dense(linear.base_layer):
            return None
        active = [name for name in linear.active_adapters if name in adapters]
        if len(active) != 1 or not (type(linear.base_layer) is nn.Linear or is_conv1d(linear.base_layer)):
            return None
        return cls(adapters[active[0]], linear.base_layer)

    def adapted(self, dtype: torch.dtype, factors: Factors) -> tuple[Adapted, Prepared | None]:
        """(its tensors with the base in dtype, as under autocast; the prepared B)."""
        weight, bias = dense_weight(self.base), parameter_of(self.base, "bias")
        if weight.dtype != dtype or bias is not None and bias.dtype != dtype:
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        return Adapted(
            weight, bias, factors.A, parameter_of(self.adapter, "mos_lora_B"), factors.kappa
        ), factors.prepared


class _Parts(NamedTuple):
    """A block's adapted linears (`reads` read its input, `down` is the last one), and their router."""

    reads: tuple[_Part, ...]
    down: _Part
    router: MoSRouter

    @property
    def all(self) -> tuple[_Part, ...]:
        return (*self.reads, self.down)

    @property
    def training(self) -> bool:
        """Whether a backward may follow a forward without gradients, since checkpointing may run it again."""
        return self.router.training or any(part.adapter.training for part in self.all)

    def tensors(self) -> Iterator[Tensor | None]:
        yield self.router.weight
        for adapter, base in self.all:
            yield from (base.weight, base.bias, adapter.mos_lora_A, adapter.mos_lora_B, adapter.mos_curvature)


def why_not_one(block: nn.Module, form: FFNForm) -> str | None:
    """Why the block's linears are called one by one for any input; None if they run as one operation.

    Under torch.compile they are always called one by one; Inductor fuses their graph.
    """
    parts = _parts(block, form)
    return parts if isinstance(parts, str) else None


def _parts(block: nn.Module, form: FFNForm) -> _Parts | str:
    """The parts of a block that runs as one operation, or the reason why it does not."""
    if len(form.routed) < len(form.linears):
        return "not all of its linears are adapted"
    modules = [getattr(block, name) for name in form.linears]
    found = [_Part.of(module) for module in modules]
    if None in found:
        return "a base is quantised or wrapped, or has no adapter or several"
    router = _router(block, modules)
    if router is None:
        return "its router has other active adapters, or is a subclass"
    if any(part.adapter.config.is_lora for part in found):
        return "one of its linears is a plain LoRA"
    *reads, down = found
    config = reads[0].adapter.config
    if any(part.adapter.config is not config and part.adapter.config != config for part in reads):
        return "the linears that read its input differ in rank, scaling or another setting"
    if any(part.adapter.mos_router is not None or routing_of(part.adapter) != routing_of(router) for part in found):
        return "its linears are not routed alike"
    if any(part.adapter.config.activation != "identity" for part in found):
        return "an activation follows the experts (config.activation)"
    if _phi_of(block, form) is None:
        return "its activation is neither SiLU nor GELU"
    if any(type(getattr(block, name)) not in (nn.Dropout, nn.Identity) for name in form.hidden):
        return "there is a module before its last linear"
    if any(t is not None and t.requires_grad for part in found for t in (part.base.weight, part.base.bias)):
        return "the base's weights are trained"
    made = _Parts(tuple(reads), down, router)
    routers = block._modules["mos_router"], router  # whose calls may be seen
    if not all(is_called_plainly(module) for module in _called(block, form, made).values() if module not in routers):
        return "a hook, offloading or a replaced forward needs the call of a single linear"
    return made


def as_one(block: nn.Module, form: FFNForm, x: Tensor, backend: str = "auto") -> tuple[FFNTensors, FFNPlan] | None:
    """The inputs of the one operation, or None if the linears are called one by one."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return None
    again = _again(block, form, x, backend)
    if again is not None:
        return again
    if x.dim() == 0 or x.is_meta:
        return None
    if getattr(block._modules.get("mos_router"), "_standing", None) is not None:
        block.mos_router._standing = None  # it holds parameters, and copies of them
    parts = _parts(block, form)
    if isinstance(parts, str) or is_transformed():
        return None
    if any(getattr(block, name).training and getattr(getattr(block, name), "p", 0) > 0 for name in form.hidden):
        return None
    if any(part.adapter.training and part.adapter.config.lora_dropout > 0 for part in parts.all):
        return None
    dtype = autocast_dtype(x)
    if not _fits(x, parts, form):
        return None
    backend = resolve_backend(backend, x)
    down, *reads = (part.adapted(dtype, factors) for part, factors in zip(*_factors(parts, x, backend), strict=True))
    gates = aux_weight = mask = None
    observers = [hook for hook in parts.router._forward_hooks.values() if isinstance(hook, Observer)]
    routers = {block.mos_router: 0, parts.router: len(observers)}
    if dtype == x.dtype and all(is_called_plainly(router, observed) for router, observed in routers.items()):
        for observer in observers:
            observer.observe(x)
        aux_weight, mask = balancing(parts.router, x)
        if mask is not None and mask.shape != x.shape[:-1]:
            return None
    else:  # a hook wants to see it, or autocast casts x, but not what the router reads
        gates = block.mos_router(x)
        if not isinstance(gates, Tensor):  # of the peft method, by adapter
            gates = next(gates[name] for name, router in block.mos_router.items() if router is parts.router)
        require_gates(gates, x, parts.router.config)
    tensors = FFNTensors(
        x.to(dtype), gates, parts.router.weight if gates is None else None, aux_weight, mask,
        down[0], tuple(linear for linear, _ in reads),
    )  # fmt: skip
    plan = FFNPlan(
        parts.reads[0].adapter.config, parts.down.adapter.config, backend, _phi_of(block, form),
        gated=form.fused or len(reads) == 2, fused=form.fused,
        differentiable=torch.is_grad_enabled() or parts.training,
        prepared=(down[1], *(prepared for _, prepared in reads)),
    )  # fmt: skip
    return tensors, _remembered(block, form, parts, tensors, plan)


class _Standing(NamedTuple):
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


def _again(block: nn.Module, form: FFNForm, x: Tensor, backend: str) -> tuple[FFNTensors, FFNPlan] | None:
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
        if module is not reference() or type(module) is not kind or _calls_its_own(module):
            return None
    router = _is_inside(children, form, before.inner) if before.inner else module  # the last of them
    if router is None or router.config is not before.routing or router.training:
        return None
    for name in form.hidden:
        if children[name].training:
            return None
    if plan.activation != "silu" and _phi_of(block, form) != plan.activation:
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
    parts = [_Part.of(linear) for linear in linears]
    router = None if None in parts else _active_router(children["mos_router"], linears)
    found = (router, *(module for part in parts if part is not None for module in part))
    if len(found) != len(inner):
        return None
    same = all(
        module is reference() and not _calls_its_own(module) for module, reference in zip(found, inner, strict=True)
    )
    return router if same else None


def _remembered(block: nn.Module, form: FFNForm, parts: _Parts, tensors: FFNTensors, plan: FFNPlan) -> FFNPlan:
    """The plan, with what the backend makes of the parameters; and noted for `_again`.

    Only where nothing but the parameters decides, and every change of them is seen. A graph that is being captured
    computes its own, which a call before it may have made.
    """
    x, weight, adapters = tensors.x, parts.router.weight, [part.adapter._kept for part in parts.all]
    called, hooks = _called(block, form, parts), RemovableHandle.next_id
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
    block.mos_router._standing = _Standing(
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


def _called(block: nn.Module, form: FFNForm, parts: _Parts) -> dict[str, nn.Module]:
    """The modules whose calls one operation replaces, by name, the block's router the last of its children."""
    called = {name: block._modules[name] for name in (*form.linears, *form.activation, *form.hidden, "mos_router")}
    if parts.router is not called["mos_router"]:  # of the peft method
        inner = (parts.router, *(module for part in parts.all for module in part))
        called.update((f"{i} inside", module) for i, module in enumerate(inner))
    return called


def _factors(parts: _Parts, x: Tensor, backend: str) -> tuple[list[_Part], list[Factors]]:
    """The linears, the last of them first, and what a call wants of their parameters."""
    linears = [parts.down, *parts.reads]
    adapters = [part.adapter for part in linears]
    if backend == "eager" or not torch.is_grad_enabled() or any(a.config.curvature_max_grad_norm for a in adapters):
        return linears, [adapter._factors(x, None, backend) for adapter in adapters]
    thetas, maps = [a.mos_curvature for a in adapters], [a.mos_curvature_map for a in adapters]
    kappas = _Curvatures.apply(len(adapters), *thetas, *maps)
    return linears, [Factors(kappa, a.mos_lora_A, None) for kappa, a in zip(kappas, adapters, strict=True)]


class _Curvatures(torch.autograd.Function):
    """κ = offset + gain·θ of several adapters in a launch each way. Their dκ is finite, so a gain of 0 leaves 0."""

    @staticmethod
    def forward(ctx, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        thetas, maps = tensors[:count], tensors[count:]
        ctx.save_for_backward(*maps)
        ctx.dtypes = [theta.dtype for theta in thetas]
        offsets, gains = ([each[i] for each in maps] for i in range(2))
        return tuple(torch._foreach_addcmul(offsets, gains, [theta.float() for theta in thetas]))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = torch._foreach_mul([each[1] for each in ctx.saved_tensors], list(gradients))
        return None, *(t.to(dtype) for t, dtype in zip(found, ctx.dtypes, strict=True)), *[None] * len(found)


_FACTS = operator.attrgetter("__class__", "shape", "dtype", "device")


def _look(t: Tensor | None) -> tuple | None:
    """What decides whether a tensor goes together with others."""
    return None if t is None else _FACTS(t)


def _fits(x: Tensor, parts: _Parts, form: FFNForm) -> bool:
    """Whether the tensors go together. Where they do not, the modules' own calls say what is wrong."""
    if any(t is not None and (t.device != x.device or is_dtensor(t)) for t in parts.tensors()):
        return False
    if not x.is_floating_point() or parts.router.weight.shape != (parts.router.config.num_experts, x.shape[-1]):
        return False
    *reads, down = weights = [dense_weight(part.base) for part in parts.all]
    hidden, casts = down.shape[1] * (2 if form.fused else 1), is_autocast(x)
    if any(weight.shape != (hidden, x.shape[-1]) for weight in reads):
        return False
    for part, weight in zip(parts.all, weights, strict=True):
        adapter, config = part.adapter, part.adapter.config
        if not (weight.dtype == x.dtype or casts and weight.is_floating_point()):
            return False
        (d_out, d_in), E, r = weight.shape, config.num_experts, config.r
        if part.base.bias is not None and part.base.bias.shape != (d_out,):
            return False
        if adapter.mos_lora_B.shape != (d_out, E, r) or adapter.mos_curvature.shape != (E,):
            return False
        if adapter.mos_lora_A.shape != ((r, d_in) if config.share_a else (E, r, d_in)):
            return False
    return True


def _router(block: nn.Module, linears: Sequence[nn.Module]) -> MoSRouter | None:
    """The router of the adapter that the linears use."""
    router, is_own = block._modules.get("mos_router"), [isinstance(linear, MoSLayer) for linear in linears]
    if type(router) is MoSRouter:  # a subclass may route otherwise
        return router if all(is_own) else None
    return None if any(is_own) else _active_router(router, linears)


def _active_router(router: nn.Module | None, linears: Sequence[nn.Module]) -> MoSRouter | None:
    """Of the peft method's routers, by adapter, that of the one adapter which all of the linears use."""
    if getattr(router, "disable_adapters", True):
        return None
    active = [name for name in router.active_adapters if name in router]
    if len(active) != 1 or type(router[active[0]]) is not MoSRouter:
        return None
    used = ([name for name in linear.active_adapters if name in linear.mos_adapter] for linear in linears)
    return router[active[0]] if all(names == active for names in used) else None


def routing_of(module: MoSAdapter | MoSRouter) -> tuple[int, int, bool]:
    """What decides how logits become gates."""
    config = module.config
    return config.num_experts, config.num_experts_per_tok, config.norm_topk_prob


_PHI = {"SiLU": "silu", "SiLUActivation": "silu", "GELU": "gelu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh",
        "NewGELUActivation": "gelu_tanh"}  # fmt: skip
"""torch's and transformers' classes, by name: transformers need not be there."""


def _phi_of(block: nn.Module, form: FFNForm) -> str | None:
    """The activation as an `FFNPlan` names it; None for another one."""
    if len(form.activation) != 1:
        return None
    module = getattr(block, form.activation[0])
    kind = type(module)
    if not kind.__module__.startswith(("torch.nn.", "transformers.")):
        return None
    if kind.__name__ == "GELU" and module.approximate == "tanh":
        return "gelu_tanh"
    if getattr(module, "act", None) not in (None, F.gelu) and not isinstance(module.act, functools.partial):
        return None
    return _PHI.get(kind.__name__)


def _calls_its_own(module: nn.Module) -> bool:
    """Whether an attribute of the module's own replaces its class's call."""
    own = vars(module)
    return "forward" in own or "_call_impl" in own or "_compiled_call_impl" in own


def is_called_plainly(module: nn.Module, observers: int = 0) -> bool:
    """Whether calling the module would run its class's forward and nothing else; observers: so many hooks do not count.

    What replaces a method of the class, or of nn.Module, is not seen.
    """
    everywhere = nn.modules.module
    return not (
        len(module._forward_hooks) > observers
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
        or _calls_its_own(module)
    )
