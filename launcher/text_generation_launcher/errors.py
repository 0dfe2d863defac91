"""How a launch ends other than well: TGI's names, one line each, exit code 1."""

from __future__ import annotations

from typing import ClassVar


class LauncherError(Exception):
    """Ends the launch. ``name`` is TGI's; the text is the one line that says why and what to change."""

    name: ClassVar[str] = "LauncherError"
    exit_code: ClassVar[int] = 1


class ArgumentValidation(LauncherError):
    name = "ArgumentValidation"


class NotEnoughCUDADevices(LauncherError):
    name = "NotEnoughCUDADevices"


class CannotListen(LauncherError):
    """The HTTP port or a socket path is taken or forbidden; found before anything heavy starts."""

    name = "CannotListen"


class DownloadError(LauncherError):
    name = "DownloadError"


class ShardCannotStart(LauncherError):
    name = "ShardCannotStart"


class ShardFailed(LauncherError):
    name = "ShardFailed"


class WebserverFailed(LauncherError):
    name = "WebserverFailed"
