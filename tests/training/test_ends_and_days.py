"""Training and generation must agree on where answers end, and on the date that a chat template shows."""

import json
from datetime import date
from itertools import product

import pytest
import torch
import transformers

from models.checkpoint import open_folder
from models.records import Record
from models.reward import encode_pair_record, encode_to_score
from models.tokenizer import chat_day
from tests import tiny
from training.data import encode_sft_record
from training.preferences import encode_pointwise_record, encode_process_record

SCRIPT = "training/finetune_sft.py"
END = tiny.VOCAB_SIZE  # the end-of-turn token: neither the tokenizer's EOS nor in generation_config.json
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the answer is 7"}]}


def chat_folder(folder, template=TEMPLATE):
    tiny.write_model(folder, vocab_size=tiny.VOCAB_SIZE + 8)
    token = {"content": "<|im_end|>", "special": True, "normalized": False}
    tiny.write_tokenizer(folder, chat_template=template, added_tokens_decoder={str(END): token})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return folder


def run(script, *flags, code=0):
    result = tiny.run(script, *flags)
    assert result.code == code, result.stderr
    return result


def test_answers_end_where_they_were_trained_to(tmp_path):
    """Catches generation, ours or transformers' from the export, that does not stop at the end of turn that was
    trained, and a second space at the start of an answer whose header ends in one."""
    folder, data = chat_folder(tmp_path / "in"), tiny.write_records(tmp_path / "train.jsonl", [CHAT] * 4)
    given = ["--checkpoint_path", folder, "--train_file", data, "--output_dir", tmp_path / "out", "--save_steps", 0]
    flags = ["--num_epochs", 40, "--batch_size", 4, "--learning_rate", 1e-2, "--lr_schedule", "constant"]
    result = run(SCRIPT, *given, *flags)
    assert f"stop tokens   </s> (2), <|im_end|> ({END}) (generation_config.json does not list all" in result.stdout
    assert "first target  the answer is 7<|im_end|>" in result.stdout
    assert open_folder(tmp_path / "out").eos_token_ids == (2, END)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, END]
    asked = ["--checkpoint_path", tmp_path / "out", "--chat", "--prompt", "hello", "--temperature", 0]
    line = json.loads(run("inference/generate.py", *asked, "--max_new_tokens", 40).stdout)
    assert (line["output"], line["finish_reason"]) == ("the answer is 7", "stop")
    ids = open_folder(tmp_path / "out").tokenizer.encode("<s>user: hello<|im_end|>\nassistant: ", False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    answer = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :].tolist()
    assert answer[-1] == END and len(answer) == line["num_tokens"] + 1


def test_samples_are_learnt_as_they_were_drawn(tmp_path):
    """Catches training on (or labelling) the reference answer in a line of generate.py instead of its sample; an end
    token after a sample cut at the token limit, which would teach to stop there; two end tokens where another engine
    left one in the text; and a record from elsewhere whose finish_reason makes it pass for such a line."""
    folder, lines = chat_folder(tmp_path / "in"), tmp_path / "lines.jsonl"
    asked, reference = CHAT["messages"][:1], {"completion": "a reference", **CHAT, "text": "another", "label": 1}
    records = [{"prompt": prompt, **reference} for prompt in ("hello", asked) * 16]
    data = tiny.write_records(tmp_path / "prompts.jsonl", records)
    given = ["--checkpoint_path", folder, "--prompt_file", data, "--output_file", lines, "--stop", "e"]
    run("inference/generate.py", *given, "--max_new_tokens", 8)
    tokenizer, oracle = open_folder(folder).tokenizer, transformers.AutoTokenizer.from_pretrained(folder)
    drawn = [json.loads(line) for line in lines.read_text().splitlines()]
    kinds = {(line["finish_reason"], type(line["prompt"])) for line in drawn}
    assert kinds == set(product(("stop", "length"), (str, list)))
    for line in drawn:
        is_text = isinstance(line["prompt"], str)
        text = "<s>hello" if is_text else oracle.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        end = ("</s>" if is_text else "<|im_end|>") * (line["finish_reason"] == "stop")
        row, _ = encode_sft_record(Record("x", line), tokenizer)
        prompt_ids = tokenizer.encode(text, add_special_tokens=False)
        answer_ids = row.input_ids[row.prompt_length :]
        assert row.input_ids[: row.prompt_length] == prompt_ids and row.labels[row.prompt_length :] == answer_ids
        learnt = tokenizer.decode_continuation(prompt_ids, answer_ids, skip_special_tokens=False)
        assert learnt == line["output"] + end
        assert encode_pointwise_record(Record("x", line), tokenizer)[0].input_ids == row.input_ids
        assert encode_sft_record(Record("x", {**line, "output": line["output"] + end}), tokenizer)[0] == row
        theirs = {"stop": "eos_token", "length": "MAX_TOKENS"}[line["finish_reason"]]  # as TGI's and Gemini's have it
        assert encode_sft_record(Record("x", {**line, "finish_reason": theirs}), tokenizer)[0] == row
    answer = CHAT["messages"][1:]
    for fields in ({**CHAT, "output": "b"}, {"prompt": asked, "output": answer}):
        learnt, _ = encode_sft_record(Record("x", {**fields, "finish_reason": "stop"}), tokenizer)
        assert learnt == encode_sft_record(Record("x", CHAT), tokenizer)[0]


