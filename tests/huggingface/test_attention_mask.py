"""Padding is left out of load balancing: the injected gradient is that of the real tokens alone, however they run."""

import copy
import gc
import io
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import MATRIX, ids, mos, tiny
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mos_kernels import MoSConfig
from mos_kernels.huggingface import apply_mos, load_adapter, remove_mos, routing_report
from mos_kernels.huggingface.modules import adapter_parameters, router_owners
from mos_kernels.routing import load_balancing_loss

COEFFICIENT = 5.0
LENGTHS = {"right": (4, 7, 2), "left": (4, 7, 2), "none": (7, 7, 7)}
CHECKPOINTING = [None, False, True]
"""No checkpointing, and use_reentrant."""


def adapted(family="llama", **options):
    model = tiny(family)
    apply_mos(model, mos(model, **{"router_aux_loss_coef": COEFFICIENT, **options}))
    return model.train()


def padded(side, seed=0):
    """ids and attention mask (3, 7), LENGTHS[side] of them real."""
    tokens, mask = ids(seed, batch=3), torch.zeros(3, 7, dtype=torch.long)
    for row, length in enumerate(LENGTHS[side]):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = 1
    return tokens.masked_fill(mask == 0, 0), mask


def real_loss(logits, mask):
    """A loss on the real tokens, all of which count the same; on a classifier's logits as they are."""
    squares = logits.square().mean(-1)
    return (squares * mask).sum() / mask.sum() if squares.dim() == 2 else squares.sum()


def gradients(model, tokens, mask, call=None):
    model.zero_grad()
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    output = (call or model)(inputs_embeds=embedded, attention_mask=mask)
    real_loss(output.logits, mask).backward()
    return router_gradients(model)


def router_gradients(model):
    return {name: p.grad.clone() for name, p in adapter_parameters(model).items() if "mos_router" in name}


def assert_near(found, expected):
    """Equal but for transformers' own float32 (norms, rotary embeddings, masked attention) within float64 models."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 3e-6 * gradient.abs().max(), name


def checkpointed(model, use_reentrant):
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


def by_hand(family, scope, tokens, mask):
    """The gradient of loss and balance, where each sequence runs alone and unpadded."""
    model = adapted(family, router_scope=scope, router_aux_loss_coef=0.0)
    owners, logits = router_owners(model), {}

    def measure(name):
        def hook(owner, args, output):
            weight = getattr(owner, "mos_router", None)
            found = nn.functional.linear(args[0], owner.weight if weight is None else weight)
            logits.setdefault(name, []).append(found.flatten(0, -2))

        return hook

    for name, owner in owners.items():
        owner.register_forward_hook(measure(name))
    loss = 0
    for row, kept in zip(tokens, mask.bool(), strict=True):
        output = model(row[kept].unsqueeze(0), attention_mask=torch.ones(1, kept.sum(), dtype=torch.long))
        squares = output.logits.square().mean(-1)
        loss = loss + (squares.sum() / mask.sum() if squares.dim() == 2 else squares.sum())
    k = next(iter(owners.values())).config.num_experts_per_tok
    balance = sum(load_balancing_loss(torch.cat(parts), k) for parts in logits.values()) / len(owners)
    (loss + COEFFICIENT * balance).backward()
    return router_gradients(model)


@pytest.mark.parametrize("use_reentrant", CHECKPOINTING)
@pytest.mark.parametrize("side", ["right", "left", "none"])
@pytest.mark.parametrize("family, scope", [("llama", "ffn"), ("llama", "linear")])
def test_padded_equals_each_sequence_alone(family, scope, side, use_reentrant):
    tokens, mask = padded(side)
    model = checkpointed(adapted(family, router_scope=scope), use_reentrant)
    assert_near(gradients(model, tokens, mask), by_hand(family, scope, tokens, mask))


@pytest.mark.parametrize("use_reentrant", CHECKPOINTING)
@pytest.mark.parametrize("scope", ["ffn", "linear"])
@pytest.mark.parametrize("family", MATRIX)
def test_with_peft(family, scope, use_reentrant, tmp_path):
    from peft import get_peft_model
    from peft_setup import in_file

    from mos_kernels.huggingface import MoSPeftConfig

    tokens, mask = padded("left")
    base = tiny(family)
    options = {"router_aux_loss_coef": COEFFICIENT, "router_scope": scope}
    torch.manual_seed(0)
    model = get_peft_model(base, MoSPeftConfig(**options), autocast_adapter_dtype=False).train()
    found = gradients(checkpointed(model, use_reentrant), tokens, mask)
    model.save_pretrained(tmp_path)
    equal = tiny(family)
    load_adapter(equal, tmp_path, is_trainable=True)
    expected = gradients(equal.train(), tokens, mask)
    assert_near({in_file(name): gradient for name, gradient in found.items()}, expected)


@pytest.mark.parametrize("scope", ["ffn", "linear"])
def test_with_peft_an_adapter_set_active_later_follows_the_mask_too(scope, tmp_path):
    from peft import PeftModel, get_peft_model

    from mos_kernels.huggingface import MoSPeftConfig

    tokens, mask = padded("left")
    options = {"router_aux_loss_coef": COEFFICIENT, "router_scope": scope}
    get_peft_model(tiny(), MoSPeftConfig(**options)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    expected = gradients(model.train(), tokens, mask)
    model.load_adapter(tmp_path, "later", is_trainable=True)
    model.set_adapter("later")
    found = gradients(model.train(), tokens, mask)
    assert found and all(torch.equal(found[name.replace(".default", ".later")], g) for name, g in expected.items())


@pytest.mark.parametrize("how", ["by name", "by position"])
@pytest.mark.parametrize("through", ["apply_mos", "peft", "peft without a task"])
def test_a_routing_report_leaves_padding_out(how, through):
    from peft import get_peft_model

    from mos_kernels.huggingface import MoSPeftConfig

    tokens, mask = padded("right")
    task = {"task_type": "CAUSAL_LM"} if through == "peft" else {}
    model = adapted() if through == "apply_mos" else get_peft_model(tiny(), MoSPeftConfig(**task))
    report = (
        routing_report(model, tokens, mask)
        if how == "by position"
        else routing_report(model, tokens, attention_mask=mask)
    )
    assert {entry["tokens"] for entry in report} == {int(mask.sum())}


@pytest.mark.parametrize("use_reentrant", CHECKPOINTING)
@pytest.mark.parametrize(
    "family, side",
    [
        ("qwen2", "left"),
        ("qwen2", "right"),
        ("gemma", "left"),
        ("gemma", "right"),
        ("bert", "right"),
        ("gpt2", "right"),
    ],
)
def test_other_families(family, side, use_reentrant):
    """With positions counted from the start, as BERT's, padding on the left would be another sequence."""
    tokens, mask = padded(side)
    found = gradients(checkpointed(adapted(family), use_reentrant), tokens, mask)
    assert_near(found, by_hand(family, "ffn", tokens, mask))


