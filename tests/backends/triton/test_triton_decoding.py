"""An FFN's linears together on few tokens: as right as one by one, in half the launches, and only where they may be."""

from __future__ import annotations

import numpy
import pytest
import torch
from cases import DecodingTrial, everyday_seeds, kinds
from everyday import full_but
from strategies import normal
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mos_kernels
from mos_kernels import MoSConfig, MoSLinear, MoSRouter, MoSWrapped
from mos_kernels.backends.triton import launch
from mos_kernels.decoding import Decoding

transformers = pytest.importorskip("transformers")

D, HIDDEN, R, E = 50, 70, 3, 8
SEEDS = range(24)
EVERYDAY = everyday_seeds(DecodingTrial, SEEDS)


@pytest.mark.parametrize("seed", full_but(EVERYDAY, SEEDS))
def test_an_ffn_drawn_from_a_seed(seed):
    trial = DecodingTrial.drawn(seed)
    assert not trial.failures(), trial


def test_the_everyday_seeds_reach_what_all_of_them_do():
    reached, everything = (set().union(*(kinds(DecodingTrial.drawn(s)) for s in some)) for some in (EVERYDAY, SEEDS))
    assert reached == everything and len(everything) >= 60


@pytest.mark.shipped_settings
def test_an_ffn_in_as_many_parts_as_on_a_gpu():
    assert not DecodingTrial(MoSConfig(), tokens=(17,), d_in=600, d_hidden=300, dtype=torch.bfloat16).failures()


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
GATED = ["shrink", "bridge_expand_pair", "shrink", "bridge_expand"]
PLAIN = ["shrink", "bridge_expand", "shrink", "bridge_expand"]


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
    """What the block computes where a hook wants to see its router called."""
    handle = block.mos_router.register_forward_hook(lambda *_: None)
    try:
        return block(x)
    finally:
        handle.remove()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("family", "names"), [(llama, GATED), (phi3, PLAIN), (gpt2, PLAIN)])
def test_a_block_decodes_in_half_the_launches(launched, family, names, frozen):
    block, x = adapted(family, frozen), normal(0, 2, 9, D).float()
    launched.clear()
    with torch.no_grad():
        y = block(x)
        assert [name for name in launched if name != "gram"] == names
        assert launched.count("gram") == (0 if frozen else len(NAMES[family]))
        launched.clear()
        expected = one_by_one(block, x)
    assert [name for name in launched if name != "gram"] == [
        "shrink", "route", *["shrink", "bridge_expand"] * len(NAMES[family])
    ]  # fmt: skip
    assert y.shape == expected.shape and not y.requires_grad
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


