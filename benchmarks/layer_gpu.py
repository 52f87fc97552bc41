"""One adapted linear on a GPU, against its peers, with the ceiling beside every step: `python -m benchmarks.layer_gpu`.

Ceilings (copy bandwidth, matrix rate) are measured in the same run; nothing is timed before the kernels agree with
float64; providers are interleaved round by round and inputs rotate through more memory than the L2 holds. Rows go to
results/<gpu>/layer_gpu.jsonl. `--device cpu --tiny` under TRITON_INTERPRET=1 only checks that everything runs.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor, nn

import mos_kernels
from mos_kernels import MoSConfig, MoSLinear
from mos_kernels.adapter import mos_linear
from mos_kernels.backends import triton as kernels
from reference.per_expert import mos_linear_per_expert

SHAPES = ((1536, 8960), (8960, 1536), (4096, 14336), (14336, 4096))
DECODE_TOKENS = (1, 16, 64)
CONFIG = MoSConfig()
ROTATED = 4


class FusedLoRA(torch.autograd.Function):
    """The best plain LoRA we can write with the library's products: adapter first, hand-written backward."""

    @staticmethod
    def forward(ctx, x, weight, A, B, scaling):
        h = x @ A.t()
        ctx.save_for_backward(x, weight, A, B, h)
        ctx.scaling = scaling
        return torch.addmm(torch.mm(h, B.t()).mul_(scaling), x, weight.t())

    @staticmethod
    def backward(ctx, dy):
        x, weight, A, B, h = ctx.saved_tensors
        dh = torch.mm(dy, B).mul_(ctx.scaling)
        return torch.addmm(dh @ A, dy, weight), None, dh.t() @ x, (dy.t() @ h).mul_(ctx.scaling), None


