"""The plain LoRA nearest to a Mixture-of-Space adapter on the tokens of a calibration set, as a peft adapter folder.

Linears are fitted (see `lora_fit`) in the order in which they run, several in a pass over the data. Their inputs come
from the model in which the linears of earlier passes are exported already.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mos_kernels.huggingface import files
from mos_kernels.huggingface.atomic import check_folder, new_folder
from mos_kernels.huggingface.attention_mask import fitting, mask_names
from mos_kernels.huggingface.card import classes_to_load, export_card
from mos_kernels.huggingface.lora_fit import LinearFit
from mos_kernels.huggingface.modules import (
    active_names,
    adapter_parameters,
    forward_through,
    mos_adapters,
    plain_name,
    unwrap,
)
from mos_kernels.huggingface.state import adapter_state, require_all_adapted, tensors_of
from mos_kernels.huggingface.targets import classifier_heads, refuse_offloaded, refuse_peft
from mos_kernels.layer import MoSLayer, evaluating, is_conv1d
from mos_kernels.sharded import gathered, refuse_sharded, refuse_zero3

PASSES = 10
"""How many passes over the data are made where `at_once` is not given: their parts of the model add up to half."""

RIDGE = 1e-4
IGNORED = -100
WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@dataclass
class ExportReport:
    """What was exported, and what was lost, on the tokens of the evaluation. Prints as a table.

    linears: for each linear √(E‖Δ − B A x‖² / E‖Δ‖²) as it runs in the export; None if the adapter adds nothing.
    kl: the mean of KL(mixture ‖ LoRA) over `positions`, in nats. agreement: the share of positions with the same most
    likely class or token. Both are None without logits over classes or tokens. loss, accuracy: (of the mixture, of the
    LoRA); None without labels (accuracy: without class labels). parameters: (of the mixture's adapter, of the LoRA).
    tied: the linears whose weight is also that of another module, as of a head tied to the embeddings.
    """

    rank: int
    parameters: tuple[int, int]
    linears: dict[str, float | None]
    tokens: int
    passes: int
    positions: int = 0
    kl: float | None = None
    agreement: float | None = None
    loss: tuple[float, float] | None = None
    accuracy: tuple[float, float] | None = None
    tied: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The mean of the linears' relative errors."""
        known = [error for error in self.linears.values() if error is not None]
        return sum(known) / len(known) if known else 0.0

    def __str__(self) -> str:
        return "\n".join([*self.summary(), "", *self.table()])

    def summary(self) -> list[str]:
        """What was lost, in lines of text."""
        before, after = self.parameters
        lines = [
            f"LoRA of rank {self.rank} on {len(self.linears)} linears: {after:,} parameters, where the mixture has "
            f"{before:,}",
            f"fitted on {self.tokens:,} tokens in {self.passes} passes; relative error of a linear, on average "
            f"{self.error:.3g}",
        ]
        silent = sum(error is None for error in self.linears.values())
        if silent:
            lines.append(f"the adapter adds nothing at {silent} of the linears, and neither does the LoRA")
        lines += [
            f"{name} shares its weight with another module, which a merge would change too: untie it, or do not merge"
            for name in self.tied
        ]
        if self.kl is not None:
            lines.append(
                f"over {self.positions:,} predictions: KL(mixture, LoRA) {self.kl:.4g} nats, the same most likely one "
                f"in {100 * self.agreement:.1f}%"
            )
        else:
            lines.append("no KL divergence: there are no logits over classes or tokens, or the labels ignore them all")
        for name, pair in (("loss", self.loss), ("accuracy", self.accuracy)):
            if pair is not None:
                lines.append(f"{name} {pair[0]:.4g} with the mixture, {pair[1]:.4g} with the LoRA")
        if self.loss is None:
            lines.append("no loss: the batches have no labels, under that name, or only such as are ignored")
        return lines

    def table(self) -> list[str]:
        """The relative error of each linear, in Markdown."""
        rows = [f"| {name} | {'–' if e is None else f'{e:.3g}'} |" for name, e in self.linears.items()]
        return ["| linear | relative error |", "| --- | --- |", *rows]


def export_lora(
    model: nn.Module,
    calibration_batches: Iterable[Mapping[str, Tensor] | Tensor],
    folder: str | os.PathLike,
    rank: int | None = None,
    *,
    evaluation_batches: Iterable[Mapping[str, Tensor] | Tensor] | None = None,
    at_once: int | None = None,
    ridge: float = RIDGE,
) -> ExportReport:
    """Write the LoRA that is nearest to the adapter of `model` on the calibration tokens into `folder`, for peft.

    `PeftModel.from_pretrained(base, folder)` loads it, `merge_and_unload()` merges it, and software for LoRAs can serve
    and quantise it. Modules that were trained whole beside the adapter, and a classifier's head, are exported too.

    Args:
        model: with the adapter, from apply_mos, load_adapter or peft. It is not changed.
        calibration_batches: a list, a DataLoader or another iterable that can be read several times. Its items are
            inputs of the model: dictionaries of tensors, or input_ids. Use several thousand tokens like those of the
            task. Padding, as marked by the attention_mask, is left out. Labels are used only for the report.
        folder: must not exist, or be empty.
        rank: None: the rank at which the LoRA has as many parameters as the adapter.
        evaluation_batches: the data of the report. None: the calibration data, on which the losses are optimistic.
        at_once: how many linears are fitted in one pass over the data. A linear does not see the export of others in
            the same pass. None: a tenth of them. 1: each is fitted on the output of all exported linears before it.
            Each of these linears takes memory for d_in·(d_in + d_out) float64 numbers; no token is kept.
        ridge: how much directions that are rare in the data are drawn to the Euclidean map with the mean gates, in
            units of the mean variance of the inputs.

    Returns the report, which is also in the model card. After an error nothing is written. Raises ValueError if there
    are no tokens, if no token reached a linear, for values that are not finite, for a rank below 1, for a model without
    an active adapter or with several, for a linear that has lost its adapter or that the model holds in several places,
    and for one that is inside a module which is exported whole, such as a head. Raises FileExistsError if the folder is
    not empty, or if another process is writing it: in a job of several processes, call this in one of them. Raises
    NotADirectoryError if a parent of the folder is a file, and OSError if nothing can be written.
    """
    folder = Path(folder).resolve()  # a link stays one
    check_arguments(folder, rank, at_once, ridge)
    _check_batches("calibration_batches", calibration_batches)
    if evaluation_batches is not None:
        _check_batches("evaluation_batches", evaluation_batches)
        if next(iter(evaluation_batches), None) is None:
            raise ValueError("there are no evaluation_batches: pass some, or None for the calibration's own")
    outer = unwrap(model)
    inner = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
    linears = _linears(inner)
    if adapter_state(inner) is not None:
        refuse_peft(inner)  # what that adds would be in no export
    require_all_adapted(outer)
    prompts = getattr(outer, "active_peft_config", None)
    if getattr(prompts, "is_prompt_learning", False):
        raise ValueError(f"the model has a {type(prompts).__name__} too, which no LoRA can hold: take it off first")
    whole = _modules_saved_whole(outer, inner)
    _require_outside([linear.name for linear in linears], whole[0])
    own = adapter_parameters(inner)
    wide = sum(linear.d_in + linear.d_out for linear in linears)
    total = sum(parameter.numel() for parameter in own.values())
    rank = max(round(total / wide), 1) if rank is None else rank

    with contextlib.ExitStack() as stack:
        place = stack.enter_context(new_folder(folder))
        for context in (evaluating(outer), torch.no_grad(), torch.compiler.set_stance("force_eager")):
            stack.enter_context(context)
        read_masks = mask_names(inner)
        for linear in linears:
            linear.mask_names = read_masks(linear.name, linear.layer)
            stack.enter_context(forward_through(linear.layer, linear.forward))
        order = _order(outer, linears, calibration_batches)
        step = max(math.ceil(len(order) / PASSES), 1) if at_once is None else at_once
        passes = range(0, len(order), step)
        for start in passes:
            _collect(outer, order[start : start + step], calibration_batches)
            for linear in order[start : start + step]:
                linear.fit(rank, ridge)
        report = ExportReport(rank, (total, rank * wide), {}, order[0].tokens, len(passes), tied=_tied(inner, linears))
        chosen = calibration_batches if evaluation_batches is None else evaluation_batches
        _compare(outer, linears, chosen, report)
        _write(place, inner, linears, whole, report)
    return report


# what is wrong with the arguments


def check_arguments(folder: Path, rank: int | None, at_once: int | None, ridge: float = RIDGE) -> None:
    """Raise the errors of `export_lora` for these arguments."""
    for name, value in (("rank", rank), ("at_once", at_once)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}={value!r} must be an integer of at least 1, or None")
    if not isinstance(ridge, (int, float)) or not 0 < ridge < math.inf:
        raise ValueError(f"ridge={ridge!r} must be a positive number")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already: name a folder that is not, or remove it")
    try:
        tempfile.TemporaryFile(dir=check_folder(folder.resolve())).close()
    except (FileExistsError, NotADirectoryError):
        raise
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error}): name another folder") from None


