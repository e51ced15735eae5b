r"""training/graders.py and training/mathematics.py on pairs of an answer and the gold answer, judged by hand.

Each row of a table is (answer, gold, whether the answer is right). Traps are among them: numbers of a restated
question, boxes that are nested, empty or never closed, 1,000 vs (1,000), 50 vs 50 % vs 1/2, units, signs.
"""

import subprocess
import sys
import types

import pytest

from tests import tiny
from training.graders import exact_match, format_reward, last_number, math_answer, multiple_choice
from training.mathematics import equal

Y, N = True, False

GSM8K = [  # whole answers to word problems; gold as in the public files, or the number alone
    ("She has 16 - 3 - 4 = 9 eggs. 9 * 2 = $18.\n#### 18", "She makes 9 * 2 = $<<9*2=18>>18.\n#### 18", Y),
    ("She has 9 eggs and makes $18 every day.", "#### 18", Y),
    ("She makes $18.00 every day.", "18", Y),
    ("The answer is $18.", "18", Y),
    ("The answer is 18 dollars.", "18", Y),
    ("The answer is: 18", "18", Y),
    ("Answer: 18", "18", Y),
    ("**Answer:** 18", "18", Y),
    ("**Answer**: $18$", "18", Y),
    ("The final answer is \\boxed{18}.", "18", Y),
    ("The answer is 18, because 9 * 2 = 18 and not 20.", "18", Y),
    ("The answer is 18 since 20 is too many", "18", Y),
    ("The answer is 9 * 2 = 18.", "18", Y),
    ("The answer is 9 * 2 = 20.", "20", N),  # a false chain of equations is no answer
    ("The answer to your question is 18.", "18", Y),
    ("The answer is 18. I hope this answer is right.", "18", Y),
    ("The answer is 20. Wait, that is wrong. The answer is 18.", "18", Y),
    ("The answer is 18. No, the answer is 20.", "18", N),
    ("The answer is $3$ or $4$.", "3", N),  # hedging
    ("The answer is $x=3$ or $x=4$.", "3", N),
    ("The answer is \\(3\\) and \\(4\\).", "3", N),
    ("The answer is $3$ and $4$.", "3,4", Y),
    ("The answer is $(1,2)$ and $(3,4)$.", "(1,2),(3,4)", Y),
    ("The answers are $2$, $3$ and $4$.", "2,3,4", Y),
    ("The answers are 2 and 3.", "3", N),
    ("The answers are 2 and 3.", "2,3", Y),
    ("The answer is $5$, and $x$ is odd.", "5", Y),
    ("The answer is $x = 5$ and I am sure.", "5", Y),
    ("The answer is $5$ million.", "5000000", Y),
    ("The answer is $50$%.", "0.5", Y),
    ("The answer is $50$ percent.", "0.5", Y),
    ("The answer is $5$ m.", "5 km", N),
    ("The answer is $5$ m.", "5", Y),
    ("The answer is negative 5.", "5", N),
    ("The answer is negative 5.", "-5", Y),
    ("The answer is minus 7 dollars", "7", N),
    ("The answer is 7 minus 2", "5", Y),
    ("#### 17\nNo:\n#### 18", "18", Y),
    ("#### 18\nNo:\n#### 17", "18", N),
    ("#### $1,234", "1234", Y),
    ("#### 1234.00", "1,234", Y),
    ("#### -5", "-5", Y),
    ("#### 5", "-5", N),
    ("#### 18 eggs", "18", Y),
    ("#### The total is 18", "18", Y),
    ("#### The total of 9 and 9 is 18", "18", N),
    ("####", "18", N),
    ("#### 180", "18", N),
    ("It takes 3 bolts in total.", "3", Y),
    ("It takes 3 bolts in total. The question was how many bolts 2 robes take.", "3", N),  # the last number is 2
    ("#### Final answer\n\n18 eggs.", "18", Y),
    ("#### Conclusion\nSo the answer is $18$, for 2 days.", "18", Y),
    ("#### Step 2: Add them\n9 + 9 = 18", "18", Y),
    ("#### Conclusion\n9 + 9 = 17", "18", N),
    ("#### Paris\nIt has 2 million people.", "Paris", Y),
    ("#### No solution\n(since 2 != 3)", "No solution", Y),
    ("#### Yes", "#### Yes\nBecause 2 + 2 = 4.", Y),
    ("#### Answer: 18\nThat was for 2 days.", "18", Y),
    ("#### 3\nThe question was how many bolts 2 robes take.", "3", Y),
    ("So \\boxed{3}. (The question was: 2 bolts and half that much?)", "3", Y),
    ("He sells them for 1,000.", "1000", Y),
    ("He sells them for 1000 dollars.", "1,000", Y),
    ("She walks 2.5 miles.", "2.5", Y),
    ("She walks .5 miles.", "0.5", Y),
    ("She walks 5/2 miles.", "2.5", Y),
    ("She walks 2 1/2 miles.", "2.5", Y),
    ("She saves 20%.", "20", Y),
    ("The temperature is -7.", "-7", Y),
    ("It is 10-7=3", "3", Y),
    ("It is 2024-03", "3", Y),
    ("That is 3.", "3", Y),
    ("I cannot tell.", "3", N),
    ("", "3", N),
    ("x3", "3", N),
    ("It is three.", "3", N),
    ("<think>It is 4? \\boxed{4}</think>The answer is 3.", "3", Y),
    ("<think>It is 3. \\boxed{3}</think>The answer is 4.", "3", N),
    ("It is 3, I think.</think>\n\nIt is 4.", "3", N),
    ("<think>So 3.</think>", "3", N),  # no answer after the thoughts
    ("<answer>18</answer>", "18", Y),
    ("<answer> $18 </answer> (not 20)", "18", Y),
    ("<answer>17</answer> or <answer>18</answer>", "18", Y),
    ("<answer>She earns 18 dollars per day.</answer>", "18", Y),
    ("<answer></answer> 18", "18", N),
    ("<answer>18", "18", Y),  # not closed: the last number counts
]

