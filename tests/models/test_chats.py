"""models/chats.py and models/chat_template.py: the text that a chat becomes, and which of it is learnt, under templates
as published folders have them. The oracle is transformers' rendering of the same template."""

from datetime import date

import pytest
from transformers import AutoTokenizer

from models.chats import read_chat
from models.records import EncodingCounts, Record, encode_generated, encode_prompt, get_prompt
from models.reward import encode_pair_record
from models.tokenizer import Tokenizer
from tests.models.test_tokenizer import byte_level_folder
from training.data import encode_sft_record

HEAD = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
TEMPLATES = {
    # drops the thoughts of all turns; opens one in the generation prompt
    "r1": "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "<|user|>{{ m.content }}{% elif m.role == 'assistant' %}<|assistant|>{{ m.content.split('</think>')[-1] }}"
    "<|eot_id|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
    # writes the thoughts of the last turn alone, empty ones too, and takes them from reasoning_content as well
    "qwen3": "{% if tools %}<|user|>{{ tools | tojson }}<|eot_id|>\n{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% set said = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}<|assistant|>\n"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|eot_id|>\n"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}<|eot_id|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    # Llama 3, first published: always ends in the assistant's header, knows no add_generation_prompt
    "llama3_first": "{{ bos_token }}{% for m in messages %}" + HEAD + "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
    "llama33": "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: {{ strftime_now('%d %b %Y') }}\n"
    "{% if tools %}{% for t in tools %}{{ t | tojson(indent=4) }}\n{% endfor %}{% endif %}<|eot_id|>"
    "{% for m in messages %}{% if m.tool_calls %}" + HEAD + "{{ m.tool_calls[0].function | tojson }}<|eot_id|>"
    "{% else %}" + HEAD + "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "marked": "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|eot_id|>{% endgeneration %}{% else %}{{ m.content }}<|eot_id|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    # DeepSeek: a tool call's content must be None
    "calls": "{% for m in messages %}{% if m.role == 'assistant' and m['content'] is none %}<|assistant|>"
    "{{ m.tool_calls[0].function.name }}<|eot_id|>{% else %}<|{{ m.role }}|>{{ '' + m['content'] }}<|eot_id|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    # Tulu 3, OLMo 2: a newline behind all of the assistant's turns but the last
    "tulu3": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}"
    "{% if loop.last %}<|eot_id|>{% else %}<|eot_id|>\n{% endif %}{% else %}{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
}
TOKENS = ["<|user|>", "<|assistant|>", "<|system|>", "<think>", "</think>"]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            byte_level_folder(folder, "llama3", eos_token="<|end_of_text|>", additional_special_tokens=TOKENS)
            (folder / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
            made[name] = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        return made[name]

    return make


def user(content):
    return {"role": "user", "content": content}


def said(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def row_of(tokenizer, **fields):
    """Returns (text of a record's row, its learnt stretches, encoding counts)."""
    example, counts = encode_sft_record(Record("x:1", fields), tokenizer)
    stretches, run = [], []
    for token_id, label in zip([*example.input_ids, 0], [*example.labels, -100]):
        if label != -100:
            assert label == token_id
            run.append(label)
        elif run:
            stretches.append(tokenizer.decode(run, skip_special_tokens=False))
            run = []
    return tokenizer.decode(example.input_ids, skip_special_tokens=False), stretches, counts


TURNS = [{"role": "system", "content": "Be brief."}, user("2+2? "), said("four\n"), user("sure? user"), said(" yes ")]
THOUGHT = "<think>\ntwo and two\n</think>\n\n4"
LEARNT = {  # learnt of TURNS; of a turn with a thought; how many of two such turns are cut
    "r1": (["four\n<|eot_id|>", " yes <|eot_id|>"], ["two and two\n</think>\n\n4<|eot_id|>"], 1),
    "qwen3": (
        ["four\n<|eot_id|>", "<think>\n\n</think>\n\n yes <|eot_id|>"],
        ["<think>\ntwo and two\n</think>\n\n4<|eot_id|>"],
        1,
    ),
    "llama3_first": (["four<|eot_id|>", "yes<|eot_id|>"], [THOUGHT + "<|eot_id|>"], 0),
    "llama33": (["four<|eot_id|>", "yes<|eot_id|>"], [THOUGHT + "<|eot_id|>"], 0),
    "marked": (["four\n<|eot_id|>", " yes <|eot_id|>"], [THOUGHT + "<|eot_id|>"], 0),
    "calls": (["four\n<|eot_id|>", " yes <|eot_id|>"], [THOUGHT + "<|eot_id|>"], 0),
    "tulu3": (["four\n<|eot_id|>", " yes <|eot_id|>"], [THOUGHT + "<|eot_id|>"], 0),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_under_published_templates(name, opened):
    """Catches an end of turn other than the first one behind the content (Llama 3's header learnt), misplaced labels
    where contents quote roles or begin with spaces, silently dropped thoughts, and a row that is not the rendering."""
    tokenizer, oracle = opened(name)
    turns, thought, cut = LEARNT[name]
    text, learnt, counts = row_of(tokenizer, messages=TURNS)
    assert text == oracle.apply_chat_template(TURNS, tokenize=False) and learnt == turns and not counts
    chat = [user("2+2?"), said(THOUGHT)]
    text, learnt, counts = row_of(tokenizer, messages=chat)
    assert learnt == thought and not counts
    if name != "r1":
        assert text == oracle.apply_chat_template(chat, tokenize=False)
    prompt = oracle.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt) and text.removeprefix(prompt).startswith(thought[0])
    text, learnt, counts = row_of(tokenizer, messages=[*chat, user("3+3?"), said(THOUGHT)])
    assert learnt == thought * (2 - cut) and counts == EncodingCounts(turns_cut_by_the_template=cut)


@pytest.mark.parametrize("begun", ["<think>", "<think>\n", "<think>\n\n", "\u25c1think\u25b7"])
@pytest.mark.parametrize("written", ["<think>two", "<think>\ntwo", "\n<think>\ntwo", " <think>\n\ntwo"])
def test_a_thought_is_opened_once(begun, written, tmp_path):
    """Catches a second <think> behind the one that ends the generation prompt, where their white space differs: in
    messages, in a completion given as text, and in scored pairs."""
    written = written.replace("<think>", begun.strip())
    byte_level_folder(tmp_path, "llama3", eos_token="<|end_of_text|>", additional_special_tokens=TOKENS)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["r1"].replace("<think>\n", begun), encoding="utf-8")
    tokenizer, question, answer = Tokenizer(tmp_path), [user("2+2?")], f"{written}</think>4"
    texts = [row_of(tokenizer, messages=[*question, said(answer)])[0]]
    texts.append(row_of(tokenizer, prompt=question, completion=answer)[0])
    for other in ((answer, "5"), ([said(answer)], [said("5")])):
        pair = {"prompt": question, **dict(zip(("chosen", "rejected"), other))}
        texts.append(tokenizer.decode(encode_pair_record(Record("x:1", pair), tokenizer)[0].chosen.input_ids, False))
    more = "\n" * max(0, written.lstrip().count("\n") - begun.count("\n"))
    for text in texts:
        assert text.endswith(f"<|assistant|>{begun}{more}two</think>4<|eot_id|>"), text


def test_a_thought_where_the_prompt_has_closed_one(tmp_path):
    """Catches an empty thought in front of another, which no template writes, where the generation prompt closes the
    thought and the answer has one nevertheless."""
    byte_level_folder(tmp_path, "llama3", eos_token="<|end_of_text|>", additional_special_tokens=TOKENS)
    closed = "<|assistant|>\n<think>\n\n</think>\n\n{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["qwen3"].replace("<|assistant|>\n{% endif %}", closed))
    tokenizer, oracle, question = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path), [user("2+2?")]
    for answer in (THOUGHT, "4", "<think></think>\n4", "<think>\n\n</think>\n\n4"):
        theirs = oracle.apply_chat_template([*question, said(answer)], tokenize=False)
        theirs = theirs.replace("</think>\n\n\n", "</think>\n\n")
        record = {"prompt": question, "chosen": answer, "rejected": "5"}
        for text in (
            row_of(tokenizer, messages=[*question, said(answer)])[0],
            row_of(tokenizer, prompt=question, completion=answer)[0],
            tokenizer.decode(encode_pair_record(Record("x:1", record), tokenizer)[0].chosen.input_ids, False),
        ):
            assert text.strip() == theirs.strip()


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_as_text_follows_the_generation_prompt(name, opened):
    """Catches an answer encoded as no generation would give it, where the template writes a message otherwise than the
    model generates it (Qwen3's empty thought in front of it): in pairs, and in a line of generate.py, which is scored
    as it was drawn."""
    tokenizer, oracle = opened(name)
    prompt_text = oracle.apply_chat_template([user("2+2?")], tokenize=False, add_generation_prompt=True)
    for chosen, rejected in (("so\n</think>\n\n4", "5"), ("4", "")):
        record = {"prompt": [user("2+2?")], "chosen": chosen, "rejected": rejected}
        pair, _ = encode_pair_record(Record("x:1", record), tokenizer)
        assert pair.prompt_length == len(encode_prompt(read_chat(record["prompt"]), tokenizer))
        for side, answer in ((pair.chosen, chosen), (pair.rejected, rejected)):
            drawn = encode_generated(read_chat(record["prompt"]), answer, tokenizer, finished=True)
            assert side.input_ids == drawn == tokenizer.encode(f"{prompt_text}{answer}<|eot_id|>", False)


