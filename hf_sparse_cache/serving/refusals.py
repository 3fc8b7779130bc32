"""Errors as clients of the OpenAI API know them."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse


_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: HTTP status.
        message: what was wrong, with the value, and what to do.
        param: the field it is about, such as `messages.0.role`; None where it is about none.
        code: a word for programs.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def not_honoured(param: str, remedy: str) -> ApiError:
    """The error for a field that asks for what the server cannot do."""
    return ApiError(400, f"{param} is not supported by this server: {remedy}", param, "unsupported_parameter")
