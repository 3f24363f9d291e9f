"""Who is shown what in Role-Play Bench: the seeds, and the prompts of the character, the user simulator and the judge.

The user simulator and the judge see what a person chatting would see (`Reader.USER`): no plan, no thought, on
malformed text neither. The character sees its own thoughts, without its old plans, and what the user lets be seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from her_nemo.config.errors import UserError
from her_nemo.data.synthesis.language import fold, latin
from her_nemo.data.synthesis.prompt_files import PromptFile, load_prompt
from her_nemo.evaluation.endpoint import BadAnswer, json_object_in
from her_nemo.evaluation.results import Line
from her_nemo.evaluation.roleplay_bench_score import MAX_SEVERITY, Category, Flaw, kinds_of
from her_nemo.roleplay.dialects import Dialect, parse_message, to_her
from her_nemo.roleplay.layouts import Layout
from her_nemo.roleplay.names import same_name
from her_nemo.roleplay.prompt import Message, RolePrompt, Utterance, build_messages
from her_nemo.roleplay.turn import Turn
from her_nemo.roleplay.views import Reader, view

PROMPTS = Path(__file__).parent / "prompts"
PROMPT_NAMES = (*(category.value for category in Category), "user", "card")
NOTHING = "(nothing to see or hear)"
QUOTE_WORDS = 25
CARD = "card"

Language = Literal["en", "zh"]
_STRANGER = {"en": "User", "zh": "用户"}
_BOOK = {"en": "an original story", "zh": "一个原创故事"}
_FIELDS = ("id", "ai_name", "ai_setting", "user_name", "user_setting", "ai_prologue", "initial_user_input")
_MAY_BE_EMPTY = ("user_name", "user_setting", "ai_prologue")


@dataclass(frozen=True)
class Seed:
    """One scenario, in the data set's own fields; `language` is en or zh."""

    id: str
    ai_name: str
    ai_setting: str
    user_name: str
    user_setting: str
    ai_prologue: str
    initial_user_input: str
    language: Language

    @property
    def scene_id(self) -> str:
        """The data set's two languages may number their seeds alike."""
        return f"{self.language}/{self.id}"

    def opening(self) -> list[Line]:
        """The given messages: the character's prologue, if there is one, and the user's first words."""
        lines = (
            [Line(self.ai_name, self.ai_prologue, "given", Dialect.STARRED.value)] if self.ai_prologue else []
        )
        return [*lines, Line(self.user_name, self.initial_user_input, "given", Dialect.STARRED.value)]


def read_seeds(paths: Sequence[str | Path], count: int | None = None) -> list[Seed]:
    """The seeds of JSON-lines or Parquet files, in order; the first `count` of each file, or all.

    Raises:
        UserError: a file that cannot be read, a row without a field, an id used twice, or no seed at all.
    """
    seeds: dict[str, Seed] = {}
    for path in paths:
        for number, row in enumerate(_rows(Path(path))[:count], 1):
            seed = _seed(row, f"{path}, row {number}")
            if seed.scene_id in seeds:
                raise UserError(f"{path}, row {number}: the id {seed.id!r} is used twice in {seed.language}")
            seeds[seed.scene_id] = seed
    if not seeds:
        raise UserError(f"{', '.join(map(str, paths))}: no seed in it")
    return list(seeds.values())


def _rows(path: Path) -> list[Mapping[str, Any]]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"seeds={path}: cannot be read ({error})") from error
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON ({error})") from error
    return rows


def _seed(row: Any, place: str) -> Seed:
    if not isinstance(row, Mapping):
        raise UserError(f"{place}: not an object")
    missing = [name for name in _FIELDS if name not in row]
    if missing:
        raise UserError(f"{place}: no {', '.join(missing)}; a seed has {', '.join(_FIELDS)}")
    texts = {name: "" if row[name] is None else str(row[name]).strip() for name in _FIELDS}
    empty = [name for name in _FIELDS if not texts[name] and name not in _MAY_BE_EMPTY]
    if empty:
        raise UserError(f"{place}: {', '.join(empty)} is empty")
    language: Language = "en" if latin(texts["ai_setting"] + texts["initial_user_input"]) else "zh"
    texts["user_name"] = texts["user_name"] or _STRANGER[language]
    return Seed(**texts, language=language)


