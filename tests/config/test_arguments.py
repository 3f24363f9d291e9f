"""The words of a command line, sorted into overrides and options."""

from __future__ import annotations

import pytest

from her_nemo.config import arguments
from her_nemo.config.errors import UserError


def test_words_are_sorted() -> None:
    words = ["a=1", "--json", "--config-name", "mine.yaml", "--length=7", "b=--json"]
    typed = arguments.parse(words, flags=["--json"], options=["--length"])
    assert typed.overrides == ["a=1", "b=--json"]
    assert typed.options == {"config_name": "mine", "length": "7"}
    assert typed.flags == {"json"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--json"], "no option '--json'.*see her-nemo plan --help"),
        (["--config-dir"], "--config-dir needs a value, e.g. --config-dir=DIR"),
        (["--config-name="], "--config-name needs a value"),
    ],
)
def test_what_is_no_option_or_lacks_its_value_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        arguments.parse(words, "her-nemo plan")
