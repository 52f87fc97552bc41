"""The kernels as compiled for a GPU that need not be there: registers, spills, shared memory, occupancy, instructions.

`python -m mos_kernels kernels` prints the table. A layer's forward and backward run here with every launch recorded
instead of executed, so what is compiled is what would be launched, at the shipped settings.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mos_kernels import steps
from mos_kernels.backends.triton import ffn, launch
from mos_kernels.call import Adapted, FFNPlan, FFNTensors, LinearTensors, Plan, RouteTensors
from mos_kernels.config import MoSConfig

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64", torch.uint8: "*u8",
    torch.bool: "*i1",
}  # fmt: skip
REGISTERS_PER_SM, THREADS_PER_SM, SHARED_PER_SM = 65536, 2048, {"sm_80": 167936, "sm_90": 233472, "sm_100": 233472}


@dataclass(frozen=True)
class Launch:
    """A kernel with the argument types and constants of one launch."""

    kernel: object
    signature: tuple[tuple[str, str], ...]
    aligned: tuple[str, ...]
    constants: tuple[tuple[str, object], ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.removesuffix("_kernel")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses. registers and spills (bytes, or registers on AMD) are a thread's."""

    registers: int
    spills: int
    shared: int
    occupancy: float | None  # share of an SM's threads that can be resident, estimated; None where not known


@contextmanager
def recorded(architecture: str):
    """Record launches instead of running them, with the settings of `architecture`. Yields the list."""
    launches: list[Launch] = []

    def record(kernel, grid, tensor, arguments, **constants):
        launches.append(_describe(kernel, arguments, constants))

    def settings(kernel: str, device: torch.device, T: int) -> dict:
        return launch.architecture_settings(kernel, architecture, T)

    before = launch.launch, launch.settings
    launch.launch, launch.settings = record, settings
    try:
        yield launches
    finally:
        launch.launch, launch.settings = before


def _describe(kernel, arguments, constants: dict) -> Launch:
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    names = [name for name in kernel.arg_names if name not in constants]
    unspecialised = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    signature, aligned = [], []
    for name, value in zip(names, arguments, strict=True):
        if isinstance(value, torch.Tensor):
            signature.append((name, _POINTERS[value.dtype]))
            aligned.append(name)
        elif value == 1 and not isinstance(value, float) and name not in unspecialised:
            constants[name] = 1  # as Triton does
        else:
            signature.append((name, "fp32" if isinstance(value, float) else "i32"))
            if not isinstance(value, float) and value % 16 == 0 and name not in unspecialised:
                aligned.append(name)
    in_order = sorted(constants.items(), key=lambda item: kernel.arg_names.index(item[0]))  # or equal ones would differ
    return Launch(kernel, tuple(signature), tuple(aligned), tuple(in_order), tuple(options.items()))


def layer_launches(
    architecture: str,
    config: MoSConfig,
    T: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    wrapped: bool = False,
    device: str = "meta",
) -> list[Launch]:
    """The distinct launches of one linear with these options: forward, backward, and its router's.

    wrapped: its base is no dense product, and its output is added instead of a bias. device: where its tensors lie; the
    composition runs, but for the launches, so that they need no memory unless who records them runs them.
    """
    E, r = config.num_experts, config.r
    own = config.router_scope == "linear"

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    x, router, aux, mask = empty(T, in_features, dtype=dtype), empty(E, in_features), empty(1), empty(T) > 0
    linear = LinearTensors(
        x,
        None if wrapped else empty(out_features, in_features, dtype=dtype),
        empty(*(T, out_features) if wrapped else (out_features,), dtype=dtype),
        empty(*(r, in_features) if config.share_a else (E, r, in_features)), empty(out_features, E, r), empty(E),
        gates=None if own else empty(T, E), router=router if own else None,
        aux_weight=aux if own else None, token_mask=mask if own else None,
        dropout_state=empty(1, dtype=torch.int64) if config.lora_dropout else None,
    )  # fmt: skip
    plan = Plan(config, "triton", dropout_p=config.lora_dropout)
    inference = plan._replace(differentiable=False)
    with recorded(architecture) as launches:
        y, saved = steps.linear_forward(linear, plan)
        needs = LinearTensors(*(t is not None for t in linear))._replace(weight=False, added=False)
        steps.linear_backward(y, linear, saved, plan, needs)
        steps.linear_forward(linear, inference)
        if not own:
            routed = RouteTensors(x, router, aux, mask)
            gates, logits = steps.route_forward(routed, plan)
            steps.route_backward(gates, routed, logits, plan, RouteTensors(True, True, False, False))
            steps.route_forward(routed, inference)
    return list(dict.fromkeys(launches))


