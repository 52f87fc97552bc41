"""What is kept of an adapter's parameters without gradients: used while they are the same, and never after."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from mos_kernels import MoSConfig, MoSLinear, MoSWrapped, kept
from mos_kernels.backends import eager

CONFIG = MoSConfig(
    r=4, spaces={"hyperbolic": 2, "spherical": 1, "euclidean": 1}, num_experts_per_tok=2, router_scope="linear",
    init_lora_weights=False,
)  # fmt: skip


def layer_of(dtype=torch.float32, kind=MoSLinear, seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return kind.from_linear(nn.Linear(16, 12, dtype=dtype), CONFIG).eval()


def x_of(dtype=torch.float32):
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def prepares(monkeypatch):
    """How often the backend has prepared B."""
    calls, prepare = [], eager.prepare
    monkeypatch.setattr(eager, "prepare", lambda *args, **options: calls.append(1) or prepare(*args, **options))
    return calls


def fresh(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output from the parameters as they are now."""
    return layer(x.clone().requires_grad_()).detach()


@pytest.mark.parametrize("kind", [MoSLinear, MoSWrapped])
def test_it_is_computed_once(prepares, kind):
    layer, x = layer_of(kind=kind), x_of()
    with torch.no_grad():
        first = layer(x)
        assert len(prepares) == 1
        assert torch.equal(layer(x), first) and layer(x[:2]).shape == (2, 12)
    with torch.inference_mode():
        assert torch.equal(layer(x), first)
    assert len(prepares) == 1
    assert torch.equal(fresh(layer, x), first)


def test_under_autocast_it_is_kept_in_autocasts_dtype(prepares):
    layer, x = layer_of(), x_of()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first = layer(x)
        assert first.dtype == torch.bfloat16 and torch.equal(layer(x), first) and len(prepares) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fresh(layer, x), first)
    with torch.no_grad():
        assert layer(x).dtype == torch.float32 and len(prepares) == 3


new = {name: tensor.detach() * 2 for name, tensor in layer_of().named_parameters()}


def functional_call(layer):
    return lambda x: torch.func.functional_call(layer, new, (x,))


def assigned(layer):
    for name, value in new.items():
        setattr(layer, name, nn.Parameter(value.clone(), requires_grad=False))


def same_memory_assigned(layer):
    """A parameter over the same memory counts versions of its own."""
    layer.mos_lora_B = nn.Parameter(layer.mos_lora_B.data)
    layer.mos_lora_B.data = layer.mos_lora_B.data
    with torch.no_grad():
        layer.mos_lora_B.mul_(2)


def swapped(layer):
    for name, value in new.items():
        torch.utils.swap_tensors(getattr(layer, name), nn.Parameter(value.clone(), requires_grad=False))


def swapped_again_and_again(layer):
    """Whatever the allocator puts at an address that was free again."""
    for factor in range(2, 20):
        value = nn.Parameter(layer.mos_lora_B.detach() * factor, requires_grad=False)
        torch.utils.swap_tensors(layer.mos_lora_B, value)
        del value
        with torch.no_grad():
            assert torch.equal(layer(x_of()), fresh(layer, x_of()))


def loaded(layer):
    layer.load_state_dict(new, strict=False)


def loaded_by_assignment(layer):
    layer.load_state_dict(new, strict=False, assign=True)


def changed_in_place(layer):
    with torch.no_grad():
        layer.mos_lora_B.mul_(2)


def changed_under_inference_mode(layer):
    with torch.inference_mode():
        layer.mos_curvature.add_(1)


def data_assigned(layer):
    layer.mos_lora_A.data = layer.mos_lora_A.data * 2


def data_assigned_as_a_view(layer):
    layer.mos_lora_B.data = layer.mos_lora_B.data.transpose(1, 2)  # the same address, of E = r


def vector_to_parameters(layer):
    vector = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(vector * 2, layer.parameters())


def curvatures_map(layer):
    layer.mos_curvature_map[0] += 0.1


def reconfigured(layer):
    layer.config = MoSConfig.from_dict({**CONFIG.to_dict(), "lora_alpha": 3.0})


def drawn_anew(layer):
    layer.reset_adapter_parameters()


def cast(layer):
    layer.double()


def moved(layer):
    layer.to("cpu")
    with torch.no_grad():
        layer.mos_lora_A.neg_()


