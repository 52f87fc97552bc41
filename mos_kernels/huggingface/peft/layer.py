"""The layers of the peft method: a base with several adapters by name, and the routers of an FFN block by adapter.

Parameters are named `<linear>.mos_lora_A.<adapter>` and `<block>.mos_router.<adapter>.weight`, peft's convention, so
that a file holds the names of `save_adapter`.
"""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mos_kernels.config import MoSConfig
from mos_kernels.huggingface.targets import in_features, layer_kind, out_features
from mos_kernels.layer import (
    ADAPTER_PARAMETERS,
    Float32State,
    MoSAdapter,
    MoSRouter,
    MoSWrapped,
    adapter_tensors,
    device_and_dtype,
)

WHY_NO_MERGE = (
    "a Mixture-of-Space adapter cannot be merged into the base weights: what it adds depends on the token (top-k "
    "routing and curvature). Keep it beside the base, call unload() to take it off, or write the nearest plain LoRA, "
    "which merges: mos_kernels.huggingface.export_lora(model, calibration_batches, folder)"
)


class Float32Parameters(Float32State, nn.ParameterDict):
    """Parameters that stay float32, whatever the layer, a loader or a caster does."""

    @property
    def _float32_state(self) -> tuple[str, ...]:
        return tuple(self.keys())

    def __setitem__(self, key: str, value: Tensor) -> None:
        if value.dtype != torch.float32:
            value = nn.Parameter(value.detach().float(), requires_grad=value.requires_grad)
        super().__setitem__(key, value)

    def _refill_constants(self) -> None:
        pass


class MoSPeftAdapter(MoSAdapter):
    """One adapter of a `MoSPeftLayer`, whose parameters lie in the layer's dictionaries."""

    def __init__(self, layer: MoSPeftLayer, name: str, config: MoSConfig):
        super().__init__()
        self._layer, self.name = (layer,), name  # a tuple: not a submodule of its own child
        self.in_features = layer.in_features
        self._add_constants(config)

    def _parameter(self, name: str) -> nn.Parameter | None:
        parameters = getattr(self._layer[0], name)
        return parameters.get(self.name)

    mos_lora_A = property(lambda self: self._parameter("mos_lora_A"))
    mos_lora_B = property(lambda self: self._parameter("mos_lora_B"))
    mos_curvature = property(lambda self: self._parameter("mos_curvature"))
    mos_router = property(lambda self: self._parameter("mos_router"))

    def _constants_device(self) -> torch.device:
        return device_and_dtype(self._layer[0].get_base_layer())[0]  # parameters may be on the meta device yet

    def forward(
        self,
        x: Tensor,
        gates: Tensor | None = None,
        backend: str = "auto",
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        base_output: Tensor | None = None,
    ) -> Tensor:
        """The base, given as in `mos_linear`, plus this adapter."""
        if self.mos_lora_A.is_meta:
            raise RuntimeError(
                f"the parameters of the adapter {self.name!r} are on the meta device: load them, or, where accelerate "
                "offloads them, pass it preload_module_classes=['MoSPeftLayer']"
            )
        return self._adapt(x, gates, backend, weight, bias, base_output)

    def extra_repr(self) -> str:
        spaces = ", ".join(f"{count} {name}" for name, count in self.config.spaces.items())
        return f"r={self.config.r}, experts=({spaces}), k={self.config.num_experts_per_tok}"


