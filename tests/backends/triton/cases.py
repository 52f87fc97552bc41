"""A layer drawn from a seed, run by the kernels and by torch, and the criterion that its results are held to.

Shared by the tests in Triton's interpreter, those on a GPU and `python -m tests.fuzz`, which replays any seed. The
truth is the eager backend in float64, itself proven against reference/; "torch" is the eager backend in the case's
dtype.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from dropout_mask import keep_mask, packed
from everyday import covering
from strategies import Case, make_case, normal
from torch import Tensor

from mos_kernels import MoSConfig, ops
from mos_kernels.backends import eager, load_backend, load_ffn
from mos_kernels.backends.triton.launch import DECODE_TOKENS
from mos_kernels.call import Adapted, FFNPlan, FFNTensors
from mos_kernels.functional import mos_route

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("dense", "transposed", "rows apart", "columns apart", "expanded")
UPSTREAM_LAYOUTS = (*LAYOUTS, "one number")
BASE = ("x", "weight", "bias")
NEAR_TIE = 1e-4
"""Relative distance of two logits within which precisions may select different experts: such tokens become zero."""


class Drawn:
    """A dataclass of a comparison: its config, and fields with defaults."""

    def __str__(self) -> str:
        """The fields that differ from their defaults, as Python."""
        shown = [f"config=MoSConfig({_differences(self.config, MoSConfig())})"]
        return f"{type(self).__name__}({', '.join([*shown, _differences(self, type(self)(self.config))])})"


@dataclass(frozen=True)
class Trial(Drawn):
    """Everything about one comparison; `Trial(**fields)` or `Trial.drawn(seed)`."""

    config: MoSConfig
    tokens: tuple[int, ...] = (5,)
    d_in: int = 20
    d_out: int = 24
    dtype: torch.dtype = torch.float32
    seed: int = 0
    own_router: bool = True
    bias: bool = True
    aux_weight: float | None = 0.1
    dropout_p: float = 0.0
    kappa: tuple[float, ...] | None = None
    norms: tuple[float, ...] = (1.0,)
    b_scale: float = 1.0
    x_layout: str = "dense"
    upstream_layout: str = "dense"
    parameter_layout: str = "dense"
    base_dtype: torch.dtype | None = None  # of the output of a base that runs by itself; None: a dense base
    frozen: frozenset[str] = frozenset()
    device: str = "cpu"

    @classmethod
    def drawn(cls, seed: int, **fixed) -> Trial:
        """A trial of any kind, the same for a seed on every machine; `fixed` are fields that are not drawn."""
        rng = random.Random(seed)
        tokens = rng.choice([(), (0,), (1,), (2, 0), (3,), (2, 3), (17,), (33,), (64,), (65,), (2, 67)])
        large = rng.choice(["none", "none", "none", "rank", "experts"])
        counts = [rng.randint(0, 3) for _ in range(3)]
        if large == "experts":
            counts = rng.choice([(6, 5, 5), (7, 7, 3), (32, 0, 32)])
            tokens = rng.choice([(1,), (5,), (2, 3)])
        elif not any(counts):
            counts = [0, 0, 1]
        rank = rng.choice([1, 2, 3, 4, 5, 8])
        if large == "rank":
            rank, tokens = rng.choice([16, 17, 32, 64, 100, 128]), rng.choice([(1,), (5,), (2, 3), (33,)])
            counts = [min(count, 1) for count in counts]
        experts = sum(counts)
        mapping, domain = rng.choice([("stereographic", "ball"), ("stereographic", "raw"), ("exp_log", "ball")])
        own_router = rng.random() < 0.6
        config = MoSConfig(
            r=rank, lora_alpha=rng.choice([1.0, 3.0, 16.0]), use_rslora=rng.random() < 0.3,
            spaces=dict(zip(("hyperbolic", "spherical", "euclidean"), counts, strict=True)),
            num_experts_per_tok=rng.choice([1, experts, rng.randint(1, experts)]),
            norm_topk_prob=rng.random() < 0.6, share_a=rng.random() < 0.7,
            activation=rng.choice(["identity", "identity", "identity", "tanh", "silu", "gelu"]),
            mapping=mapping, domain=domain, boundary_eps=rng.choice([4e-3, 0.05, 0.3]),
            router_scope="linear" if own_router else "ffn",
        )  # fmt: skip
        widths = [1, 2, 3, 7, 8, 16, 17, 31, 33, 48, 64, 65, 100]
        kappa = [rng.choice([0.0, 1e-9, -1e-9, *(round(rng.uniform(-3, 3), 2),) * 4]) for _ in range(experts)]
        inputs = ["x", "weight", "bias", "A", "B", "kappa", "gates", "router"]
        drawn = {
            "config": config, "tokens": tokens, "d_in": rng.choice(widths), "d_out": rng.choice(widths),
            "dtype": rng.choice(DTYPES), "seed": seed, "own_router": own_router, "bias": rng.random() < 0.6,
            "aux_weight": rng.choice([None, 0.1, 3.0]), "dropout_p": rng.choice([0.0, 0.0, 0.0, 0.3]),
            "kappa": tuple(kappa), "norms": tuple(rng.choice([0.0, 0.03, 1.0, 1.0, 30.0]) for _ in range(3)),
            "b_scale": rng.choice([0.0, 0.1, 1.0, 1.0, 10.0]),
            "x_layout": rng.choice(["dense", *LAYOUTS]), "upstream_layout": rng.choice(["dense", *UPSTREAM_LAYOUTS]),
            "parameter_layout": rng.choice(["dense", "dense", "transposed", "rows apart"]),
            "frozen": frozenset(n for n in inputs if rng.random() < rng.choice([0.0, 0.0, 0.4])),
            "base_dtype": rng.choice([None, None, None, None, *DTYPES]),
        }  # fmt: skip
        if rng.random() < 0.3:
            drawn["frozen"] |= {"base_output"}
        if drawn["base_dtype"] is not None and config.num_experts_per_tok == experts:
            drawn["aux_weight"] = None  # a gradient that cancels to zero, and no dy·W to measure its rounding against
        return cls(**{**drawn, **fixed})

    def case(self) -> Case:
        """The call's arguments in the trial's dtype, layouts and device."""
        made = make_case(
            self.config, self.tokens, self.d_in, self.d_out, seed=self.seed, kappa=self.kappa, norms=self.norms,
            b_scale=self.b_scale, bias=self.bias, own_router=self.own_router, margin=-1.0,
        )  # fmt: skip
        made = made.to(self.dtype)
        if self.base_dtype is not None:
            made = made.wrapped(self.base_dtype)
        values = {name: tensor.detach() for name, tensor in made.inputs.items()}
        if self.own_router:
            values["router"] = in_two_parts(values["router"], self.dtype)
            values["x"] = _without_near_ties(values["x"], values["router"], self.config.num_experts_per_tok)
        tensors = {}
        for name, tensor in values.items():
            if name in ("x", "base_output"):
                tensor = laid_out(tensor, self.x_layout)
            elif name in ("A", "B", "router", "weight"):
                tensor = laid_out(tensor, self.parameter_layout)
            tensors[name] = on(tensor, self.device).requires_grad_(name not in self.frozen)
        return made.replace(**tensors)

    def upstream(self) -> Tensor:
        """dy."""
        shape, dtype = (*self.tokens, self.d_out), self.base_dtype or self.dtype
        if self.upstream_layout == "one number":
            return on(normal(self.seed + 99, 1)[0].to(dtype), self.device).expand(shape)
        return on(laid_out(normal(self.seed + 99, *shape).to(dtype), self.upstream_layout), self.device)

    def failures(self) -> list[str]:
        """One line for every result of the kernels that is further from the truth than the criterion allows."""
        aux = self.aux_weight if self.own_router else None
        return failures(self.case(), self.upstream(), aux_weight=aux, dropout_p=self.dropout_p, seed=self.seed)


def _differences(value, default) -> str:
    fields = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "config"]
    return ", ".join(f"{name}={found!r}" for name, found in fields if found != getattr(default, name))


def on(tensor: Tensor, device: str) -> Tensor:
    """tensor on device, with its strides."""
    if device == "cpu":
        return tensor
    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if 0 in tensor.stride() and tensor.numel():
        dense = [slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride()]
        moved[tuple(dense)] = tensor[tuple(dense)].to(device)
        return moved
    return moved.copy_(tensor)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """tensor's values in other strides; "expanded" repeats the first row instead, with stride 0."""
    if layout == "dense" or tensor.dim() == 0:
        return tensor.contiguous()
    if layout == "transposed":
        return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "rows apart":
        return torch.cat([tensor, tensor[..., :1]], -1)[..., :-1]
    if layout == "columns apart":
        return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]
    if tensor.dim() == 1 or 0 in tensor.shape:
        return tensor.contiguous()
    first = tensor.reshape(-1, tensor.shape[-1])[0]
    return first.expand(tensor.shape)


