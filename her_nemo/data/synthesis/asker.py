"""Asking for one structured answer: cache, endpoint, validation, and again with the defect named.

Every answer, bad ones too, is kept under a key made of model, messages, schema, sampling and attempt. So a run
that was killed replays its way to where it was without asking anything twice.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

from pydantic import BaseModel, ConfigDict, ValidationError

from her_nemo.config.errors import UserError
from her_nemo.config.synthesis import SynthesiseConfig
from her_nemo.data.synthesis.cache import AnswerCache, cache_key
from her_nemo.data.synthesis.endpoint import Completion, Endpoint, EndpointFailure
from her_nemo.data.synthesis.prompt_files import PromptFile
from her_nemo.roleplay.prompt import CONTROL_TOKENS, Message

SHOWN_DEFECTS = 12  # named in a retry; a model does not mend forty things at a time
SHOWN_ANSWER = 20_000  # characters of a bad answer sent back with the defects


class Answer(BaseModel):
    """Base of every answer: what is not in the schema is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


AnswerT = TypeVar("AnswerT", bound=Answer)


@dataclass(frozen=True)
class Fault:
    """What is wrong with an answer: `kind` is counted, `message` is told to the model."""

    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


class Quarantined(Exception):
    """No usable answer was to be had. `faults` are those of the last answer, `answer` its text."""

    def __init__(self, faults: Sequence[Fault], answer: str, trace: Sequence[Asked] = ()) -> None:
        super().__init__("; ".join(map(str, faults)))
        self.faults = tuple(faults)
        self.answer = answer
        self.trace = tuple(trace)


@dataclass(frozen=True)
class Asked:
    """One answer that was got: for the record."""

    prompt: str
    key: str
    attempt: int
    cached: bool
    faults: tuple[Fault, ...]


