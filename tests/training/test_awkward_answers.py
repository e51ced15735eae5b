r"""training/mathematics.py: right answers written in another form than the record's, and wrong ones that look right.
The verdicts are math_verify's (0.9) where it reads both; degrees, |A|, cents and "and" are ours. Catches forms
compared as text, so that a right answer earns nothing, and parsing so lenient that a wrong one earns a reward."""

import pytest

from training.graders import last_number, math_answer, multiple_choice

RIGHT = [
    ("x > 5", r"(5, \infty)"),
    ("5 < x", "x > 5"),
    (r"x \geq 2", r"[2,\infty)"),
    (r"-2 < x \le 3", "(-2,3]"),
    ("3 > x > -2", "(-2,3)"),
    (r"x \leqslant 5", r"x\le5"),
    (r"x<1 \text{ or } x>3", r"(-\infty,1)\cup(3,\infty)"),
    ("(1,2),(3,4)", "(3,4), (1,2)"),
    (r"(1,2) \text{ and } (3,4)", "(1,2),(3,4)"),
    ("y = 1+2x", "2x - y + 1 = 0"),
    (r"y=-\frac{1}{2}x+3", "x+2y=6"),
    (r"\frac{x^2}{4}+\frac{y^2}{9}=1", "9x^2+4y^2=36"),
    (r"{5 \choose 2}", "10"),
    (r"0.\overline{3}", r"\frac{1}{3}"),
    (r"0.1\overline{6}", "1/6"),
    ("|-5|", "5"),
    (r"\left|{-5}\right|", "5"),
    ("|A| = 5", "5"),
    ("f^{-1}(x)=x+1", "x+1"),
    (r"\sin 30^\circ", "0.5"),
    (r"\tan(45^{\circ})", "1"),
    (r"\arctan 1", r"\frac{\pi}{4}"),
    (r"\sec^2 x", r"\frac{1}{\cos^2 x}"),
    (r"\left(\begin{array}{cc}1&2\\3&4\end{array}\right)", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ("5\u20ac", "5"),
    ("3\u00d710\u2075", "300000"),
    ("10\u207b\u00b3", "0.001"),
    ("x\u2075+1", "x^5+1"),
    ("3\u2153", "10/3"),
    ("log\u20828", "3"),
    ("\uff081\uff0c2\uff09", "(1,2)"),
    ("\uff0d\uff15\uff10\uff05", "-50%"),
    ("\u20b9500", "500"),
    ("\u221a12", r"2\sqrt{3}"),
    (r"-{3 \over 4}", r"-\frac34"),
    ("2**10", "1024"),
    ("1.5 x 10^3", "1500"),
    ("x = y", "y = x"),
    ("x + y = 3", "2x + 2y = 6"),
    (r"m(6-m)", "-m^2 + 6m"),
    (r"9 \text{ m/s}^2", "9"),
    (r"2\sqrt{3} m", r"2\sqrt3"),
    ("1.5e3 m", "1500"),
    (r"x > 2 \text{ and } x \le 3", "(2,3]"),
    ("x >= 1 and x > 1", "x > 1"),
    (r"0 \le x < \pi", r"[0,\pi)"),
    (r"x<1 \text{ and } x>3", r"(-\infty,1)\cup(3,\infty)"),  # so written by many, and never an empty set
    (r"\$32,\!348", "32348 dollars"),
    ("5\u00a2", "5 cents"),
    (r"10\text{ N}", "10"),
    (r"10\,\mathrm{V}", "10"),
    (r"100\text{ W}, 25~\text{kW}", "100, 25"),
    (r"\frac{1}{2}\text{ J}", "0.5"),
    (r"10\text{ N}", "10 N"),
    (r"37\text{ C}", "37"),
    (r"6\text{ pm}", "6 pm"),
    (r"18\text{th}", "18"),
    (r"18^{\text{th}}", "18"),
    (r"450\text{ Rs}", "450"),
    (r"\text{Rs. }450", "Rs 450"),
    ("5 pt", "5 pints"),
    ("5 qt", "5"),
    ("12 a day", "12"),
    ("25 squared cm", "25"),
    ("25 squared units", "25"),
    ("8", "8 cubed in."),
    ("25 cm squared", "25"),
    (r"\$12 an hour", "12"),
    (r"\dbinom{10}{3}", "120"),
    (r"\tbinom{10}{3}", r"\binom{10}{3}"),
    (r"\mathbb{R}", r"(-\infty,\infty)"),
    (r"x \in \mathbb R", r"\text{all real numbers}"),
    ("2x = 2x", "2x = 2x"),
]
WRONG = [
    ("a + d", "b + c"),
    ("x + z", "2y"),
    (r"\frac{y_2 - y_1}{x_2 - x_1}", "1"),
    ("x_2 - x_1", "y_2 - y_1"),
    ("2**10", "210"),
    ("-m^2 + 6m", "-m^2 + 6"),
    ("2x + 3s", "2x + 3"),
    ("3 + 2m", "5"),
    ("9 m x", "9"),
    ("x = 0", "y = 0"),
    ("x + y = (1,2)", "2x + y = 3"),
    (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ("x > 5", r"[5,\infty)"),
    ("x > 5", r"(-\infty,5)"),
    ("x < 5", "5"),
    ("x > 5", "y > 5"),
    ("1 < x < 3", "(1,4)"),
    ("(1,2),(3,4)", "(1,2),(4,3)"),
    ("(1,2),(3,4)", "1,2,3,4"),
    ("(1,2)", "(1,2),(3,4)"),
    ("y = 2x", "y - 2x = 1"),
    ("x = 5", "x + y = 5"),
    ("xy = x", "y = 1"),
    (r"0.\overline{3}", "0.3"),
    (r"0.\overline{3}", "0.33"),
    ("|x|", "x"),
    ("x\u2075", "x^4"),
    ("\uff081\uff0c2\uff09", "(2,1)"),
    (r"\sin 30", "0.5"),
    (r"\sin^{-1} x", r"\frac{1}{\sin x}"),
    (r"{5 \choose 2}", "52"),
    ("x > 2 and x < 3", "x > 2 or x < 3"),
    ("x > 2 and x < 3", "[2,3)"),
    ("5 cents", r"\$5"),
    ("5\u00a2", r"$\$5$"),
    (r"10\text{ N}", r"10\text{ J}"),
    (r"5\text{ m}", "5 km"),
    (r"10\text{ N}^2", "10"),
    (r"2\text{ or }3", "2"),
    (r"2\mathrm{i}", "2"),
    (r"3\mathrm{e}", "3"),
    ("5 pt", "5 qt"),
    ("5 squared", "5"),
    ("5 Squared", "5"),
    ("5 squared in all", "5"),
    ("5 cubed", "5"),
    ("It is 5 squared.", "5"),
    ("3 fourths", "3"),
    ("2 thirds", "2"),
    ("1 half", "1"),
    ("5 and a half", "5"),
    ("fewer than 5", "5"),
    ("at least 5", "5"),
    ("not 5", "5"),
    ("Rs + 2", "2"),
    (r"\mathbb{R}^2", r"(-\infty,\infty)"),
    (r"\mathbb{R} \setminus \{2\}", r"(-\infty,\infty)"),
    ("2x = 2x", "x = 3y"),
]
STATED = [  # (whole text, gold, whether its answer is right)
    (r"\boxed{The area is 25 squared units.}", "25", 1),
    ("So she makes $18. I hope the answer is correct.", "18", 1),
    ("She makes 9 * 2 = $18 every day. I hope this answer is helpful!", "18", 1),
    ("9*2 = 18\n\nThis answer is in dollars.", "18", 1),
    ("9*2 = 18\n\nThis answer is in dollars.", "9", 0),
    ("The answer is Friday. I hope this answer is helpful.", "Friday", 1),
    ("Since 2 + 2 = 4, the answer is correct.", "correct", 1),
    ("It is 18. No, that answer is wrong.", "18", 0),
    ("I have 18. The answer is six.", "18", 0),
    ("I have 18, so the answer is clear: 20", "18", 0),
    ("#### The answer is correct", "correct", 1),
    ("#### So my final answer is: correct", "correct", 1),
    ("#### not right: the answer is correct", "correct", 0),
    ("#### The answer is wrong", "correct", 0),
    (r"18? The answer is correct: \boxed{correct}", "18", 0),
    ("The answer is calculated as 9*2 = 18.", "18", 1),
    ("The answer is calculated as 9*2 = 18. That is for 2 days.", "18", 1),
    ("The answer is found by multiplying 9 by 2, which equals 18.", "18", 1),
    ("The answer is given in 18 parts. So it is 20.", "18", 0),
    ("The answer is as follows:\n\n18", "18", 1),
    (r"The answer is given by $9 \times 2 = 18$.", "18", 1),
    (r"The answer is given by $9 \times 2 = 19$. Or 18", "18", 0),
    (r"The answer is therefore $\frac{1}{2}$.", "0.5", 1),
    (r"The answer is, clearly, $\frac{1}{2}$.", "0.5", 1),
    (r"The final answer is thus: $\frac{1}{2}$", "0.5", 1),
    (r"The answer is equal to $\frac{1}{2}$ of $x$.", "0.5", 1),
    (r"The answer is therefore $\frac{1}{3}$.", "0.5", 0),
    ("The answer is *18*.", "18", 1),
    ("The answer is Rs. 450.", "450", 1),
    ("The answer is Rs. 450.", "45", 0),
    ("<answer>9*2=18\n#### 18</answer>", "18", 1),
    ("<answer>9*2=18\n#### 17</answer>", "18", 0),
    ("<answer>Answer: 18</answer>", "18", 1),
    ("<answer>\nThe answer is: 18\n</answer>", "18", 1),
    ("<answer>**Answer:** 18</answer>", "18", 1),
    ("<answer>18. I hope this answer is right.</answer>", "18", 1),
    ("#### 17\n<answer>18</answer>", "18", 0),
    ("#### 18. I hope this answer is right.", "18", 1),
    ("<answer>17</answer>\n#### 18", "18", 1),
    ("#### Final answer\n<answer>Answer: 18</answer>", "18", 1),
]


@pytest.mark.parametrize(("answer", "gold", "verdict"), [(*p, 1.0) for p in RIGHT] + [(*p, 0.0) for p in WRONG])
def test_forms(answer, gold, verdict):
    assert math_answer("", f"So \\boxed{{{answer}}}.", {"answer": gold}) == verdict
    assert math_answer("", f"So \\boxed{{{gold}}}.", {"answer": answer}) == verdict


def test_what_is_stated():
    """Catches an answer read from a sentence that says something about it, words in front of it that hide it, and the
    content of <answer> that is not read like a text; and, through them, a wrong answer that becomes right."""
    assert [each for each in STATED if math_answer("", each[0], {"answer": each[1]}) != each[2]] == []


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The correct option is (C) because (A) is wrong.", "C"),
        ("So C is correct, not A.", "C"),
        ("(C) is the right answer. Note that (D) needs more data.", "C"),
        ("Is (A) right? B is correct? No: the best choice is D, and not A", "D"),
        ("\u7b54\u6848\u662fB", "B"),
        ("\u56e0\u6b64\u9009B\u3002", "B"),
        ("d", "D"),
        ("(d).", "D"),
        ("The answer is 'C'", "C"),
        ("I take 'C', since A's is wrong", "C"),
        ("answer: c) a city", "C"),
        ("I hope the answer is correct: (C)", "C"),
        ("#### A. The answer is clear: B fails", "A"),
        ("#### A (the answer is based on B)", "A"),
    ],
)
def test_choices(text, letter):
    """Catches the last letter taken for the choice although another is called correct, and a letter missed because it
    is beside Chinese characters or is a lone lowercase letter."""
    assert [multiple_choice("", text, {"answer": each}) for each in "ABCD"] == [
        float(each == letter) for each in "ABCD"
    ]


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{A, B}",
        r"\boxed{\text{(A) and (B)}}",
        "The answer is A, B, C or D",
        "The answer is A/B",
        "Answer: (A) or (B)",
        "#### B or A. I hope the answer is right",
    ],
)
def test_several_choices(text):
    """Catches a reward for naming all letters, and a record with several letters that is graded by its first alone."""
    assert [multiple_choice("", text, {"answer": each}) for each in "ABCD"] == [0] * 4
    with pytest.raises(ValueError, match="no letter"):
        multiple_choice("", "B", {"answer": text})


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is B, I think.", "B"),
        ("The answer is B, A is wrong", "B"),
        ("The answer is (B), and not A", "B"),
        (r"\boxed{B, a city}", "B"),
        (r"\boxed{A} or rather \boxed{B}", "B"),
    ],
)
def test_one_choice_beside_others(text, letter):
    """Catches a single choice taken for several because of the letters or words beside it."""
    assert multiple_choice("", text, {"answer": letter}) == multiple_choice("", letter, {"answer": text}) == 1


