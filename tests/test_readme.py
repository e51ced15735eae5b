"""README.md and the READMEs of the folders: their commands, their maps, their links."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import transformers

from models.common import flags_of, parse_args
from models.fsdp import split_batch
from tests import tiny

FOLDERS = ("training", "inference", "models", "scripts")
READMES = [Path("README.md"), *(Path(folder) / "README.md" for folder in FOLDERS)]


def text_of(readme: Path) -> str:
    return (tiny.ROOT / readme).read_text(encoding="utf-8")


def commands():
    """Yields (words of the launcher, script, arguments) for each command that runs a script of ours."""
    for readme in READMES:
        for block in re.findall(r"^```[a-z]*\n(.*?)^```$", text_of(readme), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                if not line.startswith(("python ", "torchrun ")):
                    continue
                words = shlex.split(line, comments=True)
                script = next((i for i, word in enumerate(words) if re.fullmatch(r"\w+(/\w+)+\.py", word)), None)
                if script is not None:
                    yield words[:script], words[script], words[script + 1 :]


@pytest.mark.parametrize("launcher, script, arguments", list(commands()))
def test_commands_parse(launcher, script, arguments, monkeypatch):
    """Catches a renamed script or flag, a value that a flag does not take, and batches that do not divide over the
    ranks."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    args = parse_args(tiny.args_of(module, arguments), arguments)
    if launcher[0] == "torchrun":
        ranks = launcher[launcher.index("--nproc-per-node") + 1]
        monkeypatch.setenv("WORLD_SIZE", ranks)
    if script in ("training/train_ppo.py", "training/train_grpo.py"):
        split_batch(args, args.step_size, "--minibatch_size")
        assert args.rollout_batch_size % args.step_size == 0
    elif script.startswith("training/"):
        split_batch(args, args.batch_size)


def test_what_may_change_on_resume():
    """Catches a flag that may change on --resume, but that training/README.md does not name."""
    section = text_of(Path("training/README.md")).split("## Flags and --resume")[1].split("\n## ")[0]
    for name in ("finetune_sft", "train_rm", "train_dpo", "train_ppo", "train_grpo"):
        Args = tiny.args_of(importlib.import_module(f"training.{name}"))
        # a callable decides by other flags
        missing = [
            each.name for each in flags_of(Args) if each.metadata["may_change"] and f"`--{each.name}`" not in section
        ]
        assert not missing, name


def test_recipes_are_of_the_code():
    """Catches a recipe ("How to add ...") with a line that is neither in the code nor one that the recipe adds."""
    code = {
        line.strip()
        for folder in ("training", "models")
        for path in (tiny.ROOT / folder).glob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
    }
    added = re.compile(r'apo_zero|ratios\.|score_clip|MyArgs|"""|finish\(metrics|evaluate\(|^\.\.\.$')
    num_lines = 0
    for readme in ("training", "models"):
        text = text_of(Path(readme) / "README.md")
        for recipe in re.findall(r"^## How to add .*?(?=^## |\Z)", text, re.DOTALL | re.MULTILINE):
            for block in re.findall(r"^```python\n(.*?)^```$", recipe, re.DOTALL | re.MULTILINE):
                lines = [line.partition("  #")[0].strip() for line in block.splitlines()]
                num_lines += len(lines)
                assert not [line for line in lines if line and line not in code and not added.search(line)]
    assert num_lines > 50


def test_a_model_of_another_size(tmp_path):
    """Catches a program in models/README.md that no longer writes a folder which opens with its weights, here and in
    transformers, which refuses one with another number of layer_types than layers."""
    section = text_of(Path("models/README.md")).split("## A model of another size")[1]
    program = section.split("python - <<'PY'\n")[1].split("\nPY\n")[0]
    tiny.write_model(tmp_path / "source", **tiny.QWEN2)
    assert "layer_types" in (tmp_path / "source/config.json").read_text()
    for place, folder in (("runs/toy/model", "source"), ("runs/my-size", "made")):
        assert f'"{place}"' in program
        program = program.replace(f'"{place}"', repr(str(tmp_path / folder)))
    exec(compile(program, "models/README.md", "exec"), {})
    asked = ("--checkpoint_path", tmp_path / "made", "--prompt", "3 plus", "--max_new_tokens", 4, "--device", "cpu")
    result = tiny.run("inference/generate.py", *asked)
    assert result.code == 0 and '"output"' in result.stdout, result.stderr
    assert len(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made").model.layers) == 6


def test_all_scripts_have_a_command():
    """Catches a script without a command in a README, and commands that are no longer found here."""
    assert len(list(commands())) > 30
    shown = {script for _, script, _ in commands()}
    scripts = {f"training/{name}.py" for name in ("finetune_sft", "train_rm", "train_dpo", "train_ppo")}
    assert shown >= scripts | {"inference/generate.py", "inference/score.py", "inference/chat.py"}
    runnable = {
        path.relative_to(tiny.ROOT).as_posix()
        for folder in FOLDERS
        for path in (tiny.ROOT / folder).rglob("*.py")
        if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")
    }
    assert shown == runnable


def test_no_output_is_written_twice():
    """Catches a command that is refused because an earlier one, maybe of another README, has written its output."""
    outputs = [
        arguments[i + 1]
        for _, _, arguments in commands()
        for i, word in enumerate(arguments)
        if word in ("--output_dir", "--output_file") and "--score" not in arguments
    ]
    assert len(outputs) > 20 and len(outputs) == len(set(outputs)), sorted(outputs)


@pytest.mark.parametrize("folder", FOLDERS)
def test_maps(folder):
    """Catches a file that its folder's README does not name in its map, and a name without a file."""
    mapped = re.findall(r"^\| `(\w+\.\w+)` \|", text_of(Path(folder) / "README.md"), re.MULTILINE)
    files = {path.name for path in (tiny.ROOT / folder).iterdir() if path.is_file()}
    assert len(mapped) == len(set(mapped)) and files.issuperset(mapped)
    assert {name for name in files if name.endswith(".py")} - {"__init__.py"} <= set(mapped)


def test_short():
    """Catches a README.md that grows again: details belong to the folders."""
    assert len(text_of(Path("README.md")).splitlines()) <= 250


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_links(readme):
    """Catches a link to a file that is not there, or to a section that was renamed."""
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text_of(readme)):
        path, _, section = target.partition("#")
        other = (readme.parent / path) if path else readme
        assert (tiny.ROOT / other).exists(), target
        if section:
            titles = re.findall(r"^##+ (.+)$", text_of(other), re.MULTILINE)
            assert section in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target