BOXES = [
    ("\\boxed{42}", "42", Y),
    ("\\boxed{ 42 }", "42", Y),
    ("$\\boxed{42}$.", "42", Y),
    ("\\boxed{41} and then \\boxed{42}", "42", Y),
    ("\\boxed{42} and then \\boxed{41}", "42", N),
    ("\\boxed{\\boxed{42}}", "42", Y),
    ("\\boxed{x = \\boxed{42}}", "42", Y),
    ("\\boxed{\\frac{1}{\\sqrt{4}}}", "\\frac12", Y),
    ("\\fbox{42}", "42", Y),
    ("\\boxed 42", "42", Y),
    ("$\\boxed 4$2", "4", Y),
    ("It is 42, so \\boxed{}", "42", N),
    ("\\boxed{42}, that is \\boxed{ }", "42", Y),  # the empty box is ignored
    ("It is \\boxed{42", "42", N),
    ("It is \\boxed{42}. So \\boxed{41", "42", Y),
    ("It is 42, so \\boxed{\\text{unclosed", "42", N),
    ("{ \\boxed{42}", "42", Y),
    ("} \\boxed{42}", "42", Y),
    ("\\boxed{\\{1, 2\\}}", "\\{2, 1\\}", Y),
    ("\\boxed{\\begin{pmatrix}1\\\\{2}\\end{pmatrix}}", "\\begin{pmatrix}1\\\\{2}\\end{pmatrix}", Y),
    ("#### 41\n\\boxed{42}", "42", Y),
    ("<answer>41</answer> \\boxed{42}", "42", Y),
    ("<answer>\\boxed{42}</answer>", "42", Y),
    ("\\boxed{42}", "so that we have \\boxed{42}", Y),
    ("\\boxed{42}", "\\boxed{41}", N),
    ("\\boxed{The answer is 42}", "42", Y),
    ("\\boxed{\\text{42 clips}}", "42", Y),
]

