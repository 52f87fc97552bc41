"""One adapted linear on a CPU, forward and backward, against its peers: `python -m benchmarks.layer_cpu`.

float32, the FFN shapes of Qwen2-1.5B, everything interleaved in one run: absolute times depend on the machine and on
what else it does, so only ratios within one run are quoted. Backward is the gradient of the input and of the adapter;
no base weight is trained. A speed is reported only if the eager backend agrees with reference/ in float64 first. The
formula is timed as printed (equations 5 to 8, each on vectors of full width) and tidied (each map, its guard and the
gate folded into one number a token).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

import mos_kernels
from mos_kernels import MoSConfig, MoSLinear
from reference.baselines import MoSPerExpertLinear
from reference.per_expert import mos_linear_as_printed, mos_linear_per_expert

SHAPES = ((1536, 8960), (8960, 1536))
FROZEN, LORA, MOS, MOS_GATES = "frozen linear", "peft LoRA r=8", "MoS eager", "MoS eager, given gates"
FORMULA, TIDIED = "formula as printed", "formula, a scale a token"
EXP_LOG = "exp/log, a scale a token"
AT_MOST_LORA, FASTER_THAN_FORMULA = 1.10, 1.8
CONFIG = MoSConfig(router_scope="linear")
ADAPTER = ("x", "A", "B", "kappa", "router")


def providers(d_in: int, d_out: int, tokens: int) -> dict:
    """What is timed: the module's forward by name. All share one base linear, and no factor is zero."""
    linear = nn.Linear(d_in, d_out).requires_grad_(False)
    gates = torch.randn(tokens, CONFIG.num_experts).softmax(-1).requires_grad_()
    mos = MoSLinear.from_linear(linear, CONFIG)
    given = MoSLinear.from_linear(linear, MoSConfig())
    lora = peft.get_peft_model(
        nn.ModuleDict({"linear": linear}), peft.LoraConfig(r=8, lora_alpha=16, target_modules=["linear"])
    )
    tidied, exp_log = (
        MoSPerExpertLinear(linear, mos.curvature, mapping=mapping) for mapping in ("stereographic", "exp_log")
    )
    for module in (mos, given, lora, tidied, exp_log):
        for parameter in module.parameters():
            if parameter.requires_grad and not parameter.any() and parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def printed(x: Tensor) -> Tensor:
        factors = (tidied.A, tidied.B, tidied.kappa)
        return mos_linear_as_printed(
            x, linear.weight, linear.bias, *factors, router=tidied.router, scaling=2.0, num_experts_per_tok=4
        )

    return {
        FROZEN: linear, LORA: lora.base_model.model["linear"], MOS: mos,
        MOS_GATES: lambda x: given(x, gates), FORMULA: printed, TIDIED: tidied, EXP_LOG: exp_log,
    }  # fmt: skip


def check(d_in: int, d_out: int, tokens: int = 24) -> None:
    """error(eager, float64 truth) <= 2·error(formula in float32, float64 truth) + 1e-6·max|truth|, or exit."""
    layer = MoSLinear(d_in, d_out, config=CONFIG)
    nn.init.normal_(layer.mos_lora_B, std=0.02)
    layer.eval()  # the injected load-balancing gradient is no part of the formula
    x, dy = torch.randn(tokens, d_in), torch.randn(tokens, d_out)

    def formula(x, A, B, kappa, router) -> Tensor:
        base = (t.to(x.dtype) for t in (layer.weight, layer.bias))
        return mos_linear_per_expert(
            x, *base, A, B, kappa, router=router, scaling=CONFIG.scaling, num_experts_per_tok=4
        )

    def eager(x, A, B, kappa, router) -> Tensor:
        return mos_kernels.adapter.mos_linear(
            x, layer.weight, layer.bias, A, B, kappa, router=router, config=CONFIG, backend="eager"
        )

    def results(run, dtype) -> list[Tensor]:
        given = (x, layer.mos_lora_A, layer.mos_lora_B, layer.curvature, layer.mos_router)
        leaves = [t.detach().to(dtype).requires_grad_() for t in given]
        y = run(*leaves)
        return [t.double() for t in (y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype)))]

    truths, ours, plain = (
        results(formula, torch.float64),
        results(eager, torch.float32),
        results(formula, torch.float32),
    )
    for name, truth, value, other in zip(("y", *ADAPTER), truths, ours, plain, strict=True):
        error, allowed = (value - truth).abs().max(), 2 * (other - truth).abs().max() + 1e-6 * truth.abs().max()
        if not error <= allowed:
            sys.exit(f"{d_in} -> {d_out}: {name} is off by {error:.3g}, {allowed:.3g} allowed; nothing is timed")