def in_two_parts(router: Tensor, dtype: torch.dtype) -> Tensor:
    """The router that the kernels see beside an x of dtype: the sum of two numbers of that dtype."""
    if dtype == torch.float32:
        return router
    high = router.to(dtype).float()
    return high + ((router - high) * 2048).to(dtype).float() / 2048


def _without_near_ties(x: Tensor, router: Tensor, k: int) -> Tensor:
    """x with zeros for the tokens whose selection hangs on a rounding; at zero all logits are equal, in every dtype."""
    if k == router.shape[0] or not x.numel():
        return x
    logits = x.double() @ router.double().T
    ordered = logits.sort(-1, descending=True).values
    near = ordered[..., k - 1] - ordered[..., k] <= NEAR_TIE * logits.abs().amax(-1)
    return torch.where(near.unsqueeze(-1), 0, x)


def _wide(case: Case) -> Case:
    return case.replace(
        **{n: t.detach().double().requires_grad_(t.requires_grad) for n, t in case.inputs.items()}
    )  # fmt: skip


def failures(case: Case, dy: Tensor, *, dropout_p: float = 0.0, seed: int = 0, **options) -> list[str]:
    """As `Trial.failures`, of any case; options as in `results`. Few tokens run in inference too, in other launches."""
    tokens = case.x.detach().reshape(-1, case.x.shape[-1])
    keep = keep_mask(tokens, dropout_p, seed) if dropout_p > 0 else None
    options.update(dropout_p=dropout_p, seed=seed, keep=keep)
    kernels = results(case, dy, "triton", **options)
    if both := keep is None and len(tokens) <= DECODE_TOKENS:
        with torch.no_grad():
            kernels["y in inference"] = case.ours("triton", inference=True)

    def of_both(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**found, "y in inference": found["y"]} if both else found

    truth = of_both(results(_wide(case), dy.double(), "eager", **options))
    by_torch = [of_both(results(case, dy, "eager", **options))]
    failed = compare(kernels, by_torch[0], truth)
    for attempt in range(3 if failed else 0):  # torch's own error depends on the order of its sums
        by_torch.append(of_both(_reordered(case, dy, attempt, **options)))
        failed = compare(kernels, largest_errors(by_torch, truth), truth)
    return failed