def _check_batches(name: str, batches) -> None:
    if isinstance(batches, (Tensor, Mapping, str)) or not hasattr(batches, "__iter__"):
        raise ValueError(f"{name} is a {type(batches).__name__}: pass a list of batches, or a DataLoader")
    if isinstance(batches, Iterator):
        raise ValueError(f"{name} is an iterator, and several passes are made: pass a list of batches, or a DataLoader")


# the linears of apply_mos and of peft


def _linears(model: nn.Module) -> list[LinearFit]:
    """The adapted linears of a model, with their active adapter. ValueError without one."""
    active = {id(adapter) for adapter in mos_adapters(model).values()}
    found, idle = [], set()
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for name, layer in model.named_modules():
        name, named = plain_name(name), layer._modules.get("mos_adapter")
        if isinstance(layer, MoSLayer):
            adapters = {None: layer}
        elif isinstance(named, nn.ModuleDict):
            adapters = {key: adapter for key, adapter in named.items() if id(adapter) in active}
            idle |= named.keys() - adapters.keys()
            if len(adapters) > 1:
                raise ValueError(f"{name!r} has several active adapters, {list(adapters)}: choose one with set_adapter")
            if layer.disable_adapters:
                raise ValueError(f"the adapters of {name!r} are disabled: export outside of disable_adapter()")
        else:
            continue
        if places[id(layer)] > 1:
            raise ValueError(
                f"{name!r} is one linear in {places[id(layer)]} places, and peft puts a LoRA on the first alone: its "
                "adapter has no export"
            )
        refuse_sharded(name, layer)
        refuse_offloaded(name, layer)
        for adapter_name, adapter in adapters.items():
            if adapter.mos_lora_A.is_meta:
                raise ValueError(f"{name!r} is on the meta device: load the adapter's values first")
            found.append(LinearFit(name, layer, adapter, adapter_name))
    if not found:
        others = f": it has {sorted(idle)}, choose one with set_adapter" if idle else ""
        raise ValueError(
            f"{type(model).__name__} has no active MoS adapter{others or ', put one on with load_adapter or peft'}"
        )
    refuse_zero3(adapter_parameters(model).values())
    return found


