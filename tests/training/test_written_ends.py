"""Data as other tools write it: texts that end with EOS, columns with null, tool calls as JSON text, prompts that open
the answer. The oracles are transformers and TRL's rules (SFTTrainer and RewardTrainer of 1.16)."""

import gzip
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers

from models.checkpoint import model_folder, open_folder
from models.records import Limits, Record, get_prompt, read_records, text_of
from models.reward import encode_pair_record
from tests import tiny
from training.checkpoints import CheckpointWriter, load_newest_checkpoint
from training.data import encode_sft_file, encode_sft_record
from training.metrics import Metrics
from training.preferences import encode_pair_file

LIMITS = Limits(vocab_size=10**6, max_seq_len=10**6)
USER, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("assistant", "c"))
)
TEMPLATE = """{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for call in m.tool_calls or [] %}
{"arguments": {{ ARGUMENTS }}}{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.fixture(scope="module")
def chat_folder(folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(folder, path)
    (path / "chat_template.jinja").write_text(TEMPLATE.replace("ARGUMENTS", "call.function.arguments | tojson"))
    return path


def ids_of(record: dict, folder: Path) -> list[int]:
    return list(encode_sft_record(Record("f:1", record), open_folder(folder, None, 1).tokenizer)[0].input_ids)


def test_a_text_that_ends_with_eos(folder):
    """Catches a second EOS after a text that already ends with one, as in data sets for TRL, which adds it only where
    it is missing: the model would learn to repeat EOS, and a reward model be read where PPO never reads it."""
    eos = open_folder(folder, None, 1).tokenizer.eos_token_id
    for plain in ({"text": "a b"}, {"prompt": "a", "completion": " b"}):
        ids = ids_of(plain, folder)
        assert ids[-1] == eos and ids.count(eos) == 1
        last = list(plain)[-1]
        assert ids_of({**plain, last: plain[last] + "</s>"}, folder) == ids
    assert ids_of({"prompt": "a</s>", "completion": ""}, folder)[-2:] == [eos, eos]  # the first is not the answer's


def test_columns_that_hold_null(tmp_path, chat_folder):
    """Catches records refused because columns of other forms of records are null in them, as `datasets` writes a file
    of several forms."""
    forms = [
        {"messages": [USER, YES]},
        {"prompt": "a", "completion": "b"},
        {"text": "a b"},
        {"instruction": "a", "output": "b"},
    ]
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": [USER, YES], "rejected": [USER, NO]}]
    tokenizer = open_folder(chat_folder, None, 1).tokenizer
    for records, encode in ((forms, encode_sft_file), (pairs, encode_pair_file)):
        columns = dict.fromkeys(name for record in records for name in record)
        rows = []
        for written in (records, [{**columns, **record} for record in records]):
            path = tmp_path / "records.jsonl"
            path.write_text("".join(json.dumps(record) + "\n" for record in written))
            rows.append(list(encode(path, tokenizer, LIMITS)[0]))
        assert rows[0] == rows[1]


@pytest.mark.parametrize("template", ["call.function.arguments | tojson", "call.function.arguments"])
def test_arguments_in_json_text(chat_folder, tmp_path, template):
    """Catches a call's arguments, JSON text in OpenAI's format, rendered as a quoted string by a template that expects
    an object (most do), or changed for a template that writes them as they are (DeepSeek's)."""
    path = shutil.copytree(chat_folder, tmp_path / "model")
    (path / "chat_template.jinja").write_text(TEMPLATE.replace("ARGUMENTS", template))
    tokenizer, texts = open_folder(path, None, 1).tokenizer, []
    for arguments in ({"city": "Rome"}, '{"city": "Rome"}', '{"city":'):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
        texts.append(tokenizer.decode(ids_of({"messages": messages}, path), skip_special_tokens=False))
    rendered = transformers.AutoTokenizer.from_pretrained(path).apply_chat_template
    assert '{"city": "Rome"}' in texts[1] and '\\"' not in texts[1]
    assert texts[1] == texts[0] or template == "call.function.arguments"  # there transformers writes Python's form, too
    shown = rendered([USER, {**messages[1], "content": "", "tool_calls": [call]}], tokenize=False)
    assert texts[2] == shown.rstrip("\n")  # text that is no object stays


def test_arguments_that_a_template_takes_apart(chat_folder, tmp_path):
    """Catches JSON text passed to a template that asks for the items of an object, and fails (Qwen3-Coder's)."""
    path = shutil.copytree(chat_folder, tmp_path / "model")
    (path / "chat_template.jinja").write_text(TEMPLATE.replace("ARGUMENTS", "dict(call.function.arguments.items())"))
    for arguments in ('{"city": "Rome"}', {"city": "Rome"}):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        ids = ids_of({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]}, path)
        assert "{'city': 'Rome'}" in open_folder(path, None, 1).tokenizer.decode(ids)


