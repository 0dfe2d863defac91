"""What goes wrong between us and the hub: whether to try again, and what to tell the user."""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from text_generation_server.config import ConfigError
from text_generation_server.errors import first_line

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRIES = 5
PAUSE_S = 5.0
"""Between tries of one file, as TGI; ``TGI_DOWNLOAD_PAUSE_S`` changes it."""

_DISK_ERRORS = (errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.EROFS)


class BrokenOff(OSError):
    """A connection broke after it had brought something: to try again is to go on."""


def retried(action: Callable[[], T], what: str, pause_s: float) -> T:
    """Try again where that can help: not after a refusal, and not when the network is switched off.

    The last of ``TRIES`` raises; a try that brought something counts as the first.
    """
    from huggingface_hub.errors import (  # type: ignore[attr-defined] # HTTPError is httpx's, under whichever name
        EntryNotFoundError,
        HfHubHTTPError,
        HTTPError,
        OfflineModeIsEnabled,
    )

    attempt = 0
    while True:
        try:
            return action()
        except OfflineModeIsEnabled:
            raise
        except (OSError, HTTPError) as error:  # every error of the network and of the hub, and a full disk
            attempt = 1 if isinstance(error, BrokenOff) else attempt + 1
            refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (400, 401, 403, 404)
            # A file that cannot be looked up: the library has tried several times itself by then.
            hopeless = refused or isinstance(error, EntryNotFoundError)
            if hopeless or getattr(error, "errno", None) in _DISK_ERRORS or attempt == TRIES:
                raise
            logger.warning("%s: try %d of %d failed (%s)", what, attempt, TRIES, first_line(error))
            time.sleep(pause_s)


@contextlib.contextmanager
def explained(model_id: str, revision: str | None, *, has_token: bool) -> Iterator[None]:
    """Turn the library's errors into one line that says what to do."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined] # HTTPError is httpx's, under whichever name
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    token_hint = "check that HF_TOKEN may read it" if has_token else "set HF_TOKEN"
    try:
        yield
    except GatedRepoError as error:
        raise ConfigError(
            f"`{model_id}` is gated: accept its licence on its page on the hub, and {token_hint}"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"`{model_id}` is not on the hub, or it is private: check the id, and {token_hint} if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"`{model_id}` has no revision `{revision}`; check --revision") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
            raise ConfigError(
                f"`{model_id}` is not complete in the cache and HF_HUB_OFFLINE is set: unset it, or download the model "
                "where there is a network and set HF_HOME to that cache, or give a local folder"
            ) from error
        raise ConfigError(_unreachable(model_id, error.__cause__ or error)) from error
    except EntryNotFoundError as error:
        raise ConfigError(f"`{model_id}` has no config.json: it is not a transformers model") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ConfigError(
                f"the hub refuses `{model_id}` ({error.response.status_code}): accept its licence on its page if it "
                f"is gated, and {token_hint}"
            ) from error
        raise ConfigError(
            f"the hub answered {error.response.status_code} for `{model_id}`: {first_line(error)}"
        ) from error
    except HTTPError as error:
        raise ConfigError(_unreachable(model_id, error)) from error
    except OSError as error:
        raise ConfigError(f"`{model_id}` could not be downloaded: {first_line(error)}") from error


def _unreachable(model_id: str, cause: BaseException) -> str:
    return (
        f"the hub cannot be reached and `{model_id}` is not complete in the cache ({first_line(cause)}); "
        "check the network, HF_ENDPOINT and the proxy settings, or give a local folder"
    )
