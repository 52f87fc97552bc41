"""The properties of the interpreter's tests on the device, at real sizes, and what only a device can show."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import DTYPES, FFNTrial, RouterTrial, Trial
from ffn_cases import ActivateTrial
from torch import nn

import mos_kernels
from mos_kernels import MoSConfig, MoSLinear, MoSRouter, ops
from mos_kernels.backends.triton import launch
from mos_kernels.ffn_node import FFNForm, as_one

SHAPES = ((1536, 8960), (8960, 1536), (4096, 14336), (14336, 4096))


def layer(d_in: int, d_out: int, device: str, dtype=torch.bfloat16, **options) -> MoSLinear:
    torch.manual_seed(0)
    made = MoSLinear(d_in, d_out, config=MoSConfig(router_scope="linear", **options), device=device, dtype=dtype)
    nn.init.normal_(made.mos_lora_B, std=0.02)
    return made


def gradients(made: MoSLinear, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = made(x, backend="triton")
    return [y.detach(), *torch.autograd.grad(y, [x, *(p for p in made.parameters() if p.requires_grad)], dy)]


DRAWN = [  # each seed compiles its own kernels
    (kind, seed)
    for kind, count in ((Trial, 60), (RouterTrial, 30), (FFNTrial, 20), (ActivateTrial, 20))
    for seed in range(count)
]


@pytest.mark.parametrize(("kind", "seed"), DRAWN, ids=lambda value: getattr(value, "__name__", value))
def test_a_drawn_trial(kind, seed, device):
    if device == "cpu" and seed > 2:
        pytest.skip("rehearsal: the interpreter runs these seeds in tests/backends/triton")
    trial = kind.drawn(seed, device=device)
    assert not trial.failures(), str(trial)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[::2], ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 1024])
def test_an_ffn_at_real_sizes(tokens, shape, dtype, device, scale):
    """On few tokens without a backward, on many with one."""
    d_in, d_hidden = (size // scale for size in shape)
    few, many = tokens <= 64, max(tokens // scale, 70)
    trial = FFNTrial(
        MoSConfig(), tokens=(tokens if few else many,), d_in=d_in, d_hidden=d_hidden, d_out=d_in, dtype=dtype,
        inference=few, device=device,
    )  # fmt: skip
    assert not trial.failures()


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_real_sizes(shape, dtype, activation, device, scale):
    config = MoSConfig(router_scope="linear", activation=activation)
    d_in, d_out = (size // scale for size in shape)
    trial = Trial(config, tokens=(max(1024 // scale, 70),), d_in=d_in, d_out=d_out, dtype=dtype, device=device)
    assert not trial.failures()


def test_gradients_are_bitwise_equal_from_run_to_run(device, scale):
    made = layer(1536 // scale, 8960 // scale, device, lora_dropout=0.1)
    x, dy = (torch.randn(2048 // scale, d, device=device, dtype=torch.bfloat16) for d in (1536 // scale, 8960 // scale))
    runs = []
    for _ in range(3):
        torch.manual_seed(1)
        runs.append(gradients(made, x, dy))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_a_token_does_not_depend_on_its_neighbours(device, scale):
    made = layer(1536 // scale, 1024 // scale, device).eval()
    x = torch.randn(1000 // scale + 65, 1536 // scale, device=device, dtype=torch.bfloat16)
    made.weight.data.zero_()  # the base product is the library's, which promises nothing
    with torch.no_grad():
        whole = made(x, backend="triton")
        part = made(x[:-1], backend="triton")
    assert torch.equal(whole[:-1], part)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_decoding_in_a_cuda_graph(tokens, device):
    made = layer(1536, 8960, device).freeze_for_inference()
    static = torch.randn(tokens, 1536, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                made(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = made(static)
        for seed in range(3):
            torch.manual_seed(seed)
            static.copy_(torch.randn_like(static))
            graph.replay()
            assert torch.equal(y, made(static))


@pytest.mark.needs_cuda
@pytest.mark.parametrize("tokens", [1, 64])
def test_an_ffn_decodes_in_a_cuda_graph(tokens, device):
    block = ffn(1536, 8960, device)
    static = torch.randn(tokens, 1536, device=device, dtype=torch.bfloat16)

    def run():
        return ops.ffn(*as_one(block, FORM, static))

    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run()
        for seed in range(3):
            torch.manual_seed(seed)
            static.copy_(torch.randn_like(static))
            graph.replay()
            assert torch.equal(y, run())


LINEARS = ("gate_proj", "up_proj", "down_proj")
FORM = FFNForm(LINEARS[:2], False, ("act_fn",), (), LINEARS[2], (), LINEARS)


def ffn(d: int, d_hidden: int, device: str) -> nn.Module:
    """A block with a router and gate, up and down projection, frozen for inference."""
    torch.manual_seed(0)
    config, options, block = MoSConfig(), {"device": device, "dtype": torch.bfloat16}, nn.Module()
    for name, widths in zip(LINEARS, ((d, d_hidden), (d, d_hidden), (d_hidden, d)), strict=True):
        made = MoSLinear(*widths, config=config, **options)
        nn.init.normal_(made.mos_lora_B, std=0.02)
        block.add_module(name, made)
    block.act_fn, block.mos_router = nn.SiLU(), MoSRouter(d, config, device=device)
    block.eval()
    for name in LINEARS:
        getattr(block, name).freeze_for_inference()
    return block


def test_a_linear_decodes_in_two_launches(device, scale, monkeypatch):
    made, names, run = layer(1536 // scale, 8960 // scale, device).freeze_for_inference(), [], launch.launch
    monkeypatch.setattr(
        launch, "launch", lambda kernel, *a, **c: (names.append(kernel.fn.__name__), run(kernel, *a, **c))
    )
    x = torch.randn(1, 1536 // scale, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        if device == "cpu":  # where "auto" is eager
            mos_kernels.set_backend("triton")
            made.freeze_for_inference()
            names.clear()
        made(x)
    assert names == ["shrink_kernel", "bridge_expand_kernel"]


@pytest.mark.needs_cuda
def test_nothing_is_compiled_after_warmup(device):
    model = nn.ModuleList([layer(1536, 2048, device), MoSLinear(1536, 2048, config=MoSConfig(), device=device)])
    router = MoSRouter(1536, MoSConfig(), device=device)
    model.append(router)
    mos_kernels.warmup(model, dtype=torch.bfloat16)
    model[1].to(torch.bfloat16)
    mos_kernels.warmup(model, dtype=torch.bfloat16)
    before = _compiled_kernels()
    for tokens in (1, 2, 3, 16, 63, 64, 65, 100, 128, 1000, 1024, 4097):
        x = torch.randn(tokens, 1536, device=device, dtype=torch.bfloat16, requires_grad=True)
        (model[0](x).sum() + model[1](x, router(x)).sum()).backward()
        with torch.no_grad():
            model[0](x)
    assert _compiled_kernels() == before


def _compiled_kernels() -> int:
    """How many specialisations of our kernels Triton holds."""
    names = ("activated", "bridge", "decode", "expand", "shrink")  # modules: some are functions too
    modules = [importlib.import_module(f"mos_kernels.backends.triton.{name}") for name in names]
    kernels = {value for module in modules for value in vars(module).values() if hasattr(value, "device_caches")}
    assert len([kernel for kernel in kernels if kernel.fn.__name__.endswith("_kernel")]) >= 20
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


@pytest.mark.needs_cuda
@pytest.mark.parametrize("widths", [(1536, 64), (64, 1536)], ids=str)
def test_more_than_two_to_the_31_elements(widths, device):
    d_in, d_out = widths
    tokens = 2**31 // 1536 + 3
    needed = 3 * tokens * (d_in + d_out) * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    made = layer(d_in, d_out, device)
    made.weight.data.zero_()  # a library's product rounds as its own tiles do, which the number of tokens chooses
    x = torch.zeros(tokens, d_in, device=device, dtype=torch.bfloat16)
    dy = torch.zeros(tokens, d_out, device=device, dtype=torch.bfloat16)
    tail = torch.randn(3, d_in, device=device, dtype=torch.bfloat16)
    x[-3:], dy[-3:] = tail, 1
    y, dx, *_ = gradients(made, x, dy)
    y_few, dx_few, *_ = gradients(made, torch.cat([x[:200], tail]), torch.cat([dy[:200], dy[-3:]]))
    assert torch.equal(y[-3:], y_few[-3:])
    # the injected load-balancing gradient depends on all tokens; it is small beside the rest
    assert (dx[-3:] - dx_few[-3:]).abs().max() <= 0.02 * dx_few.abs().max()


@pytest.mark.needs_cuda
def test_other_streams_and_threads(device):
    made = layer(1536, 2048, device)
    x, dy = (torch.randn(512, d, device=device, dtype=torch.bfloat16) for d in (1536, 2048))
    expected = gradients(made, x, dy)
    torch.cuda.synchronize()

    def work(_: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = gradients(made, x, dy)
        stream.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, range(2)))


@pytest.mark.needs_cuda
def test_a_second_device(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    first, second = layer(1536, 2048, "cuda:0"), layer(1536, 2048, "cuda:1")
    x = torch.randn(300, 1536, dtype=torch.bfloat16)
    with torch.cuda.device(0):
        for made in (first, second):
            made(x.to(made.weight.device)).sum().backward()
    assert torch.equal(first.mos_lora_A.grad.cpu(), second.mos_lora_A.grad.cpu())


@pytest.mark.needs_cuda
@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_compiled_in_one_graph(backend, device):
    made = layer(256, 384, device, dtype=torch.float32)
    x = torch.randn(128, 256, device=device)
    expected = made(x, backend=backend)
    compiled = torch.compile(lambda x: made(x, backend=backend), fullgraph=True)
    y = compiled(x)
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in made.parameters() if p.requires_grad)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_dropout(dtype, device):
    made = layer(256, 384, device, dtype=torch.float32, lora_dropout=0.1)
    x = torch.randn(128, 256, device=device, requires_grad=True)
    with torch.autocast("cuda", dtype):
        y = made(x)
    assert y.dtype == dtype and y.isfinite().all()
    y.float().sum().backward()
    assert x.grad.isfinite().all() and x.grad.dtype == torch.float32


@pytest.mark.needs_cuda
def test_auto_is_triton_on_a_gpu(device):
    from mos_kernels.backends import resolve_backend

    assert resolve_backend("auto", torch.empty(1, device=device)) == "triton"
    assert resolve_backend("auto", torch.empty(1, device=device, dtype=torch.float64)) == "eager"