def ffn_launches(
    architecture: str,
    config: MoSConfig,
    T: int,
    d_hidden: int,
    dtype: torch.dtype,
    activation: str = "silu",
    gated: bool = True,
    fused: bool = False,
    device: str = "meta",
    d: int = 1536,
) -> list[Launch]:
    """The distinct launches of an FFN as one operation: forward, backward, and on the way without a backward.

    d wide, d_hidden between its linears; activation, gated and fused as in `FFNPlan`.
    """
    E, r = config.num_experts, config.r

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    def linear(d_in: int, d_out: int) -> Adapted:
        A = empty(*(r, d_in) if config.share_a else (E, r, d_in))
        return Adapted(empty(d_out, d_in, dtype=dtype), empty(d_out, dtype=dtype), A, empty(d_out, E, r), empty(E))

    reads = [linear(d, 2 * d_hidden)] if fused else [linear(d, d_hidden) for _ in range(2 if gated else 1)]
    tensors = FFNTensors(
        empty(T, d, dtype=dtype), None, empty(E, d), empty(1), empty(T) > 0, linear(d_hidden, d), tuple(reads)
    )
    plan = FFNPlan(config, config, "triton", activation, gated, fused, True, (None,) * (1 + len(reads)))
    needed = Adapted(False, False, True, True, True)
    needs = FFNTensors(True, False, True, False, False, needed, (needed,) * len(reads))
    frozen = FFNTensors(True, False, False, False, False, Adapted(*[False] * 5), (Adapted(*[False] * 5),) * len(reads))
    with recorded(architecture) as launches:
        y, saved = ffn.ffn_forward(tensors, plan)
        for asked in (needs, frozen):
            ffn.ffn_backward(y, tensors, saved, plan, asked)
        ffn.ffn_inference(tensors, plan._replace(differentiable=False))
    return list(dict.fromkeys(launches))


def compile_launch(described: Launch, architecture: str):
    """Triton's compiled kernel for `architecture` (a key of TARGETS)."""
    constants = dict(described.constants)
    types = dict(described.signature)
    names = described.kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=described.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in described.aligned},
    )
    return triton.compile(source, target=TARGETS[architecture], options=dict(described.options))


def resources(kernel, architecture: str, num_warps: int) -> Resources:
    """Registers, spills and shared memory of a compiled kernel."""
    if architecture.startswith("gfx"):
        text = kernel.asm["amdgcn"]

        def field(name: str) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

        return Resources(field("vgpr_count"), field("vgpr_spill_count"), kernel.metadata.shared, None)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    spills = int(re.search(r"STACK:(\d+)", usage).group(1))  # LOCAL stays 0: spilled registers live on the stack
    threads = 32 * num_warps
    blocks = REGISTERS_PER_SM // (-(-registers // 8) * 8 * threads)
    if kernel.metadata.shared:
        blocks = min(blocks, SHARED_PER_SM[architecture] // (kernel.metadata.shared + 1024))
    return Resources(registers, spills, kernel.metadata.shared, min(blocks * threads / THREADS_PER_SM, 1.0))


def _cuobjdump() -> str:
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else "cuobjdump"


def default_launches(architecture: str, T: int) -> list[Launch]:
    """What the defaults launch in bf16 on the Qwen2-1.5B shapes, with the variants that use other kernels."""
    variants = [MoSConfig(), MoSConfig(router_scope="linear"), MoSConfig(activation="silu")]
    launches = [
        described
        for config in variants
        for wrapped in (False, True)
        for described in layer_launches(architecture, config, T, 1536, 8960, torch.bfloat16, wrapped)
    ]
    for activation in ("silu", "gelu_tanh"):
        launches += ffn_launches(architecture, MoSConfig(), T, 8960, torch.bfloat16, activation)
    return list(dict.fromkeys(launches))


def distinctions(launches: list[Launch]) -> list[str]:
    """For each launch, the constants that set it apart from others of its kernel; where none does, the types too."""
    texts = []
    for described in launches:
        others = [other for other in launches if other.kernel is described.kernel]
        for traits in (_constants, _constants_and_types):
            own, all_traits = traits(described), [traits(other) for other in others]
            if all_traits.count(own) == 1:
                break
        varying = sorted(name for name in own if any(t.get(name) != own[name] for t in all_traits))
        texts.append(" ".join(f"{name}={own[name]}" for name in varying))
    return texts


def _constants(described: Launch) -> dict[str, object]:
    return dict(described.constants)


def _constants_and_types(described: Launch) -> dict[str, object]:
    aligned = {f"{name}%16": 0 for name in described.aligned}
    return {**dict(described.constants), **dict(described.signature), **aligned}


def table(architectures, token_counts=(8192, 16)) -> str:
    """One line a kernel, architecture and bucket, as text; the last column tells a kernel's variants apart."""
    heads = f"{'kernel':22} {'bucket':7} {'arch':7} {'registers':>9} {'spills':>6} {'shared':>7} {'occupancy':>9}"
    lines = [f"{heads}  variant"]
    for architecture in architectures:
        for T in token_counts:
            launches = default_launches(architecture, T)
            for described, variant in zip(launches, distinctions(launches), strict=True):
                warps = dict(described.options)["num_warps"]
                used = resources(compile_launch(described, architecture), architecture, warps)
                occupancy = "-" if used.occupancy is None else f"{used.occupancy:.0%}"
                lines.append(
                    f"{described.name:22} {launch.bucket(T):7} {architecture:7} {used.registers:9} {used.spills:6} "
                    f"{used.shared:7} {occupancy:>9}  {variant}".rstrip()
                )
    return "\n".join(lines)
