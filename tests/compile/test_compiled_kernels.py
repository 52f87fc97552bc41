"""Registers, spills, shared memory and instructions of every kernel at its shipped settings, for four architectures."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

import pytest
import torch
from everyday import full_but
from refills import refilled

from mos_kernels import MoSConfig
from mos_kernels.backends.triton import compiled, tune

pytestmark = pytest.mark.budget(40)
"""Compiling takes what it takes; each process compiles a kernel once."""
NVIDIA, EVERY = ("sm_80", "sm_90", "sm_100"), tuple(compiled.TARGETS)
EVERYDAY = ("sm_90",)
every_nvidia = pytest.mark.parametrize("architecture", full_but(EVERYDAY, NVIDIA))
SHARED = {**dict.fromkeys(NVIDIA, 101_376), "gfx942": 65_536}
"""Bytes: what the smallest GPUs of a generation give a program (sm_86, sm_89 and sm_120 have 99 KB)."""

D_IN, D_OUT, TRAIN, DECODE = 1536, 8960, 8192, 16
HALF = (torch.bfloat16, torch.float16)
WIDE = (
    "shrink", "shrink_backward", "expand", "expand_backward",
    "activated_norm", "activated_expand", "activated_input", "activated_weight", "activate", "activate_backward",
)  # fmt: skip
FEW = ("bridge_expand", "bridge_expand_pair")
WIDE_OF = {TRAIN: WIDE, DECODE: (*(name for name in WIDE if name != "expand"), *FEW)}


default_launches = functools.cache(compiled.default_launches)
layer_launches = functools.cache(compiled.layer_launches)
ffn_launches = functools.cache(compiled.ffn_launches)


@functools.cache
def compiled_for(architecture: str, launch: compiled.Launch):
    return compiled.compile_launch(launch, architecture)


def launches(
    T: int, *configs: MoSConfig, dtype=torch.bfloat16, architecture="sm_90", ffn: bool = False
) -> list[compiled.Launch]:
    """Of a linear with each of the configurations. ffn: and of an FFN as one operation."""
    found = [launch for config in configs for launch in layer_launches(architecture, config, T, D_IN, D_OUT, dtype)]
    found += ffn_launches(architecture, MoSConfig(), T, D_OUT, dtype) if ffn else ()
    return list(dict.fromkeys(found))


def between(found: list[compiled.Launch]) -> list[compiled.Launch]:
    """Those between the linears of an FFN."""
    return [launch for launch in found if launch.name in ("activate", "activate_backward")]


def assert_fits(architecture: str, found: list[compiled.Launch]) -> None:
    """No spills, shared memory within what the GPUs have, and none filled anew while a product may read it."""
    assert found
    for launch in found:
        warps = dict(launch.options)["num_warps"]
        made = compiled_for(architecture, launch)
        used = compiled.resources(made, architecture, warps)
        assert used.spills == 0 and used.shared <= SHARED[architecture], (launch.name, used, launch.constants)
        assert refilled(made.asm["ttgir"]) == [], (launch.name, launch.constants)


def linear(**options) -> MoSConfig:
    return MoSConfig(router_scope="linear", **options)


# the defaults, on every target


@pytest.mark.parametrize("T", [TRAIN, DECODE])
@pytest.mark.parametrize("architecture", full_but((*EVERYDAY, "gfx942"), EVERY))
def test_the_defaults_compile_without_spills(architecture, T):
    found = default_launches(architecture, T)
    narrow = {"gram", "bridge", "bridge_backward", "bridge_reduce", "route"}
    assert {launch.name for launch in found} >= {*WIDE_OF[T], *narrow}
    assert_fits(architecture, found)


@pytest.mark.parametrize("architecture", full_but(EVERYDAY, EVERY))
def test_the_seeds_of_the_tuner_compile_without_spills(architecture, monkeypatch):
    settings = tune.launch
    table, bucket = settings.architecture_settings, settings.bucket

    def seeded(kernel: str, name: str, T: int) -> dict:
        return dict(tune.SEEDS.get(kernel, {}).get(bucket(T)) or table(kernel, name, T))

    monkeypatch.setattr(settings, "architecture_settings", seeded)
    found = compiled.layer_launches(architecture, linear(), TRAIN, D_IN, D_OUT, torch.bfloat16)
    found += compiled.ffn_launches(architecture, linear(), TRAIN, D_OUT, torch.bfloat16)
    assert_fits(architecture, [launch for launch in found if launch.name in tune.SEEDS])


def test_every_kernel_of_the_package_is_compiled_here():
    sources = Path(compiled.__file__).parent.glob("*.py")
    defined = {name for path in sources for name in re.findall(r"@triton.jit.*\ndef (\w+)_kernel\(", path.read_text())}
    assert defined == {one.name for T in (TRAIN, DECODE) for one in default_launches("sm_90", T)}


@pytest.mark.parametrize("T", [TRAIN, DECODE])
def test_the_table_tells_the_variants_of_a_kernel_apart(T):
    launches = default_launches("sm_90", T)
    lines = {(launch.name, variant) for launch, variant in zip(launches, compiled.distinctions(launches), strict=True)}
    assert len(lines) == len(launches)


def test_spills_are_seen():
    """A kernel held to far too few registers: what the other tests assert to be 0 is not 0 by construction."""
    launch = [one for one in default_launches("sm_90", TRAIN) if one.name == "bridge_backward"][0]
    starved = dataclasses.replace(launch, options=(*launch.options, ("maxnreg", 32)))
    used = compiled.resources(compiled.compile_launch(starved, "sm_90"), "sm_90", 4)
    assert used.registers <= 32 and used.spills > 0


@pytest.mark.parametrize("options", full_but([{"r": 32}], [{"r": 32}, {"r": 128}, {"share_a": False}]), ids=str)
def test_no_stage_is_refilled_under_a_product_in_two_halves(options):
    """dW of over 32 rows of the stack is one: Triton 3.6 waits for its first half alone before it loads x anew."""
    (backward,) = [launch for launch in launches(TRAIN, linear(**options)) if launch.name == "shrink_backward"]
    assert dict(backward.constants)["BLOCK_C"] == 64 and dict(backward.options)["num_stages"] == 1
    assert "cp.async" not in compiled_for("sm_90", backward).asm["ptx"]


# the variants, on sm_90


@pytest.mark.parametrize("T", [TRAIN, DECODE])
@pytest.mark.parametrize("activation", ["identity", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.one_at_a_time("T", "activation", "dtype")
def test_other_dtypes_without_spills(dtype, activation, T):
    assert_fits("sm_90", launches(T, linear(activation=activation), dtype=dtype))


@pytest.mark.parametrize("T", [TRAIN, DECODE])
@pytest.mark.parametrize(
    "options",
    [
        {"share_a": False}, {"mapping": "exp_log"}, {"domain": "raw"}, {"norm_topk_prob": False},
        {"lora_dropout": 0.1}, {"activation": "tanh", "mapping": "exp_log", "share_a": False},
        {"lora_dropout": 0.1, "r": 64}, {"lora_dropout": 0.1, "r": 4, "share_a": False},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.one_at_a_time("T", "options")
def test_options_without_spills(options, T):
    assert_fits("sm_90", launches(T, linear(**options)))


@pytest.mark.parametrize("T", [TRAIN, DECODE])
@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("r", full_but((1, 128), [1, 4, 16, 32, 64, 128]))
@pytest.mark.one_at_a_time("r", "activation", "T")
def test_ranks_without_spills(r, activation, T):
    assert_fits("sm_90", launches(T, linear(r=r, activation=activation)))


@every_nvidia
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("experts", "r"), [(1, 128), (8, 16), (64, 2)])
@pytest.mark.one_at_a_time("experts", "dtype")
def test_few_tokens_with_as_many_columns_as_one_launch_takes(experts, r, dtype, architecture):
    spaces = {"hyperbolic": (experts + 1) // 2, "spherical": experts // 2}
    options = {"r": r, "spaces": spaces, "num_experts_per_tok": min(4, experts)}
    config = linear(**options, mapping="exp_log", norm_topk_prob=False)
    found = launches(DECODE, config, dtype=dtype, architecture=architecture)
    assert_fits(architecture, named(found, "bridge_expand"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("r", "share_a"), full_but([(1, True), (16, False)], [(1, True), (16, True), (8, False), (16, False)])
)
@pytest.mark.one_at_a_time("r", "dtype")
def test_linears_that_share_launches(r, share_a, dtype):
    found = ffn_launches("sm_90", MoSConfig(r=r, share_a=share_a), DECODE, D_OUT, dtype)
    pairs = [one for one in named(found, "shrink", "bridge_expand_pair") if dict(one.constants).get("PAIR", True)]
    assert {one.name for one in pairs} == {"shrink", "bridge_expand_pair"}
    assert_fits("sm_90", pairs)


@pytest.mark.parametrize("architecture", full_but(EVERYDAY, EVERY))
def test_float32_with_dropout_without_spills(architecture):
    configs = (linear(lora_dropout=0.1), linear(lora_dropout=0.1, share_a=False), linear(lora_dropout=0.1, r=64))
    assert_fits(architecture, launches(TRAIN, *configs, dtype=torch.float32, architecture=architecture))
    few = launches(DECODE, linear(lora_dropout=0.1, share_a=False, r=4), dtype=torch.float32, architecture=architecture)
    assert_fits(architecture, named(few, "shrink_backward"))


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("r", [64, 128])
@pytest.mark.full
def test_large_ranks_in_float32_without_spills(r, activation):
    assert_fits("sm_90", launches(TRAIN, linear(r=r, activation=activation), dtype=torch.float32))


@pytest.mark.parametrize("T", [TRAIN, DECODE])
@pytest.mark.parametrize("experts", full_but((64,), [1, 2, 16, 64]))
def test_numbers_of_experts_without_spills(experts, T):
    share = {"spaces": {"hyperbolic": (experts + 1) // 2, "spherical": experts // 2}}
    options = {**share, "num_experts_per_tok": min(4, experts)}
    curved = linear(**options, mapping="exp_log", norm_topk_prob=False)
    assert_fits("sm_90", launches(T, linear(**options), curved, linear(**options, activation="silu")))


@pytest.mark.parametrize("options", full_but([{}], [{}, {"lora_dropout": 0.1}, {"activation": "gelu"}]), ids=str)
def test_sizes_of_one_compile(options):
    """Triton makes a constant of an argument that is 1, which is then no tensor."""
    one = {"r": 1, "spaces": {"euclidean": 1}, "num_experts_per_tok": 1}
    config = MoSConfig(**one, **options, router_scope="ffn" if options else "linear")
    found = [one for T in (1, 100) for one in layer_launches("sm_90", config, T, 1, 1, torch.bfloat16)]
    assert any(dict(launch.constants).get("N") == 1 for launch in found)
    assert_fits("sm_90", list(dict.fromkeys(found)))


@pytest.mark.parametrize("T", [TRAIN, DECODE])
@pytest.mark.parametrize("form", full_but(("gated",), ("gated", "fused", "not gated")))
@pytest.mark.parametrize("rows", [8, 64, 512])
@pytest.mark.parametrize("dtype", full_but((torch.bfloat16,), (torch.bfloat16, torch.float16, torch.float32)), ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("architecture", full_but(EVERYDAY, EVERY))
@pytest.mark.one_at_a_time("rows", "activation", "T")
def test_ffn_kernels_without_spills(architecture, activation, dtype, rows, form, T):
    config = MoSConfig(r=rows // 8, share_a=False)
    form = {"gated": form != "not gated", "fused": form == "fused"}
    assert_fits(architecture, between(ffn_launches(architecture, config, T, D_OUT, dtype, activation, **form)))


OF_AN_FFN = [
    {"dtype": torch.float32}, {"share_a": False}, {"r": 64, "experts": 2}, {"r": 128, "experts": 1},
    {"r": 2, "experts": 64}, {"mapping": "exp_log"}, {"dtype": torch.float16, "norm_topk_prob": False},
    {"form": "fused"}, {"form": "plain"}, {"r": 64, "experts": 2, "mapping": "exp_log"},
    {"r": 128, "experts": 1, "mapping": "exp_log"},
]  # fmt: skip


@pytest.mark.parametrize("T", [TRAIN, DECODE])
@pytest.mark.parametrize("options", full_but(OF_AN_FFN[:2], OF_AN_FFN), ids=str)
@pytest.mark.parametrize("architecture", full_but(EVERYDAY, EVERY))
@pytest.mark.one_at_a_time("options", "architecture")
def test_an_ffn_without_spills(architecture, options, T):
    options = dict(options)
    dtype, form = options.pop("dtype", torch.bfloat16), options.pop("form", "gated")
    if "experts" in options:
        experts = options.pop("experts")
        options["spaces"] = {"hyperbolic": (experts + 1) // 2, "spherical": experts // 2}
        options["num_experts_per_tok"] = min(4, experts)
    form = {"gated": form != "plain", "fused": form == "fused"}
    assert_fits(architecture, ffn_launches(architecture, MoSConfig(**options), T, D_OUT, dtype, **form))


# instructions


def named(found: list[compiled.Launch], *names: str) -> list[compiled.Launch]:
    chosen = [launch for launch in found if launch.name in names]
    assert {launch.name for launch in chosen} == set(names)
    return chosen


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_wide_products_in_training_use_the_tensor_cores_of_sm_90(dtype):
    wide = [name for name in WIDE if name != "activate_backward"]  # of 32 tokens, which wgmma does not take
    for launch in named(launches(TRAIN, linear(), linear(activation="silu"), dtype=dtype, ffn=True), *wide):
        if launch.name == "shrink_backward" and dict(launch.constants)["PAIR"]:  # of 32 tokens, too
            continue
        assert "wgmma.mma_async" in compiled_for("sm_90", launch).asm["ptx"], (launch.name, launch.constants)


@pytest.mark.parametrize("architecture", full_but(("sm_80",), ["sm_80", "sm_100"]))
def test_wide_products_in_training_use_tensor_cores_elsewhere(architecture):
    instruction = {"sm_80": "mma.sync", "sm_100": ("tcgen05.mma", "mma.sync")}[architecture]
    instructions = (instruction,) if isinstance(instruction, str) else instruction
    for launch in named(default_launches(architecture, TRAIN), *WIDE):
        text = compiled_for(architecture, launch).asm["ptx"]
        assert any(name in text for name in instructions), launch.name


def test_wide_products_use_matrix_instructions_on_gfx942():
    for launch in named(default_launches("gfx942", TRAIN), *WIDE):
        assert "v_mfma" in compiled_for("gfx942", launch).asm["amdgcn"], launch.name


@pytest.mark.parametrize("architecture", full_but(EVERYDAY, EVERY))
def test_float32_is_never_multiplied_in_tf32(architecture):
    text = "amdgcn" if architecture.startswith("gfx") else "ptx"
    dropping = (linear(lora_dropout=0.1), linear(lora_dropout=0.1, share_a=False))
    configs = (linear(), linear(activation="silu"), *dropping)
    float32 = launches(TRAIN, *configs, dtype=torch.float32, architecture=architecture, ffn=True)
    for launch in [*float32, *default_launches(architecture, TRAIN)]:
        code = compiled_for(architecture, launch).asm[text]
        assert not re.search(r"tf32|xf32", code), (launch.name, launch.constants)
    for launch in named(float32, *WIDE) if text == "ptx" else ():
        code = compiled_for(architecture, launch).asm[text]
        assert "fma.rn.f32" in code and "mma.sync" not in code and "wgmma" not in code and "tcgen05.mma" not in code


SIXTEEN_BYTES = re.compile(r"ld\.global[.\w]*\.v4\.b32|cp\.async\.cg\.shared\.global [^;]*, 0x10,")


@pytest.mark.parametrize("T", [TRAIN, DECODE])
@every_nvidia
def test_narrow_numbers_are_loaded_sixteen_bytes_at_a_time(architecture, T):
    """dz, B and the gates, in the kernels that make no wide product."""
    reading = ("gram", "bridge_backward", "bridge_reduce", "norm_gradient", "route", "route_backward")
    for launch in named(default_launches(architecture, T), *reading):
        assert SIXTEEN_BYTES.search(compiled_for(architecture, launch).asm["ptx"]), (launch.name, launch.constants)


@every_nvidia
def test_bridge_reads_and_writes_all_that_a_thread_has_at_once(architecture):
    """Of 32 tokens a thread of 128 has two numbers of p, and sixteen of z."""
    for launch in named(default_launches(architecture, TRAIN), "bridge"):
        ptx = compiled_for(architecture, launch).asm["ptx"]
        assert re.search(r"ld\.global[.\w]*\.v2\.b32", ptx) and re.search(r"st\.global[.\w]*\.v4\.b32", ptx)


@every_nvidia
@pytest.mark.parametrize("T", [TRAIN, DECODE])
def test_curvature_factors_are_computed_once(architecture, T):
    """λ and e take three roots. Without `once`, each of the threads that share a token's expert takes them all."""
    kernels = ("bridge", "bridge_backward", *(FEW if T == DECODE else ()))
    for launch in named(default_launches(architecture, T), *kernels):
        constants, threads = dict(launch.constants), 32 * dict(launch.options)["num_warps"]
        factors = -(-constants["BLOCK_T"] * constants["BLOCK_E"] // threads)
        roots = len(re.findall(r"sqrt\.rn\.f32", compiled_for(architecture, launch).asm["ptx"]))
        assert roots <= 2 * 3 * factors, (launch.name, launch.constants)


@pytest.mark.parametrize("architecture", full_but(EVERYDAY, ("sm_80", "sm_90")))
@pytest.mark.parametrize("T", [TRAIN, DECODE])
def test_activations_of_an_ffn_are_computed_once(architecture, T):
    """One exponential for each number of a tile: Triton would compute φ again for the product that reads h."""
    for launch in between(ffn_launches(architecture, MoSConfig(), T, D_OUT, torch.bfloat16)):
        constants, threads = dict(launch.constants), 32 * dict(launch.options)["num_warps"]
        exponentials = compiled_for(architecture, launch).asm["ptx"].count("ex2.approx")
        assert exponentials == constants["BLOCK_T"] * constants["BLOCK_D"] // threads, (launch.name, launch.constants)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_loads_run_ahead_of_the_wide_products(dtype):
    names = ("shrink", "shrink_backward", "expand", "expand_backward")
    for launch in named(launches(TRAIN, linear(), MoSConfig(), dtype=dtype), *names):
        ptx = compiled_for("sm_90", launch).asm["ptx"]
        assert re.search(r"cp\.async\.wait_group \s*[1-9]", ptx), (launch.name, launch.constants)


@pytest.mark.parametrize("T", [TRAIN, DECODE])
@every_nvidia
def test_wide_operands_are_loaded_sixteen_bytes_at_a_time(architecture, T):
    """Those of x, dy, z and B; h is read in pieces of r."""
    reading = [name for name in WIDE_OF[T] if name != "activated_expand"]
    for launch in named(default_launches(architecture, T), *reading):
        if launch.name == "activated_norm" and not dict(launch.constants)["BACKWARD"]:
            continue
        assert SIXTEEN_BYTES.search(compiled_for(architecture, launch).asm["ptx"]), (launch.name, launch.constants)


# nothing about T but its bucket chooses or specialises a kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "config",
    [MoSConfig(), linear(), linear(activation="silu"), linear(share_a=False, r=5, lora_dropout=0.1)],
    ids=["ffn", "linear", "silu", "odd"],
)
@pytest.mark.parametrize("widths", [(64, 160), (37, 53)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_no_new_kernel_over_varying_T(dtype, config, widths, wrapped):
    for counts in ((1, 2, 3, 7, 16, 33, 48, 64), (65, 66, 128, 1000, 8192, 99_999)):
        found = {frozenset(layer_launches("sm_90", config, T, *widths, dtype, wrapped)) for T in counts}
        assert len(found) == 1
        assert len({frozenset(ffn_launches("sm_90", config, T, widths[1], dtype)) for T in counts}) == 1


def test_a_specialised_T_would_be_seen():
    """The description of a launch tells sizes that Triton specialises on apart."""
    config = MoSConfig()
    narrow, wide = (layer_launches("sm_90", config, 16, d_in, 64, torch.bfloat16) for d_in in (1536, 1537))
    assert set(narrow) != set(wide)