class Clock:
    """Seconds of a call: device events on a GPU, wall time on a CPU."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def __call__(self, call: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def rotate(T: int, width: int, device, dtype, requires_grad: bool = False) -> Callable[[], Tensor]:
    """A source of random (T, width) tensors that leaves the L2 cold."""
    made = [torch.randn(T, width, device=device, dtype=dtype).requires_grad_(requires_grad) for _ in range(ROTATED)]
    cycle = itertools.cycle(made)
    return lambda: next(cycle)


def layer(d_in: int, d_out: int, device, dtype) -> MoSLinear:
    adapted = MoSLinear(d_in, d_out, config=CONFIG, device=device, dtype=dtype)
    nn.init.normal_(adapted.mos_lora_B, std=0.02)
    return adapted


def check(d_in: int, d_out: int, device, dtype, tokens: int) -> None:
    """error(triton, float64 truth) <= 2·error(eager in dtype, truth) + 1e-6·max|truth| for y and gradients, or exit."""
    adapted = layer(d_in, d_out, device, dtype)
    x, dy = (torch.randn(tokens, d, device=device, dtype=dtype) for d in (d_in, d_out))
    gates = torch.rand(tokens, CONFIG.num_experts, device=device).softmax(-1)
    given = (x, adapted.mos_lora_A, adapted.mos_lora_B, adapted.curvature, gates)

    def results(backend: str, wide: bool) -> list[Tensor]:
        kind = torch.float64 if wide else dtype
        leaves = [
            t.detach().to(kind if i == 0 or wide else torch.float32).requires_grad_() for i, t in enumerate(given)
        ]
        base = adapted.weight.to(kind), adapted.bias.to(kind)
        y = mos_linear(leaves[0], *base, *leaves[1:4], gates=leaves[4], config=CONFIG, backend=backend)
        return [t.double() for t in (y.detach(), *torch.autograd.grad(y, leaves, dy.to(kind)))]

    truths, ours, plain = results("eager", True), results("triton", False), results("eager", False)
    for name, truth, value, other in zip(("y", "x", "A", "B", "kappa", "gates"), truths, ours, plain, strict=True):
        error, allowed = (value - truth).abs().max(), 2 * (other - truth).abs().max() + 1e-6 * truth.abs().max()
        if not error <= allowed:
            sys.exit(
                f"{d_in} -> {d_out}, {dtype}: {name} is off by {error:.3g}, {allowed:.3g} allowed; nothing is timed"
            )


def providers(d_in: int, d_out: int, device, dtype) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """(x, gates) -> y by name; all share one base linear."""
    adapted = layer(d_in, d_out, device, dtype)
    linear = adapted.to_linear()
    weight, bias, A, B = adapted.weight, adapted.bias, adapted.mos_lora_A, adapted.mos_lora_B
    lora_A = torch.randn(8, d_in, device=device, dtype=dtype).div_(d_in**0.5).requires_grad_()
    lora_B = torch.randn(d_out, 8, device=device, dtype=dtype).mul_(0.02).requires_grad_()
    compiled = torch.compile(lambda x, gates: adapted(x, gates, backend="eager"))

    def formula(x: Tensor, gates: Tensor) -> Tensor:
        factors = (A.to(dtype), B.to(dtype), adapted.curvature)
        return mos_linear_per_expert(x, weight, bias, *factors, gates=gates, scaling=CONFIG.scaling)

    found = {
        "frozen linear": lambda x, gates: linear(x),
        "hand-fused LoRA r=8": lambda x, gates: FusedLoRA.apply(x, weight, lora_A, lora_B, 2.0),
        "MoS triton": lambda x, gates: adapted(x, gates, backend="triton"),
        "MoS eager": lambda x, gates: adapted(x, gates, backend="eager"),
        "formula, expert by expert": formula,
    }
    if device.type == "cuda":
        found["MoS eager, compiled"] = compiled
    if importlib.util.find_spec("peft"):
        import peft

        for name, autocast in (("peft LoRA r=8, bf16", False), ("peft LoRA r=8, fp32", True)):
            options = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["linear"])
            base = nn.ModuleDict({"linear": adapted.to_linear()})
            model = peft.get_peft_model(base, options, autocast_adapter_dtype=autocast)
            found[name] = lambda x, gates, module=model.base_model.model["linear"]: module(x)
    else:
        print("peft is not installed: its rows are left out")
    return found


def orders(d_in: int, d_out: int, T: int, device, dtype) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Forward with the base product after, before and between: which order the layer should take."""
    adapted = layer(d_in, d_out, device, dtype)
    weight, bias, kappa = adapted.weight, adapted.bias, adapted.curvature.detach()

    def adapter(x: Tensor, gates: Tensor):
        p, n, _ = kernels.shrink(x, adapted.mos_lora_A, None, None, True)
        prepared = kernels.prepare(adapted.mos_lora_B, dtype, CONFIG)
        return kernels.bridge(p, n, gates, False, kappa, prepared, CONFIG)[0], prepared

    def adapter_first(x, gates):
        z, prepared = adapter(x, gates)
        return kernels.expand(z, prepared, bias, dtype).addmm_(x, weight.t())

    def adapter_first_addmm(x, gates):
        z, prepared = adapter(x, gates)
        return torch.addmm(bias, z, prepared.B.flatten(1).t()).addmm_(x, weight.t())

    def base_first(x, gates):
        z, prepared = adapter(x, gates)
        return torch.addmm(bias, x, weight.t()).addmm_(z, prepared.B.flatten(1).t())

    return {
        "adapter first": adapter_first,
        "adapter first, expand by addmm": adapter_first_addmm,
        "base first": base_first,
    }