NUMBERS = [  # (what the box of the answer holds, gold, right)
    ("1/2", "0.5", Y),
    ("50\\%", "1/2", Y),
    ("50%", "0.5", Y),
    ("50 percent", "50", Y),
    ("50", "50\\%", Y),
    ("0.5\\%", "0.5", N),
    ("0.5%", "0.005", Y),
    ("5%", "50", N),
    ("100%", "1", Y),
    ("0.333", "\\frac{1}{3}", N),
    (r"\sqrt{2} \times 10^{-19}", r"1.6 \times 10^{-19}", N),
    (r"\sin(\pi)", "0", Y),
    (r"\boldsymbol{3}", "3", Y),
    ("\\frac{2}{6}", "\\frac{1}{3}", Y),
    ("\\dfrac{1}{3}", "\\tfrac13", Y),
    ("\\frac{1}3", "1/3", Y),
    ("-\\frac{1}{3}", "\\frac{-1}{3}", Y),
    ("\\frac{1}{-3}", "-1/3", Y),
    ("1,000", "1000", Y),
    ("1{,}000", "1000", Y),
    ("1\\,000", "1000", Y),
    ("1,\\!000", "1000", Y),
    ("10 000", "10000", Y),
    ("1,000,000", "10^6", Y),
    ("1 million", "1000000", Y),
    ("2.5 million dollars", "2,500,000", Y),
    ("1,000", "(1,000)", N),
    ("(1,000)", "(1, 0)", Y),
    ("1,000.50", "1000.5", Y),
    ("1,00", "100", N),
    ("42.", "42", Y),
    ("42.0", "42", Y),
    ("042", "42", Y),
    ("+42", "42", Y),
    ("-0", "0", Y),
    ("--5", "5", Y),
    ("\u22125", "-5", Y),
    ("- 5", "-5", Y),
    ("5", "-5", N),
    ("1.5e3", "1500", Y),
    ("1.5 \\times 10^3", "1500", Y),
    ("1.5\u00d710^{3}", "1500", Y),
    ("1.5*10^{-3}", "0.0015", Y),
    ("3 \\cdot 4", "12", Y),
    ("1 1/2", "3/2", Y),
    ("1\\frac{1}{2}", "1.5", Y),
    ("-1\\frac12", "-\\frac32", Y),
    ("1\\frac{1}{2}", "0.5", N),
    ("\u00bd", "0.5", Y),
    ("2\u00bd", "2.5", Y),
    ("5 cm", "5", Y),
    ("5\\text{ cm}", "5", Y),
    ("5~\\mathrm{cm}^2", "5", Y),
    ("5cm", "5 centimeters", Y),
    ("5 cm", "5 m", N),
    ("5 miles per hour", "5", Y),
    ("5 m/s", "5", Y),
    ("90^\\circ", "90", Y),
    ("90\u00b0", "90^{\\circ}", Y),
    ("90 degrees", "90", Y),
    ("\\$18.00", "18", Y),
    ("$18", "18", Y),
    ("\u20ac18", "18", Y),
    ("-\\$5", "-5", Y),
    ("18 dollars", "\\$18", Y),
    ("x = 5", "5", Y),
    ("x=5", "x = 5", Y),
    ("5", "x = 5", Y),
    ("y = 5", "x = 5", N),
    ("x = 6", "5", N),
    ("f(2) = 5", "5", Y),
    ("\\text{Total cost} = 5", "5", Y),
    ("6 \\times 7 = 42", "42", Y),
    ("6 \\times 7 = 43", "43", N),
    ("2 + 2 = 4 = 8/2", "4", Y),
    ("\\sqrt{4}", "2", Y),
    ("\\sqrt{8}", "2\\sqrt{2}", Y),
    ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}", Y),
    ("\\sqrt2", "\\sqrt{2}", Y),
    ("sqrt(2)", "\\sqrt{2}", Y),
    ("\u221a2", "2^{1/2}", Y),
    ("\\sqrt[3]{27}", "3", Y),
    ("\\sqrt[3]{-8}", "-2", Y),
    ("1.414", "\\sqrt{2}", N),
    ("\\sqrt{3}", "\\sqrt{2}", N),
    ("2\\pi", "\\pi \\cdot 2", Y),
    ("2\u03c0", "2\\pi", Y),
    ("2 pi", "2\\pi", Y),
    ("\\frac{\\pi}{2}", "\\frac{1}{2}\\pi", Y),
    ("3.14", "\\pi", N),
    ("\\pi^2", "\\pi", N),
    ("5!", "120", Y),
    ("\\binom{5}{2}", "10", Y),
    ("\\log_{2} 8", "3", Y),
    ("\\ln 1", "0", Y),
    ("\\sin(\\frac{\\pi}{6})", "\\frac12", Y),
    ("2^{10}", "1024", Y),
    ("2^10", "1024", Y),
    ("-2^2", "-4", Y),
    ("(-2)^2", "4", Y),
    ("1/0", "1/0", Y),  # not numbers: compared as text
    ("1/0", "0", N),
    ("073", "73", Y),  # AIME
    ("73", "073", Y),
    ("073.", "73", Y),
    ("730", "73", N),
    ("204 \\text{ minutes}", "204", Y),
    ("m+n = 73", "73", Y),
    ("\\infty", "-\\infty", N),
    ("1010_2", "1010_{2}", Y),
    ("1010_2", "1010_3", N),
    ("3:4", "3 : 4", Y),
    ("3:4", "4:3", N),
    ("10:30", "10:30", Y),
]