# passes over the data


class _Reached(Exception):
    """The last linear of a pass was reached, so the rest of the model need not run."""


def _run(model: nn.Module, batch: Mapping[str, Tensor] | Tensor):
    """Run the model on a batch, which is moved to the model's device."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    if not isinstance(batch, (Tensor, Mapping)):
        raise ValueError(f"a batch is a {type(batch).__name__}: make it a dictionary of tensors, or input_ids")
    values = [batch] if isinstance(batch, Tensor) else [v for v in batch.values() if isinstance(v, Tensor)]
    empty = next((tuple(value.shape) for value in values if value.numel() == 0), None)
    if empty is not None or not values and not batch:
        raise ValueError(
            f"a batch holds no tokens ({'no tensor' if empty is None else f'shape {empty}'}): leave it out"
        )
    if not values:
        kinds = ", ".join(f"{name}: {type(value).__name__}" for name, value in batch.items())
        raise ValueError(f"a batch holds no tensor ({kinds}): pass tensors, as by tokenizer(…, return_tensors='pt')")
    ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() < 2:
        raise ValueError(f"input_ids of a batch have the shape {tuple(ids.shape)}: make it (batch, sequence)")
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    return model(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()})


def _masks(batch: Mapping[str, Tensor] | Tensor, names: tuple[str, ...]) -> Callable[[Tensor], Tensor | None]:
    """Which tokens of x (..., d) are not padding, bool (...), by the mask that fits x; None: all of them.

    A decoder behind an encoder is seldom given a mask: its padding has no labels.
    """
    masks = [batch.get(name) for name in names] if isinstance(batch, Mapping) else []
    if "decoder_attention_mask" in names and masks and masks[-1] is None:
        labels = batch.get("labels")
        masks += [labels != IGNORED] if isinstance(labels, Tensor) and labels.dim() == 2 else []
    return lambda x: fitting(masks, x)


def _order(model: nn.Module, linears: list[LinearFit], batches) -> list[LinearFit]:
    """The linears in the order in which the first batch reaches them; those that it does not reach come last."""
    order: list[LinearFit] = []

    def note(linear: LinearFit) -> None:
        if linear not in order:
            order.append(linear)

    first = next(iter(batches), None)
    if first is None:
        raise ValueError("there are no calibration batches: pass some, with tokens like those of the task")
    for linear in linears:
        linear.calls, linear.on_call = 0, note
    _run(model, first)
    for linear in linears:
        linear.on_call = None
    return [*order, *(linear for linear in linears if linear not in order)]


def _collect(model: nn.Module, part: list[LinearFit], batches) -> None:
    """Run the data up to the last of these linears, and add to their statistics."""
    usual = {linear: linear.calls for linear in part}  # of a forward; more than one where layers share a linear
    calls: dict[LinearFit, int] = {}

    def stop(linear: LinearFit) -> None:
        calls[linear] += 1
        if all(calls[linear] >= max(usual[linear], 1) for linear in part):
            raise _Reached

    try:
        for batch in batches:
            calls = dict.fromkeys(part, 0)
            for linear in part:
                linear.mode, linear.on_call, linear.mask_of = "collect", stop, _masks(batch, linear.mask_names)
            with contextlib.suppress(_Reached):
                _run(model, batch)
        if not calls:
            raise ValueError("calibration_batches were empty when read again: pass a list of batches, or a DataLoader")
    finally:
        for linear in part:
            linear.mode, linear.on_call, linear.calls = "adapter", None, usual[linear]


def _compare(model: nn.Module, linears: list[LinearFit], batches, report: ExportReport) -> None:
    """Run mixture and LoRA on every batch, and fill in what the LoRA loses."""
    causal = getattr(model, "can_generate", lambda: False)() and not getattr(model.config, "is_encoder_decoder", False)
    sums = torch.zeros(4, dtype=torch.float64)  # KL, agreement, right with the mixture, right with the LoRA
    losses, weight, positions, classes = [0.0, 0.0], 0, 0, 0
    names = mask_names(model)("", model)
    for batch in batches:
        outputs = []
        for mode in ("adapter", "measure"):
            for linear in linears:
                linear.mode, linear.mask_of = mode, _masks(batch, linear.mask_names)
            outputs.append(_run(model, batch))
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        logits = [_logits(output) for output in outputs]
        shown = None if logits[0] is None else _kept(logits[0], _masks(batch, names), labels, causal)
        pair = [getattr(output, "loss", None) for output in outputs]
        if labels is not None and all(isinstance(loss, Tensor) for loss in pair):
            count = int(shown[0].sum()) if shown is not None else len(labels)
            if count:  # of no labels but ignored ones the loss is NaN
                losses = [total + float(loss) * count for total, loss in zip(losses, pair, strict=True)]
                weight += count
        if shown is None:
            continue
        kept, targets = shown
        positions += int(kept.sum())
        cut = slice(None, -1) if causal and kept.dim() > 1 else slice(None)
        mixture, lora = ((one[:, cut] if one.dim() > 2 else one)[kept] for one in logits)
        targets = None if targets is None else targets[kept]
        classes += 0 if targets is None else len(targets)
        for start in range(0, len(mixture), 512):  # of a large vocabulary a few at a time
            ours, theirs = (one[start : start + 512].double().log_softmax(-1) for one in (mixture, lora))
            best = ours.argmax(-1), theirs.argmax(-1)
            found = [(ours.exp() * (ours - theirs)).sum(), (best[0] == best[1]).sum()]
            known = None if targets is None else targets[start : start + 512]
            found += [0.0 if known is None else (one == known).sum() for one in best]
            sums += torch.tensor([float(value) for value in found], dtype=torch.float64)
    report.linears.update({linear.name: linear.error for linear in linears})
    if positions:
        report.positions = positions
        report.kl, report.agreement = (sums[:2] / positions).tolist()
    if weight:
        report.loss = losses[0] / weight, losses[1] / weight
    if classes:
        report.accuracy = tuple((sums[2:] / classes).tolist())


def _logits(output) -> Tensor | None:
    """Logits over classes or tokens; None if there are none, or only one, as in a regression."""
    logits = output.get("logits") if isinstance(output, Mapping) else None
    return logits if isinstance(logits, Tensor) and logits.dim() >= 2 and logits.shape[-1] > 1 else None


def _kept(
    logits: Tensor, mask_of: Callable, labels: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor | None] | None:
    """(which predictions count, their labels). Predictions with a label count, or those of tokens that are not padding.

    None without labels and mask. In a causal model the prediction at a token is for the next one, so the last is left
    out.
    """
    places = logits.shape[:-1]
    if labels is not None and labels.is_floating_point():  # a regression, or several labels at once
        return None
    shifts = causal and len(places) > 1
    if labels is not None and labels.shape == places:
        labels = labels.to(logits.device)
        labels = labels[:, 1:] if shifts else labels
        return labels != IGNORED, labels
    real = mask_of(logits)
    real = torch.ones(places, dtype=torch.bool, device=logits.device) if real is None else real
    return (real[:, :-1] & real[:, 1:] if shifts else real), None


# the folder


def _modules_saved_whole(outer: nn.Module, inner: nn.Module) -> tuple[list[str], dict[str, Tensor]]:
    """The modules that are saved whole beside the adapter (those that were trained, and a head), and their tensors.

    peft copies the head of every classifier for its adapter, so it expects the head in the file.
    """
    by_peft = hasattr(outer, "peft_config")
    if by_peft:
        from peft import get_peft_model_state_dict

        modules, tensors = [], {}
        for name in active_names(outer):  # of several, each on other linears
            found = get_peft_model_state_dict(outer, adapter_name=name)
            tensors |= {k.removeprefix(files.PREFIX): v for k, v in found.items() if not files.is_adapter(k)}
            modules += outer.peft_config[name].modules_to_save or []
    else:
        states = {plain_name(name): state for name, module in inner.named_modules() if (state := adapter_state(module))}
        modules = [f"{part}.{name}".lstrip(".") for part, state in states.items() for name in state.modules_to_save()]
        tensors = tensors_of(inner, [*modules, *files.named_by_ending(inner, modules)])
        if states and "" not in states:
            _warn_of_others(inner, tensors, list(states))
    for head in classifier_heads(inner) if _task_type(inner) in WITH_HEAD else ():
        modules = [*(name for name in modules if not name.startswith(f"{head}.")), head]
        if not (by_peft and any(name.startswith(f"{head}.") for name in tensors)):
            tensors |= tensors_of(inner, [head])
    present = [name for name in modules if any(f".{name}." in f".{tensor}" for tensor in tensors)]
    return list(dict.fromkeys(present)), tensors


def _warn_of_others(model: nn.Module, saved: Mapping[str, Tensor], parts: list[str]) -> None:
    """Warn if parts of the model without an adapter may have been trained: nothing notes which of them were."""
    inside = tuple(f"{part}." for part in parts)
    names = [plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad]
    others = [name for name in names if name not in saved and not name.startswith(inside)]
    if others:
        warnings.warn(
            f"the adapter is on {', '.join(parts)} alone: if other parts of {type(model).__name__} were trained, they "
            f"are not exported ({', '.join(others[:4])}{', …' if len(others) > 4 else ''}). Freeze them, or put the "
            "adapter on the whole model",
            stacklevel=4,
        )


def _tied(model: nn.Module, linears: list[LinearFit]) -> tuple[str, ...]:
    """The linears whose weight is also that of another module."""
    owners: dict[int, set[nn.Module]] = defaultdict(set)
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)].add(module)
    return tuple(
        linear.name
        for linear in linears
        if any(owners[id(parameter)] - set(linear.layer.modules()) for parameter in linear.layer.parameters())
    )


def _require_outside(linears: list[str], modules: list[str]) -> None:
    """ValueError if a linear is inside a module that is saved whole: peft would drop its LoRA without a word."""
    for module in modules:
        for name in linears:
            # peft finds these modules by the ending of their names: "classifier" is also found in pre_classifier
            if f".{module}." in f".{name}." or name.endswith(module):
                raise ValueError(
                    f"{name!r} has an adapter, and {module!r}, which was trained or is the head, is exported whole: "
                    "peft would load it without the LoRA. Leave the linear out of target_modules (exclude_modules), or "
                    "keep its weight and bias frozen"
                )


def _target_modules(model: nn.Module, names: list[str]) -> list[str]:
    """The ends of the linears' names, as users and servers write them; full names if the ends match other modules."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    matched = {plain_name(name) for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return ends if matched == set(names) else names


