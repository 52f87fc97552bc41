"""FFN blocks: recognising the form of a block, and replacing its forward by one that passes the gates to its linears.

The forward of a block is traced by torch.fx. It is replaced only if it has one of these forms:

    down(act(gate(x)) * up(x))                                     Llama, Qwen, Mistral, Gemma
    down(act(first) * second)   first, second = gate_up(x).chunk(2, -1)     Phi-3, GLM
    down(act(up(x)))                                               GPT-2, CLIP, GPT-NeoX, Phi

act may be several modules with one input each. Such modules, for example dropout, may also be before and after down.
The names of the children do not matter. Liger's forwards of the first two forms are known by name.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import types
from dataclasses import replace

from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer

from mos_kernels.ffn import FFNForm, bound_form, ffn_forward
from mos_kernels.huggingface.targets import is_linear
from mos_kernels.layer import MoSRouter


def add_router(block: nn.Module, form: FFNForm, router: MoSRouter) -> None:
    """Register the router on the block, and give this instance (not its class) the forward that uses the router."""
    block.mos_router = router
    _bind(block, form)
    block._replicate_for_data_parallel = functools.partial(_replicate, block, form)


def remove_router(block: nn.Module) -> None:
    """Undo `add_router`: the block has the forward of its class again."""
    del block.mos_router
    del block._replicate_for_data_parallel
    if hasattr(block, "_hf_hook"):
        block._old_forward = types.MethodType(type(block).forward, block)
    if _is_bound(vars(block).get("forward")):
        del block.forward


def restore_forwards(model: nn.Module) -> None:
    """Put back the forwards of `add_router` that Liger has replaced since; with Liger's, no gates reach the linears."""
    for block in model.modules():
        replicate = vars(block).get("_replicate_for_data_parallel")
        if isinstance(replicate, functools.partial) and replicate.func is _replicate and _ligers(block):
            _bind(block, replicate.args[1])


def _bind(block: nn.Module, form: FFNForm) -> None:
    # a partial of a module-level function can be pickled, and deepcopy binds it to the copy; a bound method cannot
    forward = functools.partial(ffn_forward, block, form)
    if hasattr(block, "_hf_hook"):  # accelerate's wrapper calls this one
        block._old_forward = forward
    if not hasattr(block, "_hf_hook") or _ligers(block):  # Liger replaces that wrapper too
        block.forward = forward


def _is_bound(forward) -> bool:
    return isinstance(forward, functools.partial) and forward.func is ffn_forward


def _replicate(block: nn.Module, form: FFNForm) -> nn.Module:
    replica = type(block)._replicate_for_data_parallel(block)
    _bind(replica, form)
    return replica


# recognition: the block's own forward, traced on a symbol


def recognise(block: nn.Module) -> FFNForm | None:
    """The form of the block, with no linear routed; None if its forward has none of the forms. No tensor is computed.

    If the forward was replaced already, the form is the one that was recognised then.
    """
    bound = bound_form(block)
    if bound is not None:
        return replace(bound, routed=())
    by_liger = _liger_form(block)
    if by_liger is not None:
        return by_liger
    if not _has_class_forward(block):
        return None
    expression = _trace(block, training=True)
    if expression is None or expression != _trace(block, training=False):
        return None
    return _parse(block, expression)


_GATED, _FUSED = ("gate_proj", "up_proj"), ("gate_up_proj",)
_LIGER = {
    "LigerSwiGLUMLP": (_GATED, "silu"),
    "LigerQwen3MoeSwiGLUMLP": (_GATED, "silu"),
    "LigerHunyuanV1SwiGLUMLP": (_GATED, "silu"),
    "LigerPhi3SwiGLUMLP": (_FUSED, "silu"),
    "LigerGEGLUMLP": (_GATED, "gelu_tanh"),
}


def _ligers(block: nn.Module) -> str | None:
    """The name of Liger's class whose forward the block has, of its own or by its class; None for other forwards."""
    forward = vars(block).get("forward", type(block).forward)
    forward = getattr(forward, "__func__", forward)
    name, _, method = getattr(forward, "__qualname__", "").partition(".")
    known = method == "forward" and name in _LIGER and forward.__module__.startswith("liger_kernel.")
    return name if known else None


