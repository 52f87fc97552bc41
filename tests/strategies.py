"""Random layers: shapes, configurations and tensors, and their outputs and gradients by two routes.

Shared by the tests of every backend: `Case.ours` runs the operation, `Case.reference` the paper's formula, token by
token in float64. A case never sits on a near tie of its routing, where two precisions may select differently.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

import reference.layer
from mos_kernels import MoSConfig
from mos_kernels.config import SPACES
from mos_kernels.functional import mos_linear

ACTIVATIONS = ("identity", "tanh", "silu", "gelu")
GEOMETRIES = (("stereographic", "ball"), ("stereographic", "raw"), ("exp_log", "ball"))
INPUTS = ("x", "weight", "bias", "base_output", "A", "B", "kappa", "gates", "router")


@dataclass(frozen=True)
class Case:
    """The arguments of one call. Tensors are leaves that require grad; gates or router is None, bias may be.

    base_output: what a base made of x that is no dense product; weight and bias are None then.
    """

    config: MoSConfig
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    A: Tensor
    B: Tensor
    kappa: Tensor
    gates: Tensor | None
    router: Tensor | None
    base_output: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {name: tensor for name in INPUTS if (tensor := getattr(self, name)) is not None}

    def replace(self, **tensors) -> Case:
        return dataclasses.replace(self, **tensors)

    def to(self, dtype: torch.dtype, adapter_dtype: torch.dtype | None = None) -> Case:
        """Fresh leaves: x, weight, bias in dtype; the others in adapter_dtype, by default float32 at least."""
        narrow = adapter_dtype or torch.promote_types(dtype, torch.float32)
        wide = {"x", "weight", "bias", "base_output"}
        return self.replace(**{n: leaf(t, dtype if n in wide else narrow) for n, t in self.inputs.items()})

    def wrapped(self, dtype: torch.dtype | None = None) -> Case:
        """The same with a base that runs by itself, whose output is a leaf, in dtype."""
        output = torch.nn.functional.linear(self.x.detach(), self.weight.detach(), self.bias)
        return self.replace(weight=None, bias=None, base_output=leaf(output, dtype))

    def ours(self, backend: str = "eager", **options) -> Tensor:
        """The operation under test."""
        return mos_linear(
            self.x, self.weight, self.bias, self.A, self.B, self.kappa,
            base_output=self.base_output, gates=self.gates, router=self.router, config=self.config, backend=backend,
            **options,
        )  # fmt: skip

    def reference(self, layer: Callable = reference.layer.mos_linear, **options) -> Tensor:
        """The paper's formula in the dtype of x; `layer` is `mos_linear` or `mos_linear_per_expert` of reference/."""
        c, weight = self.config, self.weight
        if weight is None:
            weight = self.x.new_zeros(self.B.shape[0], self.x.shape[-1])
        y = layer(
            self.x, weight, self.bias, self.A, self.B, self.kappa, gates=self.gates, router=self.router,
            scaling=c.scaling, num_experts_per_tok=c.num_experts_per_tok, norm_topk_prob=c.norm_topk_prob,
            activation=c.activation, mapping=c.mapping, domain=c.domain, boundary_eps=c.boundary_eps, **options,
        )  # fmt: skip
        return y if self.base_output is None else y + self.base_output

    def upstream(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
        """A gradient of the output."""
        return normal(seed, *self.x.shape[:-1], self.B.shape[0]).to(dtype)

    def gradients(self, y: Tensor, dy: Tensor | None = None) -> dict[str, Tensor]:
        """The gradient of every input; zeros for one that y does not depend on."""
        dy = self.upstream(y.dtype) if dy is None else dy
        found = torch.autograd.grad(y, list(self.inputs.values()), dy, allow_unused=True)
        return {
            name: torch.zeros_like(tensor) if gradient is None else gradient
            for (name, tensor), gradient in zip(self.inputs.items(), found, strict=True)
        }

    def results(self, y: Tensor, dy: Tensor | None = None) -> dict[str, Tensor]:
        """Output and gradients by name."""
        return {"y": y.detach(), **self.gradients(y, dy)}


def leaf(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_case(
    config: MoSConfig,
    tokens: tuple[int, ...] = (5,),
    d_in: int = 7,
    d_out: int = 6,
    *,
    seed: int = 0,
    kappa: tuple[float, ...] | None = None,
    norms: tuple[float, ...] = (1.0,),
    b_scale: float = 1.0,
    bias: bool = True,
    own_router: bool = False,
    margin: float = 1e-3,
) -> Case:
    """A float64 case. norms: of the tokens in turn, each times a random factor near 1; ‖B_e A‖ is about b_scale.

    kappa: (E,), by default ±0.7 and 0 by the space of each expert. margin: the least gap between the last logit kept
    and the first dropped, relative to the largest, that tokens are drawn for.
    """
    E, r, k, T = config.num_experts, config.r, config.num_experts_per_tok, math.prod(tokens)
    if kappa is None:
        kappa = tuple(0.7 * sign for sign in config.curvature_signs)
    router = normal(seed + 1, E, d_in)
    x = normal(seed, 20 * T + 20 if margin > 0 else T, d_in)
    if own_router:
        x = x[_routing_margin(x @ router.T, k) > margin]
    assert x.shape[0] >= T, "too few tokens with a clear routing: widen d_in or lower the margin"
    length = torch.tensor(norms, dtype=torch.float64)[torch.arange(T) % len(norms)]
    length = length * (1 + 0.1 * normal(seed + 2, T).tanh())
    x = torch.nn.functional.normalize(x[:T], dim=-1) * length.unsqueeze(-1)
    A = normal(seed + 3, r, d_in) if config.share_a else normal(seed + 3, E, r, d_in)
    tensors = {
        "x": x.reshape(*tokens, d_in),
        "weight": normal(seed + 4, d_out, d_in) / math.sqrt(d_in),
        "bias": normal(seed + 5, d_out) if bias else None,
        "A": A / math.sqrt(max(r, d_in)),
        "B": normal(seed + 6, d_out, E, r) * (b_scale / math.sqrt(max(d_out, r))),
        "kappa": torch.tensor(kappa, dtype=torch.float64),
        "gates": None if own_router else _sparse_gates(seed + 7, tokens, E, k),
        "router": router if own_router else None,
    }
    return Case(config, **{name: None if t is None else leaf(t) for name, t in tensors.items()})


def _routing_margin(logits: Tensor, k: int) -> Tensor:
    if k == logits.shape[-1]:
        return torch.full(logits.shape[:-1], torch.inf)
    ordered = logits.sort(-1, descending=True).values
    return (ordered[..., k - 1] - ordered[..., k]) / logits.abs().amax(-1)


def _sparse_gates(seed: int, tokens: tuple[int, ...], E: int, k: int) -> Tensor:
    scores = normal(seed, *tokens, E)
    kept = scores >= scores.sort(-1, descending=True).values[..., k - 1 : k]
    return scores.softmax(-1) * kept


def assert_results_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every entry within tolerance times its largest magnitude (1e-12 where that is tiny), and finite."""
    assert actual.keys() == expected.keys()
    for name, truth in expected.items():
        value = actual[name]
        assert value.shape == truth.shape, (name, value.shape, truth.shape)
        if truth.numel():
            error = (value.double() - truth.double()).abs().max().item()
            allowed = tolerance * max(truth.abs().max().item(), 1e-12 / tolerance)
            assert error <= allowed, f"{name}: error {error:.3g} > {allowed:.3g}"


# strategies

seeds = st.integers(0, 2**20)
token_shapes = st.sampled_from([(), (0,), (1,), (2,), (5,), (2, 3), (2, 0), (1, 1, 4), (7,)])
widths = st.sampled_from([1, 2, 3, 5, 8, 13, 17])
token_norms = st.lists(st.floats(-2, 2).map(lambda e: 10.0**e) | st.just(0.0), min_size=1, max_size=3).map(tuple)
curvatures = st.sampled_from([0.0, 1e-9, -1e-9]) | st.floats(-5, 5).filter(lambda k: abs(k) > 1e-6)


@st.composite
def configs(draw, activations=ACTIVATIONS, geometries=GEOMETRIES, max_experts: int = 8, max_rank: int = 16, **fixed):
    """A MoSConfig: any mix of spaces, rank, k, mapping, domain and activation."""
    counts = draw(st.lists(st.integers(0, 3), min_size=3, max_size=3).filter(lambda c: 1 <= sum(c) <= max_experts))
    mapping, domain = draw(st.sampled_from(geometries))
    return MoSConfig(**{
        "r": draw(st.integers(1, max_rank)), "lora_alpha": draw(st.sampled_from([1.0, 3.0, 16.0])),
        "use_rslora": draw(st.booleans()), "spaces": dict(zip(SPACES, counts, strict=True)),
        "num_experts_per_tok": draw(st.integers(1, sum(counts))), "norm_topk_prob": draw(st.booleans()),
        "share_a": draw(st.booleans()), "activation": draw(st.sampled_from(activations)),
        "mapping": mapping, "domain": domain, "boundary_eps": draw(st.sampled_from([4e-3, 0.05, 0.3])), **fixed,
    })  # fmt: skip


@st.composite
def cases(draw, tokens=token_shapes, **options) -> Case:
    """A float64 case of any configuration and shape; options as in `configs`."""
    config = draw(configs(**options))
    E = config.num_experts
    return make_case(
        config,
        draw(tokens),
        draw(widths),
        draw(widths),
        seed=draw(seeds),
        kappa=tuple(draw(st.lists(curvatures, min_size=E, max_size=E))),
        norms=draw(token_norms),
        b_scale=draw(st.sampled_from([0.0, 0.1, 1.0, 10.0])),
        bias=draw(st.booleans()),
        own_router=draw(st.booleans()),
    )


# cases at a guard


def limits_into(config: MoSConfig) -> tuple[float, ...]:
    """The values of κ‖x‖² at which the way into the space is guarded (ρ = 1 - boundary_eps)."""
    rho, eps = 1 - config.boundary_eps, config.boundary_eps
    if config.mapping == "exp_log":
        return (-(math.asinh(2.0**15) ** 2), (rho * math.pi / 2) ** 2)
    return (-(rho**2),) if config.domain == "ball" else (-1 - eps, -1 + eps)


def limit_back(config: MoSConfig) -> float:
    """The value of κ‖u‖² at which the way back is guarded."""
    return (1 - config.boundary_eps) ** 2


def around(limit: float, step: float = 1e-6) -> tuple[float, ...]:
    """Well inside, just inside, just outside and far outside of a limit."""
    return tuple(limit * factor for factor in (0.3, 1 - step, 1 + step, 30.0))


def guard_case(config: MoSConfig, targets: list[tuple[float, float]], *, seed: int = 0, **options) -> Case:
    """One token, and an expert for each pair (κ‖x‖², κ‖u‖²) of one sign in targets, which it attains."""
    n = 0.02  # small, so that a bounded activation attains every ‖u‖² asked for
    case = make_case(config, (1,), norms=(1.0,), seed=seed, **options)
    x = case.x.detach() * (n**0.5 / case.x.detach().norm())
    kappa = torch.tensor([into / n for into, _ in targets], dtype=torch.float64)
    B = case.B.detach().clone()
    for e, (_, back) in enumerate(targets):
        A = case.A.detach() if config.share_a else case.A.detach()[e]
        scale = reference_scale_into(n, kappa[e].item(), config)
        direction = B[:, e] @ (A @ x[0]) * scale
        B[:, e] *= _scale_to_norm(direction, math.sqrt(back / kappa[e].item()), config.activation)
    return case.replace(x=leaf(x), kappa=leaf(kappa), B=leaf(B))


def reference_scale_into(n: float, kappa: float, config: MoSConfig) -> float:
    """λ(n; κ) by reference/."""
    from reference.per_expert import scale_into

    options = {"mapping": config.mapping, "domain": config.domain, "boundary_eps": config.boundary_eps}
    n, kappa = (torch.tensor(value, dtype=torch.float64) for value in (n, kappa))
    return scale_into(n.reshape(1, 1), kappa, **options).item()


def _scale_to_norm(v: Tensor, norm: float, activation: str) -> float:
    """The factor f with ‖φ(f v)‖ = norm, by bisection."""
    phi = reference.layer.ACTIVATIONS[activation]
    low, high = 1e-12, 1e12
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if phi(middle * v).norm() < norm else (low, middle)
    return low
