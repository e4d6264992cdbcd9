"""Questions: what counts as an answer named, and what rows of a file come to."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_tasks import write_rows

from esfast.tasks import Example
from esfast.tasks.questions import Questions


def asked(path: Path, *rows: dict) -> tuple[Questions, list[Example]]:
    task = Questions(data=write_rows(path / "facts.jsonl", list(rows)), evaluation_only=True)
    return task, task.held_out(99)


def test_whitespace_around_an_answer_is_no_part_of_it(tmp_path):
    task, (one,) = asked(tmp_path, {"prompt": "France?", "answers": [" Paris", "Lutetia\n"]})
    assert task.score(one, "Paris").solved and task.score(one, "Lutetia").solved
    assert task.score(one, "Lima").feedback == "The answer is Paris."


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (
            "5",
            ["5", "It is 5.", "5, I think", "$5", "(5)", "5!", "A-5", "4, 5 or 6", "- 5", "5%"],
            ["3.5", "5.5", "-5", "\u22125", "1,5", "5,000", ".5", "15", "50", "-$5", "3-5", "x5"],
        ),
        ("10", ["10", "10.", "$10, or so"], ["10.5", "1.10", "10,5", "100"]),
        ("-5", ["-5", "It is -5."], ["5", "-5.5", "-50", "-.5"]),
        ("1,000", ["1,000", "$1,000."], ["1,000,000", "31,000", "1,000.5"]),
        ("2.5", ["2.5", "2.5."], ["12.5", "2.55", "2.5.1"]),
        ("5 km", ["5 km.", "5 km,2"], ["3.5 km", "-5 km"]),
        ("Apollo 11", ["Apollo 11."], ["Apollo 11.5", "Apollo 110"]),
        ("Paris", ["-Paris", "1,Paris.5"], ["Parisian"]),
    ],
)
def test_a_number_is_not_named_by_another_that_holds_it(tmp_path, answer, right, wrong):
    task, (one,) = asked(tmp_path, {"prompt": "How many?", "answer": answer})
    assert [text for text in right if not task.score(one, text).solved] == []
    assert [text for text in wrong if task.score(one, text).solved] == []


def test_rows_with_one_prompt_are_one_question_with_all_their_answers(tmp_path):
    rows = [
        {"prompt": "A city in Peru?", "answer": "Lima"},
        {"prompt": "A city in Chile?", "answer": "Arica"},
        {"prompt": "A city in Peru?", "answers": ["Cusco", "Lima"]},
    ]
    _, examples = asked(tmp_path, *rows)
    answers = {example.prompt: example.data["answers"] for example in examples}
    assert answers == {"A city in Peru?": ["Lima", "Cusco"], "A city in Chile?": ["Arica"]}
