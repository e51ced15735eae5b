"""The adapters of a run: the flags of LoRA, what they describe for a model, and the folder written at the end."""

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from models.adapters import PREFIX, SCORE, Adapter, AdapterArgs, open_adapter, say_what_is_not_taken
from models.checkpoint import MERGED, folder_config, hf_name
from models.checksums import DIGESTS, digests_of
from models.common import Bounds, Runtime, at_least_one, flag, flags_of, is_main_rank, on_main, positive, say
from models.compressed import LINEARS, linear_layers
from models.config import ModelConfig
from models.files import naming_file, write_json, write_whole
from models.fingerprint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, fingerprint
from models.lora import CRITIC, Lora, LoraLinear
from models.model import Transformer
from models.noise import noise_key
from models.qlinear import Scheme
from models.quantize import check_scheme
from models.shared_base import OnSharedBase
from models.tp import whole

BASE_GROUP = 32  # weights of --quantize_base int4 that share a scale and a minimum: 5 bits per weight in all


@dataclass(frozen=True, kw_only=True)
class LoraArgs(AdapterArgs):
    """LoRA: train low-rank updates of a frozen model; --adapter_path continues an earlier adapter."""

    lora_r: int | None = flag(None, bounds=at_least_one, help="rank of the updates; without it all weights are trained")
    lora_alpha: float | None = flag(
        None, bounds=positive, help="updates are scaled by lora_alpha / lora_r; default: twice --lora_r"
    )
    lora_dropout: float = flag(0.0, bounds=Bounds(least=0, below=1), help="dropout of the inputs of the updates")
    lora_target_modules: list[str] | None = flag(
        None, help=f"the layers to update: all-linear, or some of {', '.join(LINEARS)}; default: all-linear"
    )
    use_rslora: bool = flag(False, help="scale updates by lora_alpha / sqrt(lora_r) instead")
    quantize_base: str = flag("none", choices=("none", "int8", "int4"), help="quantise the blocks' frozen weights")
    merge: bool = flag(True, help="write the merged model too, beside the adapter", may_change=True)

    @property
    def uses_lora(self) -> bool:
        return self.lora_r is not None or self.adapter_path is not None


def choose_lora(
    args,
    base: Path,
    runtime: Runtime,
    *,
    with_critic: bool = False,
    with_reference: bool = False,
    policy: Lora | None = None,
    starts_as_policy: bool = False,
) -> Lora | None:
    """Returns the adapters that the flags of LoraArgs describe for the model in a folder; None without LoRA.
    with_critic: the model carries a critic's adapters, too. with_reference: it also serves as its own reference, and so
    keeps a frozen copy of the adapters of --adapter_path. policy: the model is this policy's critic, on a base of its
    own; its adapters are for the same layers, and new ones unless it starts_as_policy. Raises ValueError for flags that
    do not fit the model or each other. A collective."""
    if args.adapter_path is None and policy is None:
        say_what_is_not_taken(base)
    if not args.uses_lora:
        for each in flags_of(LoraArgs):
            if getattr(args, each.name) != each.default:
                shown = "--no-merge" if each.name == "merge" else f"--{each.name}"
                raise ValueError(f"{shown} is for LoRA, and does nothing without --lora_r or --adapter_path")
        return None
    config, tp_size = ModelConfig.from_hf(base), args.tensor_parallel_size
    if policy is None:
        start = None if args.adapter_path is None else open_adapter(args.adapter_path, base)
        r, alpha, use_rslora, layers = _shape(args, start, config)
    else:
        start, r, alpha, use_rslora = None, policy.r, policy.alpha, policy.use_rslora
        layers = _of_kinds({layer.rpartition(".")[2] for layer in policy.layers}, config)
    scheme = base_scheme(args.quantize_base)
    if scheme is not None:
        named = f"{base}: --quantize_base "  # a critic may have another base
        check_scheme(scheme, config, runtime.device, runtime.dtype, tp_size, named=named)
    streams = {"": 0 if policy is None else 1} | ({CRITIC: 1} if with_critic else {})
    values = _new_values(config, layers, r, args.seed, streams)
    if starts_as_policy and args.adapter_path is not None:
        values |= {name: value for name, value in policy.values.items() if name in values}
    found = (layers, scheme, values, base, on_main(lambda: fingerprint(base)), args.seed)
    sets = (with_critic, with_reference and start is not None)
    lora = Lora(r, alpha, use_rslora, args.lora_dropout, *found, *sets, folder_config(base))
    if start is not None:
        for layer, (A, B) in start.factors.items():
            for suffix in lora.names:
                values |= {f"{layer}.lora_A{suffix}": A, f"{layer}.lora_B{suffix}": B}
        if start.score is not None:
            values[SCORE] = start.score
        if start.config.get("lora_dropout") and not args.lora_dropout:
            say(f"{start.path}: its lora_dropout {start.config['lora_dropout']} is not used; set it by --lora_dropout")
    return lora


def base_scheme(mode: str) -> Scheme | None:
    """Returns the scheme of --quantize_base: the same on every layout of ranks, since a run may resume on another."""
    if mode == "none":
        return None
    return Scheme(mode, BASE_GROUP, has_minima=True) if mode == "int4" else Scheme(mode)


