"""Every peer under one interface: a `Base` (one frozen linear and one set of factors, shared) -> an `Arm`.

Whole layers y = W x + b + adapter(x) are in LAYERS, the adapter alone in BRANCHES. All factors are nonzero. Routed
layers are given their gates, as in an FFN block whose router all its linears share, unless their name says "own
router"; HydraLoRA always has its own. On a float32 base, peft's adapters are float32 either way: one arm.

Liger-Kernel has no low-rank adapter among its operations. unsloth's LoRA linear is addmm with a hand-written backward,
which is what "hand-fused LoRA" is here without a package that patches transformers on import and needs a GPU for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import maps
from mos_kernels import MoSConfig, MoSLinear
from mos_kernels.backends import has_triton, load_backend, why_not_triton
from mos_kernels.backends.interface import BridgeInputs, ShrinkWeights
from reference.baselines import hydralora_linear, mixture_of_lora_linear
from reference.manifold import signed_inverse_projection, signed_lift, signed_projection, squared_norm
from reference.per_expert import mos_linear_as_printed, mos_linear_per_expert, scale_back, scale_into

FROZEN = "frozen linear"
PEFT_8, PEFT_8_AS_BASE = "peft LoRA r=8, fp32 adapters", "peft LoRA r=8, adapters as base"
PEFT_64, PEFT_64_AS_BASE = "peft LoRA r=64, fp32 adapters", "peft LoRA r=64, adapters as base"
FUSED_8 = "hand-fused LoRA r=8"
ONE_EXPERT = "MoS, one Euclidean expert (a LoRA)"
HYDRA, MIXTURE = "HydraLoRA, expert by expert", "mixture of LoRA, expert by expert"
PRINTED, TIDIED = "formula as printed, expert by expert", "formula tidied, expert by expert"
EXP_LOG, EXP_LOG_COMPILED = "exp/log, expert by expert", "exp/log, expert by expert, compiled"
GEOOPT = "exp/log, geoopt (fp64 inside)"
EXP_LOG_EAGER, EXP_LOG_TRITON = "exp/log through our eager backend", "exp/log through our Triton backend"
EAGER, EAGER_COMPILED, TRITON = "MoS eager", "MoS eager, compiled", "MoS Triton"
COLLAPSED, COLLAPSED_COMPILED = "collapsed, plain PyTorch", "collapsed, plain PyTorch, compiled"
MAPPED, MAPPED_COMPILED = "stereographic, expert by expert", "stereographic, expert by expert, compiled"
LORA_BRANCH = "LoRA r=8"
EAGER_OWN, TRITON_OWN = "MoS eager, own router", "MoS Triton, own router"
EAGER_APART, TRITON_APART = "MoS eager, linear by linear", "MoS Triton, linear by linear"  # an FFN, not as one
LIGER, SWIGLU = "frozen FFN, Liger's SwiGLU", "frozen FFN, our stand-in for a fused SwiGLU"
LORA_MLP, LILY = "LoRA MLP r=8 as one node over addmm", "peft Lily r=8"


@dataclass(frozen=True)
class Setting:
    """One linear to be adapted, and the tokens it meets."""

    d_in: int
    d_out: int
    tokens: int
    dtype: torch.dtype
    device: torch.device
    experts: int = 8
    rank: int = 8
    active: int = 4

    def config(self, mapping: str = "stereographic", router_scope: str = "ffn") -> MoSConfig:
        """3 : 3 : 2 hyperbolic, spherical and Euclidean experts, as near as the number allows."""
        hyperbolic = -(-3 * self.experts // 8)
        spherical = min(hyperbolic, self.experts - hyperbolic)
        spaces = {"hyperbolic": hyperbolic, "spherical": spherical, "euclidean": self.experts - hyperbolic - spherical}
        return MoSConfig(
            r=self.rank, lora_alpha=2.0 * self.rank, spaces=spaces, mapping=mapping, router_scope=router_scope,
            num_experts_per_tok=min(self.active, self.experts),
        )  # fmt: skip


class Base:
    """A frozen linear, the factors of its adapter and its gates, with B drawn at random."""

    def __init__(self, setting: Setting):
        self.setting, self.config = setting, setting.config()
        options = {"device": setting.device, "dtype": setting.dtype}
        self.mos = MoSLinear(setting.d_in, setting.d_out, config=self.config, **options)
        nn.init.normal_(self.mos.mos_lora_B, std=0.02)
        self.linear = self.mos.to_linear()
        self.A, self.B, self.theta = self.mos.mos_lora_A, self.mos.mos_lora_B, self.mos.mos_curvature
        self.kappa = self.mos.curvature.detach().requires_grad_()
        E, device = setting.experts, setting.device
        self.router = torch.randn(E, setting.d_in, device=device).mul_(0.02).requires_grad_()
        self.gates = torch.rand(setting.tokens, E, device=device).softmax(-1).requires_grad_()

    def layer(self, mapping: str = "stereographic", router_scope: str = "ffn") -> MoSLinear:
        """A MoSLinear of these very tensors, in another mapping or with a router of its own."""
        layer = MoSLinear.from_linear(self.linear, self.setting.config(mapping, router_scope))
        layer.mos_lora_A, layer.mos_lora_B, layer.mos_curvature = self.A, self.B, self.theta
        if router_scope == "linear":
            layer.mos_router = nn.Parameter(self.router.detach())
        return layer

    @property
    def signs(self) -> tuple[float, ...]:
        return self.config.curvature_signs


@dataclass
class Arm:
    """forward(x (T, d_in), gates (T, E)) -> y (T, d_out); backward differentiates in x and in `trained`."""

    forward: Callable[[Tensor, Tensor], Tensor]
    trained: list[Tensor]


class Ours(NamedTuple):
    """Which of our computations a provider is: what must be right before it is timed."""

    backend: str
    mapping: str = "stereographic"
    own_router: bool = False

    def can_run(self, device: torch.device) -> bool:
        return self.backend != "triton" or why_no_triton(device) is None


@dataclass(frozen=True)
class Provider:
    name: str
    make: Callable[[Base], Arm]
    compiled: bool = False
    half_only: bool = False
    ours: Ours | None = None

    def offered(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether it is an arm of its own at this dtype, and can be one on this device."""
        half = dtype in (torch.bfloat16, torch.float16)
        return (half or not self.half_only) and (self.ours is None or self.ours.can_run(device))


