"""Calls of the kernels between the linears of an FFN, drawn from a seed, against the eager backend in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from cases import DTYPES, compare, laid_out
from torch import Tensor

from mos_kernels import MoSConfig
from mos_kernels.backends import eager, eager_ffn
from mos_kernels.backends.triton import activate
from mos_kernels.call import FFNPlan

FORMS = ("gated", "fused", "not gated")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
WIDTHS = (1, 2, 3, 7, 16, 31, 33, 64, 65, 100, 144)


def plan(form: str, activation: str) -> FFNPlan:
    gated, fused = form != "not gated", form == "fused"
    config = MoSConfig()
    return FFNPlan(config, config, "triton", activation, gated, fused, True, (None,) * (3 if form == "gated" else 2))


@dataclass(frozen=True)
class ActivateTrial:
    """Everything about one comparison; `ActivateTrial(**fields)` or `ActivateTrial.drawn(seed)`."""

    T: int = 33
    d: int = 72
    rows: tuple[int, ...] = (8,)  # A's shape before its last dimension: r, or E and r
    dtype: torch.dtype = torch.bfloat16
    form: str = "gated"
    activation: str = "silu"
    seed: int = 0
    scale: float = 1.0
    layout: str = "dense"
    A_dtype: torch.dtype = torch.float32
    needs_A: bool = True
    device: str = "cpu"

    @classmethod
    def drawn(cls, seed: int, **fixed) -> ActivateTrial:
        """A trial of any kind, the same for a seed on every machine; `fixed` are fields that are not drawn."""
        rng = random.Random(seed)
        drawn = {
            "T": rng.choice([0, 1, 2, 16, 17, 33, 64, 65, 130]), "d": rng.choice(WIDTHS),
            "rows": rng.choice([(1,), (3,), (8,), (8, 4), (64,), (5, 7), (9, 8), (64, 2)]),
            "dtype": rng.choice(DTYPES), "form": rng.choice(FORMS), "activation": rng.choice(ACTIVATIONS),
            "seed": seed, "scale": rng.choice([0.0, 0.1, 1.0, 1.0, 10.0]),
            "layout": rng.choice(["dense", "dense", "rows apart", "expanded"]),
            "A_dtype": rng.choice([torch.float32, *DTYPES]), "needs_A": rng.random() < 0.8,
        }  # fmt: skip
        return cls(**{**drawn, **fixed})

    def failures(self) -> list[str]:
        """One line for each result that fails the criterion, and for each argument that was written to."""
        plan_, generator = plan(self.form, self.activation), torch.Generator().manual_seed(self.seed)

        def randn(*shape: int, dtype=torch.float32, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(self.device, dtype)

        width = 2 * self.d if plan_.fused else self.d
        outputs = [
            laid_out(randn(self.T, width, dtype=self.dtype, scale=self.scale), self.layout)
            for _ in range(2 if self.form == "gated" else 1)
        ]
        A = randn(*self.rows, self.d, dtype=self.A_dtype, scale=self.d**-0.5)
        R = A.flatten(0, -2).shape[0]
        dp, dn, dh = randn(self.T, R), randn(self.T), laid_out(randn(self.T, self.d, dtype=self.dtype), self.layout)
        arguments = [*outputs, A, dp, dn, dh]
        before = [argument.clone() for argument in arguments]

        h, p, n = activate.activate_launch(outputs, A, plan_)
        gradients, dA = activate.activate_backward_launch(dh, outputs, A, dp, dn, plan_, self.needs_A)
        kernels = {"h": h, "p": p.sum(0), "n": n.sum(0).clamp(max=1e30), **_named(gradients, dA)}
        by_torch = self._by_torch(outputs, h, A, dp, dn, dh, plan_)
        double = [t.double() for t in outputs], *(t.double() for t in (h, A, dp, dn, dh))
        failed = compare(kernels, by_torch, self._by_torch(*double, plan_))
        written = [i for i, (a, b) in enumerate(zip(arguments, before, strict=True)) if not torch.equal(a, b)]
        failed += [f"argument {i} was written to" for i in written]
        shapes = [tuple(gradient.shape) for gradient in gradients]
        return failed + ([] if shapes == [tuple(output.shape) for output in outputs] else [f"gradients {shapes}"])

    def _by_torch(self, outputs, h, A, dp, dn, dh, plan_: FFNPlan) -> dict[str, Tensor]:
        """h, and what follows from the kernels' own h, which is rounded."""
        rows = A.flatten(0, -2)
        by_torch = {
            "h": eager_ffn._activate(outputs, A, plan_)[0],
            "p": eager.narrow_matmul(h, rows.t(), h.dtype), "n": eager.squared_norm(h),
        }  # fmt: skip
        dh = eager.operand(eager.narrow_matmul(dp, rows, h.dtype) + dh + 2 * dn[:, None] * h, h.dtype)
        gradients = [torch.empty_like(output) for output in outputs]
        (g, u), (dg, du) = (eager_ffn._halves(each, slice(None), plan_) for each in (outputs, gradients))
        eager_ffn._phi_backward(dh if u is None else dh * u, g, plan_.activation, dg)
        if u is not None:
            torch.mul(dh, eager_ffn.phi(g, plan_.activation), out=du)
        dA = eager.narrow_matmul(dp.t(), h, h.dtype) if self.needs_A else None
        return {**by_torch, **_named(gradients, dA)}


def _named(gradients: list[Tensor], dA: Tensor | None) -> dict[str, Tensor]:
    named = {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}
    return named if dA is None else {**named, "dA": dA}