def test_a_mark_that_ends_behind_the_turn(tmp_path):
    """Catches a score, or a log-prob, of the newline behind an end of turn, which TRL's training templates mark as the
    assistant's, and of the EOS that its Phi-3's mark by itself: no generation ends with it, so scores of samples would
    be read at another place than in training. And a chat with such an EOS refused."""
    byte_level_folder(tmp_path, "llama3", eos_token="<|end_of_text|>", additional_special_tokens=TOKENS)
    wider = TEMPLATES["marked"].replace("{% endgeneration %}", "\n{% endgeneration %}")
    eos = "{% if not add_generation_prompt %}{% generation %}<|end_of_text|>{% endgeneration %}{% endif %}"
    for template, behind in ((wider, "\n"), (wider + eos, "\n<|end_of_text|>")):
        (tmp_path / "chat_template.jinja").write_text(template)
        tokenizer, question = Tokenizer(tmp_path), [user("2+2?"), said("4"), user("2+3?")]
        learnt = row_of(tokenizer, messages=[*question, said("5")])[1]
        assert learnt == ["4<|eot_id|>\n", "5<|eot_id|>" + behind]  # as transformers masks it
        assert row_of(tokenizer, messages=question)[1] == ["4<|eot_id|>\n"]  # no EOS behind a user's turn
        assert row_of(tokenizer, messages=question[:1])[1] == []
        made, _ = encode_pair_record(Record("x:1", {"prompt": question, "chosen": "4", "rejected": "5\n"}), tokenizer)
        drawn = [encode_generated(read_chat(question), text, tokenizer, finished=True) for text in ("4", "5\n")]
        assert [made.chosen.input_ids, made.rejected.input_ids] == drawn