def test_tools_in_json_text(chat_folder):
    """Catches `tools` refused as JSON text, which TRL accepts from columns that have types."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    template = chat_folder / "chat_template.jinja"
    source = template.read_text()
    template.write_text("{% if tools %}{{ tools | tojson }}{% endif %}" + source)
    try:
        wanted = ids_of({"messages": [USER, YES], "tools": tools}, chat_folder)
        assert ids_of({"messages": [USER, YES], "tools": json.dumps(tools)}, chat_folder) == wanted
        with pytest.raises(ValueError, match="f:1: tools must be a list of objects"):
            ids_of({"messages": [USER, YES], "tools": "f("}, chat_folder)
    finally:
        template.write_text(source)


@pytest.mark.parametrize("opening", ["Let me think.", "<think>\n", "so: "])
def test_a_prompt_that_opens_the_answer(chat_folder, opening):
    """Catches an answer drawn, or trained on, as a second turn although the prompt ends with its beginning:
    transformers' continue_final_message, which TRL uses there, is the oracle."""
    tokenizer, messages = open_folder(chat_folder, None, 1).tokenizer, [USER, {"role": "assistant", "content": opening}]
    hf = transformers.AutoTokenizer.from_pretrained(chat_folder)
    wanted = hf.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert text_of(get_prompt(Record("f:1", {"prompt": messages})), tokenizer) == wanted
    row, _ = encode_sft_record(Record("f:1", {"prompt": messages, "completion": "b"}), tokenizer)
    assert tokenizer.decode(row.input_ids, skip_special_tokens=False) == f"{wanted}b</s>"
    assert tokenizer.decode([label for label in row.labels if label >= 0], skip_special_tokens=False) == "b</s>"


