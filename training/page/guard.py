"""Answers only requests of the page's own tab, so that another web site in the same browser cannot use the page."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether an address or a name is that of the machine itself."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refusal(method: str, headers: Mapping[str, str], any_name: bool) -> str | None:
    """Why a request is not answered, in words; None if it is.

    Args:
        headers: by lower-case name.
        any_name: whether the page may be reached by any name, because it asks for a password. Without one, a foreign
            name whose address was changed to 127.0.0.1 (DNS rebinding) would make another site's scripts the page's own.
    """
    name = _host_name(headers.get("host", ""))
    if not any_name and not is_loopback(name):
        return (
            f"This page answers at 127.0.0.1 and localhost, and was asked for as {name!r}. Open http://127.0.0.1, or "
            "start it with a password"
        )
    foreign = "This request comes from another web site. Open the page itself"
    # Browsers send it to https and to this machine, and a proxy passes it on.
    if site := headers.get("sec-fetch-site"):
        is_link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        return None if site in ("same-origin", "none") or is_link else foreign
    origin = headers.get("origin")
    if origin is None:
        return None
    own = {headers.get("host", ""), headers.get("x-forwarded-host", "")}
    return None if origin.partition("://")[2] in own - {""} else foreign


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


class OwnRequestsOnly:
    """ASGI middleware that answers 403 with the words of `refusal`."""

    def __init__(self, app: Any, any_name: bool) -> None:
        self.app, self.any_name = app, any_name

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            if words := refusal(scope.get("method", "GET"), headers, self.any_name):
                from starlette.responses import PlainTextResponse

                await PlainTextResponse(words, status_code=403)(scope, receive, send)
                return
        await self.app(scope, receive, send)