def test_a_marked_answer_as_text_follows_the_generation_prompt(tmp_path):
    """Catches an answer behind another header than the generation prompt's, where the template marks its turns and
    opens a thought in the generation prompt alone, as TRL's for DeepSeek."""
    byte_level_folder(tmp_path, "llama3", eos_token="<|end_of_text|>", additional_special_tokens=TOKENS)
    opens = TEMPLATES["marked"].replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think>\n{% endif %}")
    (tmp_path / "chat_template.jinja").write_text(opens)
    tokenizer, oracle = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    prompt = oracle.apply_chat_template([user("2+2?")], tokenize=False, add_generation_prompt=True)
    text, learnt, _ = row_of(tokenizer, prompt=[user("2+2?")], completion="so\n</think>\n\n4")
    assert (text, learnt) == (prompt + "so\n</think>\n\n4<|eot_id|>", ["so\n</think>\n\n4<|eot_id|>"])
    messages = [user("2+2?"), said("4")]
    assert row_of(tokenizer, messages=messages)[0] == oracle.apply_chat_template(messages, tokenize=False)
    thinks = TEMPLATES["marked"].replace("{% generation %}", "{% generation %}<think>\n\n</think>\n\n")
    (tmp_path / "chat_template.jinja").write_text(thinks)
    tokenizer = Tokenizer(tmp_path)
    assert row_of(tokenizer, prompt=[user("2+2?")], completion="4")[1] == ["4<|eot_id|>"]
    assert row_of(tokenizer, messages=messages)[1] == ["<think>\n\n</think>\n\n4<|eot_id|>"]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
