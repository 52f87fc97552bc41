"""A speed is reported only for what computes the right thing: checked here, in the same process, before any timing.

Criterion: error(ours, float64 truth) <= 2·error(torch in the same dtype, truth) + 1e-6·max|truth|, for y, with
gradients and without (decoding sums otherwise), and for every gradient. The truth is reference/, expert by expert in
float64; "torch" is that formula in the dtype for the eager backend, and the eager backend, which rounds less, for
Triton's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from benchmarks import providers, qwen2
from benchmarks.providers import Setting
from mos_kernels import MoSLinear
from mos_kernels.functional import mos_linear
from reference.layer import resolve_gates
from reference.per_expert import mos_linear_per_expert

FEWEST_TOKENS, TOKENS = 16, 96
NEAR_TIE = 1e-3
"""Tokens whose last chosen and first unchosen expert lie this near may be routed otherwise in another precision."""


def disagreements(truths: Mapping[str, Tensor], ours: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> list[str]:
    """What of `ours` fails the criterion, with the numbers; empty if nothing does. A NaN fails."""
    found = []
    for name, truth in truths.items():
        truth = truth.double()
        error = (ours[name].double() - truth).abs().max().item()
        allowed = 2 * (plain[name].double() - truth).abs().max().item() + 1e-6 * truth.abs().max().item()
        if not error <= allowed:
            found.append(f"{name} is off by {error:.3g}, {allowed:.3g} allowed")
    return found


DRAWS = 3
CURVATURES = 24
"""Draws are held to the criterion together, more of them where tokens are few, and so many that dκ, a number an expert,
has at least 24: of few numbers torch's own can come out right by luck.
"""


def check_layer(setting: Setting, backend: str, mapping: str = "stereographic", own_router: bool = False) -> list[str]:
    """What of a backend's layer at this setting, on FEWEST_TOKENS to TOKENS tokens, fails the criterion.

    Not on one token: its products are the library's matrix-vector products, whose sums of thousands of terms round
    several times worse than the formula's, without a kernel being wrong.
    """
    tokens = tokens_of(setting)
    draws = max(DRAWS, TOKENS // tokens, -(-CURVATURES // setting.experts))
    trial = _Trial(setting, backend, mapping, own_router)
    drawn = [trial.draw(tokens) for _ in range(draws)]
    return _together(drawn)


def _together(drawn: list[tuple[dict[str, Tensor], ...]]) -> list[str]:
    """`disagreements` of several draws of the truth, ours and torch's."""
    return disagreements(*(
        {name: torch.cat([results[i][name].flatten().double() for results in drawn]) for name in drawn[0][0]}
        for i in range(3)
    ))  # fmt: skip


def _ffn_block(setting: Setting, provider: str) -> tuple[qwen2.FFN, list[nn.Parameter]]:
    """A gated FFN from d_in to d_out and back with the provider's adapters, and what is trained."""
    block = qwen2.FFN(setting.d_in, setting.d_out).to(setting.device, setting.dtype).requires_grad_(False)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    trained = qwen2.adapt(block, provider, setting.config())
    return block.eval(), trained  # in training the router's gradient has that of load balancing too


