"""Parameters that are spread over processes: gathered to be saved, spread again when loaded, refused where an adapter
cannot go on them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def is_zero3(tensor: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 keeps this process's part of the parameter elsewhere and leaves it empty."""
    return hasattr(tensor, "ds_id") and tensor.numel() != tensor.ds_numel


def refuse_sharded(name: str, module: nn.Module) -> None:
    """ValueError where the weights of a linear that is to be adapted are spread over processes."""
    for parameter in module.parameters(recurse=False):
        if is_dtensor(parameter):
            raise ValueError(
                f"the weight of {name!r} is spread over processes (a DTensor, {_placements(parameter)}): with FSDP2, call "
                "apply_mos or load_adapter before fully_shard; a tensor-parallel linear cannot be adapted, so leave it "
                "out of the tensor-parallel plan (tp_plan), or out of target_modules"
            )


def _placements(tensor: Tensor) -> str:
    return ", ".join(str(placement) for placement in tensor.placements)


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies on the CPU, contiguous. Where a tensor is spread over processes all of them must call this."""
    return {name: _whole(tensor.detach()).cpu().contiguous().clone() for name, tensor in tensors.items()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def is_writer(tensors: Iterable[Tensor]) -> bool:
    """Whether this process writes: where tensors are spread, only the first one; else whoever asks."""
    return not any(is_dtensor(tensor) for tensor in tensors) or dist.get_rank() == 0