WITH_CALL = [user("1+2"), {"role": "assistant", "content": None, "tool_calls": [CALL]}, user("3"), said("it is 3")]


def test_tools_system_weights_and_parts(opened):
    """Catches `tools`, `system`, tool calls without content, contents in parts, and weights that have no effect."""
    tokenizer, oracle = opened("qwen3")
    text, learnt, _ = row_of(tokenizer, tools=TOOLS, system="Be brief.", messages=WITH_CALL)
    whole = [{"role": "system", "content": "Be brief."}, *WITH_CALL]
    whole[2] = {**whole[2], "content": ""}  # transformers drops keys that are None, and this template needs the key
    assert text == oracle.apply_chat_template(whole, tools=TOOLS, tokenize=False)
    assert "Be brief." in text and len(learnt) == 2 and learnt[0].startswith("<tool_call>{") and "add" in learnt[0]
    text, learnt, _ = row_of(opened("calls")[0], messages=WITH_CALL)
    assert learnt == ["add<|eot_id|>", "it is 3<|eot_id|>"]
    for name in TEMPLATES:
        for off in ({"weight": 0}, {"train": False}, {"loss": False}):
            messages = [user("a"), said("WRONG", **off), user("b"), said("RIGHT", weight=1)]
            text, learnt, _ = row_of(opened(name)[0], messages=messages)
            assert len(learnt) == 1 and "RIGHT" in learnt[0] and "WRONG" in text
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    assert row_of(tokenizer, messages=[user(parts), said("4")]) == row_of(tokenizer, messages=[user("2+2?"), said("4")])
    for thought in ("two and two", [{"type": "text", "text": "two "}, {"text": "and two"}]):
        reasoned = [user("2+2?"), said("4", reasoning_content=thought)]
        assert row_of(tokenizer, messages=reasoned)[1] == ["<think>\ntwo and two\n</think>\n\n4<|eot_id|>"]
    for arguments in ({"arguments": None}, {}):
        calls = [{"type": "function", "function": {"name": "add", **arguments}}]
        assert '"arguments": {}' in row_of(tokenizer, messages=[user("1"), said("", tool_calls=calls)])[1][0]