def _of_kinds(kinds: Collection[str], config: ModelConfig) -> frozenset[str]:
    """Returns a model's linear layers of these kinds, such as q_proj."""
    layers = linear_layers(config.num_hidden_layers)
    return frozenset(layer for layer in layers if layer.rpartition(".")[2] in kinds)


def _shape(args, start: Adapter | None, config: ModelConfig) -> tuple[int, float, bool, frozenset[str]]:
    """Returns (rank, alpha, use_rslora, layers)."""
    kinds = args.lora_target_modules or ("all-linear",)
    unknown = sorted(set(kinds) - {*LINEARS, "all-linear"})
    if unknown:
        names = ", ".join(LINEARS)
        raise ValueError(
            f"--lora_target_modules {' '.join(unknown)}: choose from {names}, or all-linear for all of them"
        )
    layers = _of_kinds(LINEARS if "all-linear" in kinds else kinds, config)
    if start is None:
        return args.lora_r, args.lora_alpha or 2.0 * args.lora_r, args.use_rslora, layers
    found = (start.r, float(start.config["lora_alpha"]), bool(start.config.get("use_rslora")), frozenset(start.factors))
    asked = (args.lora_r, args.lora_alpha, args.use_rslora or None, layers if args.lora_target_modules else None)
    for name, value, wanted in zip(("lora_r", "lora_alpha", "use_rslora", "lora_target_modules"), found, asked):
        if wanted is not None and wanted != value:
            raise ValueError(f"--{name}: the adapter of --adapter_path {start.path} has another; leave the flag out")
    return found


def _new_values(
    config: ModelConfig, layers: frozenset[str], r: int, seed: int, streams: dict[str, int]
) -> dict[str, Tensor]:
    """Draws new adapters as PEFT does: A uniform in +-1 / sqrt(K) (Kaiming with a = sqrt(5)), B 0, so the model equals
    its base. On the CPU, layer by layer, so equal on every rank. streams: {suffix of names: noise stream}."""
    with torch.device("meta"):
        model, values = Transformer(config), {}
    for number, layer in enumerate(sorted(layers)):
        N, K = model.get_submodule(layer).weight.shape
        for suffix, stream in streams.items():
            generator = torch.Generator().manual_seed(noise_key(seed, number, stream) % 2**63)
            A = torch.empty(r, K).uniform_(-(K**-0.5), K**-0.5, generator=generator)
            values |= {f"{layer}.lora_A{suffix}": A, f"{layer}.lora_B{suffix}": torch.zeros(N, r)}
    return values


# ---------------------------------------------------------------------------------------- writing


def adapter_tensors(model: Transformer) -> dict[str, Tensor]:
    """Returns a model's adapters and its scalar head as whole tensors, by PEFT's names. A collective."""
    tensors, suffix = {}, model.adapter
    for name, layer in (model.base if isinstance(model, OnSharedBase) else model).named_modules():
        if isinstance(layer, LoraLinear) and layer.has_adapters:
            for factor in ("lora_A", "lora_B"):
                tensor = whole(getattr(layer, factor + suffix)).cpu()
                tensors[f"{PREFIX}{hf_name(name)}.{factor}.weight"] = tensor.contiguous()
    if hasattr(model, "score") and (not model.lora.with_critic or suffix == CRITIC):
        tensors[PREFIX + SCORE] = whole(model.score.weight).cpu().contiguous()
    return tensors


def adapter_config(lora: Lora, *, scalar_head: bool) -> dict:
    kinds = sorted({layer.rpartition(".")[2] for layer in lora.layers})
    is_whole = lora.layers == _of_kinds(kinds, ModelConfig.from_hf(lora.base_config))
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scalar_head else "CAUSAL_LM",
        "base_model_name_or_path": str(lora.base.resolve()),
        "r": lora.r,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": kinds if is_whole else sorted(map(hf_name, lora.layers)),
        "modules_to_save": ["score"] if scalar_head else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def write_adapter(folder: Path, tensors: dict[str, Tensor], lora: Lora, config_changes: dict) -> None:
    """Writes both files, each atomically; the config last, since it makes the folder an adapter's. config_changes: keys
    to set in the base's config.json for the merged model, or to remove if None. Only the main rank writes."""
    if not is_main_rank():
        return
    metadata = {"format": "pt", "base_fingerprint": lora.base_fingerprint, "config_changes": json.dumps(config_changes)}
    with naming_file(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / ADAPTER_WEIGHTS, save(tensors, metadata | {DIGESTS: digests_of(tensors)}))
    write_json(folder / ADAPTER_CONFIG, adapter_config(lora, scalar_head=f"{PREFIX}{SCORE}" in tensors))


def check_base_is_the_same(lora: Lora) -> None:
    """Raises ValueError if the content of the base's folder has changed since the run began: a merged model would be
    made from other weights than the adapters were trained on."""
    if fingerprint(lora.base) != lora.base_fingerprint:
        raise ValueError(
            f"{lora.base}: other content than when the run began, so the adapters are not merged with it; "
            "restore it and --resume, or --resume with --accept_changed to merge them with the new content"
        )


def remove_merged(folder: Path) -> None:
    """Removes the merged model of an earlier end of the run: a flag that names the folder would select that model, not
    the adapter that is written now."""
    if (folder / MERGED).is_dir():
        with naming_file(folder / MERGED):
            shutil.rmtree(folder / MERGED)
        say(f"{folder / MERGED}: removed, since it was merged with an earlier adapter; --merge writes a new one")