# ---------------------------------------------------------------- what is seen


def parsed(line: Line, *, expect_plan: bool = False) -> Turn:
    """The turn of a line, in the dialect that it is written in."""
    return parse_message(line.text, Dialect(line.dialect), expect_plan=expect_plan, expect_name=line.speaker)


def visible(line: Line) -> str:
    """What a person chatting sees of a line, without the speaker's own name before it; `NOTHING` if that is none."""
    turn = parsed(line)
    shown = view(turn, Reader.USER, dialect=Dialect.STARRED).strip()
    if turn.name is not None and same_name(turn.name, line.speaker):
        shown = shown.removeprefix(turn.name_prefix.strip()).strip()
    return shown or NOTHING


def load_prompts(directory: str | Path | None = None) -> dict[tuple[str, str], PromptFile]:
    """(name, language) -> the newest version of each prompt; a file in `directory` comes before the packaged one."""
    found = {}
    for name in PROMPT_NAMES:
        for language in ("en", "zh"):
            file = f"roleplay_bench_{name}_{language}"
            own = directory is not None and any(Path(directory).glob(f"{file}.v*.jinja"))
            found[name, language] = load_prompt(file, directory=directory if own else PROMPTS)
    return found


def actor_messages(seed: Seed, dialogue: Sequence[Line], form: str, card: PromptFile) -> list[Message]:
    """The prompt for the character's next turn.

    Args:
        dialogue: what was said so far, the oldest turns perhaps left out.
        form: a value of `Layout` (our own system prompts and history), or `CARD`.
        card: the prompt of the form `CARD`, for models that know none of our layouts.
    """
    if form != CARD:
        prompt = RolePrompt(
            name=seed.ai_name,
            book=_BOOK[seed.language],
            profile=seed.ai_setting,
            others=((seed.user_name, seed.user_setting),) if seed.user_setting else (),
        )
        history = [
            Utterance(line.speaker, to_her(line.text, Dialect(line.dialect), line.speaker))
            for line in dialogue
        ]
        return build_messages(prompt, seed.ai_name, history, Layout(form))
    messages = card.messages(**_parts(seed))
    return _chat(messages, dialogue, seed.ai_name)


def user_messages(seed: Seed, dialogue: Sequence[Line], prompt: PromptFile) -> list[Message]:
    """The prompt for the user simulator's next turn. It knows the character's name and what it sees of it."""
    messages = prompt.messages(user_name=seed.user_name, user_setting=seed.user_setting, ai_name=seed.ai_name)
    return _chat(messages, dialogue, seed.user_name)


def _chat(messages: list[Message], dialogue: Sequence[Line], me: str) -> list[Message]:
    """The visible dialogue after `messages`, my turns as the assistant's; neighbours of one role are one message."""
    out = [*messages]
    for line in dialogue:
        role, text = "assistant" if line.speaker == me else "user", visible(line)
        if out[-1]["role"] == role:
            out[-1] = {"role": role, "content": f"{out[-1]['content']}\n\n{text}"}
        else:
            out.append({"role": role, "content": text})
    return out


def _parts(seed: Seed) -> dict[str, str]:
    return {name: getattr(seed, name) for name in ("ai_name", "ai_setting", "user_name", "user_setting")}


# ---------------------------------------------------------------- the judge