REFUSED = [
    ("r1", {"messages": [{"role": "developer", "content": "d"}, user("a"), said("b")]}, "message 0, of the role 'dev"),
    ("r1", {"messages": [user("a"), {"role": "tool", "content": "7"}, said("b")]}, "message 1, of the role 'tool'"),
    ("r1", {"tools": TOOLS, "messages": [user("a"), said("b")]}, "tools: the chat template has no place"),
    ("marked", {"messages": [user("a"), said("b", reasoning_content="c")]}, "leaves out a part of message 1"),
    ("llama33", {"messages": [user("a"), said("b", reasoning_content="c")]}, "leaves out reasoning_content"),
    ("marked", {"messages": [user("a"), said("b", tool_calls=[CALL])]}, "message 1: the chat template has no place"),
    ("r1", {"messages": [user("a"), said("b", weight=0.5)]}, "messages[1]: weight must be 0 or 1"),
    ("r1", {"messages": [user([{"type": "image_url", "image_url": "x"}]), said("b")]}, "of type 'image_url'"),
    ("r1", {"system": "s", "messages": [{"role": "system", "content": "t"}, user("a"), said("b")]}, "leave one out"),
    ("r1", {"system": 5, "messages": [user("a"), said("b")]}, "system must be text"),
    ("r1", {"tools": "add", "messages": [user("a"), said("b")]}, "tools must be a list of objects"),
    ("r1", {"history": [["a", "b"]], "messages": [user("a"), said("b")]}, '"history" is not read'),
    ("r1", {"functions": [{"name": "add"}], "messages": [user("a"), said("b")]}, '"functions" is not read; give tools'),
    ("r1", {"images": ["a.png"], "messages": [user("a"), said("b")]}, '"images" is not read'),
    ("r1", {"image": "a.png", "messages": [user("a"), said("b")]}, '"image" is not read; only text can be read'),
    ("r1", {"audio": {"path": "a.wav"}, "prompt": [user("a")], "completion": "b"}, '"audio" is not read'),
    ("r1", {"documents": [{"text": "x"}], "messages": [user("a"), said("b")]}, '"documents" is not read; put them'),
    ("r1", {"system_prompt": "Be brief.", "messages": [user("a"), said("b")]}, '"system_prompt" is not read; call it'),
    ("r1", {"messages": [user("a"), said("", function_call={"name": "add"})]}, "function_call is not read; give tool_"),
    ("r1", {"functions": '[{"name": "f"}]', "messages": [user("a"), said("b")]}, '"functions" is not read; give tools'),
    ("qwen3", {"messages": [user("a"), said("b", reasoning_content=5)]}, "reasoning_content must be text"),
    ("qwen3", {"messages": [user("a"), said("b", thinking=[{"type": "image"}])]}, "a part of its thinking is of type"),
    ("r1", {"messages": [said("b")]}, "message 0 is the assistant's"),
    ("r1", {"messages": [user("a"), {"role": "assistant", "content": None}]}, 'messages[1] must have the string "cont'),
    ("r1", {"system": "s", "prompt": "a", "completion": "b"}, "system belongs to a chat"),
    ("r1", {"tools": TOOLS, "prompt": "a", "completion": "b"}, "tools belongs to a chat"),
    ("r1", {"system_prompt": "s", "prompt": "a", "completion": "b"}, "messages, and call it system"),
    ("r1", {"history": [["c", "d"]], "prompt": "a", "completion": "b"}, "messages, and put its turns into the"),
    ("r1", {"prompt": [user("a"), said(" ")], "completion": "b"}, "a message of the assistant that is empty; leave it"),
    ("r1", {"images": ["a.png"], "prompt": "a", "completion": "b"}, '"images" is not read; only text can be read'),
    ("r1", {"instruction": "a", "context": "c", "output": "b"}, '"context" is not read; call it input'),
    ("r1", {"instruction": "a", "input": 5, "output": "b"}, "instruction and input must be text"),
]


@pytest.mark.parametrize("name, fields, complaint", REFUSED, ids=[complaint for _, _, complaint in REFUSED])
def test_what_cannot_be_used_is_named(name, fields, complaint, opened):
    """Catches any part of a record that is silently left out."""
    with pytest.raises(ValueError) as caught:
        row_of(opened(name)[0], **fields)
    assert str(caught.value).startswith("x:1: ") and complaint in str(caught.value), caught.value


def test_empty_columns_and_others_of_their_names(opened):
    """Catches a record refused for a column without a value, or for one whose name means something else there."""
    tokenizer, plain = opened("llama33")[0], [user("a"), said("b")]
    wanted = row_of(tokenizer, messages=plain)
    empty = (
        {"images": [None]},
        {"images": [[]]},
        {"image": {"bytes": None, "path": None}},
        {"video": False},
        {"functions": "[]"},
        {"history": []},
    )
    for more in (*empty, {"functions": ["solve"]}, {"documents": ["doc-7"]}):
        assert row_of(tokenizer, messages=plain, **more) == wanted
    called = {"name": None, "arguments": None}
    odd = [{**user("a"), "reasoning": {"effort": "low"}}, said("b", function_call=called, thinking=False, reasoning={})]
    assert row_of(tokenizer, messages=odd) == wanted
    brief = {"role": "system", "content": "Be brief."}
    system = row_of(tokenizer, messages=[brief, *plain])
    assert row_of(tokenizer, messages=[brief, *plain], system_prompt="Be brief.") == system
    assert row_of(tokenizer, messages=plain, system="Be brief.", system_prompt="Be brief.") == system
    asked = row_of(tokenizer, prompt="Be brief. a", completion="b")
    assert row_of(tokenizer, prompt="Be brief. a", completion="b", system_prompt="Be brief.", images=[]) == asked
    assert row_of(tokenizer, instruction="Be brief. a", context="", output="b") == asked
    assert row_of(tokenizer, prompt="Be brief. a", completion="b", documents=[{"text": "Be brief."}]) == asked
    assert row_of(tokenizer, prompt="Be brief. a", completion="b", image="debian:12") == asked
    calls = '[{"type": "function", "function": {"name": "add", "arguments": null}}]'
    assert '"arguments": {}' in row_of(tokenizer, messages=[user("1"), said("", tool_calls=calls)])[1][0]


