"""What the driver makes of the replies of vLLM's workers, errors among them; vLLM is not needed."""

from __future__ import annotations

import pytest

from esfast import ConfigError, StateError
from esfast.engines.vllm_replies import answered, failure


@pytest.mark.parametrize(
    ("seen", "raised", "says"),
    [
        (ConfigError("too many"), ConfigError, "too many"),
        (FileNotFoundError(2, "no such file", "a"), OSError, "no such file: 'a'"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), ValueError, "can't decode"),
        (MemoryError(), MemoryError, "MemoryError"),
        (KeyError("name"), RuntimeError, "KeyError.*name"),
    ],
)
def test_an_error_is_raised_again_as_what_it_was(
    seen: Exception, raised: type[Exception], says: str
) -> None:
    with pytest.raises(raised, match=says) as caught:
        answered([failure(seen), failure(seen)])
    assert type(caught.value) is raised


def test_workers_of_which_some_failed_are_apart() -> None:
    assert answered([{"value": 1}, {"value": None}]) == [1, None]
    with pytest.raises(StateError, match=r"1 of 2 workers failed \(full\).*apart"):
        answered([{"value": 1}, failure(OSError("full"))])