def trained_by_a_fused_optimizer(layer):
    """Which changes no version; here in eval mode."""
    optimizer = torch.optim.AdamW([layer.mos_lora_A, layer.mos_lora_B], lr=0.1, fused=True)
    for _ in range(2):
        layer(x_of()).sum().backward()
        with torch.no_grad():
            layer(x_of())
        optimizer.step()
        with torch.no_grad():
            assert torch.equal(layer(x_of()), fresh(layer, x_of()))
        optimizer.zero_grad()
        with torch.no_grad():
            layer(x_of())


def a_regulariser_and_a_fused_optimizer(layer):
    """No forward of a layer, hence no backward of one, before the step; and no gradient after it."""
    factors = [layer.mos_lora_A, layer.mos_lora_B]
    optimizer = torch.optim.SGD(factors, lr=0.1, fused=True)
    sum(factor.square().sum() for factor in factors).backward()
    optimizer.step()
    optimizer.zero_grad()


def data_changed_then_eval(layer):
    """What leaves no trace in a tensor, as copies of moving averages, and writes through numpy."""
    layer.mos_lora_B.data.mul_(2)
    layer.mos_lora_A.detach().numpy()[:] *= 2
    layer.eval()


def synchronised_from_a_layer_in_training(layer):
    """As a reference model is, through `.data`, after a step of the model in training."""
    other = layer_of(seed=3)
    other(x_of()).sum().backward()
    with torch.no_grad():
        layer.mos_lora_B.data.mul_(0.5).add_(other.mos_lora_B.data, alpha=0.5)


CHANGES = [
    functional_call, assigned, same_memory_assigned, swapped, swapped_again_and_again, loaded, loaded_by_assignment,
    changed_in_place, changed_under_inference_mode, data_assigned, data_assigned_as_a_view, vector_to_parameters,
    curvatures_map, reconfigured, drawn_anew, cast, moved, trained_by_a_fused_optimizer,
    a_regulariser_and_a_fused_optimizer, data_changed_then_eval, synchronised_from_a_layer_in_training,
]  # fmt: skip


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change, frozen):
    layer = layer_of()
    if frozen:
        layer.freeze_for_inference()
    with torch.no_grad():
        before = layer(x_of())
    call = change(layer) or layer
    x = x_of(layer.weight.dtype)
    with torch.no_grad():
        now = call(x)
        assert torch.equal(call(x), now)
    assert torch.equal(now, call(x.clone().requires_grad_()).detach())
    assert not torch.equal(now.float(), before.float())


def test_computed_parameters_are_used_and_not_kept(recwarn):
    layer = layer_of()
    computed = {name: parameter * 2 for name, parameter in layer.named_parameters()}
    with torch.no_grad():
        now = torch.func.functional_call(layer, computed, (x_of(),))
    assert layer._kept is None and not recwarn.list
    assert torch.equal(now, torch.func.functional_call(layer, computed, (x_of().requires_grad_(),)).detach())


class _Doubled(torch.nn.Module):
    def forward(self, parameter):
        return 2 * parameter


@pytest.mark.parametrize("name", ["mos_curvature", "mos_lora_A", "mos_lora_B", "mos_router"])
def test_a_parametrised_parameter_is_computed_at_each_call(name):
    layer = layer_of()
    doubled = copy.deepcopy(layer)
    with torch.no_grad():
        getattr(doubled, name).mul_(2)
        torch.nn.utils.parametrize.register_parametrization(layer, name, _Doubled())
        for _ in range(2):
            assert torch.equal(layer(x_of()), doubled(x_of()))
            for changed in (layer.parametrizations[name].original, getattr(doubled, name)):
                changed.mul_(0.5)


def test_a_router_that_is_taken_off_and_put_back_is_noticed():
    layer = layer_of()
    router, gates = layer.mos_router, torch.full((x_of().shape[0], layer.config.num_experts), 0.1)
    with torch.no_grad():
        routed = layer(x_of())
        layer.mos_router = None
        given = layer(x_of(), gates)
        assert torch.equal(given, copy.deepcopy(layer)(x_of(), gates))
        layer.mos_router = router
        assert torch.equal(layer(x_of()), routed)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_has_its_own(make):
    layer = layer_of().freeze_for_inference()
    other = make(layer)
    assert other._kept is None and layer._kept is not None
    with torch.no_grad():
        assert torch.equal(other(x_of()), layer(x_of()))
        other.mos_lora_B.neg_()
        assert not torch.equal(other(x_of()), layer(x_of()))
    assert torch.equal(other(x_of()), fresh(other, x_of()))