def _write(folder: Path, model: nn.Module, linears: list[LinearFit], whole, report: ExportReport) -> None:
    modules, module_tensors = whole
    tensors = dict(module_tensors)
    for linear in linears:
        tensors[f"{linear.name}.lora_A.weight"], tensors[f"{linear.name}.lora_B.weight"] = linear.factors
    kind, about_base = files.class_of(model), files.about_base(model)
    config = {
        **about_base,
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "r": report.rank,
        "lora_alpha": report.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _target_modules(model, [linear.name for linear in linears]),
        "fan_in_fan_out": any(is_conv1d(getattr(one.layer, "base_layer", one.layer)) for one in linears),
        "modules_to_save": modules or None,
    }
    base, classes = about_base["base_model_name_or_path"], classes_to_load(model)
    card = export_card(base, kind, classes, report.summary(), report.table())
    values = {files.PREFIX + name: tensor for name, tensor in gathered(tensors).items()}
    files.write_folder(folder, values, config, card)


def _task_type(model: nn.Module) -> str | None:
    """peft's task. None where its class for the task would not pass the model's inputs on, such as sounds or images."""
    kind = files.class_of(model)
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    ends = {
        "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
    }  # fmt: skip
    if kind.__name__.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else None
    return next((task for end, task in ends.items() if kind.__name__.endswith(end)), None)
