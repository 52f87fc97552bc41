"""FFN blocks: which form a block has, and the forward that hands its router's gates to its linears.

A block takes part only where its own forward, run on a symbolic input, is one of

    down(act(gate(x)) * up(x))                                     Llama, Qwen, Mistral, Gemma
    down(act(first) * second)   first, second = gate_up(x).chunk(2, -1)     Phi-3, GLM
    down(act(up(x)))                                               GPT-2, CLIP, GPT-NeoX, Phi

where any module with one input, such as dropout, may stand at act, before down and after it. The children's names do
not matter. So a forward that computes something else is never replaced.
"""

from __future__ import annotations

import functools
import inspect
import types
from dataclasses import replace

from torch import nn

from mos_kernels.ffn import FFNForm, bound_form, ffn_forward
from mos_kernels.huggingface.targets import is_linear
from mos_kernels.layer import MoSRouter


def add_router(block: nn.Module, form: FFNForm, router: MoSRouter) -> None:
    """Register the router on the block and bind the forward that uses it to this instance (not to the class)."""
    block.mos_router = router
    _bind(block, form)
    block._replicate_for_data_parallel = functools.partial(_replicate, block, form)


def remove_router(block: nn.Module) -> None:
    """Give the block back its class's own forward."""
    del block.mos_router
    del block._replicate_for_data_parallel
    if hasattr(block, "_hf_hook"):
        block._old_forward = types.MethodType(type(block).forward, block)
    else:
        del block.forward


def _bind(block: nn.Module, form: FFNForm) -> None:
    # a partial of a module-level function: unlike a bound method it pickles, and deepcopy rebinds it to the copy
    forward = functools.partial(ffn_forward, block, form)
    if hasattr(block, "_hf_hook"):  # accelerate's wrapper calls this one
        block._old_forward = forward
    else:
        block.forward = forward


def _replicate(block: nn.Module, form: FFNForm) -> nn.Module:
    replica = type(block)._replicate_for_data_parallel(block)
    _bind(replica, form)
    return replica


# recognition: the block's own forward, run on symbols


def recognise(block: nn.Module, routed: tuple[str, ...] = ()) -> FFNForm | None:
    """The form of the block, or None where its forward is not provably one of them. Runs no tensor operation.

    A block whose forward has been bound already has the form that was bound.
    """
    bound = bound_form(block)
    if bound is not None:
        return replace(bound, routed=routed)
    if not _has_class_forward(block):
        return None
    traces = {_trace(block, training) for training in (True, False)}
    if len(traces) != 1 or None in traces:
        return None
    form = _parse(block, traces.pop())
    return replace(form, routed=routed) if form else None


def _has_class_forward(block: nn.Module) -> bool:
    bound = vars(block).get("_old_forward" if hasattr(block, "_hf_hook") else "forward")
    return bound is None or getattr(bound, "__func__", None) is type(block).forward


class _NotPlain(BaseException):
    """The forward does something with its input that the forms do not have. No `except Exception` in it hides that."""


class _Value:
    """A symbolic tensor. expression: ("x",), ("call", child, e), ("mul", e, e) or ("half", 0 or 1, e).

    Everything that is not recorded raises, so that no branch can depend on the input unseen.
    """

    def __init__(self, *expression):
        self.expression = expression

    def __mul__(self, other):
        if type(other) is not _Value:
            raise _NotPlain
        return _Value("mul", self.expression, other.expression)

    def chunk(self, chunks, dim=0):
        if (chunks, dim) != (2, -1):
            raise _NotPlain
        return tuple(_Value("half", i, self.expression) for i in range(2))

    def __getattr__(self, name):
        raise _NotPlain

    def _refuse(self, *_):
        raise _NotPlain

    __class__ = property(_refuse)  # no isinstance either: it would answer otherwise than for a tensor
    __hash__ = None

    @classmethod
    def __torch_function__(cls, *_):
        raise _NotPlain


