"""The frozen models beside a policy, its reference and in reinforcement learning a reward model: selects their folders
and quantisation, checks that they can read the policy's rows, and loads them."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch.distributed.device_mesh import DeviceMesh

from models.chats import Chat
from models.checkpoint import Folder, WeightFiles, model_config, model_folder, open_folder
from models.checksums import check_files
from models.common import Runtime, flag, refuse_idle, say
from models.config import ModelConfig
from models.fsdp import load_frozen
from models.model import Transformer
from models.qlinear import Schemes
from models.quantize import GroupSizeArgs, check_runnable, choose_scheme
from models.records import check_ids, encode_generated, ids_at_the_end
from models.reward import RewardKind, read_reward_kind
from models.tokenizer import Tokenizer
from training.optim import check_optimizer
from training.prompts import Prompts


@dataclass(frozen=True, kw_only=True)
class ReferenceArgs(GroupSizeArgs):
    """Reference model."""

    ref_checkpoint_path: Path | None = flag(
        None, type=model_folder, help="folder of the frozen reference; default: the policy's initial model"
    )
    quantize_ref: str = flag(
        "none", choices=("none", "int8", "int4"), help="quantise the reference, which is then replicated over dp"
    )

    @property
    def ref_path(self) -> Path:
        return self.ref_checkpoint_path or self.checkpoint_path

    def ref_is_base(self, scheme: Schemes | None) -> bool:
        """Whether the reference is the unchanged model of --checkpoint_path. With LoRA the policy then serves as the
        reference, see as_reference in models/shared_base.py. scheme: how the reference is quantised."""
        return scheme is None and self.ref_path.samefile(self.checkpoint_path)

    def ref_is_start(self, scheme: Schemes | None) -> bool:
        """Whether the reference has the policy's initial weights, those of --adapter_path included: a folder that
        --ref_checkpoint_path names is meant without them."""
        return self.ref_is_base(scheme) and (self.adapter_path is None or self.ref_checkpoint_path is None)

    @property
    def reference_name(self) -> str:
        """The reference's folder and adapter, for printing."""
        is_start = self.ref_checkpoint_path is None and self.adapter_path is not None
        return f"{self.ref_path} with the adapter {self.adapter_path}" if is_start else str(self.ref_path)


class RewardFolder(NamedTuple):
    """The folder of a reward model that scores a policy's answers."""

    folder: Folder
    same_tokenizer: bool  # as the policy: its ids mean the same text
    same_bos: bool  # as the policy, in front of texts
    same_template: bool  # as the policy, or none of its own
    kind: RewardKind
    policy: Tokenizer
    policy_ends: tuple[int, ...]  # the policy's own stop token ids

    def reads_ids_of(self, prompt: str | Chat) -> bool:
        """Whether the policy's ids of a prompt are the reward model's own, in the format it was trained on."""
        return self.same_tokenizer and (self.same_template if isinstance(prompt, Chat) else self.same_bos)

    def end_of(self, prompt: str | Chat) -> list[int]:
        """Returns the id that ends a finished answer in a row of the policy's ids: the one of the model's training; the
        policy's where it has none, as in chats without a template of its own."""
        borrows = isinstance(prompt, Chat) and self.folder.tokenizer.chat_template is None
        own = [] if borrows else ids_at_the_end(prompt, self.folder.tokenizer)
        return own or ids_at_the_end(prompt, self.policy) or list(self.policy_ends[:1])


class Frozen(NamedTuple):
    """The folders of the frozen models and their quantisation; None for a model or quantisation that is not used."""

    reference: Path | None
    ref_scheme: Schemes | None
    reward: RewardFolder | None
    reward_scheme: Schemes | None

    def notes(self, args) -> dict[str, str]:
        """Returns printable descriptions of the frozen models."""
        notes = {}
        if self.reference is not None:
            notes["reference"] = args.reference_name + (f", {self.ref_scheme}" if self.ref_scheme else "")
        scores = [str(self.reward.folder.path)] if self.reward else []
        notes["reward"] = " + ".join([*scores, *(args.reward_fn or [])])
        notes["reward"] += f", {self.reward_scheme}" if self.reward_scheme else ""
        return notes

    def check_prompts(self, data: Prompts) -> None:
        """Raises ValueError if a model's context is too short for the policy's rows, or if the reward model cannot read
        a prompt."""
        if self.reference is not None:
            check_context("reference", self.reference, data.longest, lower="--max_new_tokens")
        if self.reward and self.reward.same_tokenizer:
            check_context("reward model", self.reward.folder.path, data.longest, lower="--max_new_tokens")
        if self.reward:
            check_readable(self.reward, data)

    def load(
        self, args, mesh: DeviceMesh, runtime: Runtime, policy: Transformer
    ) -> tuple[Transformer | None, Transformer | None]:
        """Returns (the reference, the reward model). If the reference is the base of the policy's adapters, returns the
        policy as the reference, to be used within as_reference()."""
        load = partial(load_frozen, mesh=mesh, args=replace(args, cpu_offload=False), runtime=runtime)
        if self.reference and policy.lora is not None and args.ref_is_base(self.ref_scheme):
            reference = policy
        else:
            reference = load(self.reference, scheme=self.ref_scheme) if self.reference else None
        reward = load(self.reward.folder.path, scheme=self.reward_scheme, head="score") if self.reward else None
        return reference, reward


def check_reference_flags(args) -> None:
    """Raises ValueError if a quantised reference would be a second copy of the policy's LoRA base, and if --group_size
    is given without int4."""
    if args.uses_lora and args.quantize_ref != "none" and args.ref_checkpoint_path is None:
        raise ValueError(
            "--quantize_ref: with LoRA the reference is the base with its adapters off, quantised by --quantize_base; "
            "leave the flag out, or give a --ref_checkpoint_path"
        )
    modes = {name: getattr(args, name) for name in ("quantize_ref", "quantize_reward") if hasattr(args, name)}
    if args.group_size is not None and "int4" not in modes.values():
        raise ValueError(f"--group_size is for {' and '.join(f'--{name} int4' for name in modes)}")


def check_rl_flags(args) -> None:
    """Raises ValueError for flags of rollouts, rewards and frozen models that contradict each other."""
    check_reference_flags(args)
    check_optimizer(args)
    if args.lora_dropout:
        raise ValueError(
            f"--lora_dropout {args.lora_dropout}: a ratio to the policy that sampled would measure noise; leave it out"
        )
    if args.rollout_batch_size % args.step_size:
        raise ValueError(
            f"--minibatch_size {args.minibatch_size} does not divide --rollout_batch_size {args.rollout_batch_size}"
        )
    if args.eval_steps is not None and args.eval_prompt_file is None:
        raise ValueError("--eval_steps needs an --eval_prompt_file")
    if args.reward_checkpoint_path is None and args.reward_fn is None:
        raise ValueError("nothing to learn from: give a --reward_checkpoint_path, a --reward_fn, or both")
    weights = [args.reward_model_weight] if args.reward_checkpoint_path is not None else []
    weights += (args.reward_fn_weight or [1.0]) if args.reward_fn is not None else []
    punished = args.missing_eos_penalty or args.length_penalty or vars(args).get("soft_punish_cache")
    if not any(weights) and not punished:
        raise ValueError("nothing to learn from: the weights of all rewards are 0")
    if args.reward_checkpoint_path is None:
        refuse_idle(
            args, "without a --reward_checkpoint_path", "quantize_reward", "reward_model_weight", "process_reward"
        )
    if args.reward_fn is None:
        refuse_idle(args, "without a --reward_fn", "reward_fn_weight")
    if args.eval_prompt_file is None:
        names = ["num_generations_eval", *["num_eval_samples"] * bool(args.num_eval_samples)]
        refuse_idle(args, "without an --eval_prompt_file", *names)


def open_frozen(args, policy: Folder, runtime: Runtime, *, reference: bool = True) -> Frozen:
    """Opens the folders of the frozen models. Raises ValueError if one is unsuitable. reference: whether the run has a
    reference."""
    path, ref_scheme, reward, reward_scheme = args.ref_path if reference else None, None, None, None
    if args.reward_checkpoint_path:
        reward = open_reward_folder(args.reward_checkpoint_path, policy, args.tensor_parallel_size)
        reward_scheme = frozen_scheme(args.reward_checkpoint_path, "quantize_reward", args, runtime)
    kind = reward.kind if reward else None
    if args.normalize_reward and (kind is None or kind.separator is not None or not kind.can_normalize()):
        raise ValueError("--normalize_reward needs a reward model whose config.json has reward_mean and reward_std")
    if kind is not None and kind.separator is None:
        refuse_idle(args, f"beside {args.reward_checkpoint_path}, which scores whole answers", "process_reward")

    if reference:
        check_reader("reference", path, policy, args)
        ref_scheme = frozen_scheme(path, "quantize_ref", args, runtime)
    return Frozen(path, ref_scheme, reward, reward_scheme)


def open_reward_folder(path: Path, policy: Folder, tensor_parallel_size: int) -> RewardFolder:
    """Raises ValueError if the model has no scalar head, or cannot be split over the tensor-parallel ranks."""
    today = policy.tokenizer.today
    folder = open_folder(path, None, tensor_parallel_size, frozen=True, today=today)
    same_size = folder.config.vocab_size == policy.config.vocab_size  # any id can be drawn
    same_tokenizer = same_size and _text_to_ids(path) == _text_to_ids(policy.path)
    ours, theirs = folder.tokenizer, policy.tokenizer
    if ours.chat_template is not None:
        ours.chat_template.ignore_unread()
    same_bos = ours.encode_prefix("") == theirs.encode_prefix("")
    formats = [tokenizer.chat_template and tokenizer.chat_template.format for tokenizer in (ours, theirs)]
    same_template = formats[0] in (None, formats[1])
    kind, ends = read_reward_kind(path), policy.eos_token_ids
    return RewardFolder(folder, same_tokenizer, same_bos, same_template, kind, theirs, ends)


def _text_to_ids(folder: Path) -> dict[str, object]:
    """Returns the tokenizer files that determine how text becomes ids, without padding and truncation, which Tokenizer
    switches off: pad tokens and lengths may differ."""
    names = ("tokenizer.model", "tokenizer.json", "added_tokens.json")
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    if any(key in files.get("tokenizer.json", b"") for key in (b'"padding"', b'"truncation"')):
        files["tokenizer.json"] = {**json.loads(files["tokenizer.json"]), "padding": None, "truncation": None}
    return files


def check_readable(reward: RewardFolder, data: Prompts) -> None:
    """Raises ValueError if the reward model's folder has no chat template for the prompts, or one that rejects a chat,
    or if a prompt holds a token that the model lacks. Tries one prompt per sequence of roles and options, all if the
    tokenizer has such tokens; a model that reads the policy's ids needs no template."""
    path, tokenizer, vocab_size = reward.folder.path, reward.folder.tokenizer, reward.folder.config.vocab_size
    is_process, kinds = reward.kind.separator is not None, {}
    lacks_tokens = max(tokenizer.added_texts, default=0) >= vocab_size
    for prompt in (*data.train, *data.held_out):
        if is_process or not reward.reads_ids_of(prompt.asked):
            kinds.setdefault(len(kinds) if lacks_tokens else _kind_of(prompt.asked), prompt)
    for prompt in kinds.values():
        try:
            ids = encode_generated(prompt.asked, "", tokenizer, finished=not is_process)
        except ValueError as error:
            raise ValueError(f"{path}: the reward model cannot read the chat of {prompt.where}: {error}") from None
        check_ids(ids, vocab_size, f"{path}: the prompt of {prompt.where}")


def _kind_of(asked: str | Chat) -> tuple:
    """Returns what decides whether a chat template accepts a prompt; () for texts."""
    if isinstance(asked, str):
        return ()
    return tuple(message["role"] for message in asked.messages), asked.tools is None, repr(asked.kwargs)


def frozen_scheme(path: Path, name: str, args, runtime: Runtime) -> Schemes | None:
    """Returns how to quantise a frozen model, from the flag of this name (such as quantize_ref) or from the folder
    itself. Raises ValueError if that is not supported here, or if the folder holds another kind of model."""
    mode, tp_size = getattr(args, name), args.tensor_parallel_size
    scheme = choose_scheme(path, mode, args.group_size if mode == "int4" else None, f"--{name}", tp_size)
    head = "score" if name == "quantize_reward" else "lm"
    check_runnable(WeightFiles(path), model_config(path), scheme, runtime, tp_size, head, f"--{name}")
    return scheme


def check_reader(name: str, path: Path, policy: Folder, args) -> None:
    """Raises ValueError unless the model in a folder can read the policy's tokens."""
    check_files(path)
    config = ModelConfig.from_hf(path)
    config.check_divisible(args.tensor_parallel_size)
    if config.vocab_size != policy.config.vocab_size:
        raise ValueError(
            f"{path}: a {name} reads the policy's tokens, and this one has another vocabulary: {config.vocab_size} "
            f"tokens instead of {policy.config.vocab_size}"
        )
    files = _text_to_ids(path)
    if files.keys() & {"tokenizer.json", "tokenizer.model"} and files != _text_to_ids(policy.path):
        _check_vocabulary(name, path, policy)


def _check_vocabulary(name: str, path: Path, policy: Folder) -> None:
    """Raises ValueError if ids stand for other pieces of text in a folder than in the policy's; says so if only added
    tokens differ, since many models rename reserved ones."""
    tokenizers = Tokenizer(path, policy.tokenizer.today), policy.tokenizer
    theirs, ours = ({i: piece for piece, i in each.vocabulary().items()} for each in tokenizers)
    differ = [i for i in range(policy.config.vocab_size) if theirs.get(i) != ours.get(i)]
    ordinary = [i for i in differ if not any(i in each.added_texts for each in tokenizers)]
    for i in (ordinary or differ)[:1]:
        other = f"this one's token {i} is {theirs.get(i)!r} instead of {ours.get(i)!r}"
        if ordinary:
            raise ValueError(f"{path}: a {name} reads the policy's tokens, and {other}: it has another vocabulary")
        say(f"{path}: a {name} reads the policy's tokens, and {other}; only added tokens differ")


def check_context(name: str, path: Path, longest: int, *, lower: str) -> None:
    """Raises ValueError unless the model in a folder can read rows of `longest` tokens. lower: the flag to lower for
    shorter rows."""
    config = ModelConfig.from_hf(path)
    if config.max_position_embeddings < longest:
        raise ValueError(
            f"{path}: a {name} reads rows of {longest} tokens, and this one's context is {config.describe_context()}; "
            f"lower {lower} or take another folder"
        )