@dataclass
class Bill:
    """What was used, newly asked and taken from the cache kept apart."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    without_usage: int = 0  # answers whose tokens the endpoint did not count

    def add(self, completion: Completion) -> None:
        self.requests += 1
        if completion.prompt_tokens is None or completion.completion_tokens is None:
            self.without_usage += 1
        self.prompt_tokens += completion.prompt_tokens or 0
        self.completion_tokens += completion.completion_tokens or 0

    def cost(self, prompt_per_million: float | None, completion_per_million: float | None) -> float | None:
        """In the unit of the prices; None without prices."""
        if prompt_per_million is None or completion_per_million is None:
            return None
        spent = self.prompt_tokens * prompt_per_million + self.completion_tokens * completion_per_million
        return spent / 1e6


@dataclass(frozen=True)
class Given(Generic[AnswerT]):
    """A valid answer and how it was come by."""

    answer: AnswerT
    trace: tuple[Asked, ...]
    completion: Completion


@dataclass
class Asker:
    """Asks one model at one endpoint."""

    cfg: SynthesiseConfig
    endpoint: Endpoint
    cache: AnswerCache
    identity: dict[str, str]
    asked: Bill = field(default_factory=Bill)  # new in this run
    replayed: Bill = field(default_factory=Bill)  # from the cache
    faults: Counter[str] = field(default_factory=Counter)
    _embedders: dict[str, dict[str, str]] = field(default_factory=dict)
    _under_way: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)

    async def ask(
        self,
        prompt: PromptFile,
        messages: Sequence[Message],
        answer_type: type[AnswerT],
        check: Callable[[AnswerT], Sequence[Fault]],
    ) -> Given[AnswerT]:
        """An answer of `answer_type` in which `check` finds no fault.

        Raises:
            Quarantined: after cfg.attempts answers with faults, or when the endpoint fails for this request.
            UserError: when going on makes no sense (key, path, budget, endpoint down).
        """
        _refuse_control_tokens(messages)
        trace: list[Asked] = []
        faults: Sequence[Fault] = ()
        text = ""
        conversation = list(messages)
        for attempt in range(1, self.cfg.attempts + 1):
            completion, key, cached = await self._completion(
                prompt, conversation, answer_type, attempt, trace
            )
            text = completion.text
            answer, faults = _validate(completion, answer_type, self.cfg.sampling.max_tokens)
            if answer is not None:
                faults = list(check(answer))
            trace.append(Asked(str(prompt), key, attempt, cached, tuple(faults)))
            self.faults.update(fault.kind for fault in faults)
            if answer is not None and not faults:
                return Given(answer, tuple(trace), completion)
            conversation = [*messages, *_complaint(text, faults)]
        raise Quarantined(faults, text, trace)

    async def plain(
        self,
        prompt: PromptFile,
        messages: Sequence[Message],
        check: Callable[[Completion], Sequence[Fault]],
    ) -> tuple[Completion, tuple[Asked, ...]]:
        """A free answer, as a chat would give it, in which `check` finds no fault. Raises as `ask` does."""
        _refuse_control_tokens(messages)
        trace: list[Asked] = []
        faults: Sequence[Fault] = ()
        for attempt in range(1, self.cfg.attempts + 1):
            completion, key, cached = await self._completion(prompt, list(messages), None, attempt, trace)
            faults = list(check(completion))
            trace.append(Asked(str(prompt), key, attempt, cached, tuple(faults)))
            self.faults.update(fault.kind for fault in faults)
            if not faults:
                return completion, tuple(trace)
        raise Quarantined(faults, completion.text, trace)

    async def _completion(
        self,
        prompt: PromptFile,
        messages: list[Message],
        answer_type: type[Answer] | None,
        attempt: int,
        trace: Sequence[Asked],
    ) -> tuple[Completion, str, bool]:
        """(completion, cache key, was it cached)."""
        request = self._request(messages, answer_type, attempt)
        key = cache_key(self.identity, request, attempt)
        # Two units may ask the very same thing: the second waits for the first one's answer.
        async with self._under_way.setdefault(key, asyncio.Lock()):
            stored = self.cache.get(key)
            if stored is not None:
                completion = Completion(**stored["completion"])
                self.replayed.add(completion)
                return completion, key, True
            self._check_budget()
            try:
                completion = await self.endpoint.complete(request)
            except EndpointFailure as failure:
                fault = Fault(f"endpoint_{failure.kind}", str(failure))
                self.faults[fault.kind] += 1
                raise Quarantined([fault], "", trace) from failure
            self.asked.add(completion)
            body = {"identity": self.identity, "prompt": str(prompt), "attempt": attempt, "request": request}
            self.cache.put(key, body | {"completion": vars(completion)})
            return completion, key, False

    async def embed(self, model: str, texts: list[str]) -> list[list[float]]:
        """One vector per text from the endpoint's embedding model, cached like an answer.

        Raises:
            UserError: if the endpoint fails; without vectors nothing can be clustered.
        """
        request = {"model": model, "input": texts}
        if model not in self._embedders:
            self._embedders[model] = await self.endpoint.identity(model)
        key = cache_key(self._embedders[model], request, 1)
        stored = self.cache.get(key)
        if stored is not None:
            return stored["embeddings"]
        try:
            rows = await self.endpoint.embed(model, texts)
        except EndpointFailure as failure:
            raise UserError(f"principles.embedding_model={model}: {failure}") from failure
        self.cache.put(key, {"identity": self._embedders[model], "request": request, "embeddings": rows})
        return rows

    def _request(
        self, messages: list[Message], answer_type: type[Answer] | None, attempt: int
    ) -> dict[str, Any]:
        sampling = self.cfg.sampling
        request: dict[str, Any] = {
            "model": self.cfg.model,
            "messages": messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            **self.cfg.extra_body,
        }
        if sampling.seed is not None:
            request["seed"] = sampling.seed + attempt - 1
        if answer_type is not None and self.cfg.structured_output == "json_schema":
            schema = {"name": answer_type.__name__, "schema": answer_type.model_json_schema(), "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif answer_type is not None and self.cfg.structured_output == "json_object":
            request["response_format"] = {"type": "json_object"}
        return request

    def cost(self, bill: Bill) -> float | None:
        """What a bill comes to at cfg.prices."""
        return bill.cost(self.cfg.prices.prompt_per_million, self.cfg.prices.completion_per_million)

    def _check_budget(self) -> None:
        budget, spent = self.cfg.limits.budget, self.cost(self.asked)
        if budget is None:
            return
        if spent is None:
            raise UserError("limits.budget needs prices.prompt_per_million and prices.completion_per_million")
        if spent >= budget:
            raise UserError(
                f"limits.budget={budget:g} is spent ({spent:.4f} in {self.asked.requests} answers). They are kept: "
                "raise it and run the same command to go on"
            )


def schema_text(answer_type: type[Answer]) -> str:
    """The JSON schema of an answer, for prompts: endpoints that cannot enforce it can still follow it."""
    return json.dumps(answer_type.model_json_schema(), ensure_ascii=False, separators=(",", ":"))


def _refuse_control_tokens(messages: Sequence[Message]) -> None:
    """A text that holds <|im_end|> would end its own message at the server."""
    for message in messages:
        for token in CONTROL_TOKENS:
            if token in message["content"]:
                raise Quarantined([Fault("control_token", f"the source text contains {token}")], "")


# C0 without tab and line breaks, DEL, C1, and half a surrogate pair: nothing a reader could see.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_FENCED = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL)


def _validate(
    completion: Completion, answer_type: type[AnswerT], max_tokens: int
) -> tuple[AnswerT | None, list[Fault]]:
    """The typed answer, or what keeps it from being one."""
    if completion.finish_reason == "length":
        message = f"the answer was cut off at {max_tokens} tokens; be shorter"
        return None, [Fault("truncated", message)]
    text = completion.text
    fenced = _FENCED.fullmatch(text)
    text = fenced.group(1) if fenced else text.strip()
    if any(token in text for token in CONTROL_TOKENS):
        return None, [Fault("control_token", f"the answer contains one of {', '.join(CONTROL_TOKENS)}")]
    try:
        # Guided decoding lets raw control characters into strings; JSON does not, Python may.
        body = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        message = f"not JSON: {error}. Give one JSON object and nothing else"
        return None, [Fault("bad_json", message)]
    strange = sorted({hex(ord(char)) for string in _strings(body) for char in _CONTROL.findall(string)})
    if strange:
        return None, [
            Fault("control_character", f"a text contains the control character {', '.join(strange[:5])}")
        ]
    try:
        return answer_type.model_validate_json(json.dumps(body)), []
    except ValidationError as error:
        return None, [_schema_fault(problem) for problem in error.errors()[:SHOWN_DEFECTS]]


def _strings(body: Any) -> Iterator[str]:
    """Every string of a JSON value."""
    if isinstance(body, str):
        yield body
    elif isinstance(body, dict | list):
        for value in body.values() if isinstance(body, dict) else body:
            yield from _strings(value)


def _schema_fault(problem: Any) -> Fault:
    place = ".".join(str(part) for part in problem["loc"]) or "the object"
    return Fault("bad_schema", f"{place}: {problem['msg']}")


def _complaint(text: str, faults: Sequence[Fault]) -> list[Message]:
    """The bad answer and what is wrong with it, as the next two messages."""
    named = "\n".join(f"- {fault.message}" for fault in faults[:SHOWN_DEFECTS])
    more = len(faults) - SHOWN_DEFECTS
    if more > 0:
        named += f"\n- and {more} more of these kinds"
    shown = text if len(text) <= SHOWN_ANSWER else text[:SHOWN_ANSWER] + " [...]"
    for token in CONTROL_TOKENS:
        shown = shown.replace(token, "")
    return [
        {"role": "assistant", "content": shown or "(no text)"},
        {
            "role": "user",
            "content": f"This answer cannot be used:\n{named}\n\nAnswer the whole task again, with everything "
            "that was right kept and these points mended. Give the JSON object only.",
        },
    ]