def check_decoding(setting: Setting, provider: str) -> list[str]:
    """As `check_layer`, of a gated FFN from d_in to d_out and back, frozen, on FEWEST_TOKENS and without gradients."""
    block, _ = _ffn_block(setting, provider)
    backend = block.backend
    qwen2.freeze(block, backend)

    def through(name: str, x: Tensor) -> dict[str, Tensor]:
        block.backend = name
        return {"y of an FFN": block(x)}

    drawn = []
    with torch.no_grad():
        for _ in range(TOKENS // FEWEST_TOKENS):
            x = _ffn_input(setting, block, FEWEST_TOKENS)
            truth = {"y of an FFN": _ffn_formula(block, x.double())}
            plain = {"y of an FFN": _ffn_formula(block, x)} if backend == "eager" else through("eager", x)
            drawn.append((truth, through(backend, x), plain))
    return _together(drawn)


def check_ffn(setting: Setting, provider: str) -> list[str]:
    """As `check_layer`, of a gated FFN in forward and backward, as the provider computes it."""
    block, trained = _ffn_block(setting, provider)
    names = ["y", "dx", *(f"gradient {i}" for i in range(len(trained)))]
    eager = provider not in (providers.TRITON, providers.TRITON_APART)

    def results(run: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        x = x.detach().requires_grad_()
        y = run(x)
        return dict(zip(names, (y.detach(), *torch.autograd.grad(y, [x, *trained], dy.to(y.dtype))), strict=True))

    def by_eager(x: Tensor) -> Tensor:
        block.backend, before = "eager", block.backend
        try:
            return block(x)
        finally:
            block.backend = before

    def formula(x: Tensor) -> Tensor:
        return _plain_formula(block, x) if block.mos_router is None else _ffn_formula(block, x)

    drawn = []
    for _ in range(DRAWS):
        x = _ffn_input(setting, block, tokens_of(setting))
        dy = torch.randn_like(x)
        truth, ours = results(formula, x.double(), dy), results(block, x, dy)
        drawn.append((truth, ours, results(formula if eager else by_eager, x, dy)))
    return _together(drawn)


def _ffn_input(setting: Setting, block: qwen2.FFN, tokens: int) -> Tensor:
    x = torch.randn(tokens, setting.d_in, device=setting.device, dtype=setting.dtype)
    if block.mos_router is None:
        return x
    return x[_decided(x, block.mos_router.weight, block.mos_router.config.num_experts_per_tok)]


def _plain_formula(block: qwen2.FFN, x: Tensor) -> Tensor:
    """The frozen FFN, or that with plain LoRAs, linear by linear and left to autograd."""
    factors = iter(block.lora) if hasattr(block, "lora") else None

    def linear(name: str, x: Tensor) -> Tensor:
        y = x @ getattr(block, name).weight.to(x.dtype).t()
        if factors is not None:
            A, B = next(factors).to(x.dtype), next(factors).to(x.dtype)
            y = y + 2.0 * (x @ A.t() @ B.t())
        return y

    gate, up = (linear(name, x) for name in qwen2.LINEARS[:2])
    return linear(qwen2.LINEARS[2], nn.functional.silu(gate) * up)


def _ffn_formula(block: qwen2.FFN, x: Tensor) -> Tensor:
    config, router = block.mos_router.config, block.mos_router.weight
    routing = config.num_experts_per_tok, config.norm_topk_prob
    gates = resolve_gates(
        x, block.gate_proj.mos_lora_B, None, router.to(torch.promote_types(x.dtype, router.dtype)), *routing
    )

    def linear(layer: MoSLinear, x: Tensor) -> Tensor:
        factors = layer.mos_lora_A, layer.mos_lora_B, layer.curvature
        return mos_linear_per_expert(
            x,
            layer.weight,
            None,
            *factors,
            gates=gates,
            scaling=config.scaling,
            mapping=config.mapping,
            fused_norm=True,
        )

    hidden = nn.functional.silu(linear(block.gate_proj, x)) * linear(block.up_proj, x)
    return linear(block.down_proj, hidden)


def tokens_of(setting: Setting) -> int:
    """On how many tokens a setting is checked: in the launch bucket of its own number."""
    return min(max(setting.tokens, FEWEST_TOKENS), TOKENS)


class _Trial:
    """One layer with random factors, through the reference and through a backend."""

    def __init__(self, setting: Setting, backend: str, mapping: str, own_router: bool):
        self.setting, self.config, self.backend = setting, setting.config(mapping), backend
        layer = MoSLinear(setting.d_in, setting.d_out, config=self.config, device=setting.device, dtype=setting.dtype)
        nn.init.normal_(layer.mos_lora_B, std=0.02)
        self.factors = layer.mos_lora_A, layer.mos_lora_B, layer.curvature
        self.bases = {kind: (layer.weight.to(kind), layer.bias.to(kind)) for kind in (setting.dtype, torch.float64)}
        E, device = self.config.num_experts, setting.device
        self.router = torch.randn(E, setting.d_in, device=device).mul_(0.02) if own_router else None

    def draw(self, tokens: int) -> tuple[dict[str, Tensor], ...]:
        """y and gradients on random tokens: the truth, the backend's, and torch's in the same dtype."""
        s, E = self.setting, self.config.num_experts
        x = torch.randn(tokens, s.d_in, device=s.device, dtype=s.dtype)
        if self.router is None:
            routed = torch.rand(tokens, E, device=s.device).softmax(-1)
        else:
            x, routed = x[_decided(x, self.router, self.config.num_experts_per_tok)], self.router
        dy = torch.randn(x.shape[0], s.d_out, device=s.device, dtype=s.dtype)
        given = x, *self.factors, routed
        truths = self._results(self._formula, torch.float64, given, dy)
        ours = self._results(self._through(self.backend), s.dtype, given, dy)
        plain = self._formula if self.backend == "eager" else self._through("eager")
        found = truths, ours, self._results(plain, s.dtype, given, dy)
        with torch.no_grad():
            decoded = self._through(self.backend, inference=True)(x, self.bases[s.dtype], *self.factors, routed)
        for results, y in zip(found, (truths["y"], decoded, found[2]["y"]), strict=True):
            results["y without gradients"] = y
        return found

    def _routing(self, routed: Tensor) -> dict[str, Tensor]:
        return {"gates" if self.router is None else "router": routed}

    def _formula(self, x: Tensor, base, A: Tensor, B: Tensor, kappa: Tensor, routed: Tensor) -> Tensor:
        config = self.config
        return mos_linear_per_expert(
            x, *base, A, B, kappa, **self._routing(routed), scaling=config.scaling, mapping=config.mapping,
            num_experts_per_tok=config.num_experts_per_tok, fused_norm=True,
        )  # fmt: skip

    def _through(self, backend: str, inference: bool = False) -> Callable[..., Tensor]:
        return lambda x, base, A, B, kappa, routed: mos_linear(
            x, *base, A, B, kappa, **self._routing(routed), config=self.config, inference=inference, backend=backend
        )

    def _results(self, run: Callable[..., Tensor], kind: torch.dtype, given, dy: Tensor) -> dict[str, Tensor]:
        narrow = torch.float64 if kind == torch.float64 else torch.float32
        leaves = [t.detach().to(kind if i == 0 else narrow).requires_grad_() for i, t in enumerate(given)]
        y = run(leaves[0], self.bases[kind], *leaves[1:])
        names = ("y", "dx", "dA", "dB", "dkappa", "dgates" if self.router is None else "drouter")
        return dict(zip(names, (y.detach(), *torch.autograd.grad(y, leaves, dy.to(kind))), strict=True))


def _decided(x: Tensor, router: Tensor, k: int) -> Tensor:
    """Which tokens' routing no rounding can change."""
    if k == router.shape[0]:
        return torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    ordered = (x.double() @ router.double().t()).sort(-1, descending=True).values
    return ordered[:, k - 1] - ordered[:, k] > NEAR_TIE
