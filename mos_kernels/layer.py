"""The modules: `MoSLinear` and `MoSConv1D` replace a frozen dense linear, `MoSWrapped` wraps any other linear.

`MoSRouter` routes for the linears of an FFN block.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mos_kernels.backends import eager, load_backend, resolve_backend
from mos_kernels.backends.interface import ShrinkWeights
from mos_kernels.call import autocast_dtype, without_autocast
from mos_kernels.config import MoSConfig, listed
from mos_kernels.functional import mos_linear, mos_route, refuse_scripting, refuse_transforms
from mos_kernels.kept import Factors, Kept, Use, is_capturing, is_plain
from mos_kernels.lora import lora_linear
from mos_kernels.sharded import is_dtensor, whole

ADAPTER_PARAMETERS = ("mos_lora_A", "mos_lora_B", "mos_router", "mos_curvature")
"""The names of the trainable parameters of a layer. The router of a block has `mos_router.weight`."""

Module = TypeVar("Module", bound=nn.Module)
ROUTER_INIT_STD = 0.02
_DENSE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Float32State(nn.Module):
    """A module whose tensors named in `_float32_state` stay float32, with their exact values, in `.to`, `.half` etc."""

    _float32_state: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        own = [t for name in self._float32_state if (t := getattr(self, name, None)) is not None]
        was_meta = any(t.is_meta for t in own)
        own += [t.grad for t in own if t.grad is not None]

        def in_float32(t: Tensor) -> Tensor:
            moved = fn(t)
            kept = moved.dtype == torch.float32 or not any(t is one for one in own)
            return moved if kept else t.to(moved.device, torch.float32)

        super()._apply(in_float32, recurse)
        if was_meta:
            self._refill_constants()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        for name in self._float32_state:  # assign=True may bring another dtype or device
            tensor = getattr(self, name, None)
            if isinstance(tensor, nn.Parameter) and tensor.dtype != torch.float32:
                tensor.data = tensor.data.float()
        self._refill_constants()

    def _refill_constants(self) -> None:
        """Compute the buffers that depend on the configuration again, on the device of the parameters."""
        raise NotImplementedError


def parameter_shapes(config: MoSConfig, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's parameters, by name (see `MoSLayer`). A LoRA has only A and B."""
    E, r = config.num_experts, config.r
    shapes: dict[str, tuple[int, ...]] = {"mos_lora_A": (r, d_in), "mos_lora_B": (d_out, E, r)}
    if not config.share_a:
        shapes["mos_lora_A"] = (E, r, d_in)
    if not config.is_lora:
        shapes["mos_curvature"] = (E,)
    if not config.is_lora and config.router_scope == "linear":
        shapes["mos_router"] = (E, d_in)
    return shapes


def adapter_tensors(
    config: MoSConfig, d_in: int, d_out: int, device: torch.device, dtype: torch.dtype
) -> dict[str, nn.Parameter | None]:
    """The parameters of an adapter by name, not initialised. A, B and router have this dtype."""
    tensors: dict[str, nn.Parameter | None] = {}
    for name, shape in parameter_shapes(config, d_in, d_out).items():
        is_theta = name == "mos_curvature"
        empty = torch.empty(shape, device=device, dtype=torch.float32 if is_theta else dtype)
        tensors[name] = nn.Parameter(empty, requires_grad=not is_theta or config.learn_curvature)
    return tensors | {name: None for name in ADAPTER_PARAMETERS if name not in tensors}


