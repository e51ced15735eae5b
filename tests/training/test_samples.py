"""training/samples.py: samples at evaluations are drawn with the current weights, and do not affect the training.
Several ranks: test_parallel.py."""

import pytest
import torch
from safetensors.torch import load_file

from models.chats import read_chat
from models.records import Record
from models.tokenizer import Tokenizer
from tests import tiny
from training import samples
from training.data import encode_sft_record
from training.samples import block, lesson, prompts_of, question

SCRIPT = "training/finetune_sft.py"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Writes training and evaluation records; truncated, the second evaluation record has no targets."""
    root = tmp_path_factory.mktemp("data")
    records = [{"prompt": f"Question {i}:" + " and so" * (i % 4), "completion": f" it is {i + 3}"} for i in range(12)]
    evaluation = [records[3], {"prompt": "very long " * 30, "completion": " never seen"}, *records[7:10]]
    return tiny.write_records(root / "train.jsonl", records), tiny.write_records(root / "eval.jsonl", evaluation)


def finetune(folder, files, out, *more):
    train_file, eval_file = files
    flags = ["--checkpoint_path", folder, "--train_file", train_file, "--eval_file", eval_file, "--output_dir", out]
    flags += ["--max_seq_len", 40, "--overlong", "truncate", "--batch_size", 4, "--learning_rate", 3e-3]
    flags += ["--lr_schedule", "constant", "--max_steps", 4, "--eval_steps", 2, *more]
    flags += [] if more[:2] == ("--num_eval_samples", 0) else ["--eval_max_new_tokens", 20]
    result = tiny.run(SCRIPT, *flags)
    assert result.code == 0, result.stderr
    return result


@pytest.mark.parametrize("tied", [False, True])
def test_samples_are_those_of_the_current_weights(files, tmp_path, tied):
    """Catches samples drawn with the weights of an earlier evaluation or of the start, in the blocks or only in the
    head; prompts encoded differently from generation; and lines that are missing, doubled or in another order."""
    folder = tmp_path / "in"
    tiny.write_model(folder, tie_word_embeddings=tied)
    result = finetune(folder, files, tmp_path / "out", "--num_eval_samples", 3)
    finetune(folder, files, tmp_path / "half", "--max_steps", 2, "--num_eval_samples", 3)
    lines = tiny.read_lines(tmp_path / "out/samples.jsonl")
    assert [line["step"] for line in lines] == [2, 2, 2, 4, 4, 4]
    outputs = []
    for name, shown in (("half", lines[:3]), ("out", lines[3:])):
        flags = ["--checkpoint_path", tmp_path / name, "--prompt_file", files[1], "--temperature", 0]
        flags += ["--max_new_tokens", 20, "--max_seq_len", 120, "--overlong", "truncate"]
        assert tiny.run("inference/generate.py", *flags, "--output_file", tmp_path / f"{name}.jsonl").code == 0
        wanted = sorted(tiny.read_lines(tmp_path / f"{name}.jsonl"), key=lambda line: line["idx"])
        wanted = [wanted[i] for i in (0, 2, 3)]  # the second record has no targets
        for line, want in zip(shown, wanted, strict=True):
            assert line["prompt"] == "<s>" + want["prompt"] and line["reference"] == want["completion"]
            assert (line["output"], line["finish_reason"]) == (want["output"], want["finish_reason"])
        outputs.append([line["output"] for line in shown])
    assert outputs[0] != outputs[1], "the steps in between change what it says"
    assert result.stdout.count("  prompt  ") == 6 and f"  wanted  {lines[0]['reference']}\n" in result.stdout


def test_training_does_not_notice(folder, files, tmp_path):
    """Catches samples that use a global random state, change a weight, or leave FSDP with stale gathered weights, and
    an --eval_temperature without effect."""
    states, drawn = [], []
    for name, count in (("none", 0), ("greedy", 2), ("sampled", 3)):
        torch.manual_seed(0)
        finetune(folder, files, tmp_path / name, "--num_eval_samples", count, "--eval_temperature", count // 3)
        states.append(torch.get_rng_state())
    assert not (tmp_path / "none/samples.jsonl").exists()
    assert all(torch.equal(state, states[0]) for state in states)
    wanted = load_file(tmp_path / "none/model.safetensors")
    metrics = [line["loss"] for line in tiny.read_lines(tmp_path / "none/metrics.jsonl")]
    for name in ("greedy", "sampled"):
        weights = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(weights[key], wanted[key]) for key in wanted)
        assert [line["loss"] for line in tiny.read_lines(tmp_path / name / "metrics.jsonl")] == metrics
        lines = tiny.read_lines(tmp_path / name / "samples.jsonl")
        drawn.append({(line["step"], line["prompt"]): line["output"] for line in lines})
    greedy, sampled = drawn
    assert len(greedy) == 4 and all(sampled[which] != output for which, output in greedy.items())


def test_resume_drops_what_follows_the_checkpoint(folder, files, tmp_path):
    """Catches samples of a step twice after a resume, or those before it lost."""
    out = tmp_path / "out"
    finetune(folder, files, out, "--save_steps", 3)
    wanted = (out / "samples.jsonl").read_bytes()
    assert wanted.count(b"\n") == 4
    with open(out / "samples.jsonl", "ab") as file:
        file.write(b'{"step": 2, "pro')  # torn by a kill
    (out / "checkpoints/step-000004").rename(tmp_path / "gone")
    assert "resuming after step 3" in finetune(folder, files, out, "--save_steps", 3, "--resume").stdout
    assert (out / "samples.jsonl").read_bytes() == wanted


def test_prompts_of_all_kinds_of_records(tmp_path):
    """Catches a chat cut at its first answer, a header or end of turn on the wrong side, a text with no prompt, and an
    error for a count of more than islice can count to."""
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    tiny.write_tokenizer(tmp_path, chat_template=template)
    tokenizer = Tokenizer(tmp_path)
    roles = ("user", "assistant", "user", "assistant", "user")
    chat = [{"role": role, "content": f"say {i}"} for i, role in enumerate(roles)]
    records = [{"messages": chat}, {"prompt": "3 plus 4", "completion": " is 7"}, {"text": "The answer is 17, or so"}]
    examples = [encode_sft_record(Record("", fields), tokenizer)[0] for fields in records]
    in_chat, completion, text = prompts_of(examples, 10**30)
    assert prompts_of(examples, 2) == [in_chat, completion]
    assert tokenizer.decode(in_chat.ids, False) == "<user>say 0</s><assistant>say 1</s><user>say 2</s><assistant>"
    assert tokenizer.decode_continuation(in_chat.ids, in_chat.reference, False) == "say 3</s>"
    assert completion.ids == tokenizer.encode("3 plus 4")
    assert tokenizer.decode_continuation(completion.ids, completion.reference, False) == " is 7</s>"
    assert text.ids + text.reference == [*tokenizer.encode("The answer is 17, or so"), tokenizer.eos_token_id]
    assert len(text.ids) == len(text.reference) or len(text.ids) + 1 == len(text.reference)
    assert lesson(examples, tokenizer) == "say 3</s>" and lesson([], tokenizer) == "nothing"


def test_shown_samples_fit_a_terminal():
    """Catches an answer that floods the screen, or moves its cursor."""
    line = {"prompt": "a" * 999 + "?", "output": "\x1b[2J\n" + "b" * 999, "reference": "é", "finish_reason": "length"}
    text = block(line)
    assert text.count("\n") == 3 and len(text) < 500 and "\x1b" not in text
    assert "aaa?\n" in text and "\\x1b[2J\\nbbb" in text and "(not finished)" in text


def test_no_memory_for_them(folder, files, tmp_path, monkeypatch):
    """Catches advice to take smaller batches if it is the copy for samples that does not fit into memory."""

    def copy(*args, **kwargs):
        raise torch.OutOfMemoryError("Tried to allocate 140 GiB")

    monkeypatch.setattr(samples, "copy_for_inference", copy)
    flags = ["--checkpoint_path", folder, "--train_file", files[0], "--eval_file", files[1], "--max_seq_len", 40]
    result = tiny.run(SCRIPT, *flags, "--overlong", "truncate", "--output_dir", tmp_path / "out", "--max_steps", 1)
    assert result.code == 2 and "--num_eval_samples 0 turns them off; Tried to allocate 140 GiB" in result.stderr


def test_questions_of_held_out_prompts():
    """Catches a chat shown by its instruction and header, which are the same in all, and a text shown by its first
    example."""
    question_text = "How many clips did Natalia sell altogether in April and May?\nPut it in a box." + " Please." * 20
    chat = read_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": question_text}])
    rendered = f"<|user|>{question_text}<|end|>\n<|assistant|>\n"
    shown = question(chat, rendered)
    assert (
        shown.startswith("How many clips did Natalia sell altogether in April and May?\\nPut it") and len(shown) == 104
    )
    assert question(read_chat([{"role": "user", "content": "short"}]), "<|user|>short") == "short"
    assert question(text := "Q: 1+1 A: 2\n" * 9 + "Q: 4+5 A:", text).endswith("A: 2\\nQ: 4+5 A:")
