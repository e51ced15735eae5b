"""scripts/recipes/*.sh: their commands, recorded by a stub in place of Python."""

import importlib
import itertools
import os
import shutil
import subprocess

import pytest

from inference import score
from models.common import parse_args
from models.fsdp import split_batch
from models.reward import RewardKind
from tests import tiny

RECIPES = sorted(path.name for path in (tiny.ROOT / "scripts/recipes").glob("*.sh"))
DATA = ("sft", "steps", "hard", "held_out", "chats", "chats.eval", "pairs", "pairs.eval")
# logs its words, and writes the files that recipes look for: a --output_file, and the config.json of an
# --output_dir (or another EXPORT, or none)
PYTHON = r"""#!/bin/sh
[ -f scripts/recipes/slurm.sh ] || exit 9 # it runs in another folder
printf "%s\037" "$@" >>"$LOG"
echo >>"$LOG"
before=
for word; do
    case $before in
        --output_file) touch "$word" ;;
        --output_dir) file="$word/${EXPORT-config.json}" && mkdir -p "$(dirname "$file")" && touch "$file" ;;
    esac
    before=$word
done
"""
STUBS = {
    "python": PYTHON,
    "srun": '#!/bin/sh\nshift\nexec "$@"\n',
    "scontrol": "#!/bin/sh\necho first\n",
}


def run(recipe, tmp_path, *arguments, root=tiny.ROOT, **environment):
    """Runs a recipe of the repository in `root`; returns its process and the words of each of its commands."""
    for name, text in STUBS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for name in ("log", *(f"{part}.jsonl" for part in DATA)):
        (tmp_path / name).touch()
    environment |= {"PYTHON": tmp_path / "python", "LOG": tmp_path / "log", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"SLURM_NNODES": 2, "SLURM_JOB_NODELIST": "first", "SLURM_JOB_ID": 1}
    environment["CDPATH"] = tmp_path / "cdpath"  # has such a folder, too
    (tmp_path / "cdpath/scripts/recipes").mkdir(parents=True, exist_ok=True)
    command = ["bash", f"scripts/recipes/{recipe}", *arguments]
    given = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    done = subprocess.run(command, env=given, cwd=root, capture_output=True, text=True)
    return done, [line.split("\037")[:-1] for line in (tmp_path / "log").read_text().splitlines()]


