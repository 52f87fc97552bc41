"""How the tokens of a model are routed. Hooks on the routers measure this, without padding."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mos_kernels import routing
from mos_kernels.config import MoSConfig
from mos_kernels.ffn_node import Observer
from mos_kernels.huggingface.attention_mask import fitting, mask_names
from mos_kernels.huggingface.modules import mos_adapters, router_owners
from mos_kernels.huggingface.targets import refuse_offloaded
from mos_kernels.layer import evaluating


class RouterStatistics:
    """Sums over the tokens of one router. The results are None before the first token."""

    def __init__(self, config: MoSConfig):
        self.config = config
        self.tokens = 0
        self._sums: Tensor | None = None  # (3, E): top-k assignments, softmax, gates
        self._entropy: Tensor | None = None

    @torch.no_grad()
    def add(self, logits: Tensor) -> None:
        """logits (T, E)."""
        tokens = logits.shape[0]
        if tokens == 0:
            return
        logits, k = logits.float(), self.config.num_experts_per_tok
        gates = routing.route(logits, k, self.config.norm_topk_prob)
        share, probability = routing.load(logits, k)
        sums = torch.stack([share * tokens, probability * tokens, gates.sum(0)])
        entropy = -torch.special.xlogy(gates, gates).sum()
        self._sums = sums if self._sums is None else self._sums + sums
        self._entropy = entropy if self._entropy is None else self._entropy + entropy
        self.tokens += tokens

    def summary(self) -> dict | None:
        """tokens, share f_e of the T·k assignments, mean_gate, entropy of a token's gates in nats, aux_loss E·Σ f·P."""
        if self._sums is None:
            return None
        share, probability, gate = (self._sums / self.tokens).cpu()
        return {
            "tokens": self.tokens,
            "share": share.tolist(),
            "mean_gate": gate.tolist(),
            "entropy": self._entropy.item() / self.tokens,
            "aux_loss": self.config.num_experts * (share * probability).sum().item(),
        }


@contextlib.contextmanager
def measured_routing(
    model: nn.Module, statistics: dict[str, RouterStatistics] | None = None
) -> Iterator[dict[str, RouterStatistics]]:
    """Statistics of every router, by name. Each forward of `model` inside the context adds to them.

    statistics: those of an earlier context, to which this one adds.

    A compiled model runs uncompiled inside the context, since hooks do not work in a compiled model. Tokens that the
    model's `attention_mask` marks as padding are left out, if the mask has the shape of the tokens. A decoder behind an
    encoder has its own, `decoder_attention_mask`.
    """
    owners = router_owners(model)
    for name, owner in owners.items():
        refuse_offloaded(name, owner)
    statistics = {} if statistics is None else statistics
    for name, owner in owners.items():
        statistics.setdefault(name, RouterStatistics(owner.config))
    masks: dict[str, Tensor] = {}
    inner = getattr(model, "_orig_mod", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    signature, names_of = inspect.signature(inner.forward), mask_names(inner)

    def remember_masks(module, args, kwargs):
        given = dict(kwargs)
        if args:
            with contextlib.suppress(TypeError):  # the model says itself what is wrong with its arguments
                given.update(signature.bind_partial(*args, **kwargs).arguments)
        masks.clear()
        masks.update((name, value) for name, value in given.items() if name.endswith("attention_mask"))

    def measure(name, owner):
        names = names_of(name, owner)

        def observe(x):
            with torch.autocast(x.device.type, enabled=False):
                logits = owner.routing_logits(x.detach())
            real = fitting(map(masks.get, names), x)
            statistics[name].add(logits.flatten(0, -2) if real is None else logits[real])

        return Observer(observe)

    handles = [model.register_forward_pre_hook(remember_masks, with_kwargs=True)]
    handles += [owner.register_forward_hook(measure(name, owner), with_kwargs=True) for name, owner in owners.items()]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield statistics
    finally:
        for handle in handles:
            handle.remove()


class RoutingReport(list):
    """One dictionary for each router: name, spaces, tokens, share, mean_gate, entropy, aux_loss. Prints as a table."""

    def __str__(self) -> str:
        width = max(len(entry["name"]) for entry in self)
        lines = [f"{'router':{width}}  tokens  aux loss  entropy  share of the assignments, by expert"]
        for entry in self:
            shares = "  ".join(
                f"{space[0].upper()} {share:.3f}" for space, share in zip(entry["spaces"], entry["share"], strict=True)
            )
            numbers = f"{entry['tokens']:6d}  {entry['aux_loss']:8.3f}  {entry['entropy']:7.3f}"
            lines.append(f"{entry['name']:{width}}  {numbers}  {shares}")
        lines.append("H hyperbolic, S spherical, E Euclidean, at the start of training; entropy in nats;")
        lines.append("aux loss is the load-balancing loss E·Σ f·P, 1 at uniform routing")
        return "\n".join(lines)


@torch.no_grad()
def routing_report(model: nn.Module, *args, **kwargs) -> RoutingReport:
    """Run model(*args, **kwargs) once in eval mode, without gradients, and report how each router routed the tokens.

    Padding, as marked by the model's attention_mask, is left out. Training mode is restored afterwards. Raises
    ValueError if the model has no router, or if no router ran.
    """
    if not router_owners(model):
        loras = mos_adapters(model)
        why = f"its {len(loras)} adapted linears are LoRAs, which need none" if loras else "call apply_mos first"
        raise ValueError(f"{type(model).__name__} has no MoS routers: {why}")
    with evaluating(model), measured_routing(model) as statistics:
        model(*args, **kwargs)
    report = RoutingReport()
    for name, measured in statistics.items():
        summary = measured.summary()
        if summary is not None:
            report.append({"name": name, "spaces": list(measured.config.expert_spaces), **summary})
    if not report:
        raise ValueError("the model ran, but no token reached a MoS router: is the adapted part used for these inputs?")
    return report
