"""Which FFN blocks run as one operation: the form of a block, its parts, and what needs the call of a single linear.

The adapted linears of a block run as one operation unless something needs the call of a single linear. Then they are
called one by one, with equal results up to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mos_kernels.backends.interface import Prepared
from mos_kernels.call import Adapted
from mos_kernels.kept import Factors
from mos_kernels.layer import (
    MoSAdapter,
    MoSConv1D,
    MoSLayer,
    MoSLinear,
    MoSRouter,
    dense_weight,
    is_conv1d,
    is_dense,
    parameter_of,
)


@dataclass(frozen=True)
class FFNForm:
    """The form of an FFN block, by the names of its children.

    inputs: the linears that read the block's input: (gate, up), (fused gate_up,) or (up,). fused: whether a single
    input linear computes gate and up, in this order. activation: the modules on the gate (or on the single input).
    hidden: the modules before `down`. output: the modules after it. routed: the linears that take gates. phi: an
    activation that is no module, as an `FFNPlan` names it.
    """

    inputs: tuple[str, ...]
    fused: bool
    activation: tuple[str, ...]
    hidden: tuple[str, ...]
    down: str
    output: tuple[str, ...]
    routed: tuple[str, ...] = ()
    phi: str | None = None

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


class Part(NamedTuple):
    """An adapted linear: its adapter, and the module that has the base's weight and bias."""

    adapter: MoSAdapter
    base: nn.Module

    @classmethod
    def of(cls, linear: nn.Module) -> Part | None:
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


class Parts(NamedTuple):
    """A block's adapted linears (`reads` read its input, `down` is the last one), and their router."""

    reads: tuple[Part, ...]
    down: Part
    router: MoSRouter

    @property
    def all(self) -> tuple[Part, ...]:
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
    parts = parts_of(block, form)
    return parts if isinstance(parts, str) else None


def parts_of(block: nn.Module, form: FFNForm) -> Parts | str:
    """The parts of a block that runs as one operation, or the reason why it does not."""
    if len(form.routed) < len(form.linears):
        return "not all of its linears are adapted"
    modules = [getattr(block, name) for name in form.linears]
    found = [Part.of(module) for module in modules]
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
    if phi_of(block, form) is None:
        return "its activation is neither SiLU nor GELU"
    if any(type(getattr(block, name)) not in (nn.Dropout, nn.Identity) for name in form.hidden):
        return "there is a module before its last linear"
    if any(t is not None and t.requires_grad for part in found for t in (part.base.weight, part.base.bias)):
        return "the base's weights are trained"
    made = Parts(tuple(reads), down, router)
    routers = block._modules["mos_router"], router  # whose calls may be seen
    others = (module for module in called_modules(block, form, made).values() if module not in routers)
    if not all(map(is_called_plainly, others)):
        return "a hook, offloading or a replaced forward needs the call of a single linear"
    return made


def called_modules(block: nn.Module, form: FFNForm, parts: Parts) -> dict[str, nn.Module]:
    """The modules whose calls one operation replaces, by name, the block's router the last of its children."""
    called = {name: block._modules[name] for name in (*form.linears, *form.activation, *form.hidden, "mos_router")}
    if parts.router is not called["mos_router"]:  # of the peft method
        inner = (parts.router, *(module for part in parts.all for module in part))
        called.update((f"{i} inside", module) for i, module in enumerate(inner))
    return called


def _router(block: nn.Module, linears: Sequence[nn.Module]) -> MoSRouter | None:
    """The router of the adapter that the linears use."""
    router, is_own = block._modules.get("mos_router"), [isinstance(linear, MoSLayer) for linear in linears]
    if type(router) is MoSRouter:  # a subclass may route otherwise
        return router if all(is_own) else None
    return None if any(is_own) else active_router(router, linears)


def active_router(router: nn.Module | None, linears: Sequence[nn.Module]) -> MoSRouter | None:
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


def phi_of(block: nn.Module, form: FFNForm) -> str | None:
    """The activation as an `FFNPlan` names it; None for another one."""
    if len(form.activation) != 1:
        return None if form.activation else form.phi
    module = getattr(block, form.activation[0])
    kind = type(module)
    if not kind.__module__.startswith(("torch.nn.", "transformers.")):
        return None
    if kind.__name__ == "GELU" and module.approximate == "tanh":
        return "gelu_tanh"
    if getattr(module, "act", None) not in (None, F.gelu) and not isinstance(module.act, functools.partial):
        return None
    return _PHI.get(kind.__name__)


def calls_its_own(module: nn.Module) -> bool:
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
        or calls_its_own(module)
    )