def test_where_ffns_get_the_tokens_of_all_sequences_in_rows():
    torch.manual_seed(0)
    options = {"vocab_size": 48, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1}
    model = OPTForCausalLM(OPTConfig(**options, num_attention_heads=2, max_position_embeddings=32, dropout=0.0))
    config = MoSConfig(target_modules=["fc1", "fc2"], router_aux_loss_coef=COEFFICIENT, router_scope="linear")
    apply_mos(model.double().train(), config)
    tokens, mask = padded("right")

    def found(tokens, mask):  # B is 0, so the injected gradient is all that reaches the routers
        model.zero_grad()
        model(input_ids=tokens, attention_mask=mask).logits.sum().backward()
        return router_gradients(model)

    first = found(tokens, mask)
    assert all(gradient.any() for gradient in first.values())
    assert_near(found(tokens.masked_fill(mask == 0, 9), mask), first)


def test_without_a_mask_for_each_token_all_are_counted():
    """Packed sequences bring none, and some callers bring one for each pair of tokens."""
    tokens, mask = padded("right")
    model = adapted()
    known = gradients(model, tokens, mask)
    causal = (mask[:, None, None, :] * torch.ones(7, 7).tril().long()).bool()
    stale = gradients(model, tokens, mask, call=lambda **inputs: model(**{**inputs, "attention_mask": None}))
    pairs = gradients(model, tokens, mask, call=lambda **inputs: model(**{**inputs, "attention_mask": causal}))
    for owner in router_owners(model).values():
        owner.token_mask = None
    every = gradients(model, tokens, mask, call=lambda **inputs: model(**{**inputs, "attention_mask": None}))
    assert_close(stale, every, rtol=0, atol=0)
    assert all(not torch.allclose(known[name], every[name], rtol=1e-3) for name in known)
    assert_near(pairs, gradients(model, tokens, mask))