class MoSTunerLayer(BaseTunerLayer):
    """What peft asks of any of its layers."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(WHY_NO_MERGE)

    def unmerge(self) -> None:
        raise NotImplementedError(WHY_NO_MERGE)


class MoSPeftLayer(nn.Module, MoSTunerLayer):
    """A linear, `base_layer`, with Mixture-of-Space adapters by name; those that are active are added.

    A dense base and the first active adapter are one operation, as in MoSLinear; any other base runs as it is.
    """

    adapter_layer_names = ADAPTER_PARAMETERS
    other_param_names = ("mos_adapter",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MoSConfig, inference_mode: bool = False):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features(base_layer), out_features(base_layer)
        self.mos_lora_A, self.mos_lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.mos_curvature, self.mos_router = Float32Parameters(), nn.ParameterDict()
        self.mos_adapter = nn.ModuleDict()
        self._disable_adapters, self.merged_adapters = False, []
        self._active_adapter = adapter_name
        base_layer.requires_grad_(False)
        self.update_layer(adapter_name, config, inference_mode)
        self.train(base_layer.training)

    def update_layer(self, adapter_name: str, config: MoSConfig, inference_mode: bool = False) -> None:
        """Add an adapter at its start. config: with this linear's rank, alpha and router_scope."""
        device, dtype = device_and_dtype(self.get_base_layer())
        tensors = adapter_tensors(config, self.in_features, self.out_features, device, dtype)
        for name, tensor in tensors.items():
            if tensor is not None:  # in the base's dtype, as peft's, which then casts to float32 unless told not to
                getattr(self, name)[adapter_name] = nn.Parameter(tensor.data.to(dtype))
        adapter = MoSPeftAdapter(self, adapter_name, config).train(self.training)
        self.mos_adapter[adapter_name] = adapter
        adapter.reset_adapter_parameters()
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As peft's, but that values which were loaded are not rounded to the base's dtype."""
        device = device_and_dtype(self.get_base_layer())[0] if device is None else device
        for name in ADAPTER_PARAMETERS:
            parameters = getattr(self, name)
            if adapter_name in parameters and not parameters[adapter_name].is_meta:
                parameters[adapter_name].data = parameters[adapter_name].data.to(device)
        if adapter_name in self.mos_adapter and not self.mos_curvature[adapter_name].is_meta:
            self.mos_adapter[adapter_name].to(device)

    def _freeze_non_trainable_peft_weights(self, adapter_names=None) -> None:
        for name, adapter in self.mos_adapter.items():
            if not adapter.config.learn_curvature:
                self.mos_curvature[name].requires_grad_(False)

    def forward(self, x: Tensor, gates: dict[str, Tensor] | None = None, backend: str = "auto") -> Tensor:
        """y = base(x) + the active adapters' outputs. x (..., d_in) -> (..., d_out).

        gates: those of the FFN block's routers, (..., E) by adapter; an adapter without uses its own router.
        """
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.mos_adapter]
        if not active:
            return self.base_layer(x)
        gates = {} if gates is None else gates
        base = self._base(x)
        for name in active:
            adapter = self.mos_adapter[name]
            if adapter._layer[0] is not self:  # DataParallel's copies of the two
                adapter._layer = (self,)
            y = adapter(x, gates.get(name), backend, *base)
            base = (None, None, y)
        return y

    def _base(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """weight and bias of a dense base, or the output on x of any other."""
        linear = self.base_layer
        if layer_kind(linear) is MoSWrapped or linear._forward_hooks or linear._forward_pre_hooks:
            return None, None, linear(x)
        if "forward" in vars(linear):  # accelerate's hook stands there
            return None, None, linear(x)
        return (linear.weight.t() if isinstance(linear, Conv1D) else linear.weight), linear.bias, None

    def freeze_for_inference(self) -> MoSPeftLayer:
        """As MoSLayer's, for every adapter."""
        self.eval()
        for adapter in self.mos_adapter.values():
            adapter._freeze(*device_and_dtype(self.get_base_layer()))
        return self

    def __repr__(self) -> str:
        return "mos." + super().__repr__()


class MoSPeftRouter(nn.ModuleDict, MoSTunerLayer):
    """The routers of an FFN block, one by adapter. Its output goes to the block's `MoSPeftLayer`s."""

    adapter_layer_names = ("routers",)
    weight = bias = None  # BaseTunerLayer's would look for a base

    def __init__(self, reads: nn.Module, adapter_name: str):
        super().__init__()
        self._reads = (reads,)  # the linear whose device the routers follow; not a submodule
        self._disable_adapters, self.merged_adapters = False, []
        self._active_adapter = adapter_name

    @property
    def routers(self) -> MoSPeftRouter:
        return self

    def get_base_layer(self) -> nn.Module:
        return self._reads[0]

    def update_layer(self, adapter_name: str, router: MoSRouter, active_adapters, inference_mode: bool = False) -> None:
        """Add the router of an adapter."""
        self[adapter_name] = router.to(device_and_dtype(self._reads[0])[1])
        self.set_adapter(active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self and not self[adapter_name].weight.is_meta:
            self[adapter_name].to(device_and_dtype(self._reads[0])[0] if device is None else device)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The gates (..., E) of the active adapters, by name."""
        active = [] if self.disable_adapters else self.active_adapters
        return {name: self[name](x) for name in active if name in self}