def steps(d_in: int, d_out: int, T: int, device, dtype) -> dict[str, tuple[Callable[[], object], int]]:
    """Each step and the bytes that it must move."""
    adapted, E, r = layer(d_in, d_out, device, dtype), CONFIG.num_experts, CONFIG.r
    A, B, kappa, size = adapted.mos_lora_A, adapted.mos_lora_B, adapted.curvature.detach(), dtype.itemsize
    x, dy = rotate(T, d_in, device, dtype), rotate(T, d_out, device, dtype)
    gates = torch.rand(T, E, device=device).softmax(-1)
    p, n, _ = kernels.shrink(x(), A, None, None, True)
    prepared = kernels.prepare(B, dtype, CONFIG)
    z, _ = kernels.bridge(p, n, gates, False, kappa, prepared, CONFIG)
    dz, dB = kernels.expand_backward(dy(), z, prepared, True)
    d = kernels.bridge_backward(dz, None, p, n, gates, False, kappa, prepared, None, None, CONFIG)
    wide_in, wide_out, rank = T * d_in * size, T * d_out * size, T * E * r
    return {
        "prepare (gram)": (lambda: kernels.prepare(B, dtype, CONFIG), B.numel() * (4 + size)),
        "shrink": (lambda: kernels.shrink(x(), A, None, None, True), wide_in),
        "bridge": (
            lambda: kernels.bridge(p, n, gates, False, kappa, prepared, CONFIG),
            4 * T * (r + 1 + E) + size * rank,
        ),
        "expand": (lambda: kernels.expand(z, prepared, adapted.bias, dtype), wide_out + size * rank),
        "expand backward": (lambda: kernels.expand_backward(dy(), z, prepared, True), wide_out + (4 + size) * rank),
        "bridge backward": (
            lambda: kernels.bridge_backward(dz, None, p, n, gates, False, kappa, prepared, None, None, CONFIG),
            4 * rank * dz.shape[0] + 4 * T * (2 * r + 2 + 4 * E),
        ),
        "norm gradient": (lambda: kernels.add_norm_gradient(dB, B, d.M), 4 * B.numel() * (dB.shape[0] + 2)),
        "shrink backward": (
            lambda: kernels.shrink_backward(x(), A, None, d.p, d.n, None, None, (True, True, False)),
            2 * wide_in,
        ),
    }


def interleaved(calls: dict[str, Callable[[], object]], clock: Clock, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 3):
        for name, call in calls.items():
            elapsed = clock(call)
            if round_ >= 3:
                seconds[name].append(elapsed)
    return seconds


