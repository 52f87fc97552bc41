"""A mixture that starts as a trained LoRA: its Euclidean experts are copies of the LoRA, its curved experts are zero.

A Euclidean expert with gate g computes g·(α/r)·B A x. So the mixture computes the LoRA's s·B A x for every x if

    Σ_e g_e(x) B_e (α/r) = s·B    over the Euclidean experts, which all have the LoRA's A and B_e = c·B

This holds with c = s / (G·α/r) if the gates of the Euclidean experts have the same sum G for every x. Without curved
experts, renormalised gates have the sum G = 1. With curved experts, the experts form groups of equal size. Each group
has one Euclidean expert, and all experts of a group have the same row in the router. Then the k largest logits belong
to whole groups, and G = 1 / (experts in a group). Rows differ between groups, and after the start each row trains by
itself.

A router at zero would only do for k = E. For k < E, ties would go to the first experts, which are the curved ones, and
experts of the same space would stay copies of each other.
"""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mos_kernels.config import MoSConfig
from mos_kernels.huggingface.apply import AppliedMoS, install
from mos_kernels.huggingface.atomic import CONFIG_NAME, WEIGHTS_NAME
from mos_kernels.huggingface.files import (
    PREFIX,
    read_json,
    read_tensors,
    refuse_meta,
    require_finite,
    require_untied,
    without_base,
)
from mos_kernels.huggingface.modules import plain_name, refuse_parallel, unwrap
from mos_kernels.huggingface.plan import Plan, make_plan
from mos_kernels.huggingface.state import adapter_state, tensors_of
from mos_kernels.huggingface.targets import in_features, out_features
from mos_kernels.layer import ROUTER_INIT_STD, MoSLayer, MoSRouter
from mos_kernels.sharded import spread_like

CURVATURE_STEP = 0.1
"""Experts of one space in one group differ by this part of curvature_init, or they would stay copies of each other."""

_KEEPS_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")
_MORE_THAN_B_A = (
    "use_dora", "bias", "lora_bias", "use_qalora", "alora_invocation_tokens", "layer_replication", "kasa_config",
    "arrow_config",
)  # fmt: skip


@dataclass(frozen=True)
class LoRA:
    """A trained LoRA: factors A (r, d_in), B (d_out, r) and scaling s by linear, and the modules trained whole."""

    factors: dict[str, tuple[Tensor, Tensor, float]]
    modules: list[str]
    module_tensors: dict[str, Tensor]
    dropout: float
    use_rslora: bool


def start_from_lora(
    model: nn.Module,
    lora: str | os.PathLike | nn.Module,
    config: MoSConfig | None = None,
    *,
    adapter_name: str = "default",
) -> AppliedMoS:
    """Put an adapter on `model` that computes the same as a trained LoRA, up to rounding. It can be trained further.

    Args:
        model: the LoRA's base model, without an adapter.
        lora: the folder of a peft LoRA adapter, or a PeftModel with the adapter `adapter_name`, which is not changed.
        config: None for the default configuration with the linears, the rank, the dropout and the scaling of the LoRA.
            A given configuration may have more linears (which start without an effect) and larger ranks.

    The number of Euclidean experts must divide the number of experts, and k must be a multiple of the group size
    (experts per Euclidean expert). The gates must be renormalised, unless all experts are used. Modules that were
    trained with the LoRA, such as a classifier, are copied and stay trainable.

    Returns the same as apply_mos. Raises ValueError, before the model is changed, if the function would differ from the
    LoRA's: for an activation, DoRA, trained biases, an initialisation that changed the base (such as PiSSA), smaller
    ranks, and linears that `config` leaves out. Also for damaged or foreign files, as `load_adapter` does.
    """
    refuse_parallel(model)
    model = unwrap(model)
    if adapter_state(model) is not None or hasattr(model, "peft_config"):
        raise ValueError("the model has an adapter already: pass the plain base model (remove_mos, or unload of peft)")
    read = _read_model(lora, adapter_name) if isinstance(lora, nn.Module) else _read_folder(Path(lora))
    found = _collect(*read, model)
    config = _default_config(found) if config is None else config
    plan = make_plan(model, config)
    for linear in plan.linears:
        if linear.name in found.factors:
            _group_size(linear.config)
    modules = tensors_of(model, found.modules)
    refuse_meta(plan.linears, modules)
    _require_same_function(found, plan)
    shapes = {name: tuple(tensor.shape) for name, tensor in modules.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in found.module_tensors.items()}:
        raise ValueError(f"the modules trained with the LoRA, {found.modules}, are not those of this model")
    require_untied("the LoRA", model, modules, found.module_tensors)

    install(model, plan)
    with torch.no_grad():
        for linear in plan.linears:
            layer = model.get_submodule(linear.target.names[0])
            _fill(layer, found.factors.get(linear.name))
            if layer.mos_router is not None:
                layer.mos_router.copy_(_router(layer.mos_router, layer.config))
        for router in (module for module in model.modules() if isinstance(module, MoSRouter)):
            router.weight.copy_(_router(router.weight, router.config))
    modules = tensors_of(model, found.modules)
    adapter_state(model).replace({n: spread_like(found.module_tensors[n], tensor) for n, tensor in modules.items()})
    for tensor in modules.values():
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(True)
    return AppliedMoS([linear.name for linear in plan.linears], plan.report())


