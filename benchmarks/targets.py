"""The targets, as data, and what the rows say about each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks import providers as p
from benchmarks import store

QWEN2, LLAMA3 = ((1536, 8960), (8960, 1536)), ((4096, 14336), (14336, 4096))
FOUR = (*QWEN2, *LLAMA3)
FFNS = (QWEN2[0], LLAMA3[0])


@dataclass(frozen=True)
class Target:
    """measure: "time" (ours / base), "speedup" (base / ours), "share" (of the ceiling), "memory" (peak beyond the
    base's, over x plus y), "saved" (bytes saved for backward, over the base's), "launches" (kernels and copies on the
    device), "own launches", "per token" (time a token over that at 8,192 tokens), "odd" (time over the base's, over the
    same at even widths). A target holds for every shape it names, so the worst is reported beside all.
    """

    what: str
    measure: str
    bound: float
    kind: str
    ours: str
    base: str | None = None
    shapes: tuple[tuple[int, int], ...] = FOUR
    tokens: int | None = 8192
    step: str | None = None
    device: str = "gpu"
    at_least: bool = False

    @property
    def wanted(self) -> str:
        if self.is_count:
            number = f"{self.bound:.0f}"
        else:
            number = f"{self.bound:.0%}" if self.measure in ("share", "memory") else f"{self.bound:.2f}×"
        return f"{'≥' if self.at_least else '≤'} {number}"

    @property
    def is_count(self) -> bool:
        return self.measure in ("launches", "own launches")

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def _layer(what: str, base: str, bound: float, shapes=FOUR) -> Target:
    return Target(what, "time", bound, "layer", p.TRITON, base, shapes)


def _ffn(what: str, base: str | None, bound: float, shapes=FFNS, tokens: int | None = 8192, measure="time") -> Target:
    return Target(what, measure, bound, "ffn", p.TRITON, base, shapes, tokens)


def _cpu(what: str, ours: str, base: str, bound: float, measure="time", kind="ffn", shapes=QWEN2[:1], **more) -> Target:
    return Target(f"CPU, {what}", measure, bound, kind, ours, base, shapes, **{"tokens": 512, "device": "cpu", **more})


TARGETS = (
    _ffn("MoS FFN, forward + backward, over the frozen FFN as transformers runs it, T=8192", p.FROZEN, 1.00),
    _ffn("the same, T=2048", p.FROZEN, 1.05, tokens=2048),
    _ffn("the same over the frozen FFN with Liger's SwiGLU, T=8192, Qwen shape", p.LIGER, 1.12, QWEN2[:1]),
    _ffn("the same, Llama shape", p.LIGER, 1.05, LLAMA3[:1]),
    _ffn("the same over the frozen FFN with our stand-in for it, Qwen shape", p.SWIGLU, 1.12, QWEN2[:1]),
    _ffn("the same, Llama shape, our stand-in", p.SWIGLU, 1.05, LLAMA3[:1]),
    _ffn("the same over a LoRA MLP r=8 as one node over addmm, Qwen shape", p.LORA_MLP, 0.82, QWEN2[:1]),
    _ffn("the same over a LoRA MLP r=8 as one node over addmm, Llama shape", p.LORA_MLP, 0.90, LLAMA3[:1]),
    _ffn("the same over peft LoRA r=8 on the FFN, adapters in bf16", p.PEFT_8_AS_BASE, 0.75),
    _ffn("the same over peft LoRA r=8 on the FFN, adapters in fp32", p.PEFT_8, 0.50),
    _ffn("MoS FFN, saved for backward over the frozen FFN", p.FROZEN, 0.75, measure="saved"),
    _ffn("MoS FFN, saved for backward over peft LoRA r=8, adapters in bf16", p.PEFT_8_AS_BASE, 0.55, measure="saved"),
    _ffn("MoS FFN, launches, forward + backward, base products included", None, 32, measure="launches"),
    _ffn("MoS FFN, launches of our kernels", None, 22, measure="own launches"),
    _layer("one MoS linear, forward + backward, over the frozen linear, Llama shapes", p.FROZEN, 1.12, LLAMA3),
    _layer("the same, Qwen shapes", p.FROZEN, 1.28, QWEN2),
    Target("adapter branch, faster than the formula, expert by expert (tidied)", "speedup", 10, "branch", p.TRITON,
           p.TIDIED, at_least=True),
    Target("adapter branch, faster than the compiled collapsed form", "speedup", 1.3, "branch", p.TRITON,
           p.COLLAPSED_COMPILED, at_least=True),
    Target("shrink, share of the measured copy bandwidth, where ≥ 128 MB move", "share", 0.80, "steps", "shrink",
           step="shrink, triton", at_least=True),
    Target("expand, share of the measured copy bandwidth, where ≥ 128 MB move", "share", 0.80, "steps", "expand",
           step="expand, triton", at_least=True),
    Target("shrink backward, share of the measured copy bandwidth, where ≥ 128 MB move", "share", 0.80, "steps",
           "shrink backward", step="shrink backward, triton", at_least=True),
    Target("peak memory beyond the frozen layer's, forward + backward, over x plus y", "memory", 0.05, "layer",
           p.TRITON, p.FROZEN),
    Target("decoding, 1 to 64 tokens, a gated FFN in a CUDA graph, over the frozen FFN", "time", 1.3, "decode",
           p.TRITON, p.FROZEN, QWEN2[:1], tokens=None),
    Target("Qwen2-1.5B's shape, training step, tokens/s over peft LoRA r=8 (bf16 adapters)", "speedup", 1.2, "model",
           p.TRITON, p.PEFT_8_AS_BASE, shapes=(), tokens=None, step="training step", at_least=True),
    Target("growth in T: time a token at 65,536 tokens over that at 8,192", "per token", 1.1, "tokens", p.TRITON,
           shapes=QWEN2[:1], tokens=65536),
    Target("no cliff at odd widths: time over frozen, over the same at 1536→8960", "odd", 1.2, "width", p.TRITON,
           p.FROZEN, shapes=((1537, 8961), (1531, 8963), (1544, 8968))),
    _cpu("MoS FFN at T=512 over peft LoRA r=8", p.EAGER, p.PEFT_8, 1.02),
    _cpu("the same, saved for backward over peft LoRA r=8", p.EAGER, p.PEFT_8, 0.55, "saved"),
    _cpu("the same, saved for backward over the frozen FFN", p.EAGER, p.FROZEN, 0.75, "saved"),
    _cpu("one token of SmolLM2-135M's FFN (576→1536) over peft LoRA r=8", p.EAGER, p.PEFT_8, 1.25, kind="decode",
         tokens=1, shapes=((576, 1536),)),
    _cpu("T=512: one Euclidean expert over a LoRA r=8 fused by hand", p.ONE_EXPERT, p.FUSED_8, 1.05, "time", "lora",
         ((576, 576), (1536, 1536))),
    _cpu("T=512: one MoS linear, own router, over peft LoRA r=8", p.EAGER_OWN, p.PEFT_8, 1.10, "time", "layer", QWEN2),
    _cpu("T=512: one MoS linear, given gates, over peft LoRA r=8", p.EAGER, p.PEFT_8, 1.10, "time", "layer", QWEN2),
    _cpu("T=512: one MoS linear, own router, faster than the formula as printed", p.EAGER_OWN, p.PRINTED, 1.8,
         "speedup", "layer", QWEN2, at_least=True),
    _cpu("T=512: one MoS linear, given gates, faster than the formula as printed", p.EAGER, p.PRINTED, 1.8,
         "speedup", "layer", QWEN2, at_least=True),
)  # fmt: skip

LEAST_BYTES = 128 << 20
"""A share of the bandwidth is asked of a step that moves this much."""


def values(target: Target, rows: Iterable[dict]) -> list[tuple[str, float]]:
    """(shape, measured number) for every shape of the target that the rows of one machine hold."""
    groups = store.groups(store.measured(rows))
    found = []
    for group in groups.values():
        ours = group.get(target.ours)
        if ours is None or ours["kind"] != target.kind or ("gpu" in ours) != (target.device == "gpu"):
            continue
        widths = ours.get("d_in"), ours.get("d_out")
        if target.shapes and widths not in target.shapes:
            continue
        if target.tokens is not None and ours["tokens"] != target.tokens:
            continue
        if target.step is not None and ours["step"] != target.step:
            continue
        value = _value(target, ours, group.get(target.base), groups.values())
        if value is not None:
            found.append((_label(target, ours), value))
    return found


def _value(target: Target, ours: dict, base: dict | None, groups: Iterable[dict[str, dict]]) -> float | None:
    if target.measure == "share":
        return ours["share_of_ceiling"] if ours["bytes"] >= LEAST_BYTES else None
    if target.measure == "per token":
        reference = _of_shape(groups, ours, tokens=8192)
        mine = reference and reference.get(target.ours)
        return mine and ours["median_s"] / ours["tokens"] / (mine["median_s"] / mine["tokens"])
    if target.is_count:
        return ours.get("device_launches" if target.measure == "launches" else "launches")
    if base is None:
        return None
    if target.measure == "saved":
        return (
            ours["saved_bytes"] / base["saved_bytes"] if ours.get("saved_bytes") and base.get("saved_bytes") else None
        )
    if target.measure == "memory":
        if "peak_bytes" not in ours or "peak_bytes" not in base:
            return None
        size = 4 if ours["dtype"] == "float32" else 2
        return (ours["peak_bytes"] - base["peak_bytes"]) / (size * ours["tokens"] * (ours["d_in"] + ours["d_out"]))
    ratio = ours["median_s"] / base["median_s"]
    if target.measure == "odd":
        even = _of_shape(groups, ours, d_in=1536, d_out=8960)
        if not even or not {target.ours, target.base} <= set(even):
            return None
        return ratio / (even[target.ours]["median_s"] / even[target.base]["median_s"])
    return 1 / ratio if target.measure == "speedup" else ratio


def _of_shape(groups: Iterable[dict[str, dict]], like: dict, **shape) -> dict[str, dict] | None:
    """The group of the same kind, dtype and shape as the row but for what is given."""
    wanted = {**{name: like.get(name) for name in store.SHAPE}, **shape}
    for group in groups:
        row = next(iter(group.values()))
        alike = row["kind"] == like["kind"] and row["dtype"] == like["dtype"]
        if alike and all(row.get(name) == value for name, value in wanted.items()):
            return group
    return None


def _label(target: Target, row: dict) -> str:
    if target.kind == "decode":
        return f"T={row['tokens']}"
    if target.kind == "ffn" and row["step"].endswith("settings found"):
        return f"{row['d_in']}→{row['d_out']}, settings found"
    if target.kind == "model":
        return f"{row['tokens']} tokens"
    return f"{row['d_in']}→{row['d_out']}"


def missed(rows: list[dict], device: str) -> list[str]:
    """The targets of a device that the rows miss, in words."""
    found = []
    for target in TARGETS:
        if target.device == device:
            for shape, value in values(target, rows):
                if not target.met(value):
                    found.append(f"{target.what}, {shape}: {value:.3g}, target {target.wanted}")
    return found
