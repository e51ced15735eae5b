"""README.md: its commands."""

import importlib
import re
import shlex

import pytest

from tests import tiny
from training.common import split_batch


def commands():
    """The words of each command that runs a script of ours, by its line."""
    text = (tiny.ROOT / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```[a-z]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if not line.startswith(("python ", "torchrun ")):
                continue
            words = shlex.split(line, comments=True)
            script = next((i for i, word in enumerate(words) if re.fullmatch(r"\w+/\w+\.py", word)), None)
            if script is not None:
                yield words[:script], words[script], words[script + 1 :]


@pytest.mark.parametrize("launcher, script, arguments", list(commands()))
def test_commands_parse(launcher, script, arguments, monkeypatch):
    """Catches a flag that was renamed, a value it does not take, and batches that do not divide over the ranks."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if not hasattr(module, "parser"):
        pytest.skip("parses within its main")
    args = module.parser().parse_args(arguments)
    if launcher[0] == "torchrun":
        ranks = launcher[launcher.index("--nproc-per-node") + 1]
        monkeypatch.setenv("WORLD_SIZE", ranks)
    if script.startswith("training/"):
        flag = "minibatch_size" if script.endswith("ppo.py") else "batch_size"
        batch_size = getattr(args, flag) or args.rollout_batch_size
        split_batch(batch_size, args.micro_batch_size, args.tensor_parallel_size, args.dp_replicate)
        assert flag == "batch_size" or args.rollout_batch_size % batch_size == 0


def test_all_scripts_have_a_command():
    """Catches a script that nobody is told of, and commands that are no longer found here."""
    assert len(list(commands())) > 15
    shown = {script for _, script, _ in commands()}
    scripts = {f"training/{name}.py" for name in ("finetune_sft", "train_rm", "train_dpo", "train_ppo")}
    assert shown >= scripts | {"inference/generate.py", "inference/score.py", "inference/chat.py"}
