"""What is asked of an OpenAI-compatible endpoint: how fast, how long, how often."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from her_nemo.config.base import Section, knob


class RequestLimits(Section):
    """`limits.*`: what the endpoint can bear."""

    concurrency: PositiveInt = knob(8, "Requests under way at a time.")
    requests_per_minute: PositiveFloat | None = knob(None, "Requests started per minute; null sets no limit.")
    tokens_per_minute: PositiveFloat | None = knob(
        None, "Tokens per minute, prompts and answers together; null sets no limit."
    )
    timeout_seconds: PositiveFloat = knob(600.0, "Longest wait for one answer.")
    retries: NonNegativeInt = knob(
        6, "Retries after 408, 409, 425, 429, 5xx, a lost connection or a time-out."
    )
    backoff_seconds: PositiveFloat = knob(
        1.0, "First wait before a retry; doubled each time, with jitter. Retry-After wins where it is longer."
    )
    max_backoff_seconds: PositiveFloat = knob(60.0, "Longest wait before a retry.")
    give_up_after: PositiveInt = knob(
        5, "Requests that fail in a row, all retries spent, before the run stops."
    )
