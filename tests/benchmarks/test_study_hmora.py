"""HMoRA: its gates, its loss and its task against the formulas, and that the task does not see what is predicted."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.study.decoder.training import collate, equation_losses
from benchmarks.study.hmora import EPSILON, hmora, lacking

LAYERS, WIDTH, E = 3, 16, 8
EXAMPLES = [{"prompt": [4, 5, 6, 7], "equation": [8, 9, 2]}, {"prompt": [10, 11], "equation": [12, 2]}]


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    base.get_input_embeddings().weight.data.normal_()
    return hmora(base, heads=4, token=5, lora_dropout=0.0, init_lora_weights=False)


def routers(model):
    return [layer.mlp.mos_router for layer in model.model.layers]


def test_the_gates_are_the_formula_and_low_layers_route_by_token(model):
    batch = collate(EXAMPLES, 0)
    seen = []
    for router in routers(model):
        router.register_forward_hook(lambda module, args, gates: seen.append((args[0], gates)))
    equation_losses(model.eval(), batch, "none")
    task = routers(model)[0].prompts.task
    assert task.shape == (2, WIDTH) and len(seen) == LAYERS
    for i, (router, (x, gates)) in enumerate(zip(routers(model), seen, strict=True)):
        assert math.isclose(router.level.item(), EPSILON * (2 * i / LAYERS - 1), abs_tol=1e-6)
        share = 1 / (1 + math.exp(-router.level.item()))
        by_token, by_task = (x @ router.weight.T).softmax(-1), (task @ router.task_weight.T).softmax(-1)
        torch.testing.assert_close(gates, (1 - share) * by_token + share * by_task[:, None])
        torch.testing.assert_close(gates.sum(-1), torch.ones(gates.shape[:-1]))
        torch.testing.assert_close(router.routing_logits(x).softmax(-1), gates)


def test_the_largest_gates_alone_pass_through_a_softmax_again(model):
    router, x = routers(model)[0], torch.randn(2, 5, WIDTH)
    router.prompts.task = torch.randn(2, WIDTH)
    every = router(x)
    object.__setattr__(router.config, "num_experts_per_tok", 2)
    two = router(x)
    values, kept = every.topk(2, -1)
    assert torch.equal((two > 0).sum(-1), torch.full((2, 5), 2))
    torch.testing.assert_close(two.gather(-1, kept), values.softmax(-1))


def test_the_task_sees_the_prompt_alone_whatever_the_padding(model):
    def task(examples):
        equation_losses(model, collate(examples, 0), "none")
        return routers(model)[0].prompts.task.detach()

    both = task(EXAMPLES)
    for i, example in enumerate(EXAMPLES):
        torch.testing.assert_close(task([{**example, "equation": [20, 21, 22, 23, 2]}])[0], both[i])
        torch.testing.assert_close(task([{**example, "equation": [2]}])[0], both[i])
    assert (task([{"prompt": [4, 5, 7, 6], "equation": [8]}])[0] - both[0]).abs().max() > 1e-3
    start = model.task_encoder.vector
    assert torch.equal(start, model.get_input_embeddings().weight[5])


@pytest.mark.parametrize("generated", [1, 6])
def test_what_is_generated_is_what_the_whole_sequence_gives(model, generated):
    prompts = collate([{**example, "equation": []} for example in EXAMPLES], 0)
    written = model.eval().generate(
        input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"], do_sample=False,
        max_new_tokens=generated, min_new_tokens=generated, pad_token_id=0,
    )[:, 4:]  # fmt: skip
    for example, tokens in zip(EXAMPLES, written, strict=True):
        batch = collate([{**example, "equation": tokens.tolist()}], 0)
        mask = torch.zeros_like(batch["input_ids"])
        mask[:, : len(example["prompt"])] = 1
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], prompt_mask=mask).logits[0, len(example["prompt"]) - 1 : -1]
        logits[:, 2] = -math.inf  # of a minimal length
        assert torch.equal(logits.argmax(-1), tokens)


def test_the_loss_wants_balance_on_average_and_certainty_of_each_choice():
    certain, uniform = torch.eye(E).repeat(3, 1), torch.full((24, E), 1 / E)
    assert lacking(certain) == 0  # balanced and certain
    torch.testing.assert_close(lacking(uniform), torch.tensor(0.5), atol=1e-6, rtol=0)  # balanced, in doubt
    torch.testing.assert_close(lacking(certain[:1].repeat(24, 1)), torch.tensor(0.98), atol=1e-6, rtol=0)  # one expert
    p = torch.randn(40, E).softmax(-1)
    mean, unit = p.mean(0), math.log(E)
    high = min(-(mean * mean.log()).sum().item(), 0.98 * unit)
    low = sum(max(-(row * row.log()).sum().item(), 0.5 * unit) for row in p) / 40
    torch.testing.assert_close(lacking(p), torch.tensor(max(0.48 * unit - high + low, 0) / unit), atol=1e-5, rtol=1e-5)


def test_all_of_it_trains_and_padding_has_no_say(model):
    batch = collate(EXAMPLES, 0)
    (equation_losses(model.train(), batch, "mean") + model.auxiliary_loss()).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for part in ("task_encoder", "mos_router.weight", "task_weight", "level", "mos_lora_A", "mos_lora_B"):
        found = [p for name, p in trained.items() if part in name]
        assert found and all(p.grad is not None and p.grad.abs().sum() > 0 for p in found), part
    assert model.model.layers[0].mlp.down_proj.config.is_lora
    whole = model.auxiliary_loss()
    model.eval()
    equation_losses(model, batch, "none")
    wanted = model.auxiliary_loss()
    torch.testing.assert_close(whole, wanted)
    labels = batch.pop("labels")
    wider = {name: torch.cat([torch.zeros_like(part[:, :3]), part], 1) for name, part in batch.items()}
    equation_losses(model, {**wider, "labels": labels}, "none")
    torch.testing.assert_close(model.auxiliary_loss(), wanted)


def test_a_batch_whose_task_is_not_known_is_refused(model):
    with pytest.raises(ValueError, match="5 sequences, and the task of 0 is known"):
        routers(model)[0](torch.zeros(5, 3, WIDTH))
