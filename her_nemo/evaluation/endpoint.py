"""One model in one role (actor, judge, environment, ...): cached chat completions, and failures as values.

Every answer is on disk as soon as it is there, bad ones too, under the model's fingerprint, the role, the messages,
the sampling and the number of the draw: a run that was killed replays its way to where it was and asks nothing twice.
What failed at the endpoint is not kept, so that the next run asks again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from tqdm import tqdm

from her_nemo.config.endpoints import RequestLimits
from her_nemo.config.errors import UserError
from her_nemo.config.evaluation import ChatModel, ChatSampling
from her_nemo.data.synthesis.asker import Bill
from her_nemo.data.synthesis.cache import AnswerCache, cache_key
from her_nemo.data.synthesis.endpoint import Completion, Endpoint, EndpointFailure
from her_nemo.data.synthesis.runner import work_through
from her_nemo.evaluation.results import Failure, FailureKind
from her_nemo.roleplay.prompt import Message

Answer = TypeVar("Answer")
Unit = TypeVar("Unit")
Result = TypeVar("Result")

RETRY_TEMPERATURE = 1.0
LINE_SECONDS = 60.0
SHOWN_ANSWER = 4_000  # characters of a bad answer kept in a failure
_MEBIBYTE = 2**20
_WHOLE_FILE = 64 * _MEBIBYTE
_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)\n?\s*```", re.DOTALL)
# Of the files of a model's directory: those that its answers depend on.
_SHAPING = (".json", ".jinja", ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".txt", ".model")
_WORD = re.compile(r"\w")
# Asked of answers that are not what was asked for, to tell a refusal from a slip of form.
_REFUSAL = re.compile(
    r"\s*(?:i['’]?m (?:very |so )?sorry\b|sorry,|i apologi[sz]e|i (?:can['’]?t|cannot|can not|won['’]?t|am unable to|"
    r"am not able to)\b|as an ai\b|(?:很)?抱歉|对不起|我(?:无法|不能))",
    re.IGNORECASE,
)


class BadAnswer(ValueError):
    """Raised by a parser: the text is not what was asked for. The message says what is wrong."""


@dataclass
class RoleModel:
    """Asks one model in one role.

    Attributes:
        role: who the model is here; part of the cache key, and named in failures.
        model: its name at the endpoint.
        identity: what tells it from others (fingerprint of a checkpoint, vLLM's root, or the address).
        asked, replayed: what was newly asked and what came from the cache.
    """

    role: str
    model: str
    endpoint: Endpoint
    cache: AnswerCache
    identity: Mapping[str, str]
    sampling: ChatSampling
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    asked: Bill = field(default_factory=Bill)
    replayed: Bill = field(default_factory=Bill)
    _under_way: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        draw: int = 0,
        schema: tuple[str, Mapping[str, Any]] | None = None,
        json_object: bool = False,
        temperature: float | None = None,
    ) -> Completion | Failure:
        """One answer, from the cache if it was given before.

        Args:
            messages: the prompt.
            draw: tells apart answers to the same prompt (runs, attempts); added to the seed that is sent.
            schema: (name, JSON schema) that the endpoint holds the answer to.
            json_object: ask for any JSON object instead.
            temperature: instead of that of the sampling.

        Raises:
            UserError: when going on makes no sense (wrong key or path, endpoint down).
        """
        request: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "temperature": self.sampling.temperature if temperature is None else temperature,
            "top_p": self.sampling.top_p,
            "max_tokens": self.sampling.max_tokens,
            **self.extra_body,
        }
        if self.sampling.seed is not None:
            request["seed"] = self.sampling.seed + draw
        if schema is not None:
            body = {"name": schema[0], "schema": dict(schema[1]), "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": body}
        elif json_object:
            request["response_format"] = {"type": "json_object"}
        key = cache_key({**self.identity, "role": self.role}, request, draw)
        # Two scenes may ask the very same thing: the second waits for the first one's answer.
        async with self._under_way.setdefault(key, asyncio.Lock()):
            stored = self.cache.get(key)
            if stored is not None:
                completion = Completion(**stored["completion"])
                self.replayed.add(completion)
            else:
                try:
                    completion = await self.endpoint.complete(request)
                except EndpointFailure as failure:
                    kind = FailureKind.TIMED_OUT if failure.kind == "timeout" else FailureKind.ENDPOINT
                    return Failure(kind, f"{failure.kind}: {failure}", self.role)
                self.asked.add(completion)
                body = {"identity": dict(self.identity), "role": self.role, "draw": draw, "request": request}
                # In a thread: the file is synced to disk, and other answers need not wait for that.
                await asyncio.to_thread(self.cache.put, key, body | {"completion": vars(completion)})
        if completion.refusal or completion.finish_reason == "content_filter":
            said = completion.refusal or "stopped by the endpoint's content filter"
            return Failure(FailureKind.REFUSED, said, self.role, completion.text[:SHOWN_ANSWER])
        return completion

    async def parsed(
        self,
        messages: Sequence[Message],
        parse: Callable[[str], Answer],
        *,
        draw: int = 0,
        attempts: int = 1,
        schema: tuple[str, Mapping[str, Any]] | None = None,
        json_object: bool = False,
        whole: bool = False,
    ) -> tuple[Answer, str] | Failure:
        """(the answer as `parse` reads it, its text). A bad answer is asked for again, `attempts` times in all.

        `parse` raises BadAnswer. The attempts of draw d are the draws d x attempts and those that follow. Where the
        sampling is greedy they are drawn at RETRY_TEMPERATURE: the same words would come again otherwise. With `whole`
        an answer that was cut off is a bad one, whatever can be read in it, unless all of it is a JSON object.
        """
        failure = Failure(FailureKind.UNPARSABLE, "nothing was asked", self.role)
        for attempt in range(attempts):
            greedy_again = attempt > 0 and self.sampling.temperature == 0
            given = await self.complete(
                messages,
                draw=draw * attempts + attempt,
                schema=schema,
                json_object=json_object,
                temperature=RETRY_TEMPERATURE if greedy_again else None,
            )
            if isinstance(given, Failure):
                failure = given
                if given.kind is not FailureKind.REFUSED:
                    return failure  # the endpoint's own retries are spent
                continue
            try:
                if whole and given.finish_reason == "length" and _object(given.text) is None:
                    raise BadAnswer("the answer has no end")
                return parse(given.text), given.text
            except BadAnswer as problem:
                failure = self._bad(given, problem)
        return failure

    def _bad(self, given: Completion, problem: BadAnswer) -> Failure:
        shown = given.text[:SHOWN_ANSWER]
        if given.finish_reason == "length":
            cut = f"cut off at {self.sampling.max_tokens} tokens; {problem}"
            return Failure(FailureKind.TRUNCATED, cut, self.role, shown)
        kind = FailureKind.REFUSED if _REFUSAL.match(given.text) else FailureKind.UNPARSABLE
        return Failure(kind, str(problem), self.role, shown)


def json_object_in(text: str) -> dict[str, Any]:
    """The JSON object that an answer holds: the whole of it, in its last fence, or at one end of other words.

    Strict, since a draft taken for the verdict would be a score: the last object counts, every brace has to belong to
    a whole object, and outside a fence words may stand before or behind it, not on both sides.

    Raises:
        BadAnswer: if there is none, or it cannot be told from a draft.
    """
    if (body := _object(text)) is not None:
        return body
    fences = list(_FENCED.finditer(text))
    if fences and "{" not in text[fences[-1].end() :] and (body := _object(fences[-1].group(1))) is not None:
        return body
    decoder = json.JSONDecoder(strict=False)
    found: dict[str, Any] | None = None
    begin = end = 0
    while (start := text.find("{", end)) >= 0:
        try:
            found, stop = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            raise BadAnswer("no JSON object in it" if found is None else "a broken JSON object in it") from None
        begin, end = start, stop
    if found is None:
        raise BadAnswer("no JSON object in it")
    if _WORD.search(text[:begin]) and _WORD.search(text[end:]):
        raise BadAnswer("words on both sides of its JSON object, which may be a draft")
    return found


def _object(text: str) -> dict[str, Any] | None:
    """The whole text as a JSON object."""
    # Guided decoding lets raw control characters into strings; JSON does not, Python may.
    with contextlib.suppress(ValueError, RecursionError):
        body = json.loads(text.strip(), strict=False)
        if isinstance(body, dict):
            return body
    return None


# ---------------------------------------------------------------- opening


@contextlib.asynccontextmanager
async def open_models(
    roles: Mapping[str, ChatModel],
    cache_dir: str | Path,
    limits: RequestLimits,
    fingerprints: Mapping[str, Mapping[str, str]] | None = None,
) -> AsyncIterator[dict[str, RoleModel]]:
    """A RoleModel for each role. Roles at one address share its connections and its limits.

    Args:
        roles: role -> who answers; `endpoint` has to be set (servers for checkpoints are started before).
        cache_dir: one cache for all.
        limits: of each address.
        fingerprints: role -> identity to use instead of what the endpoint says, for servers started here.

    Raises:
        UserError: an endpoint that does not answer, or lists several models where none is named.
    """
    cache = AnswerCache(cache_dir)
    async with contextlib.AsyncExitStack() as stack:
        endpoints: dict[tuple[str, str | None], Endpoint] = {}
        opened = {}
        for role, chat in roles.items():
            assert chat.endpoint is not None, role
            address = (chat.endpoint.rstrip("/"), chat.api_key_env)
            if address not in endpoints:
                endpoints[address] = await stack.enter_async_context(
                    Endpoint(chat.endpoint, limits, chat.api_key_env)
                )
            known = (fingerprints or {}).get(role)
            opened[role] = await _open(role, chat, endpoints[address], cache, known)
        yield opened


async def _open(
    role: str, chat: ChatModel, endpoint: Endpoint, cache: AnswerCache, known: Mapping[str, str] | None
) -> RoleModel:
    model = chat.model or await _only_model(endpoint, role)
    identity = dict(known or await _identity(endpoint, model))
    if chat.revision is not None:
        identity["revision"] = chat.revision
    return RoleModel(role, model, endpoint, cache, identity, chat.sampling, dict(chat.extra_body))


async def _only_model(endpoint: Endpoint, role: str) -> str:
    names = await endpoint.models()
    if len(names) != 1:
        listed = ", ".join(names[:10]) or "none"
        raise UserError(f"{role}.model: {endpoint.base_url} lists {listed}; name the one to ask")
    return names[0]


async def _identity(endpoint: Endpoint, model: str) -> dict[str, str]:
    """What the endpoint says of the model; with a directory on this machine, what lies in it."""
    identity = await endpoint.identity(model)
    root = Path(identity.get("root", ""))
    if identity.get("root") and any((root / name).is_file() for name in ("config.json", "adapter_config.json")):
        identity["fingerprint"] = fingerprint(root)
    return identity


def fingerprint(directory: str | Path) -> str:
    """SHA-256 over the files of a Hugging Face directory that shape its answers, first 32 hexadecimal digits.

    Files up to 64 MiB count whole; of larger ones the length, the time of change and the first and last MiB.
    """
    whole = hashlib.sha256()
    for file in sorted(Path(directory).iterdir()):
        if not file.is_file() or file.suffix not in _SHAPING:
            continue
        if file.name == "proof.json":
            continue  # says when the export was proved, not what it is
        stat = file.stat()
        digest = hashlib.sha256()
        with file.open("rb") as content:
            if stat.st_size <= _WHOLE_FILE:
                digest.update(content.read())
            else:
                digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
                digest.update(content.read(_MEBIBYTE))
                content.seek(-_MEBIBYTE, 2)
                digest.update(content.read())
        whole.update(f"{file.name} {digest.hexdigest()}\n".encode())
    return whole.hexdigest()[:32]


# ---------------------------------------------------------------- many at a time


async def run_all(
    units: Sequence[Unit],
    work: Callable[[Unit], Awaitable[Result]],
    *,
    concurrency: int,
    title: str,
    models: Sequence[RoleModel] = (),
) -> list[Result]:
    """The results in the order of the units, at most `concurrency` under way, with a bar that shows rate and ETA.

    An error of one unit (UserError, a bug) stops all of them and is raised; failed calls are values, not errors.
    """
    results: dict[int, Result] = {}
    bar = tqdm(total=len(units), desc=title, unit="scene", disable=None, smoothing=0.1)
    told = begun = time.monotonic()

    async def one(index: int) -> None:
        nonlocal told
        results[index] = await work(units[index])
        bar.set_postfix_str(_spent(models), refresh=False)
        bar.update()
        # A log file has no bar: a line a minute instead.
        if bar.disable and (now := time.monotonic()) - told >= LINE_SECONDS:
            told = now
            line = _progress(len(results), len(units), now - begun)
            print(f"{title}: {line}, {_spent(models)}", file=sys.stderr, flush=True)

    with bar:
        await work_through(len(units), one, concurrency=concurrency)
    return [results[index] for index in range(len(units))]


def _progress(done: int, total: int, seconds: float) -> str:
    """How far it is, how fast it goes, and how long it will take."""
    minutes = seconds / 60 * (total - done) / done
    return f"{done} of {total} scenes, {done / seconds * 60:.1f} a minute, about {minutes:.0f} minutes left"


def _spent(models: Sequence[RoleModel]) -> str:
    tokens = sum(m.asked.prompt_tokens + m.asked.completion_tokens for m in models)
    return f"{tokens:,} tokens, {sum(m.replayed.requests for m in models):,} answers from the cache"


def usage_of(models: Mapping[str, RoleModel]) -> dict[str, Any]:
    """Role -> what was asked in this run and what came from the cache, for `Results.usage`."""
    return {
        role: {"asked": vars(model.asked), "cached": vars(model.replayed)} for role, model in models.items()
    }