STRUCTURES = [
    ("\\sin 2x", "\\sin(2x)", Y),  # an argument without brackets
    ("\\sin 2x", "2\\sin x\\cos x", Y),
    ("\\sin 2x", "x\\sin 2", N),
    ("\\cos 2\\theta", "\\cos(2\\theta)", Y),
    ("\\sin 2\\pi x", "\\sin(2\\pi x)", Y),
    ("\\ln x + 1", "\\ln(x)+1", Y),
    ("x\\ln x", "x\\ln(x)", Y),
    ("12\\pi \\text{ cm}^2", "12\\pi", Y),  # a unit behind pi
    ("36\\pi\\text{ cubic inches}", "36\\pi", Y),
    ("36\\pi", "36\\pi\\text{ cm}^3", Y),
    ("12\\pi cm", "12\\pi", Y),
    ("12\\pi r^2", "12\\pi", N),
    ("3\\pi h", "3\\pi", N),
    ("(1, 2)", "(1,2)", Y),
    ("\\left( 1, \\frac{2}{2} \\right)", "(1, 1)", Y),
    ("(2, 1)", "(1, 2)", N),
    ("(1, 2)", "(1, 2, 3)", N),
    ("(3, \\frac{\\pi}{2})", "\\left( 3, \\frac{\\pi}{2} \\right)", Y),
    ("(x, y) = (1, 2)", "(1, 2)", Y),
    ("[0, 1)", "[0,1)", Y),
    ("[0, 1)", "[0, 1]", N),
    ("(0, 1)", "[0, 1]", N),
    ("[-2, 7]", r"x \in [-2,7]", Y),
    (r"y\in(-2,7)", r"x \in [-2,7]", N),
    ("(0, \\infty)", "(0,\\infty)", Y),
    ("x \u2208 (0, \\infty)", "(0,\\infty)", Y),
    ("(-\\infty, 0) \\cup (1, \\infty)", "(1, oo) \\cup (-oo, 0)", Y),
    ("(-\\infty, 0) \\cup (1, \\infty)", "(-\\infty, 0) \\cup [1, \\infty)", N),
    ("\\{1, 2, 3\\}", "\\{3,2,1\\}", Y),
    ("\\{1, 2\\}", "\\{1, 2, 3\\}", N),
    ("\\{1, 2\\}", "(1, 2)", N),
    ("{1, 2}", "\\{2, 1\\}", Y),
    ("1, 2", "2,1", Y),
    ("1, 2 and 3", "1,2,3", Y),
    ("1 \\text{ and } 2", "1,2", Y),
    ("x = 1 or x = 2", "1, 2", Y),
    ("x = 1, y = 2", "x = 2, y = 1", N),
    ("1, 2", "1, 2, 3", N),
    ("1,000, 2,000", "1000, 2000", Y),
    ("(1,000, 2)", "(1000, 2)", Y),
    ("3 \\pm \\sqrt{2}", "3 + \\sqrt{2}, 3 - \\sqrt{2}", Y),
    ("\\pm 2", "-2, 2", Y),
    ("2", "\\pm 2", N),
    ("\\emptyset", "\\varnothing", Y),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{bmatrix}1&2\\\\3&\\frac{8}{2}\\end{bmatrix}", Y),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{pmatrix} 1 & 3 \\\\ 2 & 4 \\end{pmatrix}", N),
    ("2x + 3", "3 + 2x", Y),
    ("(x+1)^2", "x^2 + 2x + 1", Y),
    ("(x+1)^2", "x^2 + 1", N),
    ("x(x-1)", "x^2-x", Y),
    ("y = 2x + 3", "2x+3", Y),
    ("x^2 + y^2 = 4", "y^2 + x^2 = 4", Y),
    ("x^2 + y^2 = 4", "4", N),
    ("\\frac{a}{b}", "a/b", Y),
    ("2xy", "2yx", Y),
    ("x", "y", N),
    ("\\frac{\\sqrt{x}}{x}", "\\frac{1}{\\sqrt{x}}", Y),
    ("\\alpha + 1", "1+\\alpha", Y),
    ("\\alpha", "\\beta", N),
    ("x_{12}", "x_{21}", N),
    ("x_1 + x_2", "x_{2} + x_{1}", Y),
    ("x > 5", "x>5", Y),
    ("x > 5", "5", N),
    ("x \\le 5", "x \\ge 5", N),
    ("\\text{Friday}", "Friday", Y),
    ("friday.", "Friday", Y),
    ("Monday", "Friday", N),
    ("dog", "god", N),
    ("\\text{(C)}", "C", Y),
    ("even", "\\text{even}", Y),
    ("9^{9^{9}}", "9^{9^{9}}", Y),  # compared as text: too large to compute
    ("9^{9^{9}}", "9", N),
    ("1e999999999", "5", N),
    ("((((((5))))))", "5", Y),
    ("(" * 900 + "5", "5", N),
    ("1" * 5000, "1", N),
    ("500!" * 100, "5", N),
    ("__import__('os').getpid()", "5", N),
]

