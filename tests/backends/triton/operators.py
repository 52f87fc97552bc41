"""Which operators of PyTorch's run beside the kernels."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Computed(TorchDispatchMode):
    """Names of the operators that read or write a tensor's numbers."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("empty", "new_empty", "empty_like", "_unsafe_view", "detach", "fill_"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))