LAYERS: dict[str, Provider] = {}
BRANCHES: dict[str, Provider] = {}


def _provides(table: dict[str, Provider], name: str, **options):
    def register(make):
        table[name] = Provider(name, make, **options)
        return make

    return register


def why_no_triton(device: torch.device) -> str | None:
    """Why the Triton backend cannot run on a device, or None if it can. Touches no GPU."""
    if device.type == "cuda":
        return None if has_triton() else "triton is not installed"
    return why_not_triton(torch.empty(0, device=device))


COMPILE_BACKEND = "inductor"
"""What compiled arms compile with; a check of the suite itself takes "eager", which only traces."""


def compiled(function: Callable) -> Callable:
    """torch.compile for one fixed shape, in one graph."""
    return torch.compile(function, dynamic=False, fullgraph=True, backend=COMPILE_BACKEND)


# whole layers


@_provides(LAYERS, FROZEN)
def _frozen(base: Base) -> Arm:
    return Arm(lambda x, gates: base.linear(x), [])


def _peft(rank: int, autocast_adapter_dtype: bool, base: Base) -> Arm:
    import peft

    options = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["linear"])
    model = peft.get_peft_model(
        nn.ModuleDict({"linear": base.linear}), options, autocast_adapter_dtype=autocast_adapter_dtype
    )
    layer = model.base_model.model["linear"]
    trained = [p for p in layer.parameters() if p.requires_grad]
    for parameter in trained:
        nn.init.normal_(parameter, std=0.02)
    return Arm(lambda x, gates: layer(x), trained)


_provides(LAYERS, PEFT_8)(functools.partial(_peft, 8, True))
_provides(LAYERS, PEFT_8_AS_BASE, half_only=True)(functools.partial(_peft, 8, False))
_provides(LAYERS, PEFT_64)(functools.partial(_peft, 64, True))
_provides(LAYERS, PEFT_64_AS_BASE, half_only=True)(functools.partial(_peft, 64, False))