@pytest.mark.parametrize(
    ("text", "gold", "wrong"),
    [
        (r"It is \frac{-1}{2}", "-0.5", "2"),
        (r"It is \frac12", "0.5", "12"),
        ("It is 1.5e3", "1500", "1.5"),
        ("It is 1e-3.", "0.001", "1"),
    ],
)
def test_the_last_number_is_whole(text, gold, wrong):
    """Catches a fragment of the last number, such as the 1.5 of 1.5e3, taken for the number."""
    assert [math_answer("", text, {"answer": each}) for each in (gold, wrong)] == [1, 0]


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("\u6240\u4ee5\u5171\u67095\u4e2a\u82f9\u679c", "5"),
        ("\u603b\u51711,234\u5143\u3002", "1234"),
        ("\u7b54\u6848\u662f-5\u3002", "-5"),
        ("\u56e0\u6b64\uff0c\u7b54\u6848\u4e3a3/4\u3002", "0.75"),
        ("\u7b54\u6848\u662f50%", "50"),
        ("\\boxed{5\u4e2a}", "5"),
        ("Answer: 5 (since 15 / 3 = 5)", "5"),
        ("#### Answer: 5", "5"),
        ("#### 5\u5143", "5"),
        ("\\boxed{5\\ \\text{\u0440\u0443\u0431}}", "5"),
        ("\uc815\ub2f5\uc740 7\uc785\ub2c8\ub2e4", "7"),
    ],
)
def test_numbers_among_words(text, gold):
    """Catches a number directly after a Chinese character taken for part of a word: no right answer in Chinese would
    earn a reward."""
    assert math_answer("", text, {"answer": gold}) == last_number("", text, {"answer": gold}) == 1
    assert math_answer("", text, {"answer": "8"}) == last_number("", text, {"answer": "8"}) == 0


def test_the_answer_in_chinese_is_what_is_stated():
    """Catches an answer read from the explanation that follows the stated one."""
    text = "\u7b54\u6848\u662f12\uff0c\u56e0\u4e3a3\u4e584\u7b49\u4e8e12\uff0c\u4e0d\u662f10"
    assert [math_answer("", text, {"answer": gold}) for gold in ("12", "10", "3")] == [1, 0, 0]