def output_dirs(words):
    return [value for flag, value in itertools.pairwise(words) if flag == "--output_dir"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_commands(recipe, tmp_path, monkeypatch):
    """Catches a renamed flag, a value that a flag does not take, batches that do not divide over the ranks, a stage
    that cannot be run again after a later one failed, or is run again when it has finished, a recipe that an exported
    CDPATH leads elsewhere, and one that says nothing of an argument or a file that is missing."""
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    out.mkdir()
    places = (model, "train.jsonl", out) if recipe == "slurm.sh" else (tmp_path, model, out)
    done, commands = run(recipe, tmp_path, *places)
    assert done.returncode == 0 and commands, done.stderr
    for words in commands:
        start = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script, flags = words[start], words[start + 1 :]
        args = parse_args(tiny.args_of(importlib.import_module(script[:-3].replace("/", ".")), flags), flags)
        assert getattr(args, "resume", True), script
        ranks = int(words[words.index("--nproc-per-node") + 1]) if start else 1
        monkeypatch.setenv("WORLD_SIZE", str(ranks * (2 if recipe == "slurm.sh" else 1)))
        if hasattr(args, "rollout_batch_size"):
            split_batch(args, args.step_size, "--minibatch_size")
        elif script.startswith("training/"):
            split_batch(args, args.batch_size)
    for stage in ("sft", "prm"):  # whose checkpoints may have been removed since, for the room of a later one's
        (out / stage).mkdir(exist_ok=True)
        (out / stage / "config.json").touch()
    (tmp_path / "log").unlink()
    done, left = run(recipe, tmp_path, *places)
    assert done.returncode == 0, done.stderr
    if recipe in ("llama_sft_dpo.sh", "easy_to_hard.sh"):
        stages = [words for words in commands if {f"{out}/sft", f"{out}/prm"} & {*output_dirs(words)}]
        assert stages and left == [words for words in commands if words not in stages], recipe
    done, commands = run(recipe, tmp_path / "model")
    assert done.returncode and "is missing" in done.stderr and not commands, done
    if recipe != "slurm.sh":  # before a model is fetched
        (tmp_path / "log").unlink()
        done, commands = run(recipe, tmp_path / "model", tmp_path / "nowhere", tmp_path / "more", tmp_path / "other")
        assert not commands or not commands[0][0].endswith("download.py"), commands


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "slurm.sh"])
def test_a_model_is_downloaded_once(recipe, tmp_path):
    """Catches a rerun that asks the Hub for the model again, and fails on a node without network, and one that takes an
    interrupted download for a model."""
    root, name = tmp_path / "repository", "org/name"
    shutil.copytree(tiny.ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    folder = root / "checkpoints" / name
    incomplete = folder / ".cache/huggingface/download/model.safetensors.0a1b.incomplete"
    for path, downloads in ((folder / "tokenizer.json", 1), (folder / "config.json", 0), (incomplete, 1)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        (tmp_path / "log").unlink(missing_ok=True)
        done, commands = run(recipe, tmp_path, tmp_path, name, tmp_path / path.name, root=root)
        assert done.returncode == 0, done.stderr
        assert commands.count(["scripts/download.py", name]) == downloads
        assert any(f"checkpoints/{name}" in words for words in commands)


def test_what_a_finished_job_leaves(tmp_path):
    """Catches a job that starts anew, or fails, after a finished run with adapters, and one that takes the model of an
    earlier run for its own."""
    out = tmp_path / "out"
    out.mkdir()
    adapter, lora = "adapter_config.json", "--lora_r 8"
    cases = [("config.json", "", 0), ("merged/config.json", lora, 0), (adapter, f"{lora} --no-merge", 0)]
    for export, more, code in (*cases, (adapter, lora, 1), ("", "", 1)):
        done, _ = run("slurm.sh", tmp_path, tmp_path, "train.jsonl", f"{out}/", EXPORT=export, MORE=more)
        assert done.returncode == code, (export, done.stderr)


def test_a_chat_template_from_another_folder(tmp_path):
    """Catches a base model that gets the other folder's tokenizer without its chat template, which transformers 5
    writes to a file of its own, or that keeps the checksums of the files it had."""
    model, other, out = tmp_path / "model", tmp_path / "other", tmp_path / "out"
    for folder, names in (
        (model, ("config.json", "model.safetensors", "tokenizer.json", "special_tokens_map.json", "checksums.json")),
        (other, ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(folder.name)
    for _ in range(2):  # and once more
        done, commands = run("llama_sft_dpo.sh", tmp_path, tmp_path, model, out, TEMPLATE=other)
        assert done.returncode == 0 and str(out / "base") in commands[0], done.stderr
    found = {path.name: path.read_text() for path in (out / "base").iterdir()}
    taken = dict.fromkeys(("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"), "other")
    assert found == {"config.json": "model", "model.safetensors": "model", **taken}
    assert {path.read_text() for path in model.iterdir()} == {"model"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_scores_of_what_was_trained(recipe, tmp_path):
    """Catches flags of score.py that the recipe's own reward model refuses, after hours of training, and a recipe that
    ends before it."""
    done, commands = run(recipe, tmp_path, tmp_path, tmp_path, tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tiny.ROOT / "scripts/recipes" / recipe).read_text()
    assert any("inference/score.py" in words for words in commands) == ("inference/score.py" in text)
    kinds = {}
    for words in commands:
        start = next(i for i, word in enumerate(words) if word.endswith(".py"))
        flags = dict(zip(words[start:], words[start + 1 :]))
        if words[start] == "training/train_rm.py":
            separator = "\n" if flags.get("--loss") == "process" else None
            kinds[flags["--output_dir"]] = RewardKind(separator, None, None)
        if words[start] == "inference/score.py":
            args = parse_args(score.ScoreArgs, words[start + 1 :])
            score.check_flags(args)
            if args.checkpoint_path is not None:
                score.check_kind(args, kinds[str(args.checkpoint_path)])


def test_scripts_stay_in_the_repository():
    """Catches a shell script that an exported CDPATH leads to another folder."""
    for path in (tiny.ROOT / "scripts").rglob("*.sh"):
        for line in path.read_text().splitlines():
            assert not line.startswith('cd "$(dirname'), path
