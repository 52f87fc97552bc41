"""`MoSPeftConfig`, with the options of MoSConfig and of peft, and the type MOSELORA for peft."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from dataclasses import InitVar, dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftType

import mos_kernels
from mos_kernels.config import MoSConfig, default_spaces
from mos_kernels.huggingface.atomic import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from mos_kernels.huggingface.card import with_import_note
from mos_kernels.huggingface.files import PEFT_TYPE, PICKLE_NAME, read_json, refuse_damaged, unknown_options
from mos_kernels.run_report.log import write_text


def _add_peft_type(name: str) -> PeftType:
    """Add a member to peft's enumeration, which has no method for this. peft's registry accepts only its members."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)  # since Python 3.12 members are attributes
    return member


MOSELORA = _add_peft_type(PEFT_TYPE)


@dataclass
class MoSPeftConfig(PeftConfig):
    """The configuration of a Mixture-of-Space adapter for peft, in place of a LoraConfig.

        model = get_peft_model(model, MoSPeftConfig(r=8, task_type="CAUSAL_LM"))

    It has the options of `MoSConfig` (see there), with the same defaults and checks, and those of peft.

    Attributes:
        target_modules: as in MoSConfig. None: the FFN linears of the model, chosen by its type.
        modules_to_save: modules that are trained and saved whole, as in peft.
        bias: only "none".

    Bad values and unknown options raise ValueError.
    """

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    spaces: dict[str, int] = field(default_factory=default_spaces)
    num_experts_per_tok: int = 4
    norm_topk_prob: bool = True
    router_scope: str = "ffn"
    router_aux_loss_coef: float = 0.01
    curvature_init: float = 0.3
    length_unit: str | float = "sqrt_dim"
    learn_curvature: bool = True
    curvature_lr_ratio: float = 30.0
    curvature_max_grad_norm: float | None = None
    share_a: bool = True
    activation: str = "identity"
    mapping: str = "stereographic"
    domain: str = "ball"
    boundary_eps: float = 4e-3
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    spaces_pattern: dict[str, dict[str, int]] | None = None
    modules_to_save: list[str] | None = None
    mos_kernels_version: str | None = None
    bias: InitVar[str] = "none"

    def __post_init__(self, bias: str) -> None:
        super().__post_init__()
        if bias != "none":
            raise ValueError(f"bias={bias!r}: the base's biases stay frozen; leave it out, or train them by hand")
        self.peft_type = MOSELORA
        self.mos_kernels_version = mos_kernels.__version__
        for name, value in self.to_mos_config().to_dict().items():
            if name != "target_modules" or self.target_modules is not None:
                setattr(self, name, value)

    @classmethod
    def paper(cls, **options) -> MoSPeftConfig:
        """As `MoSConfig.paper`. options: also those of peft, such as task_type."""
        return cls(**{**_preset(MoSConfig.paper()), **options})

    @classmethod
    def hydralora(cls, num_experts: int = 8, **options) -> MoSPeftConfig:
        """As `MoSConfig.hydralora`. options: as in `paper`."""
        return cls(**{**_preset(MoSConfig.hydralora(num_experts)), **options})

    @classmethod
    def mixture_of_lora(cls, num_experts: int = 8, **options) -> MoSPeftConfig:
        """As `MoSConfig.mixture_of_lora`. options: as in `paper`."""
        return cls(**{**_preset(MoSConfig.mixture_of_lora(num_experts)), **options})

    def to_mos_config(self) -> MoSConfig:
        """The same adapter as a MoSConfig. Raises ValueError as MoSConfig does."""
        names = (f.name for f in dataclasses.fields(MoSConfig))
        values = {name: getattr(self, name) for name in names}
        if self.target_modules is None:
            del values["target_modules"]
        # an empty list or dictionary is the same as None, as in peft
        for name in ("exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern", "spaces_pattern"):
            values[name] = values[name] or None
        return MoSConfig(**values)

    def __setattr__(self, name: str, value) -> None:
        # loaders set these two; any other change (get_peft_model writes the base model's name) means that this is no
        # longer the configuration of the folder
        if name not in ("inference_mode", "modules_to_save"):
            self.forget_folder()
        super().__setattr__(name, value)

    @property
    def read_from(self) -> Path | None:
        """The folder that this was read from; None after it was changed, or after its adapter was put on a model."""
        return vars(self).get("_read_from")

    def forget_folder(self) -> None:
        """Set `read_from` to None: from now on this is not checked against a folder."""
        vars(self).pop("_read_from", None)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder: str | None = None, **kwargs) -> MoSPeftConfig:
        """As in peft, and ValueError for damaged adapter files, before a model is changed.

        From the Hub this also downloads the weights. Later the tuner compares them with the model.
        """
        folder = _folder_of(pretrained_model_name_or_path, subfolder, cls._split_kwargs(kwargs)[0])
        if folder is not None:
            refuse_damaged(folder)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not kwargs.get("ignore_mismatched_sizes"):
            vars(config)["_read_from"] = folder and folder.absolute()
        return config

    @classmethod
    def check_kwargs(cls, **kwargs) -> dict:
        """The options of a file. ValueError for unknown ones, unless they are off; peft would drop them."""
        known = inspect.signature(cls).parameters
        if unknown := unknown_options(kwargs, known):
            raise ValueError(f"unknown options {sorted(unknown)}: MoSPeftConfig has {sorted(known)}")
        return {name: value for name, value in kwargs.items() if name in known}

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """As in peft. The model card gets the package's tag, and says what to import before loading."""
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / CONFIG_NAME
        # peft sorts keys, and of several that match a linear the first counts
        patterns = {name: getattr(self, name) for name in ("rank_pattern", "alpha_pattern", "spaces_pattern")}
        write_text(path, json.dumps({**read_json(path), **patterns}, indent=2))
        path = Path(save_directory) / CARD_NAME
        # peft writes no card into the subfolder of an adapter that is not called "default"
        card = ModelCard(path.read_text(encoding="utf-8") if path.is_file() else "---\nlibrary_name: peft\n---\n")
        card.data.tags = sorted({*(card.data.tags or []), "mos-kernels"})
        path.write_text(with_import_note(str(card), self.to_mos_config(), self.task_type), encoding="utf-8")


def _preset(config: MoSConfig) -> dict:
    """The options in which it differs from the default."""
    default = MoSConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if value != default[name]}


def _folder_of(source: str | os.PathLike, subfolder: str | None, options: dict) -> Path | None:
    """The folder of an adapter; from the Hub, the weights are downloaded too. None if peft will raise an error."""
    folder = Path(os.fspath(source), subfolder or "")
    if (folder / CONFIG_NAME).is_file():
        return folder
    repository = os.fspath(source)
    try:
        folder = Path(hf_hub_download(repository, CONFIG_NAME, subfolder=subfolder, **options)).parent
        for name in (WEIGHTS_NAME, PICKLE_NAME):
            try:
                hf_hub_download(repository, name, subfolder=subfolder, **options)
            except EntryNotFoundError:
                continue
            break
    except Exception:  # peft tries again, and raises its own error
        return None
    return folder
