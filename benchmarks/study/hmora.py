"""HMoRA (Liao et al., 2025): low-rank experts that a token and the task of its sequence choose together.

Its experts are our layer's, Euclidean and with one A; only its gates are its own. Of a layer l of L, for a token x of a
sequence whose task is the vector t,

    gates = (1 − σ(α_l)) softmax(W x) + σ(α_l) softmax(V t)

α_l is learned. It starts at −ε + 2ε·l/L, so low layers route by token and high ones by task. t is the output of a small
encoder, over the embeddings of the prompt, at a learned vector appended to them. Only gate and up are routed, down is a
plain LoRA, as published. In training the prompt ends where the labels begin: t must not see what is to be predicted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, relu

from mos_kernels import MoSConfig, MoSRouter
from mos_kernels.call import without_autocast
from mos_kernels.huggingface import apply_mos

EPSILON = 2.0
BALANCED, CERTAIN = 0.98, 0.5
"""γ_b and γ_c: a router needs no more balance on average, and no more certainty of each choice, in units of ln E."""
PROMPT_MASK = "prompt_mask"


class TaskEncoder(nn.Module):
    """A transformer layer, its feed-forward twice as wide as the model, over the embeddings and a learned vector.

    embeddings (B, T, d), real bool (B, T) -> (B, d) in float32: the output at the vector, which starts as `start` (d,).
    """

    def __init__(self, start: Tensor, heads: int) -> None:
        super().__init__()
        width = len(start)
        self.vector = nn.Parameter(start.detach().float().clone())
        self.layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
        self.register_buffer("rates", 10000.0 ** (-torch.arange(0, width, 2) / width), persistent=False)

    def forward(self, embeddings: Tensor, real: Tensor) -> Tensor:
        real = torch.cat([real, real.new_ones(len(real), 1)], 1)
        tokens = torch.cat([embeddings.float(), self.vector.expand(len(real), 1, -1)], 1)
        angles = (real.cumsum(1) - 1)[..., None] * self.rates  # whatever the padding, a prompt begins at 0
        positions = torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)[..., : tokens.shape[-1]]
        return self.layer(tokens + positions, src_key_padding_mask=~real)[:, -1].float()


class _Prompts:
    """The batch that the model is at: which tokens are real, and the task of each sequence."""

    real: Tensor | None = None
    task: Tensor | None = None


class HMoRARouter(MoSRouter):
    """x (B, T, d) -> gates (B, T, E) in float32, for gate and up of a layer.

    weight: W (E, d), on x after dropout; task_weight: V (E, d); level: α, a number. With fewer experts a token than E,
    the largest gates pass through a softmax again, as published.
    """

    def __init__(self, in_features: int, config: MoSConfig, level: float, prompts: _Prompts) -> None:
        super().__init__(in_features, config)
        self.task_weight = nn.Parameter(torch.empty(config.num_experts, in_features))
        nn.init.normal_(self.task_weight, std=0.02)
        self.level = nn.Parameter(torch.tensor(level))
        self.prompts, self.chosen = prompts, None

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return self._gates(x)

    def routing_logits(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._gates(x).log()

    def _gates(self, x: Tensor) -> Tensor:
        task, k = self.prompts.task, self.config.num_experts_per_tok
        if task is None or len(task) != len(x):
            raise ValueError(f"{len(x)} sequences, and the task of {0 if task is None else len(task)} is known")
        with without_autocast(x):
            seen = dropout(x.float(), self.config.lora_dropout, self.training)
            by_token, by_task = linear(seen, self.weight).softmax(-1), linear(task, self.task_weight).softmax(-1)
            self.chosen = by_token, by_task
            share = self.level.sigmoid()
            gates = (1 - share) * by_token + share * by_task[:, None]
            if k == self.config.num_experts:
                return gates
            best = gates.topk(k, -1)
            return torch.zeros_like(gates).scatter(-1, best.indices, best.values.softmax(-1))

    def auxiliary_loss(self) -> Tensor:
        """Of the latest batch: what balance and certainty lack, of the choice by token and of that by task."""
        by_token, by_task = self.chosen
        real = self.prompts.real
        return lacking(by_token[real] if real is not None else by_token.flatten(0, 1)) + lacking(by_task)


def lacking(p: Tensor) -> Tensor:
    """relu(D − (H(mean p) − mean H(p))) / ln E of p (N, E), with the entropies cut off where they are good enough.

    D = (γ_b − γ_c) ln E is what their difference then is at most.
    """
    unit = math.log(p.shape[-1])
    balance = _entropy(p.mean(0)).clamp(max=BALANCED * unit)
    doubt = _entropy(p).clamp(min=CERTAIN * unit).mean()
    return relu((BALANCED - CERTAIN) * unit - (balance - doubt)) / unit


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


def hmora(model: nn.Module, token: int = 0, coefficient: float = 0.005, heads: int = 16, **options):
    """The model with HMoRA on its FFN linears, in place.

    token: the one as whose embedding the task's vector starts. coefficient: of the auxiliary loss,
    which `model.auxiliary_loss()` gives. options: of MoSConfig, besides the published ones. The model's forward takes
    prompt_mask (B, T), the tokens that are the prompt; None: all that are real. A forward with a filled cache goes on
    with the tasks of the forward before.
    """
    published = {
        "spaces": {"euclidean": 8}, "num_experts_per_tok": 8, "r": 8, "lora_alpha": 8, "use_rslora": True,
        "lora_dropout": 0.1, "router_aux_loss_coef": 0.0, "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "spaces_pattern": {"down_proj": {"euclidean": 1}},
    }  # fmt: skip
    apply_mos(model, MoSConfig(**{**published, **options}))
    prompts, routers = _Prompts(), []
    blocks = [module for module in model.modules() if isinstance(module._modules.get("mos_router"), MoSRouter)]
    for i, block in enumerate(blocks):
        old = block.mos_router
        block.mos_router = HMoRARouter(old.in_features, old.config, EPSILON * (2 * i / len(blocks) - 1), prompts).to(
            old.weight.device
        )
        routers.append(block.mos_router)
    embeddings = model.get_input_embeddings()
    model.task_encoder = TaskEncoder(embeddings.weight[token], heads).to(embeddings.weight.device)
    model.auxiliary_loss = lambda: coefficient * sum(router.auxiliary_loss() for router in routers)

    def see(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        prompt = kwargs.pop(PROMPT_MASK, None)
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # its former name
        if cache is None or not cache.get_seq_length():
            tokens, mask = kwargs["input_ids"], kwargs.get("attention_mask")
            prompts.real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
            shown = prompts.real if prompt is None else prompt != 0
            prompts.task = model.task_encoder(embeddings(tokens), shown)
        return args, kwargs

    model.register_forward_pre_hook(see, with_kwargs=True)
    return model