def test_nothing_is_kept_where_a_change_would_not_be_seen():
    layer = layer_of()
    layer.share_memory()  # another process may write
    with torch.inference_mode():
        tensors = layer_of()  # these have no versions
    with torch.no_grad():
        layer(x_of())
    with torch.inference_mode():
        tensors(x_of())
    assert layer._kept is None and tensors._kept is None
    managed = layer_of()
    managed._is_fsdp_managed_module = True  # FSDP fills one tensor again and again, at one version
    with torch.no_grad():
        assert torch.equal(managed(x_of()), layer_of()(x_of()))
    assert managed._kept is None
    assert managed.freeze_for_inference()._kept is None


@pytest.mark.parametrize("what", ["gradients", "training"])
def test_nothing_is_held_in_training(what):
    layer = layer_of().freeze_for_inference()
    assert layer._kept is not None
    if what == "training":
        layer.train()
    layer(x_of())
    assert layer._kept is None


def test_a_graph_being_captured_computes_from_the_parameters_unless_frozen(monkeypatch):
    layer = layer_of()
    with torch.no_grad():
        layer(x_of())
        monkeypatch.setattr("mos_kernels.layer.is_capturing", lambda x: True)
        factors = layer._factors(x_of(), None, "auto")
        assert factors.prepared is None and factors.A is layer.mos_lora_A and not layer._kept.frozen
        layer._kept = None
        assert layer._factors(x_of(), None, "auto").prepared is None and layer._kept is None
        monkeypatch.undo()
        layer.freeze_for_inference()
        monkeypatch.setattr("mos_kernels.layer.is_capturing", lambda x: True)
        assert layer._factors(x_of(), None, "auto") is layer._kept.factors
        layer.mos_lora_B.neg_()
        assert layer._factors(x_of(), None, "auto").prepared is None


def test_a_router_of_its_own_is_among_what_is_kept():
    layer = layer_of()
    with torch.no_grad():
        layer(x_of())
        before = layer._kept
        layer(x_of())
        assert layer._kept is before
        layer.mos_router.neg_()
        assert torch.equal(layer(x_of()), fresh(layer, x_of())) and layer._kept is not before


def test_a_compiled_layer_computes_from_the_parameters():
    layer, graphs = layer_of(), []
    compiled = torch.compile(layer, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        layer(x_of())
        for _ in range(3):
            torch.testing.assert_close(compiled(x_of()), layer(x_of()))
            layer.mos_lora_B.mul_(2)
    assert len(graphs) == 1


def test_threads():
    layer = layer_of()
    expected = fresh(layer, x_of())

    @torch.no_grad()
    def run(_):
        for _ in range(20):
            layer._kept = None
            assert torch.equal(layer(x_of()), expected)

    with ThreadPoolExecutor() as pool:
        list(pool.map(run, range(4)))


def test_a_change_while_it_is_made_ends_it():
    tensor = nn.Parameter(torch.ones(2), requires_grad=False)
    use = kept.Use("eager", torch.float32, torch.float32, CONFIG)
    made = kept.Kept.make((tensor,), use, lambda: tensor.add_(1))
    assert not made.is_valid((tensor,), use)


def test_the_peft_door_keeps_and_forgets_too():
    pytest.importorskip("peft")
    from peft import get_peft_model

    from mos_kernels.huggingface import MoSPeftConfig

    torch.manual_seed(0)
    config = MoSPeftConfig(target_modules=["0"], router_scope="linear", init_lora_weights=False, r=4)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 12)), config).eval()
    layer = model.base_model.model[0]
    with torch.no_grad():
        before = model(x_of())
        first = layer.mos_adapter["default"]._kept
        model(x_of())
        assert first is not None and layer.mos_adapter["default"]._kept is first
        layer.mos_lora_B["default"].mul_(2)
        doubled = model(x_of())
        layer.mos_adapter["default"].mos_lora_B = nn.Parameter(layer.mos_lora_B["default"] / 2)
        again = model(x_of())
    assert torch.equal(again, before) and not torch.equal(doubled, before)
    assert torch.equal(again, fresh(model, x_of()))
