"""The plain LoRA nearest to the adapter of one linear, fitted to its inputs and to what the adapter adds there.

The adapter of a linear adds Δ(x) to its output. The LoRA is the M = B A of rank r with the smallest E‖Δ − M x‖². Let
C = E[xxᵀ] = L Lᵀ and D = E[Δxᵀ]. Then E‖Δ − M x‖² = E‖Δ − D C⁻¹ x‖² + ‖(D C⁻¹ − M) L‖². The first term does not
depend on M, so M L is the truncated singular value decomposition of D L⁻ᵀ. L may be any square root of C; Cholesky's is
the cheapest.

The fit is regularised towards M₀ = (α/r) Σ_e E[g_e] B_e A_e, the adapter with mean gates in flat space. The minimum of
E‖Δ − M x‖² + λ‖M − M₀‖² is found with C + λI and D + λM₀ instead of C and D. For Euclidean experts with constant gates,
Δ = M₀ x, so the fit is M₀ for any tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as product

from mos_kernels.functional import mos_linear, mos_route
from mos_kernels.layer import MoSAdapter


class LinearFit:
    """An adapted linear: its statistics over the tokens, and the LoRA fitted to them.

    mode: "adapter" runs the adapter; "collect" runs it and adds to the statistics; "lora" runs the export; "measure"
    runs it and adds its squared error, and the square of Δ, to `squares`.
    """

    mask_names: tuple[str, ...] = ()  # the batch's entries that may be the mask of its input

    def __init__(self, name: str, layer: nn.Module, adapter: MoSAdapter, adapter_name: str | None) -> None:
        """adapter_name: the name of the adapter under peft. Gates are given by this name."""
        self.name, self.layer, self.adapter, self.adapter_name = name, layer, adapter, adapter_name
        self.d_out, self.d_in = adapter.mos_lora_B.shape[0], adapter.mos_lora_A.shape[-1]
        self.mode, self.calls, self.on_call = "adapter", 0, None
        self.tokens, self.factors, self.squares = 0, None, [0.0, 0.0]
        self.C: Tensor | None = None

    def forward(self, original: Callable, x: Tensor, gates=None, backend: str = "auto") -> Tensor:
        self.calls += 1
        if self.mode in ("lora", "measure"):
            if self.mode == "measure":
                self._measure(x, gates)
            y = self._exported(x)
        else:
            if self.mode == "collect":
                self.add(x, gates)
            y = original(x) if gates is None else original(x, gates, backend)
        if self.on_call is not None:
            self.on_call(self)
        return y

    def _exported(self, x: Tensor) -> Tensor:
        weight, bias, base = self.layer._base(x)
        base = product(x, weight, bias) if base is None else base
        A, B = (factor.to(x.device) for factor in self.factors)
        with torch.autocast(x.device.type, enabled=False):  # float32, as peft's
            return (base + product(product(x.to(A.dtype), A), B)).to(base.dtype)

    def _tokens(self, x: Tensor, gates) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens that are not padding: x (T, d_in), their gates (T, E), and the adapter's output (T, d_out).

        gates: (..., E), or a dictionary by adapter, or None for the linear's own router.
        """
        adapter, config = self.adapter, self.adapter.config
        if isinstance(gates, Mapping):  # of a block that may hold linears with routers of their own
            gates = gates.get(self.adapter_name) if adapter.mos_router is None else None
        mask = self.mask_of(x)
        x = x.reshape(-1, self.d_in) if mask is None else x[mask]
        x = x if x.dtype == torch.float64 else x.float()
        if gates is not None:
            gates = gates.reshape(-1, gates.shape[-1]) if mask is None else gates[mask]
        if x.shape[0] == 0:
            return x, x.new_zeros(0, config.num_experts), x.new_zeros(0, self.d_out)
        with torch.autocast(x.device.type, enabled=False):
            if config.is_lora:
                gates, delta = x.new_ones(x.shape[0], 1), product(x, self._flat(x.new_ones(1)).to(x.dtype))
            else:
                if gates is None:
                    gates = mos_route(x, adapter.mos_router, config=config, inference=True)
                delta = mos_linear(
                    x, None, None, adapter.mos_lora_A, adapter.mos_lora_B, adapter.curvature, config=config,
                    base_output=x.new_zeros(x.shape[0], self.d_out), gates=gates, inference=True,
                )  # fmt: skip
        return x, gates, delta

    def add(self, x: Tensor, gates) -> None:
        """Add the tokens of x (..., d_in) that are not padding to the statistics. gates: as in the linear's call."""
        x, gates, delta = self._tokens(x, gates)
        if self.C is None:
            device = "cpu" if x.device.type == "mps" else x.device
            self.C = torch.zeros(self.d_in, self.d_in, dtype=torch.float64, device=device)
            self.D, self.gates = self.C.new_zeros(self.d_out, self.d_in), self.C.new_zeros(gates.shape[-1])
        x, delta, gates = (t.to(self.C.device, torch.float64) for t in (x, delta, gates))
        self.C.addmm_(x.T, x)
        self.D.addmm_(delta.T, x)
        self.gates += gates.sum(0)
        self.tokens += x.shape[0]

    def _measure(self, x: Tensor, gates) -> None:
        x, _, delta = self._tokens(x, gates)
        A, B = (factor.to(x.device, x.dtype) for factor in self.factors)
        with torch.autocast(x.device.type, enabled=False):
            left = delta - product(product(x, A), B)
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        for i, values in enumerate((left, delta)):
            self.squares[i] += float(values.to(dtype).square().sum())

    @property
    def error(self) -> float | None:
        """The relative error over the measured tokens; None if the adapter adds nothing."""
        return math.sqrt(self.squares[0] / self.squares[1]) if self.squares[1] else None

    def fit(self, rank: int, ridge: float) -> None:
        """Set `factors`, A (rank, d_in) and B (d_out, rank), drop the statistics, and run the export from now on."""
        if self.tokens == 0:
            raise ValueError(
                f"no token of calibration_batches reached {self.name!r}: pass batches that hold tokens (padding is "
                "none) and use the adapted part of the model"
            )
        C, D, gates = (total / self.tokens for total in (self.C, self.D, self.gates))
        if not (C.isfinite().all() and D.isfinite().all()):
            raise ValueError(
                f"the inputs or the adapter's outputs at {self.name!r} are not finite on calibration_batches"
            )
        self.C = self.D = None
        mean = C.diagonal().mean()
        weight = ridge * torch.where(mean > 0, mean, 1.0)
        L, failed = torch.linalg.cholesky_ex(C + weight * torch.eye(self.d_in, dtype=C.dtype, device=C.device))
        if failed:
            raise ValueError(
                f"ridge={ridge} is too small for the {self.tokens} tokens that reached {self.name!r}: pass a larger "
                "one, such as 1e-4, or more tokens"
            )
        G = torch.linalg.solve_triangular(L, (D + weight * self._flat(gates)).T, upper=False).T
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
        root = S.sqrt()
        A = torch.linalg.solve_triangular(L.T, Vh.T * root, upper=True).T
        dtype = self.adapter.mos_lora_A.dtype if self.adapter.mos_lora_A.dtype == torch.float64 else torch.float32
        factors = A.new_zeros(rank, self.d_in), A.new_zeros(self.d_out, rank)
        factors[0][: len(S)], factors[1][:, : len(S)] = A, U * root
        self.factors = tuple(factor.to(dtype) for factor in factors)
        self.mode = "lora"

    def _flat(self, gates: Tensor) -> Tensor:
        """M₀ (d_out, d_in), the adapter with these gates (E,) in flat space; 0 with an activation."""
        config = self.adapter.config
        B = self.adapter.mos_lora_B.detach().to(gates.device, torch.float64)
        A = self.adapter.mos_lora_A.detach().to(gates.device, torch.float64)
        if config.activation != "identity":
            return gates.new_zeros(self.d_out, self.d_in)
        weighted = B * (config.scaling * gates).view(1, -1, 1)  # (d_out, E, r)
        return weighted.sum(1) @ A if config.share_a else torch.einsum("oer,eri->oi", weighted, A)

    mask_of: Callable[[Tensor], Tensor | None] = staticmethod(lambda x: None)