class MoSAdapter(Float32State):
    """The adapter of a linear. A subclass has `config`, `in_features` and the parameters (see `MoSLayer`)."""

    config: MoSConfig
    in_features: int
    mos_lora_A: nn.Parameter
    mos_lora_B: nn.Parameter
    mos_curvature: nn.Parameter
    mos_router: nn.Parameter | None
    mos_curvature_map: Tensor
    mos_aux_weight: Tensor
    _float32_state = ("mos_curvature", "mos_curvature_map", "mos_aux_weight")
    token_mask: Any = None  # an object whose of(x) says which tokens are real, or None
    _kept: Kept | None = None

    def _add_parameters(self, config: MoSConfig, parameters: dict[str, nn.Parameter | None]) -> None:
        """Register and initialise the parameters, from `adapter_tensors`, and what is computed of the configuration."""
        self.config = config
        self.aux_coefficient = config.router_aux_loss_coef
        # κ = offset + gain·θ, a row each; the gain of a Euclidean expert is 0
        self.register_buffer("mos_curvature_map", None, persistent=False)
        self.register_buffer("mos_aux_weight", None, persistent=False)
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        self.reset_adapter_parameters()

    @torch.no_grad()
    def reset_adapter_parameters(self) -> None:
        """Initialise the adapter: B = 0 (unless init_lora_weights=False), θ = 0, A and the router random."""
        config = self.config
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(self.mos_lora_A, std=1 / config.r)
        else:
            bound = 1 / math.sqrt(self.in_features)  # kaiming_uniform_(a=√5) of each (r, d_in) factor, as peft
            nn.init.uniform_(self.mos_lora_A, -bound, bound)
        if config.init_lora_weights is False:
            bound = 1 / math.sqrt(config.r)
            nn.init.uniform_(self.mos_lora_B, -bound, bound)
        else:
            nn.init.zeros_(self.mos_lora_B)
        if self.mos_curvature is not None:
            nn.init.zeros_(self.mos_curvature)
        if self.mos_router is not None:
            nn.init.normal_(self.mos_router, std=ROUTER_INIT_STD)
        self._refill_constants()

    def _refill_constants(self) -> None:
        if self.config.is_lora:  # it has no buffers
            return
        config, device = self.config, self.mos_curvature.device
        unit = config.squared_length_unit(self.in_features)
        signs = torch.tensor(config.curvature_signs, dtype=torch.float64, device="cpu")
        rows = [signs * config.curvature_init / unit, signs.abs() * config.curvature_lr_ratio / unit]
        self.mos_curvature_map = torch.stack(rows).to(device, torch.float32)
        if self.mos_router is not None:
            self.mos_aux_weight = torch.full((1,), self.aux_coefficient, device=device, dtype=torch.float32)

    @property
    def curvature(self) -> Tensor:
        """The effective curvature κ of each expert, (E,) float32, in 1/length²: (κ̂_init + ratio·θ) / length_unit².

        If FSDP2 or ZeRO-3 has sharded θ, every process must read this property.
        """
        if self.config.is_lora:
            return torch.zeros(1, device=self.mos_lora_B.device)
        theta = whole(self.mos_curvature)
        return _Curvature.apply(theta, self.mos_curvature_map, self.config.curvature_max_grad_norm)

    def _adapt(
        self,
        x: Tensor,
        gates: Tensor | None,
        backend: str,
        weight: Tensor | None,
        bias: Tensor | None,
        base_output: Tensor | None,
    ) -> Tensor:
        """Base plus adapter; the base is given as in `mos_linear`. gates=None: the adapter's own router is used."""
        refuse_transforms(x)  # before κ is computed
        B = parameter_of(self, "mos_lora_B")
        if is_dtensor(B):
            raise ValueError(
                "the layer's parameters are DTensors in forward: a linear with an adapter cannot be tensor-parallel, "
                "leave it out of the plan; with FSDP2, call the module that fully_shard was called on"
            )
        dropout_p = self.config.lora_dropout if self.training else 0.0
        if self.config.is_lora:
            if gates is not None:
                raise ValueError("a single Euclidean expert is a LoRA, which has no gate: leave the gates out")
            A = parameter_of(self, "mos_lora_A")
            return lora_linear(
                x, weight, bias, A if self.config.share_a else A[0], B.squeeze(1), self.config.scaling,
                base_output=base_output, dropout_p=dropout_p,
            )  # fmt: skip
        kappa, A, prepared = self._factors(x, base_output, backend)
        router = self.mos_router if gates is None else None
        aux_weight, token_mask = (None, None) if router is None else balancing(self, x)
        return mos_linear(
            x, weight, bias, A, B, kappa,
            config=self.config, base_output=base_output, gates=gates, router=router, aux_weight=aux_weight,
            token_mask=token_mask, dropout_p=dropout_p, inference=not self.training,
            prepared=prepared, backend=backend,
        )  # fmt: skip

    def _factors(self, x: Tensor, base_output: Tensor | None, backend: str) -> Factors:
        """κ, A and the prepared B. In eval mode without gradients they are cached (see `mos_kernels.kept`)."""
        if self.training or torch.is_grad_enabled():
            if self._kept is not None:
                self._kept = None
        elif is_plain(x) and x.device == self.mos_lora_B.device:
            x_dtype = autocast_dtype(x)
            y_dtype = x_dtype if base_output is None else base_output.dtype
            kept = self._keep(x_dtype, y_dtype, resolve_backend(backend, x), is_capturing(x))
            if kept is not None:
                return kept.factors
        return Factors(self.curvature, self.mos_lora_A, None)

    def _keep(
        self, x_dtype: torch.dtype, y_dtype: torch.dtype, backend: str, capturing: bool = False, frozen: bool = False
    ) -> Kept | None:
        """The cached tensors for this use, computed again if they are not valid. None if they cannot be cached now.

        A captured CUDA graph that computes them sees later changes of the parameters. So cached tensors go into a graph
        only if `freeze_for_inference` made them.
        """
        if getattr(self, "_is_fsdp_managed_module", False):  # it refills one tensor without a new version
            return None
        tensors = self._kept_from()
        use, kept = Use(backend, x_dtype, y_dtype, self.config), self._kept
        if kept is not None and kept.is_valid(tensors, use) and not frozen:
            return kept if kept.frozen or not capturing else None
        if capturing or eager.is_observed():  # a dispatch mode's tensors may hold no numbers, as FakeTensorMode's
            return None

        def form() -> Factors:
            steps = load_backend(backend)
            with without_autocast(tensors[3]):
                _, _, A, B, *router = tensors
                A = steps.operand(A, x_dtype)
                weights = ShrinkWeights(A, router[0] if router else None, x_dtype)
                return Factors(self.curvature, A, steps.prepare(B, y_dtype, self.config, weights=weights))

        self._kept = Kept.make(tensors, use, form, frozen)
        return self._kept

    def _kept_from(self) -> tuple[Tensor, ...]:
        """The tensors from which the cached ones are computed: θ, its map, A, B, and a router of its own."""
        own: Any = self._parameters
        buffers: Any = self._buffers
        try:
            found = own["mos_curvature"], buffers["mos_curvature_map"], own["mos_lora_A"], own["mos_lora_B"]
            router = own["mos_router"]
        except KeyError:  # parametrised or pruned, or of a data-parallel replica
            found = self.mos_curvature, self.mos_curvature_map, self.mos_lora_A, self.mos_lora_B
            router = self.mos_router
        return found if router is None else (*found, router)

    def _is_kept(self, kept: Kept) -> bool:
        """Whether `kept` is the current cache, and valid for the use that it was made for."""
        return self._kept is kept and self.config is kept.use.config and kept.is_valid(self._kept_from(), kept.use)

    def routing_logits(self, x: Tensor) -> Tensor:
        """The logits (..., E) of the layer's own router on x (..., d_in), detached from the graph."""
        if self.config.is_lora:
            raise ValueError("this layer is a LoRA, one Euclidean expert: it has no router")
        if self.mos_router is None:
            raise ValueError("this layer has no router of its own (router_scope='ffn'): ask the FFN block's mos_router")
        return _routing_logits(x, self.mos_router)

    def _freeze(self, device: torch.device, dtype: torch.dtype) -> None:
        """Fill the cache now, for a base on `device` whose input and output have `dtype`."""
        if self.config.is_lora:
            return
        backend = resolve_backend("auto", torch.empty(0, device=device, dtype=dtype))
        self._keep(dtype, dtype, backend, frozen=True)

    def train(self, mode: bool = True):
        self._kept = None
        theta = self.mos_curvature
        if mode and theta is not None and theta.dtype in (torch.bfloat16, torch.float16):  # cast through .data, by TRL
            theta.data = theta.data.float()
        return super().train(mode)

    def _adapter_repr(self) -> str:
        return f"r={self.config.r}, experts=({listed(self.config.spaces)}), k={self.config.num_experts_per_tok}"

    def __prepare_scriptable__(self):
        refuse_scripting()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None}  # copies and pickles have other tensors


