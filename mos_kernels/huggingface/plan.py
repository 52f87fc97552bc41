"""The plan of an adapter: every linear and router that it will have, decided before the model is changed."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from mos_kernels.backends.eager import compute_dtype
from mos_kernels.config import MoSConfig, listed
from mos_kernels.ffn import FFNForm, why_not_one
from mos_kernels.huggingface.blocks import recognise
from mos_kernels.huggingface.targets import Target, base_of, find_targets, in_features, layer_kind, out_features
from mos_kernels.layer import MoSLayer, MoSRouter, device_and_dtype, parameter_shapes


@dataclass(frozen=True)
class PlannedLinear:
    """A linear to adapt. config: its own, with its rank, alpha, spaces and router_scope."""

    target: Target
    config: MoSConfig
    why_own_router: str | None = None

    @property
    def name(self) -> str:
        return self.target.name

    def build(self) -> MoSLayer:
        """The adapted layer, which uses the weight and the bias of the linear and freezes them."""
        return layer_kind(self.target.module).from_linear(self.target.module, self.config)


@dataclass(frozen=True)
class PlannedBlock:
    """An FFN block that gets a router for the linears in form.routed."""

    name: str
    block: nn.Module
    form: FFNForm
    config: MoSConfig

    @property
    def reads_input(self) -> nn.Module:
        """A linear with the same input as the router."""
        return base_of(getattr(self.block, self.form.inputs[0]))

    def build(self) -> MoSRouter:
        reads_input = self.reads_input
        device, base_dtype = device_and_dtype(reads_input)
        router = MoSRouter(in_features(reads_input), self.config, device=device, dtype=compute_dtype(base_dtype))
        return router.train(self.block.training)


@dataclass(frozen=True)
class Plan:
    """Everything that an adapter puts on a model."""

    config: MoSConfig
    linears: list[PlannedLinear] = field(default_factory=list)
    blocks: list[PlannedBlock] = field(default_factory=list)

    @property
    def num_routers(self) -> int:
        return len(self.blocks) + sum(linear.config.router_scope == "linear" for linear in self.linears)

    def share_balance(self, owners: Iterable[nn.Module]) -> None:
        """Divide the load-balancing coefficient by the number of routers, and give it to the modules that route."""
        for owner in owners:
            owner.aux_coefficient = self.config.router_aux_loss_coef / self.num_routers
            owner.mos_aux_weight.fill_(owner.aux_coefficient)

    def report(self) -> str:
        """Which linears are adapted, and which router each uses; layers that are alike share a line."""
        groups: dict[str, list[str]] = defaultdict(list)

        def of(config: MoSConfig) -> str:
            return f" of {listed(config.spaces)}" if self.config.spaces_pattern else ""

        for block in self.blocks:
            why = why_not_one(block.block, block.form)
            how = "one operation" if why is None else f"linear by linear, since {why}"
            inside = (getattr(getattr(block.block, name), "p", 0) for name in block.form.hidden)
            if why is None and any(p > 0 for p in (self.config.lora_dropout, *inside)):
                how += " (linear by linear in training, where it has dropout)"
            text = f"one router{of(block.config)} per block, for {', '.join(block.form.routed)}; {how}"
            groups[text].append(block.name or "(the model)")
        for linear in self.linears:
            if linear.config.is_lora:
                groups["a LoRA, one Euclidean expert without a router"].append(linear.name)
            elif linear.why_own_router is not None:
                groups[f"a router{of(linear.config)} of its own: {linear.why_own_router}"].append(linear.name)
        lines = [f"MoS on {len(self.linears)} linears, {self.num_routers} routers"]
        for text, names in groups.items():
            lines += [f"  {name} ({count}): {text}" for name, count in _alike(names).items()]
        return "\n".join(lines)


def make_plan(model: nn.Module, config: MoSConfig, modules: list[tuple[str, nn.Module]] | None = None) -> Plan:
    """Where `config` puts adapters on `model`, which is not changed. modules and errors: as in `find_targets`."""
    if not isinstance(config, MoSConfig):
        raise TypeError(f"config is a {type(config).__name__}: pass a mos_kernels.MoSConfig")
    targets = find_targets(model, config, modules)
    own = {target.name: config.for_module(target.name) for target in targets}
    blocks, why_own = [], {}
    if config.router_scope == "linear":
        why_own = {target.name: "router_scope='linear'" for target in targets}
    else:
        for parent, children in _by_parent(model, targets).items():
            parent_name = next(iter(children.values())).name.rpartition(".")[0]
            form = recognise(parent)
            routed, shared = _routed_together(form, {child: own[target.name] for child, target in children.items()})
            if len(routed) > 1:
                experts = {"spaces": shared.spaces, "num_experts_per_tok": shared.num_experts_per_tok}
                its = dataclasses.replace(config, **experts)
                blocks.append(PlannedBlock(parent_name, parent, dataclasses.replace(form, routed=routed), its))
            for child, target in children.items():
                if form is None:
                    why_own[target.name] = f"{type(parent).__name__} is no FFN block of a known form"
                elif child not in form.linears:
                    why_own[target.name] = f"not one of the FFN linears of {type(parent).__name__}"
                elif len(routed) == 1 or child not in routed:
                    others = sum(not own[other.name].is_lora for other in children.values()) > 1
                    only = "the only one with its spaces" if others else "the only target"
                    why_own[target.name] = f"{only} in {type(parent).__name__}"
        for target in targets:
            if _parent(model, target) is None:
                why_own[target.name] = f"shared between {', '.join(target.names)}"

    linears = []
    for target in targets:
        its, why = own[target.name], why_own.get(target.name)
        if its.is_lora:
            its, why = dataclasses.replace(its, router_scope="ffn"), None  # it has no router
        elif why is not None:
            its = dataclasses.replace(its, router_scope="linear")
        linears.append(PlannedLinear(target, its, why))
    return Plan(config, linears, blocks)


def _routed_together(form: FFNForm | None, configs: dict[str, MoSConfig]) -> tuple[tuple[str, ...], MoSConfig | None]:
    """The linears of a block that share a router, and their configuration: the largest set with the same experts.

    A LoRA has no router. Returns ((), None) if the form is unknown, or if no linear has a router.
    """
    groups: dict[tuple, list[str]] = defaultdict(list)
    for name in form.linears if form else ():
        if name in configs and not configs[name].is_lora:
            groups[tuple(configs[name].spaces.items())].append(name)
    largest = max(groups.values(), key=len, default=[])
    return tuple(largest), configs[largest[0]] if largest else None


def adapter_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the adapter, by name. Nothing is allocated: a damaged file may ask for any size."""
    shapes = {}
    for linear in plan.linears:
        base = linear.target.module
        own = parameter_shapes(linear.config, in_features(base), out_features(base))
        shapes |= {f"{linear.name}.{name}": shape for name, shape in own.items()}
    for block in plan.blocks:
        width = in_features(getattr(block.block, block.form.inputs[0]))
        shapes[f"{block.name}.mos_router.weight".lstrip(".")] = (block.config.num_experts, width)
    return shapes


def _by_parent(model: nn.Module, targets: list[Target]) -> dict[nn.Module, dict[str, Target]]:
    """The targets, by their parent and by their name in it; without those that have several parents."""
    children: dict[nn.Module, dict[str, Target]] = defaultdict(dict)
    for target in targets:
        parent = _parent(model, target)
        if parent is not None:
            children[parent][target.names[0].rpartition(".")[2]] = target
    return children


def _parent(model: nn.Module, target: Target) -> nn.Module | None:
    """The module that holds the target; None if several modules hold it, or one holds it under several names."""
    places = {(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in target.names}
    return places.pop()[0] if len(places) == 1 else None


def _alike(names: list[str]) -> dict[str, int]:
    """Names in which numbers are replaced by *, and how many names give each of them."""
    counts: dict[str, int] = {}
    for name in names:
        key = re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)
        counts[key] = counts.get(key, 0) + 1
    return counts
