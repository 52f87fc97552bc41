"""MoSLinear in a module of your own, without transformers: linears with their own routers, and linears that share one.

    python examples/plain_torch.py

A frozen feed-forward block learns to behave like another block, which differs from it by a small change of its weights.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import nn

from mos_kernels import MoSConfig, MoSLinear, MoSRouter


class OwnRouters(nn.Module):
    """Each linear has a router of its own (router_scope="linear"), so it is called like any linear."""

    def __init__(self, up: nn.Linear, down: nn.Linear):
        super().__init__()
        config = MoSConfig(r=8, router_scope="linear")
        self.up, self.down = MoSLinear.from_linear(up, config), MoSLinear.from_linear(down, config)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.up(x)))


class SharedRouter(nn.Module):
    """One router reads the block's input, and both linears use its gates (router_scope="ffn", the default)."""

    def __init__(self, up: nn.Linear, down: nn.Linear):
        super().__init__()
        config = MoSConfig(r=8)
        self.router = MoSRouter(up.in_features, config)
        self.up, self.down = MoSLinear.from_linear(up, config), MoSLinear.from_linear(down, config)

    def forward(self, x):
        gates = self.router(x)
        return self.down(torch.nn.functional.silu(self.up(x, gates)), gates)


def train(block: nn.Module, teacher: nn.Module, width: int, steps: int) -> tuple[float, float]:
    """The loss at the first and at the last step. The load-balancing gradient is added in backward by itself."""
    parameters = [p for p in block.parameters() if p.requires_grad]  # A, B, curvature and routers; the base is frozen
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    losses = []
    for _ in range(steps):
        x = torch.randn(64, width)
        loss = nn.functional.mse_loss(block(x), teacher(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    up, down = nn.Linear(options.width, 4 * options.width), nn.Linear(4 * options.width, options.width)
    teacher = nn.Sequential(copy.deepcopy(up), nn.SiLU(), copy.deepcopy(down)).requires_grad_(False)
    for linear in (teacher[0], teacher[2]):
        linear.weight += 0.5 * linear.weight.std() * torch.randn(len(linear.weight), 1)  # a change of rank one
    for kind in (OwnRouters, SharedRouter):
        block = kind(copy.deepcopy(up), copy.deepcopy(down))
        first, last = train(block, teacher, options.width, options.steps)
        print(f"{kind.__name__}: loss {first:.4f} at the first step, {last:.4f} at the last")
        dimensionless = block.up.curvature * block.up.config.squared_length_unit(options.width)
        for space, curvature in zip(block.up.config.expert_spaces, dimensionless.tolist(), strict=True):
            print(f"  expert that started {space}: curvature {curvature:.2f}")


if __name__ == "__main__":
    main()