def results(
    case: Case,
    dy: Tensor,
    backend: str,
    *,
    aux_weight: float | None = None,
    token_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    keep: Tensor | None = None,
) -> dict[str, Tensor]:
    """Output and the gradients of what requires one, by name. keep: which elements of x dropout leaves to eager."""
    aux = None if aux_weight is None else torch.tensor([aux_weight], device=case.x.device)
    torch.manual_seed(seed)
    draw = eager.draw_dropout
    try:
        if keep is not None:
            eager.draw_dropout = lambda x, p: eager.Dropout(packed(keep), p)
        y = case.ours(backend, aux_weight=aux, token_mask=token_mask, dropout_p=dropout_p)
    finally:
        if keep is not None:  # threads run without
            eager.draw_dropout = draw
    wanted = {name: tensor for name, tensor in case.inputs.items() if tensor.requires_grad}
    if not wanted:
        return {"y": y.detach()}
    found = torch.autograd.grad(y, list(wanted.values()), dy)
    return {"y": y.detach(), **dict(zip(wanted, found, strict=True))}


def error(value: Tensor, truth: Tensor) -> float:
    """The largest error; infinite where one of the two is not a number, or they are different infinities."""
    if not truth.numel():
        return 0.0
    value, truth = value.double(), truth.double()
    difference = torch.where(value == truth, 0.0, (value - truth).abs())
    return difference.nan_to_num(math.inf, math.inf).max().item()


