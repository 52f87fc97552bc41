"""The layers of the peft method: a linear with several adapters by name, and the routers of an FFN block by adapter.

A model's parameters are named `<linear>.mos_adapter.<adapter>.mos_lora_A` and `<block>.mos_router.<adapter>.weight`.
So code that looks for `.<adapter>.` finds all parameters of an adapter, as TRL does for its reference model. In files,
tensors have the same names as those of `save_adapter`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mos_kernels.config import MoSConfig
from mos_kernels.huggingface.targets import has_hooks, in_features, layer_kind, out_features
from mos_kernels.layer import (
    MoSAdapter,
    MoSRouter,
    MoSWrapped,
    RoutesBlock,
    adapter_tensors,
    dense_weight,
    device_and_dtype,
)

WHY_NO_MERGE = (
    "a Mixture-of-Space adapter cannot be merged into the base weights: what it adds depends on the token (top-k "
    "routing and curvature), unless it is one Euclidean expert. Keep it beside the base, call unload() to take it off, "
    "or write the nearest plain LoRA, which merges: mos_kernels.huggingface.export_lora(model, calibration_batches, "
    "folder). One Euclidean expert comes out exact"
)


class MoSPeftAdapter(MoSAdapter):
    """One adapter of a `MoSPeftLayer`, with the parameters of `MoSLayer`.

    All but the curvature have the base's dtype at first. peft then casts them to float32, unless
    autocast_adapter_dtype=False.
    """

    def __init__(self, layer: MoSPeftLayer, config: MoSConfig):
        super().__init__()
        self.in_features = layer.in_features
        widths = layer.in_features, layer.out_features
        self._add_parameters(config, adapter_tensors(config, *widths, *device_and_dtype(layer)))

    @property
    def trains_curvature(self) -> bool:
        """Whether θ is trained. It is not if all experts are Euclidean, since θ then has no effect."""
        return self.config.learn_curvature and any(self.config.curvature_signs)

    def forward(self, x: Tensor, gates: Tensor | None = None, backend: str = "auto", *base: Tensor | None) -> Tensor:
        """The base's output on x plus this adapter's. base: weight and bias, or (None, None, output of the base).

        gates: those of the block's router. An adapter with a router of its own, and a LoRA, do not use them.
        """
        if self.mos_router is not None or self.config.is_lora:
            gates = None
        if self.mos_lora_A.is_meta:
            raise RuntimeError("the adapter's parameters are on the meta device: load them first")
        return self._adapt(x, gates, backend, *base)

    def extra_repr(self) -> str:
        return self._adapter_repr()


class ByAdapter(nn.Module):
    """`layer.mos_lora_A` and the like: a parameter of the layer's adapters, by adapter name, as `lora_A` in peft.

    The adapters own the parameters. transformers' loader reads and sets them here, as attributes.
    """

    def __init__(self, adapters: nn.ModuleDict, parameter: str):
        super().__init__()
        self._of = adapters._modules, parameter

    def __getitem__(self, adapter_name: str) -> nn.Parameter:
        adapters, parameter = self._of
        return getattr(adapters[adapter_name], parameter)

    def __iter__(self) -> Iterator[str]:
        return iter(self._of[0])

    def __getattr__(self, name: str):
        return self[name] if name in vars(self)["_of"][0] else super().__getattr__(name)

    def __setattr__(self, name: str, value) -> None:
        if name not in vars(self).get("_of", ((),))[0]:
            return super().__setattr__(name, value)
        adapter, parameter = self._of[0][name], self._of[1]
        if parameter == "mos_curvature" and not adapter.trains_curvature:
            value.requires_grad_(False)
        setattr(adapter, parameter, value)


class MoSTunerLayer(BaseTunerLayer):
    """What peft requires of every tuner layer."""

    cast_input_dtype_enabled = False  # no input is cast, whatever peft.helpers.disable_input_dtype_casting says

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(WHY_NO_MERGE)

    def unmerge(self) -> None:
        raise NotImplementedError(WHY_NO_MERGE)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As in peft, except that loaded values are not rounded to the base's dtype."""
        adapters = getattr(self, self.adapter_layer_names[0])
        if adapter_name in adapters and not any(p.is_meta for p in adapters[adapter_name].parameters()):
            adapters[adapter_name].to(device or device_and_dtype(self.get_base_layer())[0])