def _liger_form(block: nn.Module) -> FFNForm | None:
    """The form of a forward of Liger's. It has a kernel, which cannot be traced."""
    name = _ligers(block)
    if name is None:
        return None
    inputs, phi = _LIGER[name]
    if not all(name in block._modules and _is_linear(block, name) for name in (*inputs, "down_proj")):
        return None
    return FFNForm(inputs, inputs == _FUSED, (), (), "down_proj", (), phi=phi)


def _has_class_forward(block: nn.Module) -> bool:
    bound = vars(block).get("_old_forward" if hasattr(block, "_hf_hook") else "forward")
    return bound is None or getattr(bound, "__func__", None) is type(block).forward


class _NotPlain(BaseException):
    """The forward does something that no form has. A BaseException, so that no `except Exception` in it hides this."""


def _refuse(*_):
    raise _NotPlain


class _Value(Proxy):
    """A symbolic tensor that can be passed to a child, multiplied, and split in two.

    Everything else raises, where torch.fx would answer differently from a tensor, or would not record the operation. So
    no branch can depend on the input without being noticed.
    """

    def chunk(self, chunks, dim=0):
        if (chunks, dim) != (2, -1):
            raise _NotPlain
        return tuple(self.tracer.create_proxy("call_function", _half, (self, i), {}) for i in range(2))

    def __getattr__(self, name):
        raise _NotPlain

    @classmethod
    def __torch_function__(cls, *_):
        raise _NotPlain

    __class__ = property(_refuse)  # isinstance asks for it
    __bool__ = __len__ = __iter__ = __contains__ = __int__ = __float__ = __index__ = __hash__ = _refuse
    __imul__ = __setitem__ = _refuse


def _half(x, index: int):
    """Stands for x.chunk(2, -1)[index]."""


class _Tracer(Tracer):
    """Records the calls of a block's children. The children do not run."""

    def is_leaf_module(self, module, name):
        return True

    def proxy(self, node):
        return _Value(node, self)

    def create_arg(self, value):
        return value.node if type(value) is _Value else super().create_arg(value)


def _trace(block: nn.Module, training: bool):
    """What forward(x) computes, or None: ("x",), ("call", child, e), ("mul", e, e) or ("half", 0 or 1, e)."""
    kind = type(block)
    parameters = list(inspect.signature(kind.forward).parameters.values())
    if len(parameters) != 2 or parameters[1].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return None
    try:
        probe = copy.copy(block)
        vars(probe)["training"] = training
        probe.__class__ = type(kind.__name__, (kind,), {"__setattr__": _refuse, "__delattr__": _refuse})
        return _expressions(_Tracer().trace(probe))
    except (_NotPlain, Exception):  # a forward that fails on a symbol has none of the forms
        return None


def _expressions(graph: Graph):
    """The graph as one expression. Raises _NotPlain if part of the graph is not in the expression."""
    found: dict[Node, tuple] = {}
    for node in graph.nodes:
        inputs = [found[arg] for arg in node.args if isinstance(arg, Node)]
        kind = node.target if node.op == "call_function" else node.op
        if node.op == "output":
            return found[node.args[0]]
        if node.kwargs or not node.users:
            raise _NotPlain
        if kind == "placeholder":
            found[node] = ("x",)
        elif kind == "call_module" and len(inputs) == len(node.args) == 1:
            found[node] = ("call", node.target, *inputs)
        elif kind is operator.mul and len(inputs) == 2:
            found[node] = ("mul", *inputs)
        elif kind is _half:
            found[node] = ("half", node.args[1], *inputs)
        else:
            raise _NotPlain


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
    """The fields inputs, fused and activation of act(gate) * up; None for any other product."""
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
    """The children that are applied one after the other, innermost first, and the expression they are applied to."""
    names = []
    while expression[0] == "call":
        names.append(expression[1])
        expression = expression[2]
    return tuple(reversed(names)), expression


def _is_linear(block: nn.Module, name: str) -> bool:
    return is_linear(block.get_submodule(name))
