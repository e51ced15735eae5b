"""inference/choosing.py: best-of-n and votes, checked by hand and from score.py's command line."""

import math

import pytest

from inference.choosing import choose_best, choose_by_vote, final_answer
from tests import tiny
from tests.inference.test_score import prm, rm, sampled, score, scored  # noqa: F401 (fixtures)

# ------------------------------------------------------------------------------------------ choosing


def samples(rewards, answers=None):
    """Scored lines of two prompts in turn, numbered as score.py writes them."""
    return [{"idx": i % 2, "sample_idx": i // 2, "prompt": f"p{i % 2}", "reward": r} for i, r in enumerate(rewards)]


def test_best_of_n_by_hand():
    """Catches a choice of the worst sample, or of the last among equal ones, and mixed groups: samples belong together
    by their idx, or without one by the prompt's text and the system message beside it."""
    lines = samples([1.0, -5.0, 3.0, -2.0, 3.0, -2.5])
    assert choose_best(lines) == [lines[2], lines[3]]
    unnumbered = [{k: v for k, v in line.items() if k not in ("idx", "sample_idx")} for line in lines]
    assert choose_best(unnumbered) == [unnumbered[2], unnumbered[3]]
    same_text = [{**line, "prompt": "p"} for line in lines]  # the same prompt stood twice in its file
    assert choose_best(same_text) == [same_text[2], same_text[3]]
    chats = [{**line, "prompt": [{"role": "user", "content": line["prompt"]}]} for line in unnumbered]
    assert choose_best(chats) == [chats[2], chats[3]]
    beside = [{"prompt": "p", "reward": r, "system": s} for r, s in ((1, "a"), (2, "b"), (3, "a"), (0, None))]
    assert choose_best(beside) == [beside[2], beside[1], beside[3]]


def test_weighted_vote_by_hand():
    """Catches a majority that ignores the weights, a winner by its best sample instead of its sum of weights, a tie
    that rounding decides, and samples without an answer that vote."""
    lines = [{"prompt": "p", "output": f"{i}", "reward": r} for i, r in enumerate([0.5, 0.9, 0.6, 0.1, 0.1, 0.95])]
    [best] = choose_by_vote(lines, ["a", "b", "a", "c", "c", None], weight=float)
    assert best == {**lines[2], "voted_answer": "a", "votes": pytest.approx({"a": 1.1, "b": 0.9, "c": 0.2})}
    [best] = choose_by_vote(lines, ["a", "b", "a", "b", "c", "b"], weight=lambda reward: 1)
    assert best["voted_answer"] == "b" and best["output"] == "5"
    [best] = choose_by_vote(lines, [None] * 6, weight=float)
    assert best == {**lines[5], "voted_answer": None, "votes": {}}
    tied = [{"prompt": "p", "reward": r} for r in (0.1, 0.3, 0.2, 0.3, 0.2, 0.1)]
    [best] = choose_by_vote(tied, ["x", "y", "x", "x", "y", "y"], weight=float)
    assert best["voted_answer"] == "x" and best["reward"] == 0.3


def test_final_answer():
    """Catches a box that ends at an inner brace, a blank last line as the answer, and an empty box that counts."""
    assert final_answer(r"so \boxed{1} or \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert final_answer("3+4=7\n 7 \n\n") == "7"
    assert final_answer("broken \\boxed{1\nlast") == "last"
    assert final_answer(" \n") is None
    assert final_answer("\\boxed{}") is None and final_answer("\\boxed{ 1 } or \\boxed{ }") == "1"
    assert final_answer("\\boxed {5}\n") == "5"


def test_choosing_from_the_command_line(rm, tmp_path):
    """Catches a choice that differs from that of the scored lines, votes weighted by raw scores, scored lines that are
    lost, and another result after a resume or when a second choice is made from the same scores."""
    every = scored(rm, tmp_path, sampled())
    best = scored(rm, tmp_path, sampled(), "--best_of_n", name="best.jsonl")
    assert best == choose_best(every) and len(best) == 3
    assert tiny.read_lines(tmp_path / "best.scored.jsonl") == every

    answers = [line["output"][-1] for line in every]
    wanted = choose_by_vote(every, answers, weight=lambda s: 1 / (1 + math.exp(-s)))
    vote = scored(rm, tmp_path, sampled(), "--weighted_vote", "--resume", name="best.jsonl")
    assert [line["voted_answer"] for line in vote] == [line["voted_answer"] for line in wanted]
    for line, want in zip(vote, wanted):
        assert line["votes"] == pytest.approx(want.pop("votes")) and line.items() >= want.items()

    whole = (tmp_path / "best.jsonl").read_bytes()
    kept = (tmp_path / "best.scored.jsonl").read_bytes()
    (tmp_path / "best.jsonl").unlink()
    (tmp_path / "best.scored.jsonl").write_bytes(kept[: len(kept) // 2])
    scored(rm, tmp_path, sampled(), "--weighted_vote", "--resume", name="best.jsonl")
    assert (tmp_path / "best.jsonl").read_bytes() == whole and (tmp_path / "best.scored.jsonl").read_bytes() == kept
    data = tmp_path / "data.jsonl"
    for others in ([{**every[0], "reward": "x"}], [{k: v for k, v in every[0].items() if k != "reward"}]):
        tiny.write_records(tmp_path / "best.scored.jsonl", others)
        refused = score(rm, data, tmp_path / "best.jsonl", "--best_of_n", "--resume")
        tiny.assert_refused(refused, "best.scored.jsonl:1: not a line that score.py wrote")
    (tmp_path / "best.jsonl").unlink()
    tiny.assert_refused(score(rm, data, tmp_path / "best.jsonl", "--best_of_n"), "best.scored.jsonl")


def test_votes_of_a_process_model_and_an_answer_function(prm, tmp_path):
    """Catches votes weighted by a sigmoid of a probability, and an --answer_fn that is not called with the text."""
    (tmp_path / "mine.py").write_text("def last(text):\n    return None if text.endswith('0') else text[-1]\n")
    flags = ("--weighted_vote", "--aggregate", "prod", "--answer_fn", f"{tmp_path / 'mine.py'}:last")
    for line in scored(prm, tmp_path, sampled(), *flags):
        rewards = [
            other["reward"]
            for other in tiny.read_lines(tmp_path / "out.scored.jsonl")
            if other["idx"] == line["idx"] and other["output"].endswith("1")
        ]
        assert line["votes"] == pytest.approx({"1": sum(rewards)}) and line["reward"] == max(rewards)


def test_a_brace_of_the_answers_own():
    """Catches a box not found since an escaped brace in it is never closed, so that the whole last line votes."""
    answer = r"\left\{\begin{array}{l}x=1\\y=2\end{array}\right."
    assert final_answer(rf"So it is \boxed{{{answer}}}, I think.") == answer


def test_answers_that_are_hard_to_find():
    """Catches a brace after a LaTeX line break that is read as an escaped one, and an answer cut off inside a second
    box, for which the last line would vote."""
    answer = r"\begin{pmatrix}1\\{-2}\end{pmatrix}"
    assert final_answer(rf"\boxed{{{answer}}}") == answer
    assert final_answer(r"\boxed{\{1, 2\}}") == r"\{1, 2\}" and final_answer(r"\boxed{a\\\}b}") == r"a\\\}b"
    assert final_answer(r"\\boxed{5}") == "5"  # written as in JSON
    assert final_answer(r"\boxed{1}. Or \boxed{\frac{1}") == "1" and final_answer(r"\boxed{2\boxed{3}}") == "3"


def test_equal_answers_have_equal_scores(rm, tmp_path):
    """Catches scores that depend on the rows beside them: their last bits would decide which of two equal answers is
    better, and are advantages of full size in GRPO."""
    texts = ["so " * (i * 7 % 23) for i in range(25)]
    records = [{"prompt": f"{i} plus", "chosen": text, "rejected": text} for i, text in enumerate(texts)]
    for flags in (["--batch_size", 3], ["--batch_size", 7, "--dtype", "bfloat16"]):
        lines = scored(rm, tmp_path, records, *flags, name=f"{len(flags)}.jsonl")
        assert all(line["chosen_reward"] == line["rejected_reward"] for line in lines)
        assert len({line["chosen_reward"] for line in lines}) > 20