class _Computed(TorchDispatchMode):
    """Names of the operators that read or write a tensor's numbers."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("empty", "_unsafe_view", "detach"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.unpoisoned
def test_beside_the_launches_there_are_the_base_products_and_the_activation(monkeypatch):
    block, x = adapted(llama), torch.zeros(1, D)
    monkeypatch.setattr(launch, "launch", lambda *_, **__: None)
    with torch.no_grad(), _Computed() as computed:
        block(x)
    assert computed.names == ["addmm_", "addmm_", "silu", "mul", "addmm_"]


@pytest.mark.parametrize("count", [1, 17])
def test_a_token_does_not_depend_on_the_others(count, monkeypatch):
    """Bitwise. W = 0 and the interpreter multiplies by einsum: BLAS lacks the property."""
    monkeypatch.setattr(numpy, "matmul", lambda a, b, dtype: numpy.einsum("ij,jk->ik", a, b, dtype=dtype))
    block, x = adapted(llama), normal(0, 64, D).float()
    for name in NAMES[llama]:
        getattr(block, name).weight.data.zero_()
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


def test_after_warmup_a_block_launches_nothing_new(monkeypatch):
    model = nn.ModuleList([adapted(llama), adapted(llama), adapted(llama, share_a=False), adapted(phi3)])
    model[0].train()
    called, seen = [], set()
    model[1].act_fn.register_forward_hook(lambda *_: called.append(1))

    def described(kernel, grid, tensor, arguments, **constants):
        kinds = [str(a.dtype) if isinstance(a, torch.Tensor) else type(a).__name__ for a in arguments]
        seen.add((kernel.fn.__name__, *kinds, *sorted(constants.items())))  # and not run

    monkeypatch.setattr(launch, "launch", described)
    mos_kernels.warmup(model)
    assert [block.mos_router.training for block in model] == [True, False, False, False] and not called
    assert model[1].gate_proj._frozen is not None
    warm = set(seen)
    with torch.no_grad():
        for block in model:
            for module in block.modules():
                module.training = False
            block(torch.ones(4, D))
    assert seen == warm


# where they may not


def parts_of(block: nn.Module):
    return block.mos_router, (block.gate_proj, block.up_proj, block.down_proj)


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


def with_biases_of_two_dtypes(block):
    block.gate_proj.bias, block.up_proj.bias = (
        nn.Parameter(torch.zeros(HIDDEN, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)
    )


def with_one_bias(block):
    block.gate_proj.bias = nn.Parameter(torch.zeros(HIDDEN))


def replace_kappa(layer, kappa):
    kept = layer._frozen
    layer._frozen = kept._replace(factors=kept.factors._replace(kappa=kappa))


def elsewhere(block):
    replace_kappa(block.down_proj, torch.empty(E, device="meta"))


def with_a_bias_elsewhere(block):
    block.down_proj.bias = nn.Parameter(torch.empty(D, device="meta"))


def of_a_lower_rank(block):
    block.up_proj.mos_lora_B.data = block.up_proj.mos_lora_B.data[:, :, :1].contiguous()


def with_few_curvatures(block):
    replace_kappa(block.up_proj, torch.zeros(E - 1))


CHANGES = [
    wrapped, with_own_router, of_other_experts, of_two_ranks, wide_weight, with_a_forward_of_its_own, called_otherwise,
    with_biases_of_two_dtypes, with_one_bias, elsewhere, with_a_bias_elsewhere, of_a_lower_rank, with_few_curvatures,
]  # fmt: skip


def test_together_by_default():
    with torch.no_grad():
        assert Decoding.of(*parts_of(adapted(llama)), torch.ones(64, D)) is not None


@pytest.mark.parametrize("change", CHANGES)
def test_modules_that_do_not_go_together(change):
    block = adapted(llama)
    change(block)
    with torch.no_grad():
        assert Decoding.of(*parts_of(block), torch.ones(9, D)) is None


@pytest.mark.parametrize(
    "x",
    [torch.ones(65, D), torch.ones(9, D + 1), torch.ones(()), torch.ones(9, D).bfloat16()],
    ids=lambda x: str(x.shape),
)
def test_inputs_that_they_do_not_take(x):
    with torch.no_grad():
        assert Decoding.of(*parts_of(adapted(llama)), x) is None


def test_modes_that_they_do_not_work_in():
    block, x = adapted(llama), torch.ones(9, D)
    parts = parts_of(block)
    assert Decoding.of(*parts, x) is None  # a backward may follow
    with torch.no_grad():
        assert Decoding.of(*parts, x, "eager") is None
        with torch.autocast("cpu", torch.bfloat16):
            assert Decoding.of(*parts, x) is None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.jit, "is_tracing", lambda: True)  # a trace would hold no launch
            assert Decoding.of(*parts, x) is None
        for module in (block.mos_router, block.down_proj):
            module.training = True
            assert Decoding.of(*parts, x) is None
            module.training = False
        assert Decoding.of(*parts, x) is not None
        curved = adapted(llama, activation="silu")
        assert Decoding.of(*parts_of(curved), x) is None
        with torch.autograd.forward_ad.dual_level():
            assert Decoding.of(*parts, x) is None
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
        assert Decoding.of(*parts_of(block), x) is not None
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


def test_what_comes_before_the_last_linear_may_not_change_dtype_width_or_tokens():
    with torch.no_grad():
        decoding = Decoding.of(*parts_of(adapted(llama)), torch.ones(9, D))
        _, logits = decoding.read()
        for hidden, message in [
            (torch.ones(9, HIDDEN).bfloat16(), "x is torch.bfloat16 and the weight is torch.float32"),
            (torch.ones(9, HIDDEN + 1), f"the layer reads in_features={HIDDEN}"),
            (torch.ones(3, 3, HIDDEN), r"the block reads tokens \(9,\), its last linear \(3, 3\)"),
        ]:
            with pytest.raises(ValueError, match=message):
                decoding.write(hidden, logits)
