"""An FFN as one operation through the kernels: right by the criterion, in few launches, and only where it may be."""

from __future__ import annotations

import numpy
import pytest
import test_ffn as blocks
import torch
from cases import FFNTrial, everyday_seeds, kinds
from everyday import full_but
from operators import Computed
from strategies import normal
from test_ffn import FAMILIES, OneByOne, assert_an_overflow_shows, assert_little_is_saved, results
from test_ffn import adapted as any_block
from torch import nn
from torch.utils.checkpoint import checkpoint

import mos_kernels
from mos_kernels import MoSConfig, MoSLinear, MoSRouter, MoSWrapped
from mos_kernels.backends.triton import launch
from mos_kernels.ffn import bound_form
from mos_kernels.ffn_node import as_one

transformers = pytest.importorskip("transformers", reason="the blocks are transformers'")

D, HIDDEN, R, E = 50, 70, 3, 8
SEEDS = range(72)
EVERYDAY = everyday_seeds(FFNTrial, SEEDS)


@pytest.mark.budget(10)
@pytest.mark.parametrize("seed", full_but(EVERYDAY, SEEDS))
def test_an_ffn_drawn_from_a_seed(seed):
    trial = FFNTrial.drawn(seed)
    assert not trial.failures(), trial


def test_the_everyday_seeds_reach_what_all_of_them_do():
    reached, everything = (set().union(*(kinds(FFNTrial.drawn(s)) for s in some)) for some in (EVERYDAY, SEEDS))
    assert reached == everything and len(everything) >= 100


@pytest.mark.budget(10)
@pytest.mark.shipped_settings
@pytest.mark.parametrize("inference", [False, True])
def test_an_ffn_in_as_many_parts_as_on_a_gpu(inference):
    trial = FFNTrial(
        MoSConfig(), tokens=(17,), d_in=600, d_hidden=300, dtype=torch.bfloat16, inference=inference, kept=True
    )
    assert not trial.failures()


# blocks of transformers


def llama():
    config = transformers.LlamaConfig(hidden_size=D, intermediate_size=HIDDEN, num_attention_heads=1)
    return transformers.models.llama.modeling_llama.LlamaMLP(config)


def phi3():
    config = transformers.Phi3Config(
        hidden_size=D, intermediate_size=HIDDEN, num_attention_heads=1, num_key_value_heads=1, pad_token_id=0
    )
    return transformers.models.phi3.modeling_phi3.Phi3MLP(config)


def gpt2():
    return transformers.models.gpt2.modeling_gpt2.GPT2MLP(HIDDEN, transformers.GPT2Config(n_embd=D))


NAMES = {
    llama: ("gate_proj", "up_proj", "down_proj"), phi3: ("gate_up_proj", "down_proj"), gpt2: ("c_fc", "c_proj"),
}  # fmt: skip
FORWARD = ["gram", "shrink", "bridge", "expand", "activate", "bridge", "expand"]
BACKWARD = [
    "expand_backward", "bridge_backward", "activate_backward", "expand_backward", "load", "bridge_backward",
    "bridge_reduces", "norm_gradients", "shrink_backward",
]  # fmt: skip
GATED = ["shrink", "bridge_expand_pair", "activate", "bridge_expand"]
PLAIN = ["shrink", "bridge_expand", "activate", "bridge_expand"]


def adapted(family, frozen=True, **options) -> nn.Module:
    """A block with adapters, in eval mode."""
    from mos_kernels.huggingface import apply_mos

    mos_kernels.set_backend("triton")
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": family()})
    config = MoSConfig(r=R, init_lora_weights=False, target_modules=NAMES[family], **options)
    apply_mos(model, config)
    block = model["mlp"].eval()
    if frozen:
        for name in NAMES[family]:
            getattr(block, name).freeze_for_inference()
    return block


def one_by_one(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with OneByOne(block):
        return block(x)


@pytest.mark.budget(10)  # for importing transformers
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("family", "names"), [(llama, GATED), (phi3, PLAIN), (gpt2, PLAIN)])
def test_a_block_decodes_in_four_launches(launched, family, names, frozen):
    """Without a call to freeze the first token makes what is kept, and the second needs no more."""
    block, x = adapted(family, frozen), normal(0, 2, 9, D).float()
    launched.clear()
    with torch.no_grad():
        first = block(x)
        assert [name for name in launched if name != "gram"] == names
        assert launched.count("gram") == (0 if frozen else len(NAMES[family]))
        launched.clear()
        y = block(x)
        assert launched == names and torch.equal(y, first)
        launched.clear()
        expected = one_by_one(block, x)
    linears = ["shrink", "bridge_expand"] * len(NAMES[family])
    assert [name for name in launched if name != "gram"] == ["shrink", "route", *linears]
    assert y.shape == expected.shape and not y.requires_grad
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [llama, phi3, gpt2])
def test_a_block_trains_in_few_launches(launched, family):
    block, x = adapted(family).train(), normal(0, 3, 27, D).float().requires_grad_()
    launched.clear()
    y = block(x)
    assert launched == FORWARD
    launched.clear()
    y.sum().backward()
    assert launched == BACKWARD