def test_a_finish_reason_means_the_same_in_training_and_scoring(tmp_path):
    """Catches a record that training reads and score.py refuses, or reads as another row, since another tool wrote a
    finish_reason beside a pair, labelled steps, an answer in messages, or a completion that is text."""
    tokenizer, (question, answer) = open_folder(chat_folder(tmp_path)).tokenizer, CHAT["messages"]
    point, text = {"prompt": [question], "completion": [answer], "label": 1}, {"prompt": "hello", "label": 1}
    steps = {"prompt": "hello", "completions": ["7", "hello"], "labels": [0, 1]}
    pair = {"prompt": [question], "chosen": "7", "rejected": "no"}
    cut = {**text, "completion": " the", "messages": None, "finish_reason": "length"}
    for fields in ({**point, "finish_reason": "stop"}, {**steps, "finish_reason": "stop"}, cut):
        record, separator = Record("x", fields), "\n" if "labels" in fields else None
        row, _ = (
            encode_process_record(record, "\n", tokenizer) if separator else encode_pointwise_record(record, tokenizer)
        )
        [scored], _ = encode_to_score(record, separator, tokenizer)
        assert (scored.input_ids, scored.positions) == (row.input_ids, row.positions)
    assert row.input_ids == encode_sft_record(Record("x", cut), tokenizer)[0].input_ids
    assert tokenizer.decode(row.input_ids, skip_special_tokens=False) == "<s>hello the"
    record = Record("x", {**pair, "finish_reason": "stop"})
    sides, (trained, _) = encode_to_score(record, None, tokenizer)[0], encode_pair_record(record, tokenizer)
    assert [side.input_ids for side in sides] == [trained.chosen.input_ids, trained.rejected.input_ids]
    quoted = {**text, "completion": str([answer]), "finish_reason": "stop"}
    for encode in (encode_sft_record, encode_pointwise_record, lambda r, t: encode_to_score(r, None, t)):
        with pytest.raises(ValueError, match="completion is a list of messages as text"):
            encode(Record("x", quoted), tokenizer)


def test_a_template_without_an_end(tmp_path):
    """Catches a template that ends no turn with a token but is accepted without a warning."""
    folder = chat_folder(tmp_path / "in", TEMPLATE.replace("<|im_end|>", ""))
    assert (
        "ends no turn" in open_folder(folder).stop_tokens()
        and "ends no turn" not in open_folder(chat_folder(tmp_path / "other")).stop_tokens()
    )


def test_a_run_has_one_day(tmp_path):
    """Catches a resume that reads the date from the clock, or that silently accepts another --chat_date."""
    folder = chat_folder(tmp_path / "in", "{{ strftime_now('%d %b %Y') }} " + TEMPLATE)
    data, out = tiny.write_records(tmp_path / "train.jsonl", [CHAT] * 2), tmp_path / "out"
    given = ["--checkpoint_path", folder, "--train_file", data, "--output_dir", out, "--save_steps", 1]
    given += ["--num_epochs", 1, "--batch_size", 1, "--lr_schedule", "constant"]
    run(SCRIPT, *given, "--chat_date", "2024-02-29")
    tiny.assert_refused(tiny.run(SCRIPT, *given, "--resume", "--chat_date", "2024-03-01"), "other --chat_date")
    run(SCRIPT, *given, "--resume")
    assert json.loads((out / "args.json").read_text())["chat_date"] == "2024-02-29"
    lines = tmp_path / "lines.jsonl"
    asked = ["--checkpoint_path", folder, "--chat", "--prompt", "hello", "--max_new_tokens", 2, "--output_file", lines]
    run("inference/generate.py", *asked, "--chat_date", "2024-02-29")
    run("inference/generate.py", *asked, "--resume")
    later = tiny.run("inference/generate.py", *asked, "--resume", "--chat_date", "2024-03-01")
    tiny.assert_refused(later, "was begun with other --chat_date")
    tiny.assert_refused(tiny.run(SCRIPT, *given, "--chat_date", "tomorrow"), "--chat_date tomorrow")
    assert chat_day(None) == date.today()