class MoSPeftLayer(nn.Module, MoSTunerLayer):
    """A linear, `base_layer`, with Mixture-of-Space adapters by name. The outputs of the active ones are added.

    A dense base and the first active adapter run as one operation, as in MoSLinear. Any other base runs as it is.
    """

    adapter_layer_names = ("mos_adapter",)
    mos_lora_A = property(lambda self: ByAdapter(self.mos_adapter, "mos_lora_A"))
    mos_lora_B = property(lambda self: ByAdapter(self.mos_adapter, "mos_lora_B"))
    mos_curvature = property(lambda self: ByAdapter(self.mos_adapter, "mos_curvature"))
    mos_router = property(lambda self: ByAdapter(self.mos_adapter, "mos_router"))

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MoSConfig, in_peft_model: bool = True):
        """in_peft_model: False for transformers' own adapters, whose loader expects other names in the state dict."""
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features(base_layer), out_features(base_layer)
        self.mos_adapter = nn.ModuleDict()
        self._active_adapter = adapter_name
        base_layer.requires_grad_(False)
        self.update_layer(adapter_name, config)
        self.train(base_layer.training)
        if not in_peft_model:
            self.register_state_dict_post_hook(_name_adapter_last)

    def update_layer(self, adapter_name: str, config: MoSConfig) -> None:
        """Add a new adapter. config: with this linear's rank, alpha and router_scope."""
        self.mos_adapter[adapter_name] = MoSPeftAdapter(self, config).train(self.training)
        self._freeze_non_trainable_peft_weights()

    def _freeze_non_trainable_peft_weights(self, adapter_names=None) -> None:
        for adapter in self.mos_adapter.values():
            if adapter.mos_curvature is not None and not adapter.trains_curvature:
                adapter.mos_curvature.requires_grad_(False)

    def forward(self, x: Tensor, gates: dict[str, Tensor] | None = None, backend: str = "auto") -> Tensor:
        """y = base(x) + the active adapters' outputs. x (..., d_in) -> (..., d_out).

        gates: (..., E) by adapter name, from the routers of the FFN block. Other adapters have routers of their own.
        """
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.mos_adapter]
        if not active:
            return self.base_layer(x)
        gates = {} if gates is None else gates
        base = self._base(x)
        for name in active:
            y = self.mos_adapter[name](x, gates.get(name), backend, *base)
            base = (None, None, y)
        return y

    def _base(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Weight and bias of a dense base, and None; or (None, None, its output on x) of any other base."""
        linear = self.base_layer
        if layer_kind(linear) is MoSWrapped or has_hooks(linear) or "forward" in vars(linear):  # accelerate's hook
            return None, None, linear(x)
        return dense_weight(linear), linear.bias, None

    def freeze_for_inference(self) -> MoSPeftLayer:
        """As in MoSLayer, for every adapter."""
        self.eval()
        for adapter in self.mos_adapter.values():
            adapter._freeze(*device_and_dtype(self))
        return self

    def _names(self, prefix: str) -> dict[str, str]:
        """The names of the parameters in a state dict, keyed by the names that end in the adapter's name."""
        return {
            f"{prefix}{parameter}.{name}": f"{prefix}mos_adapter.{name}.{parameter}"
            for name, adapter in self.mos_adapter.items()
            for parameter, _ in adapter.named_parameters()
        }

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name, own in self._names(prefix).items():  # from transformers, or from whole models of version 0.1
            if name in state_dict:
                state_dict[own] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __repr__(self) -> str:
        return "mos." + super().__repr__()


def _name_adapter_last(layer: MoSPeftLayer, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Rename as transformers expects: a tensor's name in the file, followed by the adapter's name."""
    for name, own in layer._names(prefix).items():
        state_dict[name] = state_dict.pop(own)


class MoSPeftRouter(RoutesBlock, nn.ModuleDict, MoSTunerLayer):
    """The routers of an FFN block, one for each adapter. The output goes to the block's `MoSPeftLayer`s."""

    adapter_layer_names = ("routers",)
    weight = bias = None  # those of BaseTunerLayer would look for a base layer

    def __init__(self, reads: nn.Module):
        super().__init__()
        self._reads = (reads,)  # the linear whose device the routers follow; not a submodule

    @property
    def routers(self) -> MoSPeftRouter:
        return self

    def get_base_layer(self) -> nn.Module:
        return self._reads[0]

    def update_layer(self, adapter_name: str, router: MoSRouter, active_adapters, inference_mode: bool = False) -> None:
        """Add the router of an adapter. Those of other adapters stay as they are, trainable or frozen."""
        self[adapter_name] = router.to(device_and_dtype(self._reads[0])[1])
        router.requires_grad_(adapter_name in active_adapters and not inference_mode)
        self._active_adapter = active_adapters

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The gates (..., E) of the active adapters, by name."""
        active = [] if self.disable_adapters else self.active_adapters
        return {name: self[name](x) for name in active if name in self}