class MoSLayer(MoSAdapter):
    """The base class of the adapted linears. A subclass has the base's `weight` and `bias`, and the widths.

    A, B and the router are float32 at first, or float64 on a float64 base. A LoRA (`MoSConfig.is_lora`) has neither
    curvature nor router.

    Attributes:
        mos_lora_A: (r, d_in), or (E, r, d_in) with share_a=False.
        mos_lora_B: (d_out, E, r).
        mos_curvature: (E,), the trained parameter θ of the curvature, always float32.
        mos_router: (E, d_in) with router_scope="linear", else None.
    """

    out_features: int
    weight: Any
    bias: Any

    def _add_adapter(self, config: MoSConfig) -> None:
        if not isinstance(config, MoSConfig):
            raise TypeError(f"config is a {type(config).__name__}: pass a mos_kernels.MoSConfig")
        device, dtype = device_and_dtype(self)
        widths = self.in_features, self.out_features
        parameters = adapter_tensors(config, *widths, device, eager.compute_dtype(dtype))
        self.requires_grad_(False)  # so far it has the base's parameters alone
        self._add_parameters(config, parameters)

    def _base(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Weight and bias of a dense base, and None; or (None, None, its output on x) of any other base."""
        return dense_weight(self), parameter_of(self, "bias"), None

    def forward(self, x: Tensor, gates: Tensor | None = None, backend: str = "auto") -> Tensor:
        """y = base(x) + adapter(x), the paper's equations 5 to 8.

        Args:
            x: (..., d_in), in the base's dtype, or any float dtype under autocast.
            gates: (..., E), the output of a `MoSRouter`. None: the layer's own router is used.
            backend: "auto", "eager" or "triton".

        Returns y, (..., d_out). Raises ValueError for a width, dtype, gates or backend that does not fit. The message
        names the remedy.
        """
        return self._adapt(x, gates, backend, *self._base(x))

    def freeze_for_inference(self):
        """Switch to eval mode, and cache what depends only on the parameters: κ, G = BᵀB, and A, B and router cast.

        Only CUDA graphs need this call. Without it, the first call in eval mode without gradients caches the same. A
        graph that is captured after this call uses the cache; capture it again after the parameters change. A graph
        that is captured without it computes these tensors at each replay. An FFN block that runs as one operation
        caches its router when it first runs after all of its linears were frozen.

        The cache is valid as long as the parameters do not change. A write through `.data` (`p.data.copy_(...)`) or
        through numpy cannot be noticed: call `eval()` after it. `train()` and `eval()` undo the call. Returns the
        layer.
        """
        self.eval()
        self._freeze(*device_and_dtype(self))
        return self

    def extra_repr(self) -> str:
        base = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{base}, {self._adapter_repr()}, router={self.config.router_scope}"


class MoSLinear(MoSLayer, nn.Linear):
    """A frozen `nn.Linear` with a Mixture-of-Space adapter.

        layer = MoSLinear.from_linear(linear, MoSConfig(r=8, router_scope="linear"))
        y = layer(x)  # (..., d_in) -> (..., d_out)

    With router_scope="linear" the layer has a router of its own. With "ffn", the default, it needs the gates of a
    `MoSRouter`: `layer(x, gates)`.

    `MoSLayer` lists the parameters of the adapter. weight (d_out, d_in) and bias (d_out,) are the base's own
    parameters, frozen, under the base's names. So a checkpoint of the whole model loads into the model without
    adapters.
    """

    def __init__(self, in_features, out_features, bias=True, *, config: MoSConfig, device=None, dtype=None):
        """A new linear, initialised as `nn.Linear`, with an adapter. device, dtype: of weight and bias.

        Raises TypeError if config is no MoSConfig.
        """
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self._add_adapter(config)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: MoSConfig) -> MoSLinear:
        """Put an adapter on `linear`. The layer uses its weight and bias without copying them, and freezes them.

        Raises TypeError if linear is no nn.Linear, and ValueError if it has an adapter or is not dense (see
        `MoSWrapped`).
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"{type(linear).__name__} is no nn.Linear: MoSLinear adapts nn.Linear, MoSConv1D transformers' Conv1D"
            )
        if isinstance(linear, MoSLayer):
            raise ValueError("this linear has a MoS adapter already: start from layer.to_linear()")
        _require_dense(linear)
        layer = _adopt(cls, linear, linear.out_features, linear.in_features)
        layer._add_adapter(config)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The base as a plain nn.Linear with the same weight and bias parameters."""
        return _adopt(nn.Linear, self, self.out_features, self.in_features).train(self.training)


class MoSConv1D(MoSLayer):
    """transformers' `Conv1D` (GPT-2) with a Mixture-of-Space adapter: `MoSLinear` with a weight of (d_in, d_out)."""

    def __init__(self, nf: int, nx: int, *, config: MoSConfig, device=None, dtype=None):
        super().__init__()
        self.nf = self.out_features = nf
        self.nx = self.in_features = nx
        self.weight = nn.Parameter(torch.empty(nx, nf, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(nf, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)
        self._add_adapter(config)

    @classmethod
    def from_linear(cls, conv1d: Any, config: MoSConfig) -> MoSConv1D:
        """Put an adapter on a Conv1D. The layer uses its weight and bias without copying them, and freezes them."""
        if not is_conv1d(conv1d) or isinstance(conv1d, MoSConv1D):
            raise TypeError(f"{type(conv1d).__name__} is not transformers' Conv1D: MoSLinear adapts nn.Linear")
        _require_dense(conv1d)
        nx, nf = conv1d.nx, conv1d.nf
        layer = _adopt(cls, conv1d, nf, nx)
        layer.nf, layer.nx = nf, nx
        layer._add_adapter(config)
        return layer.train(conv1d.training)


class MoSWrapped(MoSLayer):
    """Any other linear, `base_layer`, with a Mixture-of-Space adapter. The linear runs as it is.

    It is for linears whose weight is not a dense parameter: quantised by bitsandbytes, torchao and others,
    parametrised, or with their own forward. y has the dtype of the base's output. In a state dict, the base's tensors
    have the same names as without the adapter, so a checkpoint of the whole model loads into the model without
    adapters. Everything else is as in `MoSLinear`.
    """

    def __init__(self, base_layer: nn.Module, config: MoSConfig):
        super().__init__()
        if isinstance(base_layer, MoSLayer):
            raise ValueError("this linear has a MoS adapter already: start from its base")
        names = ("nx", "nf") if is_conv1d(base_layer) else ("in_features", "out_features")
        widths: list[Any] = [getattr(base_layer, name, None) for name in names]
        if not all(isinstance(width, int) for width in widths):
            raise TypeError(
                f"{type(base_layer).__name__} has no {' and '.join(names)}: MoSWrapped adapts linear modules"
            )
        self.in_features, self.out_features = widths
        self.base_layer: Any = base_layer
        self.register_state_dict_post_hook(_without_base_layer)
        self.register_load_state_dict_pre_hook(_with_base_layer)
        self._add_adapter(config)
        self.train(base_layer.training)

    @classmethod
    def from_linear(cls, linear: nn.Module, config: MoSConfig) -> MoSWrapped:
        """Put an adapter on `linear`, which is frozen and otherwise not changed."""
        return cls(linear, config)

    def to_linear(self) -> nn.Module:
        """The base."""
        return self.base_layer

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight of the base, in the form that it has there."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self.base_layer.bias

    def _base(self, x: Tensor) -> tuple[None, None, Tensor]:
        return None, None, self.base_layer(x)


def _without_base_layer(layer: MoSWrapped, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict) -> None:
    inner = f"{prefix}base_layer."
    for name in [name for name in state_dict if name.startswith(inner)]:
        state_dict[prefix + name.removeprefix(inner)] = state_dict.pop(name)


def _with_base_layer(layer: MoSWrapped, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    own = tuple(f"{prefix}{name}" for name in ("base_layer.", "mos_"))
    for name in [name for name in state_dict if name.startswith(prefix) and not name.startswith(own)]:
        state_dict[f"{prefix}base_layer.{name.removeprefix(prefix)}"] = state_dict.pop(name)


class RoutesBlock(nn.Module):
    """What an FFN block has as its router. It holds what the block keeps in eval mode, until `train()` or `eval()`."""

    _standing: Any = None  # see `mos_kernels.ffn_kept`

    def train(self, mode: bool = True):
        self._standing = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_standing": None}  # copies and pickles have other tensors


class MoSRouter(RoutesBlock, Float32State):
    """The router of an FFN block: x (..., d_in) -> gates (..., E), used by every adapted linear of the block.

        gates = router(x)
        y = down(act(gate(x, gates)) * up(x, gates), gates)

    weight (E, d_in) is initialised as normal(0, 0.02) in float32. Logits are computed in float32, or in float64 for
    float64 input. In training mode, backward adds the gradient of the load-balancing loss, times `mos_aux_weight`, to
    the gradient of the logits.
    """

    _float32_state = ("mos_aux_weight",)
    token_mask: Any = None  # an object whose of(x) says which tokens are real, or None

    def __init__(self, in_features: int, config: MoSConfig, device=None, dtype=None):
        """in_features: d_in, the width of the block's input. dtype: of the weight, by default float32."""
        super().__init__()
        self.in_features, self.config = in_features, config
        self.aux_coefficient = config.router_aux_loss_coef
        self.weight = nn.Parameter(
            torch.empty(config.num_experts, in_features, device=device, dtype=dtype or torch.float32)
        )
        self.register_buffer("mos_aux_weight", torch.empty(1, device=device, dtype=torch.float32), persistent=False)
        self.reset_adapter_parameters()

    @torch.no_grad()
    def reset_adapter_parameters(self) -> None:
        """Initialise the weight, and set the weight of the load-balancing gradient to `aux_coefficient`."""
        nn.init.normal_(self.weight, std=ROUTER_INIT_STD)
        self._refill_constants()

    def _refill_constants(self) -> None:
        self.mos_aux_weight = torch.full((1,), self.aux_coefficient, device=self.weight.device, dtype=torch.float32)

    def forward(self, x: Tensor, token_mask: Tensor | None = None, backend: str = "auto") -> Tensor:
        """The gates of x.

        Args:
            x: (..., d_in).
            token_mask: (...,), False for tokens that load balancing leaves out, such as padding. None: the attention
                mask of the model around the router if `apply_mos` put the router there; else all tokens count.
            backend: "auto", "eager" or "triton".

        Returns (..., E), with zeros for the experts that a token does not use.
        """
        aux_weight, known = balancing(self, x)
        token_mask = known if token_mask is None else token_mask
        return mos_route(
            x, self.weight, config=self.config, aux_weight=aux_weight, token_mask=token_mask,
            inference=not self.training, backend=backend,
        )  # fmt: skip

    def __prepare_scriptable__(self):
        refuse_scripting()

    def routing_logits(self, x: Tensor) -> Tensor:
        """The logits (..., E) of x, detached from the graph."""
        return _routing_logits(x, self.weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, experts={self.config.num_experts}, k={self.config.num_experts_per_tok}"


class _Curvature(torch.autograd.Function):
    """κ = offset + gain·θ. With `bound`, the gradient of θ is scaled down to at most that norm.

    If the gain is 0, the gradient is set to 0: at κ = 0 the incoming gradient may be infinite, and 0·∞ would be NaN.
    """

    @staticmethod
    def forward(ctx, theta: Tensor, curvature_map: Tensor, bound: float | None) -> Tensor:
        offset, gain = curvature_map
        ctx.save_for_backward(gain)
        ctx.bound, ctx.dtype = bound, theta.dtype
        return torch.addcmul(offset, gain, theta.float())

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (gain,) = ctx.saved_tensors
        gradient = torch.where(gain == 0, 0.0, gain * gradient)
        if ctx.bound is not None:
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
            gradient = gradient * (ctx.bound / norm.clamp(min=ctx.bound)).to(gradient.dtype)
        return gradient.to(ctx.dtype), None, None


def parameter_of(module: nn.Module, name: str) -> Any:
    """getattr(module, name), but faster for parameters than nn.Module's `__getattr__`."""
    found = module._parameters
    return found[name] if name in found else getattr(module, name)


def device_and_dtype(linear: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device of any linear, adapted or not, and the dtype of its input (a guess if it is quantised)."""
    base = getattr(linear, "base_layer", linear)
    offloads, tensors = offload_hook(base), [getattr(base, "weight", None), *base.parameters(), *base.buffers()]
    tensors = [t for t in tensors if isinstance(t, Tensor)]
    floats = [t.dtype for t in tensors if t.dtype in _DENSE_DTYPES]
    dtype = getattr(base, "compute_dtype", None)
    if not isinstance(dtype, torch.dtype):
        dtype = floats[0] if floats else torch.get_default_dtype()
    if offloads is not None and offloads.execution_device is not None:
        return torch.device(offloads.execution_device), dtype
    return (tensors[0].device if tensors else torch.get_default_device()), dtype


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """A context in eval mode. Unlike `model.eval()`, it does not drop the tensors that layers have cached."""
    training = [module for model in models for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def offload_hook(module: nn.Module):
    """accelerate's hook that loads the module's offloaded weights for its forward, or None."""
    hook = getattr(module, "_hf_hook", None)
    return next((part for part in getattr(hook, "hooks", [hook]) if getattr(part, "offload", False)), None)


def has_own_forward(linear: nn.Module) -> bool:
    """Whether an attribute of the linear replaces its class's forward. Accelerate's hook does not count."""
    own = vars(linear)
    forward = own.get("_old_forward", own.get("forward"))
    return forward is not None and getattr(forward, "__func__", None) is not type(linear).forward


def is_conv1d(linear: nn.Module) -> bool:
    """Whether the weight is (d_in, d_out), as in transformers' Conv1D, which is known by name: it need not be there."""
    return type(linear) is MoSConv1D or type(linear).__name__ == "Conv1D" and hasattr(linear, "nx")


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight of a dense linear as (d_out, d_in)."""
    weight = parameter_of(linear, "weight")
    return weight.t() if is_conv1d(linear) else weight


def is_dense(linear: nn.Module) -> bool:
    """Whether the weight is an ordinary parameter: not computed, quantised or packed."""
    weight = linear._parameters.get("weight")
    return weight is not None and weight.dtype in _DENSE_DTYPES and not _is_packed(weight)


def _is_packed(weight: Tensor) -> bool:
    """Whether it is a tensor subclass that stores other numbers than it represents, as in torchao. A DTensor is not."""
    kind = type(weight.data)
    return kind not in (Tensor, nn.Parameter) and not kind.__module__.startswith("torch.")


def _require_dense(linear: nn.Module) -> None:
    changed = isinstance(linear, nn.Linear) and type(linear).forward is not nn.Linear.forward
    why = None
    if not is_dense(linear):
        why = f"the weight of this {type(linear).__name__} is no dense parameter (parametrised, quantised?)"
    elif changed or has_own_forward(linear) or linear._forward_hooks or linear._forward_pre_hooks:
        why = f"this {type(linear).__name__} has a forward or hooks of its own, which its replacement would lose"
    if why is not None:
        raise TypeError(f"{why}: use MoSWrapped(linear, config), which runs the base as it is")


def balancing(owner: MoSAdapter | MoSRouter, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The weight of the load-balancing gradient, and the mask of the model around the router; (None, None) without."""
    if not (owner.training and torch.is_grad_enabled() and owner.config.router_aux_loss_coef > 0):
        return None, None
    return owner.mos_aux_weight, None if owner.token_mask is None else owner.token_mask.of(x)


@torch.no_grad()
def _routing_logits(x: Tensor, router: Tensor) -> Tensor:
    with without_autocast(x):
        return eager.routing_logits(x.reshape(-1, x.shape[-1]), whole(router)).view(*x.shape[:-1], router.shape[0])


def _adopt(cls: type[Module], base: nn.Module, out_features: int, in_features: int) -> Module:
    """A `cls` with the same parameters as `base`."""
    layer: Any = cls.__new__(cls)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = in_features, out_features
    layer.weight = base.weight
    layer.register_parameter("bias", base.bias)
    return layer
