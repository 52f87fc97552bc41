"""MELoRA (Ren et al., 2024): n small LoRAs along the diagonal, y = W x + alpha/r · diag(B_1 A_1, …, B_n A_n) x.

Each mini LoRA reads its n-th of the input and writes its n-th of the output: r (d_in + d_out) parameters as a LoRA of
rank r, and a rank of n·r. Here r is the rank of each mini LoRA.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mos_kernels.config import MoSConfig
from mos_kernels.finetune.model import Method
from mos_kernels.huggingface.targets import find_targets

MINI_LORAS = 4


class MELoRALinear(nn.Module):
    """base (frozen), lora_A (n, r, d_in/n), lora_B (n, d_out/n, r), zeros at the start. x (..., d_in) -> (..., d_out).

    Raises ValueError where n does not divide both widths.
    """

    def __init__(self, base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float, n: int = MINI_LORAS) -> None:
        super().__init__()
        d_in, d_out = base.in_features, base.out_features
        if d_in % n or d_out % n:
            raise ValueError(f"{n} mini LoRAs do not divide a linear {d_in} -> {d_out}")
        self.base, self.n, self.scaling = base, n, lora_alpha / r
        self.dropout = nn.Dropout(lora_dropout)
        self.lora_A = nn.Parameter(torch.empty(n, r, d_in // n))
        self.lora_B = nn.Parameter(torch.zeros(n, d_out // n, r))
        bound = 1 / math.sqrt(d_in // n)  # kaiming_uniform_(a=√5) of each factor, as peft
        nn.init.uniform_(self.lora_A, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.dropout(x).unflatten(-1, (self.n, -1))
        low = torch.einsum("...ni,nri->...nr", parts, self.lora_A)
        return self.base(x) + self.scaling * torch.einsum("...nr,nor->...no", low, self.lora_B).flatten(-2)


def _add(model: nn.Module, config: dict) -> list[str]:
    targets = find_targets(model, MoSConfig(target_modules=config["target_modules"]))
    options = {name: config[name] for name in ("r", "lora_alpha", "lora_dropout")}
    layers = {target.name: MELoRALinear(target.module, **options) for target in targets}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return list(layers)


METHODS = {"melora": Method(("r", "lora_alpha", "lora_dropout", "target_modules"), _add)}
