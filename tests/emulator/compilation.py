"""Triton kernels -> PTX for a GPU that need not be there, specialised on their arguments as a launch would be."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_manager, triton_key

from . import encode, machine

OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8",
    torch.bool: "*i1",
}  # fmt: skip


@dataclass(frozen=True)
class Specialised:
    """A kernel, and what about a launch chooses its code."""

    kernel: object
    architecture: str
    signature: tuple[tuple[str, str], ...]
    aligned: tuple[str, ...]
    constants: tuple[tuple[str, object], ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.removesuffix("_kernel")


@dataclass(frozen=True)
class Compiled:
    program: encode.Program
    warps: int
    shared_bytes: int


def specialised(kernel, arguments: Sequence, constants: Mapping, architecture: str) -> tuple[Specialised, list]:
    """The code that a launch would use, and those of the arguments that it takes."""
    constants = dict(constants)
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    names = [name for name in kernel.arg_names if name not in constants]
    fixed = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    signature, aligned, values = [], [], []
    for name, value in zip(names, arguments, strict=True):
        if isinstance(value, torch.Tensor):
            signature.append((name, POINTERS[value.dtype]))
            if value.data_ptr() % 16 == 0:
                aligned.append(name)
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        elif value == 1 and name not in fixed:
            constants[name] = 1
            continue
        else:
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and name not in fixed:
                aligned.append(name)
        values.append(value)
    parts = (tuple(signature), tuple(aligned), tuple(constants.items()), tuple(options.items()))
    return Specialised(kernel, architecture, *parts), values


@functools.cache
def compiled(what: Specialised) -> Compiled:
    """The kernel's program, and how it is to be launched."""
    kept = _ptx(what)
    return Compiled(encode.program(kept["ptx"]), kept["num_warps"], kept["shared"])


def _ptx(what: Specialised) -> dict:
    """As triton.compile goes, but not on to an assembler; in Triton's cache under a key of its own."""
    names, types = what.kernel.arg_names, dict(what.signature)
    source = ASTSource(
        fn=what.kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in what.constants},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in what.aligned},
    )
    target = GPUTarget("cuda", int(what.architecture.removeprefix("sm_")), 32)
    backend = make_backend(target)
    options = backend.parse_options({**dict(what.options), **source.parse_options()})
    key = "-".join([triton_key(), source.hash(), backend.hash(), options.hash(), "ptx alone"])
    cache, file = get_cache_manager(hashlib.sha256(key.encode()).hexdigest()), f"{what.name[:100]}.ptx.json"
    if found := cache.get_file(file):
        with open(found) as kept:
            return json.load(kept)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    code_generation = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, code_generation, backend.get_module_map(), context)
    stages, metadata = {}, {}
    backend.add_stages(stages, options, source.language)
    for name, stage in stages.items():
        module = stage(module, metadata)
        if name == "ptx":
            break
    kept = {"ptx": module, "num_warps": metadata.get("num_warps", options.num_warps), "shared": metadata["shared"]}
    cache.put(json.dumps(kept), file, binary=False)
    return kept


def launch(kernel, grid, arguments: Sequence, constants: Mapping, architecture: str, *schedule, **options):
    """Compile and run one launch on CPU tensors; the rest as `machine.run` takes it."""
    what, values = specialised(kernel, arguments, constants, architecture)
    made = compiled(what)
    return machine.run(made.program, grid, made.warps, made.shared_bytes, values, *schedule, **options)
