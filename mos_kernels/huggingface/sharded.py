"""Parameters that are spread over processes: gathered to be saved, spread when loaded, refused where nothing else helps.

FSDP2 and tensor parallelism spread them as DTensors; DeepSpeed's ZeRO-3 leaves them empty, with the whole shape beside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn


def is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def is_zero3(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id")


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def refuse_sharded(name: str, module: nn.Module) -> None:
    """ValueError where the linear's weights are DTensors: its adapter would be no part of what spreads them."""
    for parameter in module.parameters():
        if is_dtensor(parameter):
            placements = ", ".join(map(str, parameter.placements))
            raise ValueError(
                f"the weights of {name!r} are spread over processes (a DTensor, {placements}): with FSDP2, do this "
                "before fully_shard; a tensor-parallel linear cannot be adapted, so leave it out of the tensor-parallel "
                "plan, or out of target_modules"
            )


def refuse_fsdp1(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "the model is inside FullyShardedDataParallel (FSDP1), which flattens parameters: use FSDP2, "
                "torch.distributed.fsdp.fully_shard (accelerate: fsdp_version 2)"
            )


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies on the CPU. Where tensors are spread, every process must call this."""
    with _zero3_gathered(tensors):
        return {name: _whole(t.detach()).cpu().contiguous().clone() for name, t in tensors.items()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def _zero3_gathered(tensors: dict[str, Tensor]):
    partitioned = [tensor for tensor in tensors.values() if is_zero3(tensor)]
    if not partitioned:
        return contextlib.nullcontext()
    from deepspeed.zero import GatheredParameters

    return GatheredParameters(partitioned)


def write_once(tensors: dict[str, Tensor], write: Callable[[], None]) -> None:
    """write(), where tensors are spread in the first process alone, and until then none goes on."""
    if not any(is_dtensor(tensor) or is_zero3(tensor) for tensor in tensors.values()):
        write()
        return
    try:
        if dist.get_rank() == 0:
            write()
    finally:
        dist.barrier()


def spread_like(value: Tensor, target: Tensor) -> Tensor:
    """`value` on the device, of the dtype and in the parts of `target`. Where that is spread, the first process's counts."""
    value = value.to(target.device, target.dtype)
    if not is_dtensor(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, target.device_mesh, target.placements)