def judge_messages(
    seed: Seed, dialogue: Sequence[Line], chunk: Sequence[int], context_turns: int, prompt: PromptFile
) -> list[Message]:
    """One category's question about one chunk.

    Args:
        dialogue: the whole of it; turn n is dialogue[n - 1].
        chunk: numbers of the turns in the excerpt.
        context_turns: how many turns before it are shown, not judged.
    """
    first = chunk[0]
    numbered = [
        {"number": number, "name": line.speaker, "text": _indented(visible(line))}
        for number, line in enumerate(dialogue, 1)
        if first - context_turns <= number <= chunk[-1]
    ]
    return prompt.messages(
        **_parts(seed),
        judged=", ".join(map(str, judged_turns(dialogue, chunk))),
        quote_words=QUOTE_WORDS,
        context=[line for line in numbered if line["number"] < first],
        excerpt=[line for line in numbered if line["number"] >= first],
    )


def judged_turns(dialogue: Sequence[Line], chunk: Sequence[int]) -> tuple[int, ...]:
    """The numbers of a chunk's turns that the model under test wrote."""
    return tuple(number for number in chunk if dialogue[number - 1].source == "actor")


def _indented(text: str) -> str:
    """Later lines moved in, so that none can pass for a numbered turn."""
    return "\n    ".join(line for line in text.splitlines() if line.strip())


def verdict_schema(category: Category, judged: Sequence[int]) -> tuple[str, dict[str, Any]]:
    """(name, JSON schema) of an answer of the judge."""
    flaw = {
        "kind": {"type": "string", "enum": list(kinds_of(category))},
        "turns": {
            "type": "array",
            "items": {"type": "integer", "enum": list(judged)},
            "minItems": 1,
            "maxItems": len(judged),
        },
        "severity": {"type": "integer", "minimum": 1, "maximum": MAX_SEVERITY},
        "quote": {"type": "string"},
        "explanation": {"type": "string"},
    }
    entry = {
        "type": "object",
        "properties": flaw,
        "required": list(flaw),
        "additionalProperties": False,
    }
    body = {
        "type": "object",
        "properties": {"flaws": {"type": "array", "items": entry}},
        "required": ["flaws"],
        "additionalProperties": False,
    }
    return f"flaws_{category.value}", body


def read_flaws(
    text: str, category: Category, dialogue: Sequence[Line], judged: Sequence[int]
) -> tuple[Flaw, ...]:
    """The flaws that the judge's answer names.

    Raises:
        BadAnswer: no JSON object, a part missing or of the wrong type, a kind of another category, a turn that is
            not judged, or a severity off the scale.
    """
    body = json_object_in(text)
    entries = body.get("flaws")
    if not isinstance(entries, list):
        raise BadAnswer("no list 'flaws'")
    flaws = []
    for at, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise BadAnswer(f"flaws[{at}] is not an object")
        kind, turns, severity = entry.get("kind"), entry.get("turns"), entry.get("severity")
        if kind not in kinds_of(category):
            raise BadAnswer(f"flaws[{at}]: {category.value} has no kind {kind!r}")
        if not isinstance(turns, list) or not turns or not all(_is_one(turn, judged) for turn in turns):
            raise BadAnswer(f"flaws[{at}]: turns {turns!r} are not among the judged {list(judged)}")
        if type(severity) is not int or not 1 <= severity <= MAX_SEVERITY:
            raise BadAnswer(
                f"flaws[{at}]: severity {severity!r} is not a whole number from 1 to {MAX_SEVERITY}"
            )
        quote, explanation = entry.get("quote"), entry.get("explanation")
        if not isinstance(quote, str) or not isinstance(explanation, str):
            raise BadAnswer(f"flaws[{at}]: quote and explanation must be texts")
        where = tuple(sorted(set(turns)))
        found = any(_stands_in(quote, visible(dialogue[turn - 1])) for turn in where)
        flaws.append(Flaw(kind, where, severity, quote.strip(), explanation.strip(), found))
    return tuple(flaws)


def _is_one(turn: Any, judged: Sequence[int]) -> bool:
    return type(turn) is int and turn in judged


def _stands_in(quote: str, text: str) -> bool:
    """Whether the quote is in the text, whatever its quotation marks, blanks and stars; an empty one is not."""
    wanted, whole = ("".join(char for char in fold(part) if char.isalnum()) for part in (quote, text))
    return bool(wanted) and wanted in whole