def test_prompts_leave_nothing_out(opened):
    """Catches parts of a record silently left out of prompts: those of generate.py, PPO, DPO and reward models."""
    tokenizer, _ = opened("r1")
    for fields in ({"tools": TOOLS}, {"system": "a", "prompt": [{"role": "developer", "content": "d"}, user("a")]}):
        prompt = get_prompt(Record("x:1", {"prompt": [user("a")], **fields}))
        with pytest.raises(ValueError, match="the chat template"):
            encode_prompt(prompt, tokenizer)
    chat = get_prompt(Record("x:1", {"prompt": "a", "system": "Be brief."}), as_chat=True)
    assert "Be brief." in tokenizer.decode(encode_prompt(chat, tokenizer), False)
    alpaca = {"instruction": "Translate.", "input": "cat", "output": "chat"}
    assert get_prompt(Record("x:1", alpaca)) == "Translate.\ncat"
    assert get_prompt(Record("x:1", {**alpaca, "input": ""})) == "Translate."
    assert get_prompt(Record("x:1", {**alpaca, "prompt": "p"})) == "p"
    with pytest.raises(ValueError, match=r"found: messages.; give the messages up to the answer as"):
        get_prompt(Record("x:1", {"messages": [user("a"), said("b")]}))


def test_a_long_chat_takes_the_time_of_its_tokens(opened):
    """Catches a rendering of the whole chat for each turn. Renderings are counted, not timed."""
    tokenizer, _ = opened("llama33")
    template, count = tokenizer.chat_template, []
    render = type(template)._render
    for turns in (2, 40):
        calls = []
        type(template)._render = lambda *args, seen=calls: (seen.append(1), render(*args))[1]
        try:
            row_of(tokenizer, messages=[user("a"), said("b")] * turns)
        finally:
            type(template)._render = render
        count.append(len(calls))
    assert count[1] <= count[0]  # the first chat of a template may take a rendering more to learn its headers


def test_the_date_is_the_runs(tmp_path):
    """Catches a date read from the clock at each rendering."""
    byte_level_folder(tmp_path, "llama3")
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["llama33"], encoding="utf-8")
    text = Tokenizer(tmp_path, date(2024, 7, 26)).chat_template.render([user("a")], add_generation_prompt=True)
    assert "Today Date: 26 Jul 2024\n" in text


def test_two_answers_in_a_row_whatever_was_read_before(opened):
    """Catches a turn that begins within the answer before it, which the template writes otherwise where it is the last
    turn; an unlearnt answer learnt with it; and rows that depend on the chats read earlier."""
    tokenizer, _ = opened("qwen3")
    chats = [
        ([user("2+2?"), said("4"), said("four")], ["4<|eot_id|>", "<think>\n\n</think>\n\nfour<|eot_id|>"]),
        (
            [user("a"), said("4", weight=0), said("b"), user("c"), said("d")],
            ["b<|eot_id|>", "<think>\n\n</think>\n\nd<|eot_id|>"],
        ),
        ([user("2+2?"), said("4")], ["<think>\n\n</think>\n\n4<|eot_id|>"]),
    ]
    for order in (chats, chats[::-1]):
        for messages, learnt in order:
            assert row_of(tokenizer, messages=messages)[1] == learnt