@pytest.mark.parametrize("use_reentrant", CHECKPOINTING)
def test_a_forward_without_gradients_between_forward_and_backward_disturbs_nothing(use_reentrant):
    (tokens, mask), (others, other_mask) = padded("right"), padded("left", seed=3)
    model = checkpointed(adapted(), use_reentrant)
    expected = gradients(model, tokens, mask)

    def call(**inputs):
        output = model(**inputs)
        with torch.no_grad():
            model(others, attention_mask=other_mask)
            model(others)
        return output

    assert_close(gradients(model, tokens, mask, call), expected, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", CHECKPOINTING[:2])
def test_two_forwards_before_their_backward(use_reentrant):
    model = checkpointed(adapted(), use_reentrant)
    batches = [padded("right"), padded("left", seed=3)]
    expected = [gradients(model, *batch) for batch in batches]
    model.zero_grad()
    losses = [real_loss(model(tokens, attention_mask=mask).logits, mask) for tokens, mask in batches]
    for loss in losses:
        loss.backward()
    assert_close(router_gradients(model), {n: expected[0][n] + expected[1][n] for n in expected[0]}, rtol=1e-9, atol=0)


def in_threads(run, *arguments):
    """What run returns, in a thread for each of its arguments; an error in one of them is raised here."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(run, *arguments))


@pytest.mark.parametrize("use_reentrant", CHECKPOINTING)
def test_threads_with_different_masks_at_once(use_reentrant):
    """Copies that share parameters and masks, as DataParallel's replicas do, each with a batch of its own."""
    model = checkpointed(adapted(), use_reentrant)
    batches = [padded("right"), padded("left", seed=3)]
    expected = [gradients(model, *batch) for batch in batches]
    masks = {owner.token_mask for owner in router_owners(model).values()}
    replicas = [copy.deepcopy(model, {id(m): m for m in masks}) for _ in batches]
    together = threading.Barrier(2, timeout=60)

    def run(replica, batch):
        def call(**inputs):
            together.wait()
            output = replica(**inputs)
            together.wait()
            return output

        return gradients(replica, *batch, call)

    assert_close(in_threads(run, replicas, batches), expected, rtol=1e-12, atol=0)


def replica(model):
    """What torch.nn.parallel.replicate makes, which wants CUDA."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, made in copies.items():
        made._modules = {name: copies[child] for name, child in module.named_children()}
        made._parameters = dict(module._parameters)
    return copies[model]


def test_replicas_of_data_parallel():
    """Their forwards are in threads, backward is not."""
    model, batches = adapted(), [padded("right"), padded("left", seed=3)]
    expected = [gradients(model, *batch) for batch in batches]
    model.zero_grad()
    replicas = [replica(model) for _ in batches]

    def run(replica, batch):
        tokens, mask = batch
        return real_loss(replica(tokens, attention_mask=mask).logits, mask)

    sum(in_threads(run, replicas, batches)).backward()
    assert_close(router_gradients(model), {n: expected[0][n] + expected[1][n] for n in expected[0]}, rtol=1e-9, atol=0)


def test_the_whole_model_checkpointed_reentrantly():
    """Then the hook runs again in backward, and what it notes there is for there alone."""
    model = adapted()
    batches = [padded("right"), padded("left", seed=3)]
    expected = [gradients(model, *batch) for batch in batches]
    model.zero_grad()
    losses = []
    for tokens, mask in batches:
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
        run = lambda e, m: model(inputs_embeds=e, attention_mask=m).logits  # noqa: E731
        losses.append(real_loss(checkpoint(run, embedded, mask, use_reentrant=True), mask))
    sum(losses).backward()
    assert_close(router_gradients(model), {n: expected[0][n] + expected[1][n] for n in expected[0]}, rtol=1e-9, atol=0)
    assert_close(gradients(checkpointed(model, True), *batches[0]), expected[0], rtol=1e-9, atol=0)


def test_positional_arguments_and_an_inner_model_called_alone():
    tokens, mask = padded("right")
    model = adapted()
    expected = gradients(model, tokens, mask)

    def positional(inputs_embeds, attention_mask):
        return model(None, attention_mask, inputs_embeds=inputs_embeds)

    def inner(**inputs):  # as losses that work on hidden states do
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(logits=model.lm_head(model.model(**inputs).last_hidden_state))

    for call in (positional, inner):
        assert_close(gradients(model, tokens, mask, call), expected, rtol=1e-9, atol=1e-12)


def encoder_decoder(kind: str):
    torch.manual_seed(0)
    if kind == "t5":
        options = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
        model = T5ForConditionalGeneration(T5Config(vocab_size=48, **options, decoder_start_token_id=0))
    else:
        options = {f"{part}_{name}": n for part in ("encoder", "decoder")
                   for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
        model = BartForConditionalGeneration(BartConfig(vocab_size=48, d_model=16, **options, dropout=0.0))
    apply_mos(model, mos(model, target_modules="all-linear", router_scope="linear"))
    return model


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_and_a_decoder_each_have_their_own(kind):
    """And the keys and values of cross-attention, which read the encoder's states, have the encoder's."""
    model, seen = encoder_decoder(kind), {}
    for name, owner in router_owners(model).items():
        masks = seen.setdefault(name, [])
        owner.register_forward_hook(lambda owner, args, _, masks=masks: masks.append(owner.token_mask.of(args[0])))
    (tokens, mask), (targets, target_mask) = padded("right"), padded("left")
    target_mask[1, :3] = 0
    inputs = {"attention_mask": mask, "decoder_input_ids": targets, "decoder_attention_mask": target_mask}
    model.train()(tokens, **inputs)
    crossed = [name for name in seen if re.search(r"(EncDec|encoder_)att.*\.[kv](_proj)?$", name, re.IGNORECASE)]
    assert len(crossed) == 2 and len(seen) > 12
    for name, found in seen.items():
        expected = mask if "encoder." in name or name in crossed else target_mask
        assert found and all(torch.equal(one, expected.bool()) for one in found), name

    real = {entry["name"]: entry["tokens"] for entry in routing_report(model, tokens, **inputs)}
    assert real == {name: int((mask if "encoder." in name or name in crossed else target_mask).sum()) for name in seen}
    unmasked = {entry["name"]: entry["tokens"] for entry in routing_report(
        model, tokens, attention_mask=mask, decoder_input_ids=targets)}  # fmt: skip
    assert all(unmasked[name] == (real[name] if "encoder." in name or name in crossed else mask.numel())
               for name in seen)  # fmt: skip


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_masks_of_their_own(copied):
    tokens, mask = padded("right")
    model = adapted()
    expected = gradients(model, tokens, mask)
    twin = copied(model)
    ours, theirs = ({id(owner.token_mask) for owner in router_owners(m).values()} for m in (model, twin))
    assert len(ours) == len(theirs) == 1 and ours.isdisjoint(theirs)
    assert_close(gradients(twin, tokens, mask), expected, rtol=0, atol=0)
    assert remove_mos(twin) and not any(m._forward_pre_hooks for m in twin.modules())
    assert_close(gradients(model, tokens, mask), expected, rtol=0, atol=0)


def test_a_hook_registered_after_unpickling_does_not_take_its_place(monkeypatch):
    tokens, mask = padded("right")
    model = adapted()
    expected, pickled = gradients(model, tokens, mask), io.BytesIO(pickle.dumps(model))
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", 0)  # as in a new process
    twin = pickle.load(pickled)
    for module in twin.modules():
        for _ in range(20):
            module.register_forward_pre_hook(lambda *_: None)
    assert_close(gradients(twin, tokens, mask), expected, rtol=1e-12, atol=1e-12)  # linear by linear for the hooks


def test_generation_and_evaluation_leave_no_note():
    tokens, mask = padded("left")
    model = adapted().eval()
    with torch.no_grad():
        model(tokens, attention_mask=mask)
    model.generate(tokens, attention_mask=mask, max_new_tokens=3, do_sample=False)
    (source,) = {owner.token_mask for owner in router_owners(model).values()}
    assert source.of(torch.zeros(3, 7, 32)) is None
    assert_close(gradients(model.train(), tokens, mask), gradients(adapted(), tokens, mask), rtol=0, atol=0)


def test_remove_takes_the_hooks_and_the_masks():
    model = adapted()
    attributes = {name: set(vars(module)) for name, module in tiny().named_modules()}
    sources = {id(owner.token_mask) for owner in router_owners(model).values()}
    remove_mos(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    gc.collect()
    assert not any(id(found) in sources for found in gc.get_objects() if type(found).__name__ == "TokenMask")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_a_block_copies_when_its_model_is_gone(copied):
    model = tiny()
    apply_mos(model, mos(model))
    block = model.model.layers[0].mlp
    del model
    gc.collect()
    x = torch.randn(2, block.mos_router.in_features, dtype=block.gate_proj.weight.dtype)
    assert_close(copied(copied(block))(x), block(x))