def ceilings(device, dtype, clock: Clock, tiny: bool) -> dict[str, float]:
    """Copy bandwidth (bytes read and written a second) and matrix rate (FLOP a second)."""
    size, side = (1 << 16, 64) if tiny else (1 << 29, 8192)
    a, b = torch.randn(size // 2, device=device).to(dtype), torch.empty(size // 2, device=device, dtype=dtype)
    m = torch.randn(side, side, device=device).to(dtype)
    warm_until = time.time() + (0 if tiny else 3)  # short runs read fast from boost clocks
    while time.time() < warm_until:
        m @ m
        clock(lambda: m @ m)
    copy = statistics.median(clock(lambda: b.copy_(a)) for _ in range(20))
    product = statistics.median(clock(lambda: m @ m) for _ in range(20))
    return {"copy_bytes_per_s": 2 * a.numel() * a.element_size() / copy, "flop_per_s": 2 * side**3 / product}


def forward_backward(run, x: Callable[[], Tensor], dy: Callable[[], Tensor], gates: Tensor) -> Callable[[], None]:
    def call() -> None:
        tokens = x()
        tokens.grad = None
        run(tokens, gates).backward(dy())

    return call


def forward(run, x: Callable[[], Tensor], gates: Tensor) -> Tensor:
    return run(x(), gates)


def peak_memory(call: Callable[[], object], device) -> int | None:
    """Bytes allocated at the peak of a call, beyond what was there before."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def decode(d_in: int, d_out: int, T: int, device, dtype, clock: Clock, rounds: int) -> dict[str, list[float]]:
    """A linear's forward in a CUDA graph (a plain call on a CPU), frozen for inference, beside the base's."""
    adapted = layer(d_in, d_out, device, dtype).freeze_for_inference()
    linear, x = adapted.to_linear(), torch.randn(T, d_in, device=device, dtype=dtype)
    gates = torch.rand(T, CONFIG.num_experts, device=device).softmax(-1)
    calls = {"frozen linear": lambda: linear(x), "MoS triton": lambda: adapted(x, gates, backend="triton")}
    with torch.no_grad():
        return interleaved({name: captured(call, device) for name, call in calls.items()}, clock, rounds)


def captured(call: Callable[[], object], device) -> Callable[[], object]:
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def environment(device) -> dict:
    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return found.stdout.strip()

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "commit": git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""),
        "gpu": name, "cuda": torch.version.cuda, "hip": torch.version.hip, "python": platform.python_version(),
        "torch": torch.__version__, "triton": triton.__version__, "mos_kernels": mos_kernels.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median_s": statistics.median(ordered), "q20_s": ordered[len(ordered) // 5],
        "q80_s": ordered[len(ordered) * 4 // 5], "rounds": len(ordered),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--tiny", action="store_true", help="small sizes and two rounds: checks that everything runs")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results", help="where rows are written"
    )
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU: this benchmark needs one (--device cpu --tiny checks that it runs)")
    shapes, T, rounds = ((40, 56), (56, 40)) if options.tiny else SHAPES, options.tokens, options.rounds
    if options.tiny:
        T, rounds = 70, 2

    torch.manual_seed(0)
    clock = Clock(device)
    ceiling, about, rows = ceilings(device, dtype, clock, options.tiny), environment(device), []
    print(
        f"{about['gpu']}: copy {ceiling['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
        f"{ceiling['flop_per_s'] / 1e12:.0f} TFLOP/s"
    )

    def row(step: str, provider: str, d_in: int, d_out: int, tokens: int, seconds: list[float], **more) -> dict:
        shape = {"step": step, "provider": provider, "d_in": d_in, "d_out": d_out, "tokens": tokens}
        found = {**shape, "dtype": options.dtype, **summary(seconds), **more, **ceiling, **about}
        rows.append(found)
        return found

    for d_in, d_out in shapes:
        check(d_in, d_out, device, dtype, 65 if options.tiny else 300)
        x, dy = rotate(T, d_in, device, dtype, requires_grad=True), rotate(T, d_out, device, dtype)
        gates = torch.rand(T, CONFIG.num_experts, device=device).softmax(-1).requires_grad_()
        flop = 4 * T * d_in * d_out
        calls = {
            name: forward_backward(run, x, dy, gates) for name, run in providers(d_in, d_out, device, dtype).items()
        }
        timed = interleaved(calls, clock, rounds)
        frozen = statistics.median(timed["frozen linear"])
        print(f"\n{d_in} -> {d_out}, {T} tokens, {options.dtype}: forward + backward")
        for name, seconds in timed.items():
            peak = peak_memory(calls[name], device)
            r = row("layer forward+backward", name, d_in, d_out, T, seconds, flop=flop, peak_bytes=peak)
            print(f"  {name:30} {1e6 * r['median_s']:10.1f} us  {r['median_s'] / frozen:6.3f} x frozen")
        del calls
        with torch.no_grad():
            variants = orders(d_in, d_out, T, device, dtype)
            calls = {name: functools.partial(forward, run, x, gates) for name, run in variants.items()}
            timed = interleaved(calls, clock, rounds)
            for name, seconds in timed.items():
                r = row("layer forward, order", name, d_in, d_out, T, seconds, flop=flop // 2)
                print(f"  {name:30} {1e6 * r['median_s']:10.1f} us  forward")
            alone = steps(d_in, d_out, T, device, dtype)
            timed = interleaved({name: call for name, (call, _) in alone.items()}, clock, rounds)
            for name, seconds in timed.items():
                moved = alone[name][1]
                share = moved / statistics.median(seconds) / ceiling["copy_bytes_per_s"]
                r = row(name, "MoS triton", d_in, d_out, T, seconds, bytes=moved, share_of_copy=share)
                print(f"  {name:30} {1e6 * r['median_s']:10.1f} us  {share:6.1%} of copy bandwidth")
            del alone
        for tokens in DECODE_TOKENS:
            timed = decode(d_in, d_out, tokens, device, dtype, clock, rounds)
            base = statistics.median(timed["frozen linear"])
            for name, seconds in timed.items():
                r = row("decode forward", name, d_in, d_out, tokens, seconds)
                print(
                    f"  decode {tokens:3} {name:19} {1e6 * r['median_s']:10.1f} us  "
                    f"{r['median_s'] / base:6.3f} x frozen"
                )

    if options.tiny:
        print("\nran through; rows of tiny sizes are not kept")
        return
    folder = options.results / about["gpu"].lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / ".layer_gpu.tmp"
    beside.write_text("".join(json.dumps(r) + "\n" for r in rows))
    beside.replace(folder / "layer_gpu.jsonl")
    print(f"\n{len(rows)} rows in {folder / 'layer_gpu.jsonl'}")


if __name__ == "__main__":
    main()