def largest_errors(runs: list[dict[str, Tensor]], truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of each result, the run that is furthest from the truth."""
    return {name: max((run[name] for run in runs), key=lambda value: error(value, truth[name])) for name in truth}


def compare(kernels: dict[str, Tensor], by_torch: dict[str, Tensor], truth: dict[str, Tensor]) -> list[str]:
    """The criterion: error(kernels) <= 2·error(torch) + 1e-6·max|truth|, for the output and every gradient."""
    failed = []
    if kernels.keys() != truth.keys():
        failed.append(f"results {sorted(kernels)} instead of {sorted(truth)}")
    for name in kernels.keys() & truth.keys():
        if kernels[name].shape != truth[name].shape or kernels[name].dtype != by_torch[name].dtype:
            found = f"{tuple(kernels[name].shape)} {kernels[name].dtype}"
            failed.append(f"{name} is {found} instead of {tuple(truth[name].shape)} {by_torch[name].dtype}")
            continue
        largest = truth[name].abs().max().item() if truth[name].numel() else 0.0
        ours, theirs = error(kernels[name], truth[name]), error(by_torch[name], truth[name])
        if not ours <= 2 * theirs + 1e-6 * largest:
            failed.append(f"{name}: error {ours:.3g}, torch's {theirs:.3g}, largest value {largest:.3g}")
    return failed


def _reordered(case: Case, dy: Tensor, attempt: int, *, keep: Tensor | None, **options) -> dict[str, Tensor]:
    """The results of torch with the columns of x, and the outputs, in another order."""
    generator = torch.Generator().manual_seed(attempt)
    columns = torch.randperm(case.x.shape[-1], generator=generator).to(case.x.device)
    outputs = torch.randperm(case.B.shape[0], generator=generator).to(case.x.device)
    order = {
        "x": (-1, columns), "A": (-1, columns), "router": (-1, columns),
        "B": (0, outputs), "bias": (0, outputs), "base_output": (-1, outputs),
    }  # fmt: skip

    def permuted(name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if name == "weight":
            return tensor[outputs][:, columns]
        return tensor.index_select(*order[name]) if name in order else tensor

    shuffled = {n: permuted(n, t).requires_grad_(t.requires_grad) for n, t in case.inputs.items()}
    keep = None if keep is None else keep[:, columns]
    found = results(case.replace(**shuffled), dy[..., outputs], "eager", keep=keep, **options)
    back = {"columns": columns.argsort(), "outputs": outputs.argsort()}
    restored = {}
    for name, tensor in found.items():
        if name == "weight":
            tensor = tensor[back["outputs"]][:, back["columns"]]
        elif name == "y":
            tensor = tensor[..., back["outputs"]]
        elif name in order:
            dim, by = order[name]
            tensor = tensor.index_select(dim, back["columns"] if by is columns else back["outputs"])
        restored[name] = tensor
    return restored


@dataclass(frozen=True)
class RouterTrial(Drawn):
    """A comparison of a router of its own: gates and the gradients of x and router."""

    config: MoSConfig
    tokens: tuple[int, ...] = (5,)
    d_in: int = 20
    dtype: torch.dtype = torch.float32
    seed: int = 0
    aux_weight: float | None = 0.1
    masked: float | None = None  # the share of the tokens that load balancing leaves out
    x_layout: str = "dense"
    upstream_layout: str = "dense"
    frozen: frozenset[str] = frozenset()
    device: str = "cpu"

    @classmethod
    def drawn(cls, seed: int, **fixed) -> RouterTrial:
        """A trial of any kind, the same for a seed on every machine."""
        rng = random.Random(seed)
        experts = rng.choice([1, 2, 3, 5, 8, 8, 16, 17, 64])
        config = MoSConfig(
            spaces={"euclidean": experts},
            num_experts_per_tok=rng.choice([1, experts, rng.randint(1, experts)]),
            norm_topk_prob=rng.random() < 0.6,
        )
        drawn = {
            "config": config, "tokens": rng.choice([(), (0,), (1,), (3,), (2, 3), (33,), (64,), (65,), (2, 67)]),
            "d_in": rng.choice([1, 2, 3, 8, 16, 17, 33, 64, 65, 130]), "dtype": rng.choice(DTYPES), "seed": seed,
            "aux_weight": rng.choice([None, 0.1, 3.0]), "masked": rng.choice([None, 0.0, 0.3, 1.0]),
            "x_layout": rng.choice(["dense", *LAYOUTS]), "upstream_layout": rng.choice(["dense", *UPSTREAM_LAYOUTS]),
            "frozen": rng.choice([frozenset()] * 3 + [frozenset({"x"}), frozenset({"router"})]),
        }  # fmt: skip
        return cls(**{**drawn, **fixed})

    def failures(self) -> list[str]:
        """As `Trial.failures`."""
        E = self.config.num_experts
        router = in_two_parts(normal(self.seed + 1, E, self.d_in).float(), self.dtype)
        x = normal(self.seed, *self.tokens, self.d_in).to(self.dtype)
        x = laid_out(_without_near_ties(x, router, self.config.num_experts_per_tok), self.x_layout)
        dgates = normal(self.seed + 2, *self.tokens, E).float()
        if self.upstream_layout != "one number":
            dgates = laid_out(dgates, self.upstream_layout)
        else:
            dgates = normal(self.seed + 2, 1)[0].float().expand(dgates.shape)
        mask = None
        if self.masked is not None:
            mask = torch.rand(self.tokens, generator=torch.Generator().manual_seed(self.seed)) >= self.masked
        x, router, dgates = (on(t, self.device) for t in (x, router, dgates))
        mask = None if mask is None else mask.to(self.device)
        kernels = self._results(x, router, dgates, mask, "triton")
        by_torch = self._results(x, router, dgates, mask, "eager")
        return compare(kernels, by_torch, self._results(x.double(), router.double(), dgates.double(), mask, "eager"))

    def _results(self, x, router, dgates, mask, backend) -> dict[str, Tensor]:
        inputs = {"x": x, "router": router}
        inputs = {name: t.detach().requires_grad_(name not in self.frozen) for name, t in inputs.items()}
        aux = None if self.aux_weight is None else torch.tensor([self.aux_weight], device=x.device)
        gates = mos_route(**inputs, config=self.config, aux_weight=aux, token_mask=mask, backend=backend)
        wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
        found = torch.autograd.grad(gates, list(wanted.values()), dgates)
        return {"gates": gates.detach(), **dict(zip(wanted, found, strict=True))}


@dataclass(frozen=True)
class FFNTrial(Drawn):
    """A comparison of an FFN as one operation: its output, and all gradients where a backward may follow."""

    config: MoSConfig  # of the linears that read x
    tokens: tuple[int, ...] = (5,)
    d_in: int = 20
    d_hidden: int = 24
    d_out: int = 20
    dtype: torch.dtype = torch.float32
    seed: int = 0
    form: str = "gated"  # or "fused", one linear that makes both halves, or "plain", one that makes a single one
    activation: str = "silu"
    biases: tuple[bool, ...] = (True, True, True)  # of gate, up and down
    down: tuple[tuple[str, object], ...] = ()  # options in which the last linear's configuration differs
    gates_given: bool = False
    aux_weight: float | None = 0.1
    masked: float | None = None  # the share of the tokens that load balancing leaves out
    inference: bool = False
    kept: bool = False  # in inference: what follows from the parameters is there already
    kappa: tuple[float, ...] | None = None
    norms: tuple[float, ...] = (1.0,)
    b_scale: float = 1.0
    x_layout: str = "dense"
    upstream_layout: str = "dense"
    frozen: frozenset[str] = frozenset()
    device: str = "cpu"

    @classmethod
    def drawn(cls, seed: int, **fixed) -> FFNTrial:
        """A trial of any kind, the same for a seed on every machine."""
        rng = random.Random(seed)
        counts, rank = rng.choice(
            [((3, 3, 2), 8), ((3, 3, 2), 8), ((1, 1, 1), 5), ((0, 1, 0), 1), ((2, 0, 3), 3), ((1, 0, 1), 33),
             ((1, 0, 0), 128), ((7, 7, 3), 2), ((32, 0, 32), 1)]
        )  # fmt: skip
        experts = sum(counts)
        tokens = rng.choice([(), (0,), (1,), (2, 3), (33,), (2, 67)] if rank < 33 else [(1,), (2, 3)])
        mapping, domain = rng.choice([("stereographic", "ball"), ("stereographic", "raw"), ("exp_log", "ball")])
        config = MoSConfig(
            r=rank, spaces=dict(zip(("hyperbolic", "spherical", "euclidean"), counts, strict=True)),
            num_experts_per_tok=rng.choice([1, experts, rng.randint(1, experts)]),
            norm_topk_prob=rng.random() < 0.6, share_a=rng.random() < 0.7, mapping=mapping, domain=domain,
            boundary_eps=rng.choice([4e-3, 0.3]),
        )  # fmt: skip
        widths = [1, 3, 8, 17, 48, 65, 100]
        kappa = [rng.choice([0.0, 1e-9, -1e-9, *(round(rng.uniform(-3, 3), 2),) * 4]) for _ in range(experts)]
        names = ["x", "router", "gates", *(f"{name} {i}" for name in ("A", "B", "kappa") for i in range(3))]
        bias = rng.random() < 0.5
        drawn = {
            "config": config, "tokens": tokens, "d_in": rng.choice([*widths, 300]), "d_hidden": rng.choice(widths),
            "d_out": rng.choice(widths), "dtype": rng.choice(DTYPES), "seed": seed,
            "form": rng.choice(["gated", "gated", "gated", "fused", "plain"]),
            "activation": rng.choice(["silu", "silu", "gelu", "gelu_tanh"]),
            "biases": rng.choice([(bias,) * 3, (True, False, bias)]),
            "down": rng.choice([(), (), (), (("r", max(rank // 2, 1)), ("share_a", not config.share_a))]),
            "gates_given": rng.random() < 0.3, "aux_weight": rng.choice([None, 0.1, 3.0]),
            "masked": rng.choice([None, 0.0, 0.3, 1.0]), "inference": rng.random() < 0.4,
            "kept": rng.random() < 0.5, "kappa": tuple(kappa),
            "norms": tuple(rng.choice([0.0, 0.03, 1.0, 1.0, 30.0]) for _ in range(3)),
            "b_scale": rng.choice([0.1, 1.0, 1.0, 10.0]), "x_layout": rng.choice(["dense", *LAYOUTS]),
            "upstream_layout": rng.choice(["dense", *UPSTREAM_LAYOUTS]),
            "frozen": frozenset(n for n in names if rng.random() < rng.choice([0.0, 0.0, 0.4])),
        }  # fmt: skip
        return cls(**{**drawn, **fixed})

    def failures(self) -> list[str]:
        """As `Trial.failures`, where need be over the root mean square of the errors on up to 24 inputs.

        An FFN rounds between its linears, and torch elsewhere than the kernels: on one input the two errors are two
        draws of chance.
        """
        sums: dict[str, list[float]] = {}  # of squares of the kernels' and of torch's errors; and the largest number
        for attempt in range(24):
            by_kernels, by_torch, truth = self._compared(attempt)
            for name, expected in truth.items():
                ours, theirs, largest = sums.get(name, [0.0, 0.0, 0.0])
                largest = max(largest, expected.abs().max().item() if expected.numel() else 0.0)
                ours, theirs = (
                    ours + error(by_kernels[name], expected) ** 2,
                    theirs + error(by_torch[name], expected) ** 2,
                )
                sums[name] = [ours, theirs, largest]
            failed = []
            for name, (ours, theirs, largest) in sums.items():
                ours, theirs = ((square / (attempt + 1)) ** 0.5 for square in (ours, theirs))
                if not ours <= 2 * theirs + 1e-6 * largest:
                    failed.append(f"{name}: error {ours:.3g}, torch's {theirs:.3g}, largest value {largest:.3g}")
            if not failed:
                break
        return failed

    def _compared(self, attempt: int) -> tuple[dict[str, Tensor], ...]:
        """By the kernels, by torch, and the truth."""
        given, dy = self._given(attempt), self._upstream(attempt)
        wide = {name: t.double() if t.is_floating_point() else t for name, t in given.items()}
        kernels, by_torch = (self._results(given, dy, backend) for backend in ("triton", "eager"))
        assert kernels.keys() == by_torch.keys()
        for name, found in kernels.items():
            assert found.dtype == by_torch[name].dtype and found.shape == by_torch[name].shape, name
        return kernels, by_torch, self._results(wide, dy.double(), "eager")

    @property
    def _reads(self) -> int:
        return 2 if self.form == "gated" else 1

    @property
    def _configs(self) -> list[MoSConfig]:
        """Of the linears that read x, and of the last."""
        down = MoSConfig.from_dict({**self.config.to_dict(), **dict(self.down)})
        return [self.config] * self._reads + [down]

    def _given(self, attempt: int) -> dict[str, Tensor]:
        """All tensors by name: "x", "router" or "gates", and "weight i", "bias i", "A i", "B i", "kappa i" of linear i.

        attempt: another x.
        """
        given, k = {}, self.config.num_experts_per_tok
        read_width = self.d_hidden * (2 if self.form == "fused" else 1)
        for i, config in enumerate(self._configs):
            last = i == self._reads
            sizes = (self.d_hidden, self.d_out) if last else (self.d_in, read_width)
            kappa = tuple((1 - 0.3 * i) * value for value in self.kappa or config.curvature_signs)
            case = make_case(
                config, self.tokens, *sizes, seed=self.seed + 10 * i, kappa=kappa, norms=self.norms,
                b_scale=self.b_scale, bias=self.biases[2 if last else i], own_router=not self.gates_given, margin=-1.0,
            ).to(self.dtype)  # fmt: skip
            for name, tensor in case.inputs.items():
                if name not in ("x", "router", "gates"):
                    given[f"{name} {i}"] = tensor.detach()
                elif i == 0:
                    given[name] = tensor.detach()
        if attempt:
            length = given["x"].norm(dim=-1, keepdim=True)
            drawn = normal(self.seed + 1000 * attempt, *given["x"].shape)
            length = length * (1 + 0.1 * normal(self.seed + 1000 * attempt + 1, *length.shape).tanh())
            given["x"] = (drawn / drawn.norm(dim=-1, keepdim=True) * length).to(self.dtype)
        if not self.gates_given:
            given["router"] = in_two_parts(given["router"], self.dtype)
            given["x"] = _without_near_ties(given["x"], given["router"], k)
        given["x"] = laid_out(given["x"], self.x_layout)
        if self.masked is not None:
            generator = torch.Generator().manual_seed(self.seed)
            given["mask"] = torch.rand(self.tokens, generator=generator) >= self.masked
        return {name: on(tensor, self.device) for name, tensor in given.items()}

    def _upstream(self, attempt: int) -> Tensor:
        shape, seed = (*self.tokens, self.d_out), self.seed + 99 + attempt
        if self.upstream_layout == "one number":
            return on(normal(seed, 1)[0].to(self.dtype), self.device).expand(shape)
        return on(laid_out(normal(seed, *shape).to(self.dtype), self.upstream_layout), self.device)

    def _results(self, given: dict[str, Tensor], dy: Tensor, backend: str) -> dict[str, Tensor]:
        trained = {n: t for n, t in given.items() if n.partition(" ")[0] in ("x", "router", "gates", "A", "B", "kappa")}
        if not self.inference:
            trained = {n: t.detach().requires_grad_(n not in self.frozen) for n, t in trained.items()}
        at = {**given, **trained}
        linears = [
            Adapted(at[f"weight {i}"], at.get(f"bias {i}"), at[f"A {i}"], at[f"B {i}"], at[f"kappa {i}"])
            for i in range(self._reads + 1)
        ]
        prepared = [None] * len(linears)
        if self.inference and self.kept:
            steps, dtype = load_backend(backend), given["x"].dtype
            linears = [linear._replace(A=steps.operand(linear.A, dtype)) for linear in linears]
            prepared = [steps.prepare(t.B, dtype, config) for t, config in zip(linears, self._configs, strict=True)]
        aux = None
        if self.aux_weight is not None and not self.gates_given:
            aux = torch.tensor([self.aux_weight], device=given["x"].device)
        mask = None if aux is None else given.get("mask")
        tensors = FFNTensors(at["x"], at.get("gates"), at.get("router"), aux, mask, linears[-1], tuple(linears[:-1]))
        plan = FFNPlan(
            self.config, self._configs[-1], backend, self.activation, gated=self.form != "plain",
            fused=self.form == "fused", differentiable=not self.inference, prepared=(prepared[-1], *prepared[:-1]),
        )  # fmt: skip
        if self.inference and self.kept and not self.gates_given:
            plan = plan._replace(constants=load_ffn(backend).constants(tensors, plan))
        with torch.set_grad_enabled(not self.inference):
            y = ops.ffn(tensors, plan)
        wanted = {name: tensor for name, tensor in trained.items() if tensor.requires_grad}
        found = torch.autograd.grad(y, list(wanted.values()), dy) if wanted else ()
        return {"y": y.detach(), **dict(zip(wanted, found, strict=True))}


# which of the drawn trials run every day


def kinds(trial: Drawn) -> set[tuple]:
    """What a trial is one of: each of its fields' values, and those pairs of values that have code of their own."""
    config, found = trial.config, {**vars(trial.config), **vars(trial)}
    E, k = config.num_experts, config.num_experts_per_tok
    found |= {"experts": E, "num_experts_per_tok": {1: "one", E: "all"}.get(k, "some")}
    found |= {"geometry": (config.mapping, config.domain), "tokens": math.prod(trial.tokens)}
    found["activated"] = config.activation != "identity"
    several = {"kappa": map(_kind_of_curvature, trial.kappa or ())} if hasattr(trial, "kappa") else {}
    for name in ("frozen", "norms"):
        if isinstance(found.get(name), (tuple, frozenset)):
            several[name] = found[name]
    several["spaces"] = config.spaces.items()
    for name in ("config", "seed", "json", "kappa", "target_modules", *several):
        found.pop(name, None)
    pairs = [
        ("activation", "dtype"), ("form", "inference"), ("form", "dtype"), ("kept", "inference"),
        ("activated", "base_dtype"), ("dtype", "dropout_p"), ("dtype", "masked"),
        ("dtype", "frozen"), ("geometry", "own_router"), ("share_a", "norm_topk_prob", "own_router"),
        ("num_experts_per_tok", "norm_topk_prob"),
    ]  # fmt: skip
    single = {(name, value) for name, value in found.items() if not isinstance(value, (dict, list))}
    of_many = {(name, value) for name, values in several.items() for value in values}
    together = {(*pair, *(found[name] for name in pair)) for pair in pairs if found.keys() >= set(pair)}
    return single | of_many | together


def _kind_of_curvature(kappa: float) -> str | float:
    return kappa if abs(kappa) < 1e-6 else math.copysign(1, kappa)


def cost(trial: Drawn) -> float:
    """Roughly what it takes in the interpreter."""
    columns = trial.config.num_experts * trial.config.r
    return 1 + columns / (64 if trial.config.share_a else 16)


def everyday_seeds(kind: type, seeds: Iterable[int]) -> list[int]:
    """Few of the seeds that draw every kind of trial which all of them draw."""
    return covering(seeds, lambda seed: kinds(kind.drawn(seed)), lambda seed: cost(kind.drawn(seed)))