@pytest.mark.unpoisoned
def test_beside_the_launches_of_decoding_there_are_the_base_products(monkeypatch):
    block, x = adapted(llama), torch.zeros(1, D)
    monkeypatch.setattr(launch, "launch", lambda *_, **__: None)
    with torch.no_grad(), Computed() as computed:
        block(x)
    assert computed.names == ["addmm_"] * 3


@pytest.mark.unpoisoned
@pytest.mark.shipped_settings
def test_a_training_step_is_22_launches_beside_the_base_products(monkeypatch):
    """Kernels and sums of planes, of a bfloat16 base with adapters in float32."""
    block, launches = adapted(llama).train(), []
    for name in ("weight", "bias"):
        for linear in NAMES[llama]:
            base = getattr(getattr(block, linear), name)
            if base is not None:
                base.data = base.data.bfloat16()
    x = torch.zeros(200, D).bfloat16().requires_grad_()
    monkeypatch.setattr(launch, "launch", lambda kernel, *_, **__: launches.append(kernel.fn.__name__))
    with Computed() as computed:
        y = block(x)
        torch.autograd.grad(y, [x, *(p for p in block.parameters() if p.requires_grad)], y.detach())
    base = [name for name in computed.names if name in ("addmm_", "mm")]
    ours = [name for name in computed.names if name not in base]
    assert ours == ["_foreach_addcmul", *["sum"] * 4, "_foreach_mul"]
    assert [name.removesuffix("_kernel") for name in launches] == [*FORWARD, "gram", *BACKWARD]
    assert len(base) == 6 and len(launches) + ours.count("sum") <= 22 and len(base) + len(launches) + len(ours) <= 32


@pytest.mark.parametrize("count", [1, 17])
def test_a_token_does_not_depend_on_the_others(count, monkeypatch):
    """Bitwise. W = 0 and the interpreter multiplies by einsum: BLAS lacks the property."""
    monkeypatch.setattr(numpy, "matmul", lambda a, b, dtype: numpy.einsum("ij,jk->ik", a, b, dtype=dtype))
    block, x = adapted(llama), normal(0, 64, D).float()
    for name in NAMES[llama]:
        getattr(block, name).weight.data.zero_()
        getattr(block, name).eval()  # nothing is kept of what was
    which = torch.randperm(64, generator=torch.Generator().manual_seed(count))[:count]
    with torch.no_grad():
        assert torch.equal(block(x[which]), block(x)[which])