CHOICES = [
    ("The answer is (B).", "B", Y),
    ("The answer is B", "(B)", Y),
    ("The correct answer is option B.", "B", Y),
    ("Answer: b", "B", Y),
    ("So it is C, not B.", "C", Y),
    ("The answer is not (B)", "B", N),
    ("\\boxed{B}", "B", Y),
    ("\\boxed{\\text{(B)}}", "B", Y),
    ("\\boxed{\\textbf{(B)}\\ 42}", "B", Y),
    ("\\boxed{B. Paris}", "B", Y),
    ("<answer>B</answer>", "B", Y),
    ("<answer>C</answer>", "B", N),
    ("#### B", "B) Paris", Y),
    ("B", "B", Y),
    ("B.", "B", Y),
    ("B) Paris", "B", Y),
    ("(A) is wrong, so it is (B).", "B", Y),
    ("I think it is B", "B", Y),
    ("A bird is B", "B", Y),
    ("I think so.", "I", N),
    ("A dog.", "A", N),
    ("A", "A", Y),
    ("The answer is A because a dog barks.", "A", Y),
    ("The answer is Paris.", "B", N),
    ("The answer is Paris, which is (B).", "B", Y),
    ("It is 2.", "B", N),
    ("\\boxed{}(B)", "B", N),
    ("<think>(C)?</think>(B)", "B", Y),
    ("(B)", 1, Y),
    ("(A)", 1, N),
    ("", "B", N),
]


def boxed(pairs):
    return [(f"so it is $\\boxed{{{answer}}}$.", gold, verdict) for answer, gold, verdict in pairs]


PAIRS = [*GSM8K, *BOXES, *boxed(NUMBERS), *boxed(STRUCTURES)]
wrong = lambda grader, pairs: [pair for pair in pairs if grader("", pair[0], {"answer": pair[1]}) != pair[2]]  # noqa: E731


def test_pairs():
    """Catches a right answer that is not recognised, and a wrong one that is accepted."""
    assert len(PAIRS) + len(CHOICES) > 250
    assert wrong(math_answer, PAIRS) == []
    assert wrong(multiple_choice, CHOICES) == []


def test_equality_has_no_side():
    """Catches a comparison that depends on which of the two is the gold answer. Whole sentences are not compared here:
    only an answer may be one."""
    for answer, gold, verdict in [*NUMBERS, *STRUCTURES]:
        assert equal(gold, answer) == verdict, (gold, answer)


EXACT = [
    ("Paris", "Paris", Y),
    (" Paris\n", "Paris", Y),
    ("paris", "Paris", N),
    ("<answer>Paris</answer>", "Paris", Y),
    ("It is Paris", "Paris", N),
    ("<think>Rome</think>\nParis", "Paris", Y),
    ("<think>\\boxed{Paris}</think>\nRome", "Paris", N),
    ("42.0", "42", N),
]
LAST = [
    ("\\boxed{41} or 42", "42", Y),
    ("42 eggs of 50", "42", N),
    ("so 1,234.50.", "1234.5", Y),
    ("\\frac{3}{4}", "0.75", Y),
    ("none", "42", N),
]


