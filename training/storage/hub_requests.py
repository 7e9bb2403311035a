"""Requests to the Hugging Face Hub: their time limit, what is tried again, and their errors in words."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from training.errors import PublishError, offline_note, text_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

SCHEME = "hf://"
TOKEN_ADVICE = (
    "Make a token with write permission at https://huggingface.co/settings/tokens, and type hf auth login, "
    "or set HF_TOKEN to it"
)
WAITS = (1, 5)  # seconds before the second and the third try
LONGEST_WAIT = 60  # seconds, where the Hub asks for more


@dataclass(frozen=True)
class Address:
    """A model's repository: `name` is the target as typed, `id` is OWNER/MODEL."""

    name: str
    id: str
    token: str = field(repr=False)

    @property
    def api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(token=self.token)


class DifferentFilesError(PublishError):
    """The Hub's checksums are not those of the files that were sent."""


def find_token(target: str) -> str:
    from huggingface_hub import get_token

    try:
        token = get_token()
    except Exception as error:  # a trusted publisher whose exchange of tokens failed
        raise PublishError(
            f"{target}: there is no token for the Hub ({text_of(error)}). {TOKEN_ADVICE}"
        ) from None
    if token is None:
        raise PublishError(f"{target}: there is no token for the Hub. {TOKEN_ADVICE}")
    if not token.isascii():
        raise PublishError(
            f"{target}: the token for the Hub has a character that no token has. {TOKEN_ADVICE}"
        )
    return token


@contextmanager
def session(address: Address, problem: str, seconds: float) -> Iterator[None]:
    """Requests of huggingface_hub with a time limit, without Xet, and without secrets in what they log.

    Any error becomes a PublishError. It has no cause: the address of an upload is signed, and a traceback would show it.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils._http import default_client_factory
    from huggingface_hub.utils._http import logger as their_logger

    def limit(request: Any) -> None:
        # Some calls ask for no limit at all.
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), seconds)

    def factory() -> Any:
        client = default_client_factory()
        client.event_hooks = {"request": [*client.event_hooks["request"], limit]}
        return client

    def hide(entry: logging.LogRecord) -> bool:
        entry.msg, entry.args = _shown(entry.getMessage(), address.token), ()
        return True

    with ExitStack() as stack:
        if not sys.stderr.isatty() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
            stack.enter_context(disable_progress_bars())
        set_client_factory(factory)
        stack.callback(set_client_factory, default_client_factory)
        stack.callback(setattr, constants, "HF_HUB_DISABLE_XET", constants.HF_HUB_DISABLE_XET)
        constants.HF_HUB_DISABLE_XET = True
        their_logger.addFilter(hide)
        stack.callback(their_logger.removeFilter, hide)
        requests = logging.getLogger("httpx2")  # it logs each address
        stack.callback(requests.setLevel, requests.level)
        requests.setLevel(logging.WARNING)
        try:
            yield
        except PublishError:
            raise
        except Exception as error:
            raise PublishError(f"{address.name}: {problem}: {_reason(error, address)}") from None


def retried(address: Address, call: Callable[[], Result]) -> Result:
    """Calls again after errors that may pass: broken connections, a busy Hub, a commit of another process."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            least = _pause(error)
            if least is None:
                raise
            pause = min(max(wait, least), LONGEST_WAIT)
            reason = (
                str(error)
                if isinstance(error, PublishError)
                else f"{address.name}: {_reason(error, address)}"
            )
            logger.warning("%s. Trying again in %d s", reason, pause)
            time.sleep(pause)
    return call()


def _inner(error: BaseException) -> BaseException:
    """The error itself: huggingface_hub puts that of a file into another one."""
    while isinstance(error, RuntimeError) and not isinstance(error, PublishError) and error.__cause__:
        error = error.__cause__
    return error


def _pause(error: Exception) -> int | None:
    """Seconds that the Hub asks to wait, else 0; None if trying again cannot help."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    inner = _inner(error)
    if isinstance(inner, HfHubHTTPError):
        status = inner.response.status_code
        if status not in (409, 412, 429) and status < 500 and not _is_expired(inner):
            return None
        seconds = inner.response.headers.get("Retry-After", "")
        return int(seconds) if seconds.isdigit() else 0
    may_pass = isinstance(inner, httpx2.TransportError | json.JSONDecodeError | DifferentFilesError)
    return 0 if may_pass else None


def _is_expired(error: HfHubHTTPError) -> bool:
    """Whether the storage refuses a file: its signed address is valid for a while, and the next try gets a new one."""
    return error.response.request.method == "PUT" and error.response.status_code == 403


def _reason(error: Exception, address: Address) -> str:
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    inner, endpoint = _inner(error), _shown(constants.ENDPOINT, address.token)
    if isinstance(inner, OfflineModeIsEnabled):
        return (
            f"the Hub is switched off{offline_note() or '. Type unset HF_HUB_OFFLINE TRANSFORMERS_OFFLINE'}"
        )
    if isinstance(inner, httpx2.TimeoutException):
        return f"{endpoint} did not answer in time"
    if isinstance(inner, httpx2.TransportError):
        return f"the connection to {endpoint} failed ({text_of(inner)})"
    if isinstance(inner, (json.JSONDecodeError, LookupError, TypeError, AttributeError, RecursionError)):
        # The login page of a network, or another program.
        return f"{endpoint} does not answer as the Hub does. Look at HF_ENDPOINT, and for a proxy in between"
    if not isinstance(inner, HfHubHTTPError):
        return _shown(text_of(inner), address.token)
    status = inner.response.status_code
    words = " ".join((inner.server_message or "").split())
    said = f" ({_shown(words, address.token)})" if words else ""
    if status == 401:
        return f"the Hub does not know the token{said}. {TOKEN_ADVICE}"
    if status == 403 and not _is_expired(inner):
        return f"the Hub refuses{said}. {_who(address)}"
    if seconds := inner.response.headers.get("Retry-After"):
        return f"the Hub answered {status} and asks to wait {seconds} s"
    return f"the Hub answered {status}{said}"


def _who(address: Address) -> str:
    """Whose token it is, and what to type instead."""
    owner, model = address.id.split("/")
    try:
        user = address.api.whoami()
        name = user["name"]
        owners = [name, *(organisation["name"] for organisation in user.get("orgs", []))]
    except Exception:
        return TOKEN_ADVICE
    if owner not in owners:
        return f"You are {name} there, and {owner} is no organisation of yours. Type {SCHEME}{name}/{model}"
    return f"The token of {name} may not write there. {TOKEN_ADVICE}"


def _shown(text: str, token: str) -> str:
    """A text without the token, and without the passwords and signatures in addresses."""
    text = re.sub(r"//[^/\s]*@", "//***@", text.replace(token, "***"))
    return re.sub(r"\?[^\s'\"]+", "?...", text)