class FusedLoRA(torch.autograd.Function):
    """The best plain LoRA that the library's products allow: adapter first, base accumulated, hand-written backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scaling):
        h = torch.mm(x, A.t()).mul_(scaling)
        ctx.save_for_backward(x, weight, A, B, h)
        ctx.scaling = scaling
        y = torch.mm(h, B.t()) if bias is None else torch.addmm(bias, h, B.t())
        return y.addmm_(x, weight.t())

    @staticmethod
    def backward(ctx, dy):
        x, weight, A, B, h = ctx.saved_tensors
        dh = torch.mm(dy, B).mul_(ctx.scaling)
        dx = torch.mm(dh, A).addmm_(dy, weight)
        return dx, None, None, dh.t() @ x, dy.t() @ h, None


def _fused_factors(base: Base, rank: int = 8) -> list[Tensor]:
    s = base.setting
    return [
        torch.randn(*shape, device=s.device, dtype=s.dtype).mul_(0.02).requires_grad_()
        for shape in ((rank, s.d_in), (s.d_out, rank))
    ]


@_provides(LAYERS, FUSED_8)
def _fused(base: Base) -> Arm:
    A, B = _fused_factors(base)
    linear = base.linear
    return Arm(lambda x, gates: FusedLoRA.apply(x, linear.weight, linear.bias, A, B, 2.0), [A, B])


@_provides(LAYERS, ONE_EXPERT)
def _one_expert(base: Base) -> Arm:
    rank = base.setting.rank
    config = MoSConfig(r=rank, lora_alpha=2.0 * rank, spaces={"euclidean": 1}, num_experts_per_tok=1)
    layer = MoSLinear.from_linear(base.linear, config)
    nn.init.normal_(layer.mos_lora_B, std=0.02)
    return Arm(lambda x, gates: layer(x), [layer.mos_lora_A, layer.mos_lora_B])


@_provides(LAYERS, HYDRA)
def _hydra(base: Base) -> Arm:
    weight, bias, factors = base.linear.weight, base.linear.bias, (base.A, base.B, base.router)
    return Arm(lambda x, gates: hydralora_linear(x, weight, bias, *factors, scaling=2.0), list(factors))


@_provides(LAYERS, MIXTURE)
def _mixture(base: Base) -> Arm:
    weight, bias, E = base.linear.weight, base.linear.bias, base.setting.experts
    A = base.A.detach().expand(E, -1, -1).clone().requires_grad_()
    return Arm(
        lambda x, gates: mixture_of_lora_linear(x, weight, bias, A, base.B, gates=gates, scaling=2.0),
        [A, base.B, base.gates],
    )


def _formula(layer, base: Base) -> Arm:
    factors = (base.A, base.B, base.kappa)
    linear = base.linear
    return Arm(
        lambda x, gates: layer(x, linear.weight, linear.bias, *factors, gates=gates, scaling=2.0),
        [*factors, base.gates],
    )


_provides(LAYERS, PRINTED)(functools.partial(_formula, mos_linear_as_printed))
_provides(LAYERS, TIDIED)(functools.partial(_formula, mos_linear_per_expert))


def _mapped(mapping: str, base: Base, compile_it: bool = False) -> Arm:
    def branch(x: Tensor, A, B, kappa, gates) -> Tensor:
        return maps.mapped_branch(x, A, B, kappa, gates, 2.0, base.signs, mapping)

    def layer(x: Tensor, gates: Tensor) -> Tensor:
        return base.linear(x) + branch(x, base.A, base.B, base.kappa, gates)

    trained = [base.A, base.B, base.kappa, base.gates]
    return Arm(compiled(layer) if compile_it else layer, trained)


_provides(LAYERS, EXP_LOG)(functools.partial(_mapped, "exp/log"))
_provides(LAYERS, EXP_LOG_COMPILED, compiled=True)(functools.partial(_mapped, "exp/log", compile_it=True))
_provides(LAYERS, GEOOPT)(functools.partial(_mapped, GEOOPT))
_provides(LAYERS, MAPPED)(functools.partial(_mapped, "stereographic"))
_provides(LAYERS, MAPPED_COMPILED, compiled=True)(functools.partial(_mapped, "stereographic", compile_it=True))


def _ours(ours: Ours, base: Base, compile_it: bool = False) -> Arm:
    layer = base.layer(ours.mapping, "linear" if ours.own_router else "ffn")
    trained = [p for p in layer.parameters() if p.requires_grad]

    def forward(x: Tensor, gates: Tensor) -> Tensor:
        return layer(x, None if ours.own_router else gates, backend=ours.backend)

    return Arm(compiled(forward) if compile_it else forward, trained if ours.own_router else [*trained, base.gates])


for _name, _computation in {
    EXP_LOG_EAGER: Ours("eager", "exp_log"), EXP_LOG_TRITON: Ours("triton", "exp_log"),
    EAGER: Ours("eager"), TRITON: Ours("triton"),
    EAGER_OWN: Ours("eager", own_router=True), TRITON_OWN: Ours("triton", own_router=True),
}.items():  # fmt: skip
    _provides(LAYERS, _name, ours=_computation)(functools.partial(_ours, _computation))
_provides(LAYERS, EAGER_COMPILED, compiled=True, ours=Ours("eager"))(
    functools.partial(_ours, Ours("eager"), compile_it=True)
)


# the adapter alone: no base product


def _branch(function: Callable[..., Tensor], base: Base, compile_it: bool = False) -> Arm:
    factors = [base.A, base.B, base.kappa]
    run = compiled(function) if compile_it else function
    return Arm(lambda x, gates: run(x, *factors, gates, 2.0), [*factors, base.gates])


def printed_branch(x: Tensor, A: Tensor, B: Tensor, kappa: Tensor, gates: Tensor, scaling: float) -> Tensor:
    """`reference.per_expert.mos_linear_as_printed` without the base product."""
    A, B, y = A.to(x.dtype), B.to(x.dtype), 0
    for e in range(kappa.shape[0]):
        _, s = signed_inverse_projection(x, kappa[e])
        u = s @ A.t() @ B[:, e].t()
        y = y + (scaling * gates[:, e : e + 1]).to(x.dtype) * signed_projection(signed_lift(u, kappa[e]), u, kappa[e])
    return y


def tidied_branch(x: Tensor, A: Tensor, B: Tensor, kappa: Tensor, gates: Tensor, scaling: float) -> Tensor:
    """`reference.per_expert.mos_linear_per_expert` without the base product."""
    options = {"mapping": "stereographic", "domain": "ball", "boundary_eps": 4e-3}
    A, B, y, n = A.to(x.dtype), B.to(x.dtype), 0, squared_norm(x)
    for e in range(kappa.shape[0]):
        u = (scale_into(n, kappa[e], **options) * x).to(x.dtype) @ A.t() @ B[:, e].t()
        y = y + (scaling * gates[:, e : e + 1] * scale_back(squared_norm(u), kappa[e], **options)).to(x.dtype) * u
    return y


def collapsed_branch(x: Tensor, A: Tensor, B: Tensor, kappa: Tensor, gates: Tensor, scaling: float) -> Tensor:
    """The collapse into rank space as one writes it in a few lines, unguarded, its backward left to autograd."""
    p, n = (x @ A.to(x.dtype).t()).float(), squared_norm(x)
    h = (2 / (1 + kappa * n)).unsqueeze(-1) * p.unsqueeze(1)
    wide = B.float()
    gram = torch.einsum("der,des->ers", wide, wide)
    q = torch.einsum("ter,ers,tes->te", h, gram, h)
    z = (scaling * gates / (1 + (1 - kappa * q).sqrt())).unsqueeze(-1) * h
    return z.flatten(1).to(x.dtype) @ B.to(x.dtype).flatten(1).t()


class OurBranch(torch.autograd.Function):
    """shrink, bridge, expand and their backward, as the layer composes them, without the base product."""

    @staticmethod
    def forward(ctx, x, A, B, kappa, gates, config, backend):
        steps = load_backend(backend)
        prepared = steps.prepare(B, x.dtype, config, weights=ShrinkWeights(A, None, x.dtype))
        p, n, _ = steps.shrink(x, A, None, None, True, prepared.stack)
        z, _ = steps.bridge(BridgeInputs(p, n, gates, False, kappa, prepared), config)
        ctx.save_for_backward(x, A, B, kappa, gates, p, n, prepared.gram, z if steps.KEEPS_Z else None)
        ctx.options = config, backend
        return steps.expand(z, prepared, None, x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, A, B, kappa, gates, p, n, gram, z = ctx.saved_tensors
        config, backend = ctx.options
        steps = load_backend(backend)
        prepared = steps.prepare(B, x.dtype, config, gram)
        curved, bridged = BridgeInputs(p, n, gates, False, kappa, prepared), None
        if z is None:
            z, bridged = steps.bridge(curved, config)
        dz, dB = steps.expand_backward(dy, z, prepared, True)
        d = steps.bridge_backward(dz, bridged, curved, None, None, config)
        dB = steps.add_norm_gradient(dB, B, d.M)
        dx, dA, _ = steps.shrink_backward(x, A, None, d.p, d.n, None, None, (True, True, False))
        return dx, dA.to(A.dtype), dB.to(B.dtype), d.kappa, d.routed, None, None


def _our_branch(backend: str, base: Base) -> Arm:
    factors = [base.A, base.B, base.kappa]
    return Arm(lambda x, gates: OurBranch.apply(x, *factors, gates, base.config, backend), [*factors, base.gates])


def _exp_log_branch(base: Base) -> Arm:
    def branch(*arguments) -> Tensor:
        return maps.mapped_branch(*arguments, base.signs, "exp/log")

    return _branch(branch, base)


def _lora_branch(base: Base) -> Arm:
    A, B = _fused_factors(base)
    return Arm(lambda x, gates: torch.mm(torch.mm(x, A.t()).mul(2.0), B.t()), [A, B])


_provides(BRANCHES, LORA_BRANCH)(_lora_branch)
_provides(BRANCHES, PRINTED)(functools.partial(_branch, printed_branch))
_provides(BRANCHES, TIDIED)(functools.partial(_branch, tidied_branch))
_provides(BRANCHES, EXP_LOG)(_exp_log_branch)
_provides(BRANCHES, COLLAPSED)(functools.partial(_branch, collapsed_branch))
_provides(BRANCHES, COLLAPSED_COMPILED, compiled=True)(functools.partial(_branch, collapsed_branch, compile_it=True))
_provides(BRANCHES, EAGER, ours=Ours("eager"))(functools.partial(_our_branch, "eager"))
_provides(BRANCHES, TRITON, ours=Ours("triton"))(functools.partial(_our_branch, "triton"))
