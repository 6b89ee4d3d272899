"""The Hub's client: whether the Hub answers, and what it refuses as one line with a remedy."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator

from varcompress.errors import InputError
from varcompress.files import NO_ROOM

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def reachable() -> bool:
    """Whether the Hub answers at all. Where it does not, the client itself would try for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.DEFAULT_REQUEST_TIMEOUT)
    except Exception:  # by its version of requests or httpx, or that HF_HUB_OFFLINE is set
        return False
    return True


@contextlib.contextmanager
def hub_client(doing: str, revision: str | None = None) -> Iterator[None]:
    """`hub_errors` with the client's bars on a terminal only.

    Its warnings are about retries and other details of an error: they are not shown, unless it is set to tell more.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    if level == logging.WARNING:  # its default
        logger.setLevel(logging.ERROR)
    try:
        with hub_errors(doing, revision):
            yield
    finally:
        logger.setLevel(level)
        if hide:
            enable_progress_bars()


@contextlib.contextmanager
def hub_errors(doing: str, revision: str | None = None) -> Iterator[None]:
    """For a block that does nothing but call the Hub's client, in any thread: its errors as one line.

    Raises InputError for whatever the client raises: what failed, why, and the remedy.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # by its version the client raises errors of requests, httpx or hf_xet, and its own
        raise InputError(f"{doing}: {_reason(error, revision)}") from error


def _reason(error: Exception, revision: str | None) -> str:
    """One line: why the Hub refused, and the remedy."""
    from huggingface_hub import constants, errors

    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__:
        chain.append(cause)

    def find(*types: type[BaseException]) -> BaseException | None:
        return next((link for link in chain if isinstance(link, types)), None)

    if any(getattr(link, "errno", None) in NO_ROOM for link in chain):
        return "no room left on the disk: free some, or set HF_HOME to a folder on another disk"
    if find(errors.GatedRepoError):
        return "access is restricted: ask for it on its page, then run `hf auth login`"
    if find(errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}: check the branch, tag or commit"
    if find(errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private: check the name, or run `hf auth login`"
    answers = [link for link in chain if getattr(link, "response", None) is not None]
    if answers:
        return _refused(answers[0])
    if find(errors.HFValidationError):
        return "this is no repository name: write organisation/name with letters, digits, - _ and ."
    if find(errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError, *_transport_errors()):
        return f"{constants.ENDPOINT} cannot be reached: check the connection, HF_ENDPOINT and HF_HUB_OFFLINE"
    return _one_line(chain[-1])


def _transport_errors() -> list[type[BaseException]]:
    """What the client's HTTP library (requests, httpx, ...) raises without an answer: relatives of its HTTP error."""
    from huggingface_hub.errors import HfHubHTTPError

    return [kind for kind in HfHubHTTPError.__mro__[1:] if kind.__module__ != "builtins"]


def _refused(refusal: BaseException) -> str:
    status = refusal.response.status_code
    if status == 401:
        return "the Hub does not know you: run `hf auth login`"
    if status == 403:
        said = getattr(refusal, "server_message", None)
        return f"your token does not allow it{f' ({said})' if said else ''}: run `hf auth login` with one that does"
    if status == 429 or status >= 500:
        return f"the Hub answered {status}: try again later"
    return _one_line(refusal)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
