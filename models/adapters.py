"""Reads adapters in PEFT's format; models/trained_adapters.py writes them.

- a folder has adapter_config.json and adapter_model.safetensors, whose tensors have PEFT's names:
  base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight; a reward model also has base_model.model.score.weight
- for inference an adapter is merged while the base is read (AdaptedFiles), so a plain model runs, or is quantised
- an unsupported key of the config is an error that names it, and so is an adapter of another base, recognised by the
  base's fingerprint in the file's metadata if the file was written here, else by the recorded name
"""

import json
import math
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.chat_template import read_chat_template
from models.checkpoint import WeightFiles, hf_name, our_name
from models.checksums import DIGESTS, check_tensors
from models.common import flag, is_main_rank, on_main
from models.compressed import LINEARS, linear_layers
from models.config import ModelConfig, is_quantized, read_hf_config
from models.files import read_json_object
from models.fingerprint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PICKLED_ADAPTER, fingerprint
from models.pad_token import stated_token
from models.record_files import unreadable

PREFIX = "base_model.model."
SCORE = "score.weight"
# Keys of adapter_config.json that are supported here or have no effect (fan_in_fan_out: PEFT turns it off for Linear
# layers). Any other key must be off: false, null, 0 or empty.
KNOWN = {
    *("auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules", "inference_mode"),
    *("init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core"),
    *("modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "revision", "runtime_config"),
    *("fan_in_fan_out", "target_modules", "task_type", "use_rslora"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
}
NOT_WHOLE = "the file is not whole"
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights


@dataclass(frozen=True, kw_only=True)
class AdapterArgs:
    """An adapter in PEFT's format."""

    adapter_path: Path | None = flag(
        None, help="folder with adapter_config.json and adapter_model.safetensors for the model of --checkpoint_path"
    )


class Adapter(NamedTuple):
    """The contents of an adapter's folder."""

    path: Path
    config: dict
    factors: dict[str, tuple[Tensor, Tensor]]  # by layer, "layers.0.self_attn.q_proj": A [r, K] and B [N, r], fp32
    score: Tensor | None  # a scalar head, [1, E]
    metadata: dict[str, str]

    @property
    def r(self) -> int:
        return self.config["r"]

    @property
    def scaling(self) -> float:
        return self.config["lora_alpha"] / self.r ** (0.5 if self.config.get("use_rslora") else 1)

    @property
    def config_changes(self) -> dict:
        """Keys to set in the base's config.json for the merged model, or to remove (None); they say how a reward is
        read."""
        return json.loads(self.metadata.get("config_changes", "{}"))


def open_adapter(path: Path, base: Path) -> Adapter:
    """Reads an adapter's folder and checks it against its base's. Raises ValueError or FileNotFoundError that names the
    file and what is missing, unsupported or made for another base."""
    config = _read_config(path)
    tensors, metadata = _read_tensors(path)
    check_tensors(path / ADAPTER_WEIGHTS, tensors, metadata.get(DIGESTS))
    factors: dict[str, dict[str, Tensor]] = {}
    score = None
    for name, tensor in tensors.items():
        ours = our_name(name.removeprefix(PREFIX)).replace(".default.", ".")  # a state_dict's, which PEFT strips
        layer, _, factor = ours.removesuffix(".weight").rpartition(".")
        if ours == SCORE:
            score = tensor.float()
        elif factor in ("lora_A", "lora_B") and name.startswith(PREFIX):
            factors.setdefault(layer, {})[factor] = tensor.float()
        else:
            raise ValueError(f"{path}: the tensor {name} is no low-rank factor of a layer, and is not supported")
    if not factors:
        raise ValueError(f"{path}: its weights hold no LoRA adapter")
    for layer, pair in factors.items():
        for factor in ("lora_A", "lora_B"):
            if factor not in pair:
                raise ValueError(f"{path}: {hf_name(layer)} has no {factor}; {NOT_WHOLE}")
    pairs = {layer: (pair["lora_A"], pair["lora_B"]) for layer, pair in factors.items()}
    adapter = Adapter(path, config, pairs, score, metadata)
    warnings = on_main(lambda: _check_base(adapter, base))
    for warning in warnings if is_main_rank() else ():
        print(warning, file=sys.stderr)  # stdout may be for samples
    return adapter


def _read_config(path: Path) -> dict:
    if not path.is_dir():
        raise FileNotFoundError(f"--adapter_path {path}: no such folder")
    where = path / ADAPTER_CONFIG
    if not where.is_file():
        raise FileNotFoundError(f"{path}: no {ADAPTER_CONFIG} here, so this is not an adapter's folder")
    config = read_json_object(where)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type {config.get('peft_type')!r} is not supported, only 'LORA'")
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf or (key == "r" and value % 1):
            raise ValueError(f"{where}: {key} must be a positive number, not {value!r}")
    for key, value in config.items():
        if value and key not in KNOWN:
            raise ValueError(f"{where}: {key} {value!r} is not supported")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias {config['bias']!r} is not supported, only 'none'")
    if str(config.get("init_lora_weights")).lower().startswith(CHANGE_THE_BASE):  # PEFT accepts 'OLoRA', too
        raise ValueError(
            f"{where}: init_lora_weights {config['init_lora_weights']!r} has changed the base beside the adapter; "
            "convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    for key, kind in (("base_model_name_or_path", str), ("modules_to_save", list)):
        if not isinstance(config.get(key), kind | None):
            raise ValueError(f"{where}: {key} must be a {kind.__name__}, not {config[key]!r}")
    others = set(map(str, config.get("modules_to_save") or ())) - {"score", "classifier"}
    if others:
        raise ValueError(f"{where}: modules_to_save {', '.join(sorted(others))} is not supported, only score")
    return config


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    file, pickled = path / ADAPTER_WEIGHTS, path / PICKLED_ADAPTER
    try:
        if file.is_file():
            with safe_open(file, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
        if pickled.is_file():
            tensors = torch.load(pickled, map_location="cpu", weights_only=True)
            if not isinstance(tensors, dict) or not all(isinstance(each, Tensor) for each in tensors.values()):
                raise ValueError(f"{pickled}: holds something else, not a dict of tensors")
            return tensors, {}
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError) as error:
        found = file if file.is_file() else pickled
        reason = f"its weights cannot be read: {str(error).splitlines()[0]}"
        raise ValueError(f"{found}: {unreadable(found, reason)}") from None
    raise FileNotFoundError(f"{path}: no {ADAPTER_WEIGHTS} here")


def _check_base(adapter: Adapter, base: Path) -> list[str]:
    """Raises ValueError if an adapter is not for this base; returns warnings about the two."""
    if is_quantized(read_hf_config(base)):
        raise ValueError(
            f"{base}: its weights are quantised, so no adapter can be merged into them; give the folder "
            "that it was quantised from, and --quantize"
        )
    recorded, config = adapter.config.get("base_model_name_or_path"), ModelConfig.from_hf(base)
    known = linear_layers(config.num_hidden_layers)
    _check_shapes(adapter, base, known, [1, config.hidden_size])
    theirs, ours = _texts_of(adapter.path), _texts_of(base)
    others = [name for name in theirs if theirs[name] and theirs[name] != ours[name]]
    if not ours["eos_token"]:  # not named: the base uses its tokenizer's default, such as </s>
        others = [name for name in others if name != "eos_token"]
    advice = "the base's is used; if the adapter was trained with its own, give a copy of the base that has it"
    warnings = [f"{adapter.path}: its {name} differs from that of {base}: {advice}" for name in others]
    made_for, other, fault = adapter.metadata.get("base_fingerprint"), Path(recorded or base), NOT_WHOLE
    if made_for is None and (other / "config.json").is_file():
        made_for = fingerprint(other)
    if made_for != fingerprint(base) and (made_for is not None or other.name not in _names_of(base)):
        if not (other.exists() and other.samefile(base)):
            raise ValueError(
                f"{adapter.path}: an adapter for another base, {recorded}, not for {base}; to go on knowingly, set "
                f"base_model_name_or_path in {adapter.path / ADAPTER_CONFIG} to {base.resolve()}"
            )
        fault = f"{base}: has other content than the base of the adapter {adapter.path}"
        warnings.append(fault)
    missing = sorted(_selected(adapter.config, known) - adapter.factors.keys())
    if missing:
        where = f"{adapter.path}: {hf_name(missing[0])} has no adapter"
        raise ValueError(f"{where}, and target_modules in {ADAPTER_CONFIG} selects it; {fault}")
    return warnings


def _check_shapes(adapter: Adapter, base: Path, known: Collection[str], score: list[int]) -> None:
    """Raises ValueError for tensors that do not fit a base's. known: its linear layers; score: its head's shape."""
    files = WeightFiles(base)
    for layer, (A, B) in adapter.factors.items():
        if layer.rpartition(".")[2] not in LINEARS:
            raise ValueError(f"{adapter.path}: {hf_name(layer)} has an adapter; supported are {', '.join(LINEARS)}")
        if layer not in known:
            raise ValueError(f"{adapter.path}: an adapter for another base: {base} has no layer {hf_name(layer)}")
        if f"{layer}.weight" not in files.names():
            raise ValueError(f"{base}: its weights have no tensor {hf_name(layer)}.weight, which {adapter.path} adapts")
        shape, of_adapter = files.shape(f"{layer}.weight"), (B.shape[0], A.shape[1])
        if not A.shape[0] == B.shape[1] == adapter.r:
            raise ValueError(
                f"{adapter.path}: {hf_name(layer)} is of rank {A.shape[0]}, {ADAPTER_CONFIG} says {adapter.r}"
            )
        if shape != of_adapter:
            raise ValueError(
                f"{adapter.path}: an adapter for another base: {hf_name(layer)} is {list(of_adapter)}, of {base} "
                f"{list(shape)}"
            )
    if adapter.score is not None and list(adapter.score.shape) != score:
        raise ValueError(
            f"{adapter.path}: {SCORE} is {list(adapter.score.shape)}, should be {score}: a reward model has one score"
        )


def _selected(config: dict, layers: Iterable[str]) -> set[str]:
    """Returns the layers that an adapter's config selects by their names, as PEFT does; none if it also selects by
    number or by a regular expression."""
    targets = config.get("target_modules")
    if config.get("layers_to_transform") not in (None, []) or config.get("exclude_modules"):
        return set()
    if targets == "all-linear":
        return set(layers)
    names = targets if isinstance(targets, list) else []
    return {layer for layer in layers if any(f".{hf_name(layer)}".endswith(f".{name}") for name in names)}


def _texts_of(folder: Path) -> dict[str, object]:
    """Returns the chat template and EOS of a folder's tokenizer files, which are often saved beside an adapter, too."""
    config = read_json_object(folder / "tokenizer_config.json", missing_ok=True)
    return {"chat template": read_chat_template(folder, config), "eos_token": stated_token(folder, "eos_token")}


def _names_of(base: Path) -> set[str]:
    """Returns the names of a base: its folder's and, if it is a snapshot in the hub's cache, the model's."""
    path = base.resolve()
    of_cache = {part.rpartition("--")[2] for part in path.parts if part.startswith("models--")}
    return {base.absolute().name, path.name} | of_cache


class AdaptedFiles(WeightFiles):
    """The weight files of a folder; an adapter is merged, in fp32, into each tensor that is read."""

    def __init__(self, folder: Path, adapter: Adapter):
        super().__init__(folder)
        self.adapter, self.config_changes = adapter, adapter.config_changes
        if adapter.score is not None:  # the adapter is a reward model's, and the base a language model
            self._shapes.pop("lm_head.weight", None)
            self._file_of.pop("lm_head.weight", None)
            self._shapes[SCORE] = tuple(adapter.score.shape)

    def check(self, expected: dict[str, tuple[int, ...]], allowed: Iterable[str] = ()) -> None:
        if self.adapter.score is not None and SCORE not in expected:
            raise ValueError(
                f"--adapter_path {self.adapter.path}: the adapter of a reward model, whose head would be lost"
            )
        super().check(expected, allowed)

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> Tensor:
        if name == SCORE and self.adapter.score is not None:
            return self.adapter.score[slices]
        tensor, pair = super().read(name, slices), self.adapter.factors.get(name.removesuffix(".weight"))
        if pair is None or not name.endswith(".weight"):
            return tensor
        rows, columns = (*slices, slice(None), slice(None))[:2]
        return torch.addmm(tensor.float(), pair[1][rows], pair[0][:, columns], alpha=self.adapter.scaling)


def weight_files(folder: Path, adapter_path: Path | None) -> WeightFiles:
    """Returns the weights of a folder, with an adapter merged if one is given."""
    if adapter_path is not None:
        return AdaptedFiles(folder, open_adapter(adapter_path, folder))
    say_what_is_not_taken(folder)
    return WeightFiles(folder)


def say_what_is_not_taken(folder: Path) -> None:
    """Warns of an adapter beside a model; transformers with PEFT would use both."""
    if (folder / ADAPTER_CONFIG).is_file() and is_main_rank():
        print(f"{folder}: holds an adapter too, which is not used; --adapter_path {folder} uses it", file=sys.stderr)
