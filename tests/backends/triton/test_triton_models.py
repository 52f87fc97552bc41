"""A whole transformers model on the kernels, compiled: one graph with the registered ops, and the same numbers."""

from __future__ import annotations

import pytest
import torch

import mos_kernels
from mos_kernels import MoSConfig

transformers = pytest.importorskip("transformers")


@pytest.mark.unpoisoned
@pytest.mark.full
def test_a_compiled_model_keeps_one_graph_with_padding_left_out():
    from mos_kernels.huggingface import apply_mos

    mos_kernels.set_backend("triton")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = transformers.LlamaForCausalLM(config).train()
    apply_mos(model, MoSConfig(r=1, init_lora_weights=False, router_aux_loss_coef=5.0))
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes if "mos_kernels" in str(node.target)})
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for length in (3, 4):
        tokens = torch.arange(1, 2 * length + 1).view(2, length)
        mask = torch.ones_like(tokens)
        mask[0, : length - 2] = 0
        found = []
        for call in (model, compiled):
            model.zero_grad()
            call(tokens, attention_mask=mask).logits.square().mean().backward()
            found.append([p.grad for p in model.parameters() if p.grad is not None])
        assert len(found[0]) == len(found[1]) >= 10
        for one, linears in zip(*found, strict=True):  # a compiled FFN is its linears, another one operation
            assert (one - linears).abs().max() <= 1e-5 * linears.abs().max(), length
    assert graphs == [{"mos_kernels.linear.default", "mos_kernels.route.default"}] * 2
