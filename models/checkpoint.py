"""Loads models from Hugging Face folders; models/export.py writes them.

- a model is built on the meta device, and each parameter is then read straight from the files: safetensors by slices
  (one file, or shards with an index), `.bin` through a memory map. A rank reads only the slices of its own shard
- missing, unexpected and wrongly shaped tensors are listed in one error before anything is loaded
- whether head and embedding are tied is decided by the tensors in the files, not by config.json alone
- pickle files are read with weights_only=True only
- an exported folder is verified: small files when it is opened, tensors when they are loaded (models/checksums.py)
"""

import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from models.checksums import WEIGHTS_KEY, check_files, check_weights
from models.common import RuntimeArgs, flag, say, short_bar
from models.config import ModelConfig, is_quantized, read_hf_config
from models.files import read_json_object
from models.model import Transformer
from models.record_files import unreadable
from models.tokenizer import Tokenizer
from models.tp import Parallel, local, tensor_parallel_part

IGNORED_SUFFIX = "rotary_emb.inv_freq"  # old LLaMA files carry this buffer; it follows from the config
COMPARED_ROWS = 8192  # of embedding and head that are compared at a time
MERGED = "merged"  # subfolder of an adapter's folder that holds the merged model


def model_folder(path: str | Path) -> Path:
    """Returns the model folder at the path that a flag gives. A LoRA run's output folder holds the adapter, and the
    merged model in a subfolder: transformers with PEFT installed would take weights beside an adapter for its base."""
    folder = Path(path)
    is_inside = not (folder / "config.json").exists() and (folder / MERGED / "config.json").exists()
    return folder / MERGED if is_inside else folder


@dataclass(frozen=True, kw_only=True)
class ModelArgs(RuntimeArgs):
    """The model and its chat template."""

    checkpoint_path: Path = flag(type=model_folder, help="Hugging Face folder with the model")
    chat_date: str | None = flag(
        None,
        help="date that chat templates take for today, YYYY-MM-DD; default: with --resume the day the run began, in "
        "score.py the day of the samples in --data_file, as generate.py recorded it, else today",
    )


class Folder(NamedTuple):
    """An opened Hugging Face folder, before any weight is read."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    max_seq_len: int  # most tokens of a row: --max_seq_len, else the model's context

    @property
    def pad_token_id(self) -> int:
        """The token id for padding; 0 where the folder's pad token has no embedding, since any id will do."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id < self.config.vocab_size else 0

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The token ids that end an answer: those that the folder lists for generation, and those that training appends
        to answers, the chat template's end of turn and (for plain text) the tokenizer's EOS."""
        known = [i for i in self.tokenizer.ends_of_turn if i < self.config.vocab_size]
        return tuple(dict.fromkeys((*generation_eos_ids(self.path), *known)))

    def generation_changes(self) -> dict:
        """Returns the changes to an export's generation_config.json that make other tools stop at the same tokens."""
        ids = self.eos_token_ids
        return {} if ids == generation_eos_ids(self.path) else {"eos_token_id": list(ids) if len(ids) > 1 else ids[0]}

    def stop_tokens(self) -> str:
        """Describes the tokens that end an answer, for a script's output."""
        names = ", ".join(f"{self.tokenizer.decode([i], skip_special_tokens=False)} ({i})" for i in self.eos_token_ids)
        more = " (generation_config.json does not list all of them; an export's does)" * bool(self.generation_changes())
        endless = self.tokenizer.chat_template is not None and self.tokenizer.end_of_turn_id is None
        return (names or "none") + more + "; the chat template ends no turn, so chats do not learn to end" * endless

    def __str__(self) -> str:
        return f"{self.path}, {self.config.num_parameters() / 1e6:,.1f} M parameters"


