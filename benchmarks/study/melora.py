"""MELoRA (Ren et al., 2024): n small LoRAs along the diagonal, y = W x + alpha/r · diag(B_1 A_1, …, B_n A_n) x.

Each mini LoRA reads its n-th of the input and writes its n-th of the output: r (d_in + d_out) parameters as a LoRA of
rank r, and a rank of n·r. Here r is the rank of each mini LoRA.
"""

from __future__ import annotations

import math

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

from mos_kernels.finetune import Method

MINI_LORAS = 4


class _Diagonal(nn.Module):
    """weight (n, d_out/n, d_in/n): x (..., d_in) -> (..., d_out), each part of x by its own matrix."""

    def __init__(self, d_in: int, d_out: int, n: int) -> None:
        super().__init__()
        if d_in % n or d_out % n:
            raise ValueError(f"{n} mini LoRAs do not divide a linear {d_in} -> {d_out}")
        self.weight = nn.Parameter(torch.zeros(n, d_out // n, d_in // n))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...ni,noi->...no", x.unflatten(-1, (len(self.weight), -1)), self.weight).flatten(-2)


class MELoRALinear(Linear):
    """peft's LoRA linear with `MINI_LORAS` blocks along the diagonal as A and as B; B is zero at the start.

    Raises ValueError where their number does not divide both widths.
    """

    def update_layer(self, adapter_name: str, r: int, *args, **kwargs) -> None:
        super().update_layer(adapter_name, r, *args, **kwargs)
        down = _Diagonal(self.in_features, MINI_LORAS * r, MINI_LORAS)
        bound = 1 / math.sqrt(down.weight.shape[-1])  # kaiming_uniform_(a=√5) of each factor, as peft
        nn.init.uniform_(down.weight, -bound, bound)
        self.lora_A[adapter_name] = down.to(self.weight.device)
        self.lora_B[adapter_name] = _Diagonal(MINI_LORAS * r, self.out_features, MINI_LORAS).to(self.weight.device)


def _config(config: dict, steps: int) -> LoraConfig:
    made = LoraConfig(**config)
    made._register_custom_module({nn.Linear: MELoRALinear})
    return made


METHODS = {"melora": Method(("r", "lora_alpha", "lora_dropout", "target_modules"), _config)}