@pytest.mark.parametrize("last", ["<|eot_id|>", "<|end_of_text|>"])
def test_two_answers_in_a_row_that_end_otherwise(last, tmp_path):
    """Catches a header learnt with the answer behind it, where the template ends the last message otherwise: without a
    newline, as Tulu 3's, or by another token, as OLMo 3's."""
    byte_level_folder(tmp_path, "llama3", eos_token="<|end_of_text|>", additional_special_tokens=TOKENS)
    template = TEMPLATES["tulu3"].replace("last %}<|eot_id|>", f"last %}}{last}")
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer, oracle = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    messages = [user("a"), said("one"), said("two"), said(""), user("b"), said("three"), said("four")]
    wanted = [f"{text}<|eot_id|>" for text in ("one", "two", "", "three")] + [f"four{last}"]
    text, learnt, counts = row_of(tokenizer, messages=messages)
    assert text == oracle.apply_chat_template(messages, tokenize=False) and learnt == wanted and not counts
    unlearnt = [user("a"), said("one", weight=0), said("two")]
    assert row_of(tokenizer, messages=unlearnt)[1] == [f"two{last}"]
    text, learnt, _ = row_of(tokenizer, prompt=[user("a"), said("one")], completion=[said("two")])
    assert text == row_of(tokenizer, messages=unlearnt)[0] and learnt == [f"two{last}"]


def test_white_space_between_question_and_answer(tmp_path):
    """Catches a newline learnt before an answer, where no header is between it and a question that ends in one."""
    byte_level_folder(tmp_path, "llama3", eos_token="<|end_of_text|>", additional_special_tokens=TOKENS)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{{ '<|eot_id|>' if m.role == 'assistant' else '\n' }}{% endfor %}"
    )
    messages = [user("a"), said("one"), user("b\n"), said("two"), user("c"), said("three")]
    learnt = row_of(Tokenizer(tmp_path), messages=messages)[1]
    assert learnt == ["one<|eot_id|>", "two<|eot_id|>", "three<|eot_id|>"]


OPENED = "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' and m.reasoning_content %}<think>\n"
OPENED += (
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}TAG\n"
)
OPENED += "{{ c.function | tojson }}{% endfor %}<|eot_id|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
OPENED += "<think>\n{% if enable_thinking is false %}\n</think>\n\n{% endif %}{% endif %}"


@pytest.mark.parametrize("tag", ["<tool_call>", "<think_not>", "<|user|>"])
@pytest.mark.parametrize("is_token", [True, False])
def test_no_tag_is_torn(tag, is_token, tmp_path):
    """Catches a turn that begins inside a tag because the generation prompt opens a thought whose tag begins alike, so
    that pieces of "<tool_call>" replace its token; and a turn whose beginning depends on an earlier record."""
    tokens = TOKENS + [tag] * (is_token and tag not in TOKENS)
    byte_level_folder(tmp_path, "llama3", eos_token="<|end_of_text|>", additional_special_tokens=tokens)
    (tmp_path / "chat_template.jinja").write_text(OPENED.replace("TAG", tag), encoding="utf-8")
    tokenizer, oracle = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    messages = [user("1+2"), said("", tool_calls=[CALL]), {"role": "tool", "content": "3"}, said("It is 3.")]
    thinking = [user("1+2"), said("3", reasoning_content="one and two")]
    for kwargs in ({}, {"enable_thinking": False}):
        example, counts = encode_sft_record(
            Record("x:1", {"messages": messages, "chat_template_kwargs": kwargs}), tokenizer
        )
        assert example.input_ids == oracle.apply_chat_template(messages, tokenize=True, return_dict=False, **kwargs)
        assert not counts.split_differently
        learnt = row_of(tokenizer, messages=messages, chat_template_kwargs=kwargs)[1]
        assert learnt[0].startswith(tag + "\n{") and learnt[1] == "It is 3.<|eot_id|>"
        assert row_of(tokenizer, messages=thinking)[1] == ["one and two\n</think>\n\n3<|eot_id|>"]