def step(run, x: Tensor, dy: Tensor) -> float:
    x.grad = None
    start = time.perf_counter()
    run(x).backward(dy)
    return time.perf_counter() - start


def measure(d_in: int, d_out: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    runs = providers(d_in, d_out, tokens)
    x, dy = torch.randn(tokens, d_in, requires_grad=True), torch.randn(tokens, d_out)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            elapsed = step(run, x, dy)
            if round_:  # the first is warm-up
                seconds[name].append(elapsed)
    return seconds


def environment() -> dict:
    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return found.stdout.strip()

    info = Path("/proc/cpuinfo")
    named = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "commit": git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""),
        "cpu": named[0].split(":")[1].strip() if named else platform.processor(), "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
        "peft": peft.__version__, "mos_kernels": mos_kernels.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def missed(medians: dict[str, float]) -> list[str]:
    found = []
    for name in (MOS, MOS_GATES):
        if medians[name] > AT_MOST_LORA * medians[LORA]:
            found.append(f"{name} takes {medians[name] / medians[LORA]:.3f}x LoRA, target at most {AT_MOST_LORA}x")
        if medians[FORMULA] < FASTER_THAN_FORMULA * medians[name]:
            speedup = medians[FORMULA] / medians[name]
            found.append(f"{name} is {speedup:.2f}x faster than the formula, target at least {FASTER_THAN_FORMULA}x")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, of which the median is taken")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results", help="where rows are written"
    )
    parser.add_argument("--no-targets", action="store_true", help="report only, whatever the figures")
    options = parser.parse_args()

    torch.manual_seed(0)
    about, rows, failures = environment(), [], []
    for d_in, d_out in SHAPES:
        check(d_in, d_out)
        seconds = measure(d_in, d_out, options.tokens, options.rounds)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        failures += [f"{d_in} -> {d_out}: {message}" for message in missed(medians)]
        print(f"\n{d_in} -> {d_out}, {options.tokens} tokens, float32, forward + backward, median of {options.rounds}")
        print(f"{'':28}{'ms':>9}{'/ frozen':>10}{'/ LoRA':>9}{'formula /':>11}")
        for name, median in medians.items():
            ratios = {key: median / medians[base] for key, base in (("over_frozen", FROZEN), ("over_lora", LORA))}
            speedup = medians[FORMULA] / median
            print(f"{name:28}{1e3 * median:9.1f}{ratios['over_frozen']:10.3f}{ratios['over_lora']:9.3f}{speedup:11.2f}")
            row = {
                "step": "forward+backward",
                "d_in": d_in,
                "d_out": d_out,
                "tokens": options.tokens,
                "dtype": "float32",
            }
            timing = {"median_s": median, "seconds": [round(s, 5) for s in seconds[name]], **ratios}
            rows.append({**row, "provider": name, **timing, "formula_over_it": speedup, **about})

    folder = options.results / f"cpu-{about['cores']}core"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "layer_cpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"\n{len(rows)} rows in {folder / 'layer_cpu.jsonl'}")
    if failures and not options.no_targets:
        sys.exit("targets missed:\n  " + "\n  ".join(failures))


if __name__ == "__main__":
    main()