def expert_groups(config: MoSConfig) -> list[int]:
    """The group of each expert. The j-th Euclidean expert is in group j; the curved ones go to the groups in turn.

    Without Euclidean experts, each expert is a group by itself.
    """
    euclidean = config.spaces.get("euclidean", 0)
    if not euclidean:
        return list(range(config.num_experts))
    curved = config.num_experts - euclidean
    return [expert % euclidean for expert in range(curved)] + list(range(euclidean))


def _group_size(config: MoSConfig) -> int:
    E, k, euclidean = config.num_experts, config.num_experts_per_tok, config.spaces.get("euclidean", 0)
    if not euclidean:
        raise ValueError(f"spaces={dict(config.spaces)} has no Euclidean experts, which a LoRA becomes: add one")
    if config.activation != "identity":
        raise ValueError(f"activation={config.activation!r}: a LoRA has none, use 'identity'")
    if config.init_lora_weights is False:
        raise ValueError("init_lora_weights=False starts the curved experts with an effect: use True")
    size = E // euclidean
    if E % euclidean or k % size:
        raise ValueError(
            f"spaces={dict(config.spaces)} and num_experts_per_tok={k}: the experts must form {euclidean} groups of "
            "one size, a Euclidean one in each, and k must be a number of whole groups, or the function would not be "
            "the same for every token; such as the default, 3 + 3 + 2 experts and k=4"
        )
    if not config.norm_topk_prob and k < E:
        raise ValueError(
            f"norm_topk_prob=False with num_experts_per_tok={k} of {E}: the gates' sum depends on the token; "
            "renormalise them, or use all experts"
        )
    return size


def _default_config(lora: LoRA) -> MoSConfig:
    size = _group_size(MoSConfig())
    ranks = {name: A.shape[0] for name, (A, _, _) in lora.factors.items()}
    r = statistics.mode(ranks.values())
    alphas = {
        name: scaling * (math.sqrt(ranks[name]) if lora.use_rslora else ranks[name]) * size
        for name, (_, _, scaling) in lora.factors.items()
    }
    alpha = statistics.mode(alphas.values())
    return MoSConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        target_modules=list(lora.factors),
        rank_pattern={re.escape(name): rank for name, rank in ranks.items() if rank != r} or None,
        alpha_pattern={re.escape(name): a for name, a in alphas.items() if a != alpha} or None,
    )


def _require_same_function(lora: LoRA, plan: Plan) -> None:
    planned = {linear.name: linear for linear in plan.linears}
    absent = [name for name in lora.factors if name not in planned]
    if absent:
        raise ValueError(f"the LoRA adapts {absent[0]!r} ({len(absent)} such), and target_modules does not name it")
    for name, (A, B, _) in lora.factors.items():
        base, r = planned[name].target.module, planned[name].config.r
        if A.shape[1] != in_features(base) or B.shape[0] != out_features(base):
            raise ValueError(
                f"the LoRA of {name!r} reads {A.shape[1]} and writes {B.shape[0]}, the model's linear "
                f"{in_features(base)} and {out_features(base)}: load the base model that it was trained on"
            )
        if r < A.shape[0]:
            raise ValueError(f"the LoRA of {name!r} has rank {A.shape[0]}, the configuration r={r}: raise r, or give "
                             "the linear its rank in rank_pattern")  # fmt: skip


def _fill(layer: MoSLayer, factors: tuple[Tensor, Tensor, float] | None) -> None:
    """Set the adapter's initial values: Euclidean experts get the LoRA's factors. Additional rank has no effect yet."""
    config, curved = layer.config, [space != "euclidean" for space in layer.config.expert_spaces]
    layer.mos_lora_B.zero_()
    if factors is not None:
        size = _group_size(config)
        A, B, scaling = factors
        r = A.shape[0]
        scaled = (B.double() * (scaling * size / config.scaling)).to(layer.mos_lora_B.device)
        own_A = layer.mos_lora_A if config.share_a else layer.mos_lora_A[sum(curved) :]
        own_A[..., :r, :] = A.to(own_A.device, own_A.dtype)
        layer.mos_lora_B[:, sum(curved) :, :r] = scaled.unsqueeze(1).to(layer.mos_lora_B.dtype)
    if config.share_a and layer.mos_curvature is not None:
        layer.mos_curvature.copy_(_apart(config).to(layer.mos_curvature.device))