def test_exact_match_and_last_number():
    """Catches an exact_match that normalises text, and a last_number that prefers a box to the last number."""
    assert wrong(exact_match, EXACT) == [] and wrong(last_number, LAST) == []


FORMATS = [  # (prompt, completion, reward)
    ("", "<think>so</think><answer>5</answer>", Y),
    ("", "<think>so</think>\n<answer>5</answer>\n", Y),
    ("", "<think>so</think><answer> \n</answer>", N),
    ("", "<think>so</think> It is \\boxed{5}.", Y),
    ("Q\n<think>\n", "so</think> \\boxed{5}", Y),
    ("Q", "so</think> \\boxed{5}", N),
    ("", "<think>so</think> It is 5.", N),
    ("", "<think>so</think> \\boxed{}", N),
    ("", "<think>so</think> \\boxed{5", N),
    ("", "<think>so \\boxed{5}</think>", N),
    ("", "<think>so <answer>5</answer>", N),
    ("", "<think>so</think><answer>5", N),
    ("", "<think>so</think><answer></answer>", N),
    ("", "<think>so</think>5<answer>5</answer>", N),
    ("", "<think>so</think><answer>5</answer><answer>5</answer>", N),
    ("", "<think>a</think><think>b</think><answer>5</answer>", N),
    ("", "well <think>so</think><answer>5</answer>", N),
]


def test_format():
    """Catches tags that are missing, doubled or out of order, and an answer given inside the thoughts only."""
    assert [row for row in FORMATS if format_reward(row[0], row[1], {}) != row[2]] == []


def test_records():
    """Catches a gold answer read from another field than the first one present, a list of gold answers of which only
    one counts, and a record without one that gets a reward, if only 0 for a text without an answer: then not every call
    fails, and the run goes on."""
    assert math_answer("", "5", {"solution": "so \\boxed{5}", "target": "6"})
    assert math_answer("", "5", {"answer": None, "label": 5}) and math_answer("", "5", {"gold": [4, 5.0]})
    for grader in (math_answer, exact_match, last_number, multiple_choice):
        for text in ("5", "I do not know.", ""):
            with pytest.raises(ValueError, match="no right answer: none of answer, solution"):
                grader("", text, {"prompt": "5"})
    with pytest.raises(ValueError, match="is no letter"):
        multiple_choice("", "B", {"answer": "Paris"})


def test_hostile_texts_have_a_verdict():
    """Catches an exception, and a pattern that backtracks (for minutes here), on texts such as a model in training
    writes."""
    texts = ["\\boxed{" * 5000, "{" * 30000, "1," * 15000, "answer " * 6000, "answer is 1, " * 3000, "<answer>" * 4000]
    texts += ["(" * 30000, "1 " * 15000, "-" * 30000, "\\frac" * 6000, "9^" * 400, "x" * 30000, "$" * 30000]
    texts += [f"\\boxed{{{text[:990]}}}" for text in texts]
    for text in texts:
        for grader in (math_answer, multiple_choice, last_number, exact_match, format_reward):
            assert grader("", text, {"answer": "J" if grader is multiple_choice else "55"}) == 0
    golds = [r"\pi", r"\infty", r"y = \pi x", r"x + y = \pi", r"(1, \sqrt{2})", r"\pi\%", "0 < x < 2"]
    large = ["10^{500}", "y = 10^{500} x", "x + y = 10^{500}", "(1, 10^{500})", "10^{500}%", "1 < 2 < x < 10^{500}"]
    for text in large:  # than any float
        assert equal(text, text) and not any(equal(text, gold) or equal(gold, text) for gold in golds), text


def test_math_verify_is_asked_last(monkeypatch):
    """Catches math_verify overruling a verdict that we can give, or not being asked where we cannot."""
    asked = []
    package = types.ModuleType("math_verify")
    package.parse = lambda text: text
    package.verify = lambda gold, answer: asked.append(answer) or "int" in answer
    monkeypatch.setitem(sys.modules, "math_verify", package)
    assert wrong(math_answer, PAIRS) == [] and asked == []
    assert math_answer("", r"\boxed{\int_0^1 x}", {"answer": r"\oint x"}) and asked == [r"$\int_0^1 x$"]


def test_no_torch():
    """Catches an import of torch, which slows the start of every worker process."""
    program = "import sys, training.graders, models.worker_process, models.functions; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=tiny.ROOT, capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr
