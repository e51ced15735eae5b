"""PPO's critic: which model it starts from, and whether it is a second model or adapters on the policy's base."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models.checkpoint import Folder, has_score_head, model_folder, say_of_dropout
from models.common import Runtime, flag, non_negative
from models.config import ModelConfig, is_quantized, read_hf_config
from models.fsdp import check_loadable, load_for_training
from models.lora import CRITIC, Lora
from models.model import Transformer
from models.shared_base import OnSharedBase
from models.trained_adapters import choose_lora
from training.frozen import RewardFolder, check_reader


@dataclass(frozen=True, kw_only=True)
class CriticArgs:
    """Critic."""

    value_checkpoint_path: Path | None = flag(
        None, type=model_folder, help="initial critic; default: the reward model, else the policy with a zero head"
    )
    shared_base: bool = flag(False, help="with LoRA: the critic is its own adapters and head on the policy's base")
    value_learning_rate: float = flag(1e-5, bounds=non_negative, help="peak learning rate of the critic")


def choose_critic(args, policy: Folder, runtime: Runtime, lora: Lora | None, reward: RewardFolder | None) -> Path:
    """Returns the folder of the initial critic. Raises ValueError if critic or policy cannot be trained from their
    folders, or if the critic cannot read the policy's tokens."""
    start = args.reward_checkpoint_path if reward and reward.same_tokenizer else args.checkpoint_path
    path = args.checkpoint_path if args.shared_base else args.value_checkpoint_path or start
    if is_quantized(read_hf_config(path)):
        raise ValueError(
            f"{path}: its quantised weights are frozen, so the critic cannot start there; give the folder it was made "
            "from, or the policy's, as --value_checkpoint_path"
        )
    check_reader("critic", path, policy, args)
    if path != args.checkpoint_path:  # of that folder it is said already
        say_of_dropout(path)
    zero_head = _zero_head(path)
    if args.shared_base:
        check_loadable(args.checkpoint_path, args, runtime, new_score=zero_head, lora=lora)
    else:
        check_loadable(args.checkpoint_path, args, runtime, lora=lora)
        check_loadable(path, args, runtime, head="score", new_score=zero_head)
    return path


def _zero_head(path: Path) -> Tensor | None:
    """Returns the critic's initial head if its folder has no scalar head, else None."""
    return None if has_score_head(path) else torch.zeros(1, ModelConfig.from_hf(path).hidden_size)


def _starts_as_policy(args, value_path: Path) -> bool:
    """Whether the critic starts from the policy, the adapter of --adapter_path included: not if that folder is given
    as --value_checkpoint_path."""
    return args.value_checkpoint_path is None and value_path == args.checkpoint_path


def critic_note(args, value_path: Path) -> str:
    """Returns a printable description of the initial critic."""
    adapter = args.adapter_path if _starts_as_policy(args, value_path) else None
    start = f"{value_path}" if adapter is None else f"{value_path} with the adapter {adapter}"
    head = "" if has_score_head(value_path) else ", with a zero head"
    return start + head + ", adapters on the policy's base" * args.shared_base


def load_with_critic(
    args, mesh: DeviceMesh, runtime: Runtime, lora: Lora | None, reward: RewardFolder | None, value_path: Path
) -> tuple[Transformer, Transformer, Transformer]:
    """Returns (the model that holds the policy's weights, the policy, the critic)."""
    zero_head = _zero_head(value_path)
    if args.shared_base:
        base = load_for_training(args.checkpoint_path, mesh, args, runtime, new_score=zero_head, lora=lora)
        policy, critic = OnSharedBase(base, ""), OnSharedBase(base, CRITIC)
    else:
        policy = base = load_for_training(args.checkpoint_path, mesh, args, runtime, lora=lora)
        as_policy = _starts_as_policy(args, value_path)
        own = None if lora is None else choose_lora(args, value_path, runtime, policy=lora, starts_as_policy=as_policy)
        options = {"head": "score", "new_score": zero_head, "lora": own}
        critic = load_for_training(value_path, mesh, args, runtime, **options)
    with torch.no_grad():
        critic.score.weight.mul_(_value_scale(args, reward, value_path))
    return base, policy, critic


def _value_scale(args, reward: RewardFolder | None, value_path: Path) -> float:
    """Returns the factor that turns the initial critic's scores into values of the rewards: if it is the reward model,
    --reward_model_weight, with --normalize_reward divided by reward_std. (The critic must learn the offset, reward_mean
    / reward_std, since its head has no bias.)"""
    if reward is None or reward.kind.separator is not None or not value_path.samefile(reward.folder.path):
        return 1.0
    return args.reward_model_weight / (reward.kind.std if args.normalize_reward else 1.0)