def _apart(config: MoSConfig) -> Tensor:
    """θ (E,) with which experts of one space in one group have different curvatures."""
    theta, seen = torch.zeros(config.num_experts), {}
    for expert, key in enumerate(zip(expert_groups(config), config.expert_spaces, strict=True)):
        step = seen[key] = seen.get(key, -1) + 1
        change = config.curvature_signs[expert] * config.curvature_init * CURVATURE_STEP * step
        theta[expert] = change / config.curvature_lr_ratio
    return theta


def _router(weight: Tensor, config: MoSConfig) -> Tensor:
    """A router (E, d_in) whose rows are equal within a group."""
    groups = expert_groups(config)
    rows = torch.empty(max(groups) + 1, weight.shape[1]).normal_(std=ROUTER_INIT_STD)
    return rows[groups].to(weight.device, weight.dtype)


# the LoRA, from a folder or a model


Read = tuple[str, dict, dict[str, Tensor], Callable[[str, int], float]]
"""What messages call the source; its configuration; its tensors; the scaling of a linear and rank."""


def _read_folder(folder: Path) -> Read:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: pass the folder of a peft LoRA adapter")
    config = read_json(path)
    scaling = _scaling(config, str(path))
    return str(folder), config, read_tensors(folder / WEIGHTS_NAME), scaling


def _read_model(model: nn.Module, adapter_name: str) -> Read:
    from peft import get_peft_model_state_dict

    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"the model has no peft adapter {adapter_name!r}; it has {list(configs)}")
    config = configs[adapter_name].to_dict()
    config["peft_type"] = getattr(config["peft_type"], "value", config["peft_type"])
    _scaling(config, f"the adapter {adapter_name!r}")
    layers = {plain_name(name).removeprefix(PREFIX): module for name, module in model.named_modules()}

    def scaling(name: str, r: int) -> float:
        return layers[name].scaling[adapter_name]

    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors = {plain_name(name).removeprefix(PREFIX): tensor.detach().cpu().clone() for name, tensor in state.items()}
    return f"the adapter {adapter_name!r}", config, tensors, scaling


def _scaling(config: dict, where: str):
    """A function (name, rank) -> s of a linear, as in peft. ValueError if the LoRA computes more than B A x."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where} has peft_type {config.get('peft_type')!r}: only a LoRA becomes Euclidean experts")
    for name in _MORE_THAN_B_A:
        if config.get(name) not in (None, False, [], "none"):
            raise ValueError(f"{where} has {name}={config[name]!r}: what it computes is more than B A x")
    init = config.get("init_lora_weights", True)
    if init not in _KEEPS_THE_BASE:
        raise ValueError(f"{where} has init_lora_weights={init!r}, which changed the base's weights: convert it to a "
                         "plain LoRA first (peft: path_initial_model_for_weight_conversion)")  # fmt: skip
    alpha, patterns = config.get("lora_alpha", 8), config.get("alpha_pattern") or {}

    def scaling(name: str, r: int) -> float:
        key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)
        return (alpha if key is None else patterns[key]) / (math.sqrt(r) if config.get("use_rslora") else r)

    return scaling


def _collect(where: str, config: dict, tensors: dict[str, Tensor], scaling, model: nn.Module) -> LoRA:
    tensors = without_base(where, tensors, model)
    factors: dict[str, tuple[Tensor, Tensor, float]] = {}
    whole = dict(tensors)
    for name in tensors:
        if not name.endswith(".lora_A.weight"):
            continue
        linear = name.removesuffix(".lora_A.weight")
        A, B = whole.pop(name), whole.pop(f"{linear}.lora_B.weight", None)
        if A.dim() != 2 or B is None or B.dim() != 2 or B.shape[1] != A.shape[0]:
            raise ValueError(f"{where}: the factors of {linear!r} are not A (r, d_in) and B (d_out, r)")
        factors[linear] = (A, B, float(scaling(linear, A.shape[0])))
    modules = list(config.get("modules_to_save") or [])
    foreign = [name for name in whole if not any(f".{module}." in f".{name}" for module in modules)]
    if foreign or not factors:
        raise ValueError(f"{where} has tensors that are no LoRA of a linear: {(foreign or ['(no lora_A at all)'])[0]}")
    require_finite(where, tensors)
    return LoRA(factors, modules, whole, float(config.get("lora_dropout") or 0.0), bool(config.get("use_rslora")))
