"""Errors as HTTP responses, in OpenAI's shape."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.responses import Response

from megatron_ee.errors import ConfigError, UserError, printable
from megatron_ee.inference.requests import Event
from megatron_ee.serving.access import Unauthorized
from megatron_ee.serving.api.response_bodies import ErrorInfo, ErrorResponse
from megatron_ee.serving.engine_loop import Draining, EngineDead, QueueFull
from megatron_ee.serving.limits import RateLimited
from megatron_ee.serving.submission import Submission

_PARAM = re.compile(r"([A-Za-z][\w.\-]*(?:\[\w+\][\w.]*)*): ")
_TOO_LONG = re.compile(r"(prompt|messages): has .* tokens")
BODY = "body"
"""Messages about a body as a whole start with this, and a colon."""
CHALLENGES = ("Bearer", 'Basic realm="API key"')
"""What a client without a valid key may use. Browsers understand ``Basic`` only in a header of its own, and then ask
for the key, as password."""
QUEUE_SECONDS = 1
"""Seconds after which a client may try again when the queue is full."""


@dataclass(eq=False)
class ApiError(Exception):
    """A response that is an error.

    Attributes:
        status: of HTTP.
        problem: what is wrong.
        headers: further headers.
    """

    status: int
    problem: ErrorInfo
    headers: Mapping[str, str] = field(default_factory=dict)

    def response(self) -> Response:
        """The HTTP response."""
        response = Response(self.json(), self.status, dict(self.headers), "application/json")
        for challenge in CHALLENGES if self.status == 401 else ():
            response.headers.append("WWW-Authenticate", challenge)
        return response

    def json(self) -> str:
        """The body."""
        return ErrorResponse(error=self.problem).model_dump_json()


def invalid(message: str) -> ApiError:
    """A request that is wrong; a message that starts with a field's name and a colon names the field."""
    named = _PARAM.match(message)
    code = "context_length_exceeded" if _TOO_LONG.match(message) else None
    problem = ErrorInfo(
        message=printable(message),
        type="invalid_request_error",
        param=None if named is None or named[1] == BODY else named[1],
        code=code,
    )
    return ApiError(400, problem)


def refused(status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None) -> ApiError:
    """A request that cannot be answered, for another reason than its fields."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return ApiError(status, ErrorInfo(message=printable(message), type=kind, code=code), headers or {})


def of_error(error: UserError) -> ApiError:
    """The response to an error of admission, of translation, or of the engine's checks."""
    message = str(error)
    if isinstance(error, Unauthorized):
        return refused(401, message, "invalid_api_key")
    if isinstance(error, RateLimited):
        return refused(429, message, "rate_limit_exceeded", {"Retry-After": str(math.ceil(error.retry_after))})
    if isinstance(error, QueueFull):
        return refused(429, message, "queue_full", {"Retry-After": str(QUEUE_SECONDS)})
    if isinstance(error, Draining | EngineDead):
        return refused(503, message, "not_ready", {"Retry-After": str(QUEUE_SECONDS)})
    if isinstance(error, ConfigError):
        return invalid(message)
    return INTERNAL  # its message may name a file


INTERNAL = refused(500, "internal error; the server's log says more", "internal_error")


def failure_of(event: Event, submission: Submission, deadline: float | None) -> ApiError | None:
    """The error for an output that has ended before it was complete; None for any other event.

    Args:
        event: of the submission.
        submission: of a request.
        deadline: its seconds; None for no limit.
    """
    if event.error is None and (event.completion is None or event.completion.finish_reason != "cancelled"):
        return None
    if submission.timed_out:
        headers = {"X-Should-Retry": "false"}  # the official client would ask again, and wait as long again
        return refused(504, f"the answer was not ready after {deadline:g} seconds", "timeout", headers)
    if event.error is not None:
        return refused(500, event.error, "generation_failed")
    return refused(503, "the server is stopping", "stopping", {"Retry-After": "5"})
