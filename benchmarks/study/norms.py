"""How large the outputs of each space's experts are: measured in a training step after the first, and in the last."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mos_kernels.geometry import inverse_projection_scale, projection_scale
from mos_kernels.huggingface.peft.layer import MoSPeftLayer
from mos_kernels.layer import MoSAdapter
from mos_kernels.run_report.log import write_text

FILE = "norms.json"


@torch.no_grad()
def expert_norms(layer: MoSAdapter, linear: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, d_in) -> norms (α/r) ‖o‖ (T, E) without gates, geometry's factor λe on B A x (T, E), base's norms (T,)."""
    x, kappa = x.float(), layer.curvature.detach()
    into = inverse_projection_scale(x.square().sum(-1), kappa, layer.config)[0]
    low = x @ layer.mos_lora_A.float().transpose(-1, -2)  # (T, r), or (E, T, r)
    low = low.expand(layer.config.num_experts, *low.shape[-2:]).transpose(0, 1) * into.unsqueeze(-1)
    gram = torch.einsum("oer,oes->ers", layer.mos_lora_B, layer.mos_lora_B).float()
    q = torch.einsum("ter,ers,tes->te", low, gram, low).clamp(min=0)
    back = projection_scale(q, kappa, layer.config)[0]
    bias = None if linear.bias is None else linear.bias.float()
    base = nn.functional.linear(x, linear.weight.float(), bias)
    return layer.config.scaling * back * q.sqrt(), into * back, base.norm(dim=-1)


class ExpertNorms(TrainerCallback):
    """Writes norms.json into the output folder: by step, means over layers, tokens and the experts of a space.

    "last" is the last step; "first" the third, before which B is zero (warm-up starts at a learning rate of 0). Padding
    is left out. "factor" is λe on B A x: what the geometry makes of an expert's learning rate. "base norm" is that of
    the frozen linear's output.
    """

    def __init__(self, output: Path) -> None:
        self._path = output / FILE
        self._handles: list = []
        self._mask: Tensor | None = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._name = {2: "first", state.max_steps - 1: "last"}.get(state.global_step)
        layers = [module for module in model.modules() if isinstance(module, MoSPeftLayer)]
        if self._name is None or not layers:
            return
        self._sums: dict[str, list[float]] = {}

        def remember_mask(module, args, kwargs):
            self._mask = kwargs.get("attention_mask")

        self._handles = [model.register_forward_pre_hook(remember_mask, with_kwargs=True)]
        self._handles += [layer.register_forward_hook(self._measure) for layer in layers]

    def _measure(self, module: MoSPeftLayer, args, output) -> None:
        x, (layer,) = args[0].detach(), module.mos_adapter.values()
        known = self._mask is not None and self._mask.shape == x.shape[:-1]
        norms, factors, base = expert_norms(layer, module.base_layer, x[self._mask != 0] if known else x.flatten(0, -2))
        for expert, space in enumerate(layer.config.expert_spaces):
            self._sums.setdefault(f"{space} norm", []).append(norms[:, expert].mean().item())
            self._sums.setdefault(f"{space} factor", []).append(factors[:, expert].mean().item())
        self._sums.setdefault("base norm", []).append(base.mean().item())

    def on_step_end(self, args, state, control, **kwargs):
        for handle in self._handles:
            handle.remove()
        if self._handles:
            earlier = json.loads(self._path.read_text()) if self._path.is_file() else {}
            means = {name: sum(values) / len(values) for name, values in self._sums.items()}
            write_text(self._path, json.dumps({**earlier, self._name: means}))
        self._handles = []