def test_one_run_of_wandb(tmp_path, monkeypatch):
    """Catches a resume that begins another run at wandb, so that the steps after the checkpoint are in both."""
    asked = []
    run = types.SimpleNamespace(log=lambda values, step: None, finish=lambda: None)
    wandb = types.SimpleNamespace(init=lambda **options: asked.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name in ("a", "a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        Metrics(tmp_path / name, report_to="wandb").close()
    ids = [options["id"] for options in asked]
    assert ids[0] == ids[1] != ids[2] and {options["resume"] for options in asked} == {"allow"}


def test_checkpoints_of_other_flags(tmp_path):
    """Catches advice to remove sound checkpoints that a flag does not fit, such as another --lora_r."""
    models = [torch.nn.Linear(size, 2, bias=False) for size in (3, 4)]
    CheckpointWriter(tmp_path, models[0], torch.optim.SGD(models[0].parameters()), limit=1).save(1)
    with pytest.raises(ValueError, match=r"no checkpoint can be read by this run, .*weight.*flags") as caught:
        load_newest_checkpoint(tmp_path, models[1], torch.optim.SGD(models[1].parameters()))
    assert "remove" not in str(caught.value)


def test_no_stale_merged_model(folder, tmp_path):
    """Catches the merged model of a run's earlier end left beside a later adapter by an --export_dtype that cannot hold
    the later model, or by --no-merge: the run's folder as --checkpoint_path would read it; and an error that does not
    say what such a folder lacks."""
    out, data = tmp_path / "out", tmp_path / "train.jsonl"
    data.write_text('{"prompt": "a", "completion": " b"}\n')
    flags = ["--checkpoint_path", folder, "--train_file", data, "--output_dir", out, "--lora_r", 1, "--batch_size", 1]
    flags += ["--lr_schedule", "constant", "--warmup_ratio", 0]
    tiny.run("training/finetune_sft.py", *flags, "--max_steps", 1)
    assert model_folder(out) == out / "merged"
    flags += ["--learning_rate", 1e6, "--accept_changed", "learning_rate", "--resume"]
    large = tiny.run("training/finetune_sft.py", *flags, "--max_steps", 2, "--export_dtype", "float16")
    assert large.code == 2 and f"error: {out / 'merged'}: float16 cannot hold" in large.stderr
    assert f"{out / 'merged'}: removed" in large.stdout and model_folder(out) == out
    tiny.run("training/finetune_sft.py", *flags, "--max_steps", 2)
    assert model_folder(out) == out / "merged"
    later = tiny.run("training/finetune_sft.py", *flags, "--max_steps", 3, "--no-merge")
    assert f"{out / 'merged'}: removed" in later.stdout and model_folder(out) == out
    with pytest.raises(FileNotFoundError, match=r"no merged model; merge it .* for --checkpoint_path only"):
        open_folder(model_folder(out), None, 1)


def test_a_folder_that_changes_during_the_run(folder, tmp_path, monkeypatch):
    """Catches trained weights exported with the config, tokenizer or template of another model, which has come to the
    path of --checkpoint_path in the meantime: a link to the latest version."""
    out, data, write = tmp_path / "out", tmp_path / "train.jsonl", Metrics.write
    data.write_text('{"prompt": "a", "completion": " b"}\n')
    for name in ("one", "two"):
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / "two" / "chat_template.jinja").write_text(TEMPLATE)
    latest = tmp_path / "latest"
    latest.symlink_to("one")
    flags = ["--checkpoint_path", latest, "--train_file", data, "--output_dir", out, "--max_steps", 1]

    def write_and_publish(self, line):
        latest.unlink()
        latest.symlink_to("two")
        write(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", write_and_publish)
        ended = tiny.run("training/finetune_sft.py", *flags, "--save_steps", 0)
    assert (
        ended.code == 2 and f"{latest}: other content than when the run began; restore it and --resume" in ended.stderr
    )
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000001"]
    assert not (out / "config.json").exists()
    latest.unlink()
    latest.symlink_to("one")
    assert tiny.run("training/finetune_sft.py", *flags, "--resume").code == 0
    assert (out / "config.json").exists() and not (out / "chat_template.jinja").exists()


def test_answers_of_other_prompts(chat_folder, tmp_path):
    """Catches a traceback if a template renders the prompt by what follows it, so that a pair has two prompts."""
    path = shutil.copytree(chat_folder, tmp_path / "model")
    template = TEMPLATE.replace("ARGUMENTS", "0")
    (path / "chat_template.jinja").write_text("{{ messages | length }}" + template)
    record = Record("f:1", {"prompt": [USER], "chosen": [YES], "rejected": [NO, USER, NO]})
    with pytest.raises(ValueError, match="f:1: the chat template writes the prompt differently before chosen"):
        encode_pair_record(record, open_folder(path, None, 1).tokenizer)


def test_the_adapter_of_a_reward_model(folder, tmp_path):
    """Catches a language model trained from a reward model's adapter, whose head is dropped silently."""
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "chosen": " b", "rejected": " c", "completion": " b"}\n')
    flags = ["--checkpoint_path", folder, "--train_file", data, "--batch_size", 1, "--output_dir"]
    tiny.run("training/train_rm.py", *flags, tmp_path / "rm", "--lora_r", 1, "--no-merge")
    for script in ("finetune_sft", "train_dpo"):
        result = tiny.run(f"training/{script}.py", *flags, tmp_path / script, "--adapter_path", tmp_path / "rm")
        tiny.assert_refused(result, f"--adapter_path {tmp_path / 'rm'}: the adapter of a reward model")
    assert tiny.run("training/train_rm.py", *flags, tmp_path / "on", "--adapter_path", tmp_path / "rm").code == 0


def test_packed_files(tmp_path):
    """Catches a compressed or columnar file reported as text that is not UTF-8, which does not say what to do."""
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    with pytest.raises(ValueError, match="is a gzip file, and records are read from JSON or JSONL"):
        read_records(path)