_REFUSED = """add radd sub rsub rmul imul iadd truediv rtruediv matmul rmatmul pow rpow neg abs invert and or
eq ne lt le gt ge bool len iter getitem setitem contains int float index"""
for _operation in _REFUSED.split():
    setattr(_Value, f"__{_operation}__", _Value._refuse)


class _Child:
    """Stands for a child module: calling it with one symbolic value is recorded, anything else raises."""

    def __init__(self, name: str):
        self._name = name

    def __call__(self, *args):
        if len(args) != 1 or type(args[0]) is not _Value:
            raise _NotPlain
        return _Value("call", self._name, args[0].expression)

    def __getattr__(self, name):
        raise _NotPlain


class _Self:
    """Stands for the block in its own forward: children are symbols, methods run, everything else is the block's."""

    def __init__(self, block: nn.Module, training: bool):
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "training", training)

    __class__ = property(lambda self: type(self._block))  # for super()

    def __getattr__(self, name):
        value = getattr(self._block, name)
        if isinstance(value, nn.Module):
            return _Child(name)
        if inspect.ismethod(value) and value.__self__ is self._block:
            return types.MethodType(value.__func__, self)
        return value

    def __setattr__(self, name, value):
        raise _NotPlain


def _trace(block: nn.Module, training: bool):
    """The expression that forward(x) computes, or None."""
    forward = type(block).forward
    parameters = list(inspect.signature(forward).parameters.values())
    if len(parameters) != 2 or parameters[1].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return None
    try:
        result = forward(_Self(block, training), _Value("x"))
    except (_NotPlain, Exception):  # whatever a forward raises on a symbol, it is not one of the forms
        return None
    return result.expression if type(result) is _Value else None


def _parse(block: nn.Module, expression) -> FFNForm | None:
    children, base = _unwind(expression)
    linears = [i for i, name in enumerate(children) if _is_linear(block, name)]
    if base == ("x",):
        if len(linears) != 2 or linears[0] != 0 or children[0] == children[linears[1]]:
            return None
        down = linears[1]
        return FFNForm(children[:1], False, children[1:down], (), children[down], children[down + 1 :])
    if base[0] != "mul" or len(linears) != 1:
        return None
    inputs = _parse_product(block, base[1], base[2]) or _parse_product(block, base[2], base[1])
    if inputs is None or children[linears[0]] in inputs[0]:
        return None
    down = linears[0]
    return FFNForm(*inputs, children[:down], children[down], children[down + 1 :])


def _parse_product(block: nn.Module, gate, up) -> tuple[tuple[str, ...], bool, tuple[str, ...]] | None:
    """inputs, fused and activation of act(gate) * up."""
    on_gate, gate_base = _unwind(gate)
    on_up, up_base = _unwind(up)
    if gate_base == up_base == ("x",):
        if len(on_up) != 1 or not on_gate or on_gate[0] == on_up[0]:
            return None
        inputs, activation, fused = (on_gate[0], on_up[0]), on_gate[1:], False
    elif gate_base[0] == up_base[0] == "half":
        on_fused, fused_base = _unwind(gate_base[2])
        if (gate_base[1], up_base[1]) != (0, 1) or gate_base[2] != up_base[2] or on_up:
            return None
        if fused_base != ("x",) or len(on_fused) != 1:
            return None
        inputs, activation, fused = on_fused, on_gate, True
    else:
        return None
    if not all(_is_linear(block, name) for name in inputs) or any(_is_linear(block, name) for name in activation):
        return None
    return inputs, fused, activation


def _unwind(expression) -> tuple[tuple[str, ...], tuple]:
    """The children applied one after the other, innermost first, and what they are applied to."""
    names = []
    while expression[0] == "call":
        names.append(expression[1])
        expression = expression[2]
    return tuple(reversed(names)), expression


def _is_linear(block: nn.Module, name: str) -> bool:
    return is_linear(getattr(block, name))
