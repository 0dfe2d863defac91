"""How a launch ends other than well: TGI's names, one line each, exit code 1."""

from __future__ import annotations

from typing import ClassVar


class LauncherError(Exception):
    """Ends the launch. ``name`` is TGI's; the text is the one line that says why and what to change."""

    exit_code: ClassVar[int] = 1

    @property
    def name(self) -> str:
        """TGI's name of the error, which is the class's."""
        return type(self).__name__


class ArgumentValidation(LauncherError):
    pass


class NotEnoughCUDADevices(LauncherError):
    pass


class CannotListen(LauncherError):
    """The HTTP port or a socket path is taken or forbidden; found before anything heavy starts."""


class DownloadError(LauncherError):
    pass


class ShardCannotStart(LauncherError):
    pass


class ShardFailed(LauncherError):
    pass


class WebserverFailed(LauncherError):
    pass