def test_compiled_the_block_is_one_graph_of_the_registered_ops():
    block, x = adapted(llama), normal(0, 9, D).float()
    targets = set()

    def backend(graph, inputs):
        targets.update(str(node.target) for node in graph.graph.nodes if "mos_kernels" in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        y = torch.compile(block, backend=backend, fullgraph=True)(x)
        assert targets == {"mos_kernels.linear.default", "mos_kernels.route.default"}
        torch.testing.assert_close(y, block(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_after_warmup_a_block_launches_nothing_new(described, dtype):
    model = nn.ModuleList([adapted(llama), adapted(llama), adapted(llama, share_a=False), adapted(phi3)])
    for module in model.modules():
        if getattr(module, "weight", None) is not None and not isinstance(module, MoSRouter):
            module.weight.data = module.weight.data.to(dtype)
    model[0].train()
    called = []
    model[1].act_fn.register_forward_hook(lambda *_: called.append(1))
    mos_kernels.warmup(model, dtype)
    assert [block.mos_router.training for block in model] == [True, False, False, False] and not called
    assert model[1].gate_proj._kept is not None
    warm = set(described)
    with torch.no_grad():
        for block in model:
            for module in block.modules():
                module.training = False
            for _ in range(2):
                block(torch.ones(4, D, dtype=dtype))
    assert described == warm


@pytest.mark.parametrize("family", [llama, gpt2])
def test_what_a_block_keeps_is_cast_once_and_follows_its_parameters(family, monkeypatch):
    block, x = adapted(family, frozen=False), normal(0, 9, D).float()
    router = next(module for module in block.modules() if isinstance(module, MoSRouter))
    cast, run = [], launch.launch

    def note(kernel, *arguments, **constants):
        if kernel.fn.__name__ == "shrink_kernel":
            cast.append(not constants["STACKED"])
        run(kernel, *arguments, **constants)

    monkeypatch.setattr(launch, "launch", note)
    with torch.no_grad():
        outputs = [block(x), block(x)]
        router.weight.neg_()
        outputs.append(block(x))
        getattr(block, NAMES[family][0]).mos_lora_A.neg_()
        outputs.append(block(x))
        assert cast == [False] * 4
        assert torch.equal(*outputs[:2]) and not any(torch.equal(*outputs[i : i + 2]) for i in (1, 2))
        torch.testing.assert_close(outputs[-1], one_by_one(block, x), rtol=1e-5, atol=1e-5)


def test_a_graph_that_is_captured_reads_what_is_kept_if_the_linears_are_frozen(monkeypatch):
    """And the same memory is read for as long as they are, whatever the block is looked at anew for."""
    block, x = adapted(llama, frozen=False), normal(0, 9, D).float()
    form = bound_form(block)

    def capture():
        with monkeypatch.context() as patch:
            for module in ("layer", "ffn_node"):
                patch.setattr(f"mos_kernels.{module}.is_capturing", lambda x: True)
            return as_one(block, form, x)[1]

    with torch.no_grad():
        block(x)
        assert capture().constants is None
        for name in NAMES[llama]:
            getattr(block, name).freeze_for_inference()
        assert capture().constants is None  # not yet made: not in the graph's own memory
        block(x)
        stack = capture().constants
        nn.Linear(1, 1).register_forward_hook(lambda *_: None)  # anywhere
        block(x[:3])
        assert stack is not None and capture().constants is stack
        block.mos_router.weight.neg_()
        assert capture().constants is None


# however it runs


@pytest.fixture
def triton():
    before = mos_kernels.backends.selected_backend()
    mos_kernels.set_backend("triton")
    yield
    mos_kernels.set_backend(before)


def close(one: dict, linears: dict) -> None:
    assert one.keys() == linears.keys()
    for name, expected in linears.items():
        assert (one[name] - expected).abs().max() <= 2e-5 * expected.abs().max(), name


@pytest.mark.parametrize("door", ["own", "peft"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.one_at_a_time("family", "door")
def test_a_block_has_the_numbers_of_its_linears(triton, launched, family, door):
    block, x = any_block(family, torch.float32, door), normal(1, 2, 5, blocks.D).float().requires_grad_()
    one = results(block, x)
    assert launched == FORWARD + BACKWARD
    with OneByOne(block):
        close(one, results(block, x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_numbers(triton, launched, reentrant):
    block, x = any_block(dtype=torch.float32), normal(1, 2, 5, blocks.D).float().requires_grad_()
    expected = results(block, x)
    launched.clear()
    found = results(block, x, lambda x: checkpoint(block, x, use_reentrant=reentrant))
    assert launched == FORWARD + FORWARD + BACKWARD
    assert all(torch.equal(found[name], t) for name, t in expected.items())


def test_a_graph_that_is_kept_and_two_forwards_before_a_backward(triton):
    """Backward writes to nothing that was saved or passed in."""
    block, x = any_block(dtype=torch.float32), normal(1, 2, 5, blocks.D).float().requires_grad_()
    expected = results(block, x)
    y, other = block(x), block(x * 2)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    for _ in range(2):
        block.zero_grad()
        x.grad = None
        y.backward(upstream, retain_graph=True)
        found = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
        assert torch.equal(x.grad, expected["x"]) and all(torch.equal(t, expected[name]) for name, t in found.items())
    other.sum().backward()


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_saved_for_backward(triton, monkeypatch, dtype):
    monkeypatch.setattr(launch, "launch", lambda *_, **__: None)
    assert_little_is_saved(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(triton, dtype):
    block, x = any_block(dtype=torch.float32), normal(1, 2, 5, blocks.D).to(dtype).requires_grad_()

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    one = results(block, x, run)
    with OneByOne(block):
        linears = results(block, x, run)
    for name, expected in linears.items():
        assert (one[name] - expected).abs().max() <= 2**-6 * expected.abs().max(), name


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
def test_an_overflow_of_float16_shows(triton):
    assert_an_overflow_shows(any_block(dtype=torch.float16))


# where they may not


def wrapped(block):
    block.up_proj = MoSWrapped(block.up_proj.to_linear(), block.up_proj.config).eval()


def with_own_router(block):
    config = MoSConfig.from_dict({**block.down_proj.config.to_dict(), "router_scope": "linear"})
    block.down_proj = MoSLinear(HIDDEN, D, bias=False, config=config).eval()


def of_other_experts(block):
    block.mos_router = MoSRouter(D, MoSConfig(num_experts_per_tok=1)).eval()


def of_two_ranks(block):
    block.up_proj = MoSLinear(D, HIDDEN, bias=False, config=MoSConfig(r=R + 1)).eval()


def wide_weight(block):
    block.down_proj.weight.data = block.down_proj.weight.data.double()


def with_a_forward_of_its_own(block):
    block.up_proj.forward = lambda x, gates: x.new_zeros(*x.shape[:-1], HIDDEN)


def called_otherwise(block):
    block.up_proj._call_impl = lambda x, gates: x.new_zeros(*x.shape[:-1], HIDDEN)


def with_a_bias_elsewhere(block):
    block.down_proj.bias = nn.Parameter(torch.empty(D, device="meta"))


def of_a_lower_rank(block):
    block.up_proj.mos_lora_B.data = block.up_proj.mos_lora_B.data[:, :, :1].contiguous()


CHANGES = [
    wrapped, with_own_router, of_other_experts, of_two_ranks, wide_weight, with_a_forward_of_its_own, called_otherwise,
    with_a_bias_elsewhere, of_a_lower_rank,
]  # fmt: skip


def together(block: nn.Module, x: torch.Tensor) -> bool:
    return as_one(block, bound_form(block), x) is not None


@pytest.mark.parametrize("change", CHANGES)
def test_modules_that_do_not_go_together(change):
    block, x = adapted(llama), torch.ones(9, D)
    with torch.no_grad():
        assert together(block, x)
        change(block)
        assert not together(block, x)


@pytest.mark.parametrize(
    "x", [torch.ones(9, D + 1), torch.ones(()), torch.ones(9, D).bfloat16()], ids=lambda x: str(x.shape)
)
def test_inputs_that_they_do_not_take(x):
    with torch.no_grad():
        assert not together(adapted(llama), x)


def test_a_rank_beyond_one_tile_is_refused():
    block = adapted(llama, frozen=False)
    for name in NAMES[llama]:
        layer = getattr(block, name)
        config = MoSConfig(r=129, spaces={"spherical": 1}, num_experts_per_tok=1)
        setattr(block, name, MoSLinear(layer.in_features, layer.out_features, bias=False, config=config))
    block.mos_router = MoSRouter(D, config)
    with pytest.raises(ValueError, match="r=129 exceeds 128"):
        block(torch.ones(9, D))


def test_modes_that_they_do_not_work_in():
    block, x = adapted(llama), torch.ones(9, D)
    with torch.no_grad():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.jit, "is_tracing", lambda: True)  # a trace would hold no launch
            assert not together(block, x)
        assert together(block, x)
        assert not together(adapted(llama, activation="silu"), x)
        with torch.autograd.forward_ad.dual_level():
            assert not together(block, x)
        with pytest.raises(RuntimeError):
            torch.func.vmap(block)(torch.ones(3, 9, D))


def test_fx_sees_the_modules():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, (MoSLinear, MoSRouter, nn.SiLU)) or super().is_leaf_module(module, name)

    with torch.no_grad():
        graph = Tracer().trace(nn.Sequential(adapted(llama)))
    targets = [node.target.removeprefix("0.") for node in graph.nodes if node.op == "call_module"]
    assert targets[:3] == ["mos_router", "gate_proj", "up_proj"] and targets[-1] == "down_proj"


def test_narrowed_weights():
    """Structured pruning that leaves in_features as it was."""
    block, kept, x = adapted(llama, frozen=False), HIDDEN - 7, torch.ones(9, D)
    for layer in (block.gate_proj, block.up_proj):
        layer.weight.data, layer.mos_lora_B.data = layer.weight.data[:kept], layer.mos_lora_B.data[:kept]
    down = block.down_proj
    down.weight.data, down.mos_lora_A.data = down.weight.data[:, :kept], down.mos_lora_A.data[:, :kept]
    with torch.no_grad():
        assert together(block, x)
        torch.testing.assert_close(block(x), one_by_one(block, x), rtol=1e-5, atol=1e-5)


def test_every_hook_is_called():
    block, x, called = adapted(llama), torch.ones(9, D), []
    everywhere = nn.modules.module
    with torch.no_grad():
        for module in (block.mos_router, block.gate_proj, block.up_proj, block.down_proj):
            for register in (module.register_forward_hook, module.register_forward_pre_hook):
                handle = register(lambda *_: called.append(1))
                block(x)
                handle.remove()
        assert len(called) == 8
        for register in (everywhere.register_module_forward_hook, everywhere.register_module_forward_pre_hook):
            handle = register(lambda *_: called.append(1))
            try:
                block(x)
            finally:
                handle.remove()
        assert len(called) == 8 + 2 * 6  # the block, its activation, router and linears
        module_count = len(called)
        block(x)
        assert len(called) == module_count
