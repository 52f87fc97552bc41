"""Parameters that are sharded over processes: gathering them to read or save, sharding values to load, and errors.

FSDP2 and tensor parallelism shard parameters as DTensors. DeepSpeed's ZeRO-3 leaves them empty unless their module
runs. Functions that gather are collective: every process must call them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import torch.distributed as dist
from torch import Tensor, nn


def is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def is_zero3(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id")


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor: gathered if it is sharded at the moment, else the tensor itself."""
    if is_dtensor(tensor):
        return tensor.full_tensor()
    if is_zero3(tensor) and tuple(tensor.shape) != whole_shape(tensor):
        with _zero3_gathered([tensor]):
            return tensor.detach().clone()
    return tensor


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies on the CPU, without gradients."""
    with _zero3_gathered(tensors.values()):
        return {name: whole(tensor.detach()).cpu().contiguous().clone() for name, tensor in tensors.items()}


def _zero3_gathered(tensors: Iterable[Tensor]):
    partitioned = [tensor for tensor in tensors if is_zero3(tensor)]
    if not partitioned:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)


def spread_like(value: Tensor, target: Tensor) -> Tensor:
    """`value` with the device, dtype and sharding of `target`. A sharded one gets the value of the first process."""
    value = value.to(target.device, target.dtype)
    if not is_dtensor(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, target.device_mesh, target.placements)


def write_once(tensors: Iterable[Tensor], write: Callable[[], None]) -> None:
    """Call write(). If tensors are sharded, only the first process calls it, and the others wait."""
    if not any(is_dtensor(tensor) or is_zero3(tensor) for tensor in tensors):
        write()
        return
    try:
        if dist.get_rank() == 0:
            write()
    finally:
        dist.barrier()


def refuse_sharded(name: str, module: nn.Module) -> None:
    """ValueError if the linear's parameters are DTensors, since its adapter would not be sharded with them."""
    for parameter in module.parameters():
        if is_dtensor(parameter):
            placements = ", ".join(map(str, parameter.placements))
            raise ValueError(
                f"the weights of {name!r} are spread over processes (a DTensor, {placements}): with FSDP2, do this "
                "before fully_shard; a tensor-parallel linear cannot be adapted: leave it out of the tensor-parallel "
                "plan, or out of target_modules"
            )


def refuse_zero3(parameters: Iterable[Tensor]) -> None:
    """ValueError if ZeRO-3 has partitioned the adapter's parameters, since its optimizer then has copies of them."""
    if any(is_zero3(parameter) for parameter in parameters):
        raise ValueError(
            "DeepSpeed's ZeRO-3 has partitioned the adapter: do this before deepspeed.initialize (or "
            "Accelerator.prepare, or Trainer.train)"
        )


def refuse_fsdp1(model: nn.Module) -> None:
    """ValueError for a model in FSDP1, whose flattened parameters have neither names nor shapes."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(
            "the model is in FullyShardedDataParallel (FSDP1), which flattens parameters: use FSDP2, "
            "torch.distributed.fsdp.fully_shard (accelerate: fsdp_version 2)"
        )
