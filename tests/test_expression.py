"""What a model wrote is never evaluated: the parser of expressions, and the texts that are plain
enough for a scorer that would."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esfast.tasks.expression import ExpressionError, evaluate
from esfast.tasks.harmless import is_formula, is_plain


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("1 + 2 * 3", 7, [1, 2, 3]),
        ("(1 + 2) * 3", 9, [1, 2, 3]),
        ("8 - 3 - 2", 3, [8, 3, 2]),
        ("8 / 4 / 2", 1, [8, 4, 2]),
        ("1/3 + 2/3", 1, [1, 3, 2, 3]),
        ("((5))", 5, [5]),
        ("7/2", Fraction(7, 2), [7, 2]),
    ],
)
def test_expressions_are_worth_what_they_say(text, value, numbers):
    assert evaluate(text) == (value, numbers)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "1 +",
            "2 ** 3",
            "7 // 2",
            "-3 + 5",
            "1 2",
            "(1",
            "1)",
            "1.5",
            "__import__('os')",
            "a",
        ),
        *("1/0", "1/(2-2)", "(" * 100 + "1" + ")" * 100, "1" * 201, "9" * 13, "²", "1 = 1", "١"),
    ],
)
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(ExpressionError):
        evaluate(text)


def test_the_character_that_is_wrong_is_named():
    with pytest.raises(ExpressionError, match="unexpected '=' at character 7"):
        evaluate("1 + 1 = 2")


tree = st.recursive(
    st.integers(0, 999).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
        lambda t: f"({' '.join(t)})"
    ),
    max_leaves=8,
)


@given(tree)
def test_the_parser_agrees_with_python_on_its_own_grammar(text):
    try:
        value, _ = evaluate(text)
    except ExpressionError as error:
        assert "division by zero" in str(error)
        return
    # The text was made here, from digits and operators; this is the second opinion.
    wrapped = "".join(f"Fraction({part})" if part.isdigit() else part for part in _split(text))
    assert value == _python(wrapped)


def _split(text: str) -> list[str]:
    return text.replace("(", "( ").replace(")", " )").split()


def _python(text: str) -> Fraction:
    import ast
    import operator

    kinds = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
    kinds[ast.Div] = operator.truediv

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return kinds[type(node.op)](value(node.left), value(node.right))
        assert isinstance(node, ast.Call)
        return Fraction(ast.literal_eval(node.args[0]))

    return value(ast.parse(text, mode="eval").body)


@given(st.text(max_size=60) | st.text("0123456789+-*/() ", max_size=60))
def test_no_text_breaks_the_parser(text):
    with suppress(ExpressionError):
        value, numbers = evaluate(text)
        assert isinstance(value, Fraction) and numbers


# --- what may be handed to a scorer that evaluates --------------------------------------------


@pytest.mark.parametrize(
    "text", ["[1, 2]", "[['a']]", "ABC DE", "1 2 3", "_ Q _\nQ _ _", '{"a": 1}']
)
def test_plain_answers_pass(text):
    assert is_plain(text)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "__import__('os').system('x')",
            "oracle_answer",
            "entry['answer']",
            "9**9**9",
            "f()",
            "a.b",
        ),
        *("[x for x in (1,)]", "f'{a}'", "x" * 5000, "'a' ['b']", "1 .real"),
    ],
)
def test_answers_that_could_do_something_are_refused(text):
    assert not is_plain(text)


@pytest.mark.parametrize("text", ["3*x**2 + 2*x", "(1 + 2) / 3", "sin(x)/2 + C", "-x", "2**0.5"])
def test_formulas_pass(text):
    assert is_formula(text)


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9",
        "x.__class__",
        "sin('a')",
        "S('x')",
        "9**(9*9)",
        "(2**100)**100",
        "lambda: 1",
        "[1]",
        *("__import__('os')", "open(1)", "1 if 1 else 2", "9" * 40, "(", "x" + "+x" * 2000),
    ],
)
def test_texts_that_are_no_small_formula_are_refused(text):
    assert not is_formula(text)