def open_folder(
    path: Path,
    max_seq_len: int | None = None,
    tensor_parallel_size: int = 1,
    *,
    frozen: bool = False,
    today: date | None = None,
) -> Folder:
    """Opens a Hugging Face folder and verifies its small files. today: the date for chat templates.

    Raises ValueError if model and tokenizer do not fit together, if the model cannot be split over
    tensor_parallel_size ranks or its context is shorter than max_seq_len, and for quantised weights unless frozen.
    """
    check_files(path)
    config = model_config(path)
    if not frozen:
        refuse_quantized(path)
        say_of_dropout(path)
    config.check_divisible(tensor_parallel_size)
    generation_eos_ids(path)  # raises ValueError for invalid ids
    context = config.max_position_embeddings
    if max_seq_len is not None and max_seq_len > context:
        raise ValueError(f"--max_seq_len {max_seq_len}: the model's context is {config.describe_context()}")
    tokenizer = Tokenizer(path, today)
    # Added tokens may lie beyond the vocabulary, since many folders name a pad token that has no embedding; check_ids
    # raises an error where they occur.
    if tokenizer.base_vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer does not fit: it has {tokenizer.base_vocab_size} tokens, the model's vocab_size is "
            f"{config.vocab_size}"
        )
    return Folder(path, config, tokenizer, max_seq_len or context)


def say_of_dropout(path: Path) -> None:
    """Says of a model to be trained that its attention_dropout is not applied, if it has one."""
    dropout = read_hf_config(path).get("attention_dropout")
    if dropout:
        say(f"{path}: its attention_dropout {dropout} is not applied: attention is trained without dropout")


def our_name(name: str) -> str:
    return name.removeprefix("model.")


def hf_name(name: str) -> str:
    return name if name.startswith(("lm_head.", "score.")) else "model." + name


class WeightFiles:
    """The tensors of a Hugging Face folder under our names; reads only headers until read() is called.

    Where config.json ties head and embedding and the files hold only the head, the head serves as the embedding too.
    Raises FileNotFoundError for a missing file or shard, ValueError for a truncated or malformed one, and for one that
    changes before its last tensor is read.
    """

    config_changes: Mapping[str, object] = {}  # keys of config.json for these tensors; None: to remove (adapters.py)

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        config = read_json_object(self.folder / "config.json", missing_ok=True)
        self._file_of: dict[str, tuple[Path, str]] = {}  # our name -> (file, name in the file)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._open: dict[Path, dict[str, Tensor]] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        files, listed = self._files(config.get(WEIGHTS_KEY))
        for path in files:
            for name, shape in self._headers(path):
                is_listed = listed is None or (name in listed and self.folder / listed[name] == path)
                if name.endswith(IGNORED_SUFFIX) or not is_listed:
                    continue
                self._file_of[our_name(name)] = (path, name)
                self._shapes[our_name(name)] = shape
        if listed is not None:
            absent = [n for n in listed if our_name(n) not in self._file_of and not n.endswith(IGNORED_SUFFIX)]
            if absent:
                path = self.folder / listed[absent[0]]
                raise ValueError(f"{path}: does not hold {_some(absent)}, which the index says it holds")
        if config.get("tie_word_embeddings") and "embed_tokens.weight" not in self._file_of:
            for of in (self._file_of, self._shapes):  # safetensors.torch.save_model keeps one name of the two
                if "lm_head.weight" in of:
                    of["embed_tokens.weight"] = of.pop("lm_head.weight")

    def _files(self, named: object) -> tuple[list[Path], dict[str, str] | None]:
        """Returns (weight files, the index's weight_map or None). named: the file or index that config.json names."""
        if named is not None:
            if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
                raise ValueError(f"{self.folder}/config.json: {WEIGHTS_KEY} {named!r} is no safetensors file or index")
            path = self.folder / named
            if not path.is_file():
                raise FileNotFoundError(f"{path}: is missing; config.json names it as {WEIGHTS_KEY}")
            return self._read_index(path) if named.endswith(".json") else ([path], None)
        for stem in ("model.safetensors", "pytorch_model.bin"):
            if (self.folder / stem).is_file():  # before an index, as transformers does
                return [self.folder / stem], None
            index = self.folder / f"{stem}.index.json"
            if index.is_file():
                return self._read_index(index)
        raise FileNotFoundError(
            f"{self.folder}: no weights here (model.safetensors or pytorch_model.bin, whole or with an index)"
        )

    def _read_index(self, index: Path) -> tuple[list[Path], dict[str, str]]:
        content = read_json_object(index)
        try:
            weight_map = content["weight_map"]
            files = [self.folder / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not a shard index with a weight_map ({error!r})") from None
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"{self.folder}: the shards {_some(missing)} of {index.name} are missing")
        return files, weight_map

    def _handle(self, path: Path):
        """Opens a weight file. A safetensors file is reopened for each tensor, so that pages already read do not stay
        mapped; a `.bin` is one pickle and is opened once."""
        if path in self._open:
            return self._open[path]
        self._check_unchanged(path)
        try:
            if path.suffix == ".safetensors":
                return safe_open(path, framework="pt")
            zipped = zipfile.is_zipfile(path)  # torch before 1.6 wrote other files, which cannot be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{path}: {unreadable(path, f'truncated or not a weight file: {reason}')}") from None
        finally:  # another file may be the reason of an error, too
            self._check_unchanged(path)
        if not isinstance(tensors, dict):
            raise ValueError(f"{path}: holds a {type(tensors).__name__}, not a dict of tensors")
        self._open[path] = tensors
        return tensors

    def _check_unchanged(self, path: Path) -> None:
        """Raises ValueError if a file is not the one that was opened first: the model would be a mixture of two. Not by
        its inode, which some network mounts choose anew at any time."""
        try:
            status = path.stat()
        except FileNotFoundError:
            raise ValueError(f"{path}: was removed while it was being read; run it again") from None
        stamp = (status.st_size, status.st_mtime_ns)
        if self._stamps.setdefault(path, stamp) != stamp:
            raise ValueError(f"{path}: was replaced while it was being read; run it again")

    def _headers(self, path: Path) -> Iterable[tuple[str, tuple[int, ...]]]:
        handle = self._handle(path)
        for name in handle.keys():  # noqa: SIM118 (a safetensors handle is not a dict)
            tensor = handle.get_slice(name) if path.suffix == ".safetensors" else handle[name]
            shape = tensor.get_shape() if path.suffix == ".safetensors" else getattr(tensor, "shape", None)
            if shape is None or not isinstance(name, str):
                raise ValueError(f"{path}: the entry {name!r} is not a tensor with a name")
            yield name, tuple(shape)

    def config_of(self, config: dict) -> dict:
        """The folder's config.json as these tensors need it."""
        removed = {name for name, value in self.config_changes.items() if value is None}
        return {name: value for name, value in {**config, **self.config_changes}.items() if name not in removed}

    def names(self) -> list[str]:
        return list(self._shapes)

    def paths(self) -> list[Path]:
        """The weight files that hold the tensors."""
        return sorted({path for path, _ in self._file_of.values()})

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> Tensor:
        """Returns a tensor, or its part at `slices` (one for each leading dimension), as stored, on the CPU. It may be
        a view of the memory-mapped file: copy it before writing to it."""
        path, stored_name = self._file_of[name]
        handle = self._handle(path)
        if path.suffix == ".safetensors":
            return handle.get_slice(stored_name)[slices] if slices else handle.get_tensor(stored_name)
        return handle[stored_name][slices]

    def has_own_head(self) -> bool:
        """Whether the files hold a language-model head whose values differ from the embedding's."""
        if "lm_head.weight" not in self._shapes or "embed_tokens.weight" not in self._shapes:
            return False
        shape = self._shapes["lm_head.weight"]
        if shape != self._shapes["embed_tokens.weight"]:
            return True
        parts = ((slice(start, start + COMPARED_ROWS),) for start in range(0, shape[0], COMPARED_ROWS))
        return not all(
            torch.equal(self.read("lm_head.weight", part), self.read("embed_tokens.weight", part)) for part in parts
        )

    def check(self, expected: dict[str, tuple[int, ...]], allowed: Iterable[str] = ()) -> None:
        """Raises ValueError that lists missing, unexpected (and not `allowed`) and wrongly shaped tensors."""
        missing = [hf_name(name) for name in expected if name not in self._shapes]
        unexpected = [hf_name(name) for name in self._shapes if name not in expected and name not in set(allowed)]
        wrong = [
            f"{hf_name(name)} is {list(self._shapes[name])}, should be {list(shape)}"
            for name, shape in expected.items()
            if name in self._shapes and self._shapes[name] != shape
        ]
        lists = {"missing tensors": missing, "unexpected tensors": unexpected, "wrong shapes": wrong}
        problems = [f"{what}: {_some(names)}" for what, names in lists.items() if names]
        if "score.weight" in self._shapes.keys() - expected.keys() and "lm_head.weight" not in self._shapes:
            raise ValueError(f"{self.folder}: a reward model (it has score.weight); give a language model's folder")
        if problems:
            raise ValueError(f"{self.folder}: the weights do not fit config.json: {'; '.join(problems)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def folder_config(folder: str | Path) -> dict:
    """Returns the contents of a folder's config.json for an export of its model: with tie_word_embeddings false if the
    files hold a separate head, as in transformers (5.23)."""
    config = read_hf_config(folder)
    if config.get("tie_word_embeddings") and WeightFiles(folder).has_own_head():
        config["tie_word_embeddings"] = False
    return config


def model_config(folder: str | Path) -> ModelConfig:
    """Returns the ModelConfig of a folder: that of its config.json, with tie_word_embeddings as in folder_config."""
    config = ModelConfig.from_hf(folder)
    if config.tie_word_embeddings and WeightFiles(folder).has_own_head():
        config = replace(config, tie_word_embeddings=False)
    return config


def load_model(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    param_dtype: torch.dtype | None = None,
    tp: DeviceMesh | None = None,
    head: str = "lm",
    files: WeightFiles | None = None,
) -> Transformer:
    """Loads the model of a Hugging Face folder, with plain tensors as parameters: for inference, or a single process.

    param_dtype: the dtype of the parameters, and so of the activations; None keeps the files'. tp: read and hold only
    this rank's part. head: "lm" or "score". files: the folder's weights with changes, such as a merged adapter
    (models/adapters.py). Raises the errors of ModelConfig.from_hf and WeightFiles.
    """
    config = model_config(folder)
    refuse_quantized(folder)
    files = files or WeightFiles(folder)
    with torch.device("meta"):
        model = Transformer(config, parallel=Parallel(tp), head=head)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    files.check(shapes, allowed=["lm_head.weight"] * config.tie_word_embeddings)
    check_weights(files.folder, files.paths())
    fill_parameters(model, files, device=device, dtype=param_dtype, part_of=partial(tensor_parallel_part, tp=tp))
    return model


@torch.no_grad()
def fill_parameters(
    model: Transformer,
    files: WeightFiles,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    part_of: Callable[[str, tuple[int, ...]], tuple[slice, ...]],
    without_file: dict[str, Tensor] | None = None,
) -> None:
    """Loads all parameters of a model from files that hold them, one at a time, and recomputes its buffers.

    part_of(name, whole shape): the slices that this rank reads. Parameters on the meta device, which may have the whole
    shape, are replaced, in dtype (a scalar head in fp32); others, such as sharded ones, are filled in place.
    without_file: whole tensors that are not read from the files, such as a new scalar head's weight [1, E].
    """
    without_file = without_file or {}
    for name, parameter in short_bar(dict(model.named_parameters()).items(), "loading", "tensor"):
        slices = part_of(name, tuple(parameter.shape))
        assert name not in without_file or without_file[name].shape == parameter.shape, name
        part = without_file[name][slices] if name in without_file else files.read(name, slices)
        if parameter.is_meta:
            owner, _, attribute = name.rpartition(".")
            own_dtype = torch.float32 if name == "score.weight" else dtype
            part = nn.Parameter(part.to(device=device, dtype=own_dtype, copy=True))
            setattr(model.get_submodule(owner), attribute, part)
        else:
            own = local(parameter)
            assert own.shape == part.shape, (name, own.shape, part.shape)
            # copy_ converts before it sends: bf16 files would go to fp32 weights on a GPU as twice the bytes
            own.copy_(part.to(own.device) if part.itemsize < own.itemsize else part)
    model.tie_weights()
    model.reset_buffers(device)


def refuse_quantized(folder: str | Path) -> None:
    """Raises ValueError for a folder with quantised weights."""
    if is_quantized(read_hf_config(folder)):
        raise ValueError(
            f"{folder}: its quantised weights are frozen, for inference, references and reward models only; to train, "
            "give the folder that it was quantised from"
        )


def has_score_head(folder: str | Path) -> bool:
    """Whether a folder's weights include a scalar head, whatever its config.json says."""
    return "score.weight" in WeightFiles(folder).names()


def stored_dtype(folder: str | Path) -> torch.dtype:
    """Returns the dtype of a folder's embedding."""
    return WeightFiles(folder).read("embed_tokens.weight", (slice(0, 1),)).dtype


def generation_eos_ids(folder: str | Path) -> tuple[int, ...]:
    """Returns the eos_token_id or ids of a folder's generation_config.json, else of its config.json."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        value = read_json_object(path, missing_ok=True).get("eos_token_id")
        if value is not None and value != []:
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
                raise ValueError(f"{path}: eos_token_id must be a token id or a list of them, not {value!r}")
            return tuple(dict.fromkeys(ids))
    return ()
