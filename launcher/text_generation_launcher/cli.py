"""`text-generation-launcher`: Typer reads `Flags`; decides nothing."""

from __future__ import annotations

import inspect
import os
import sys
from typing import Annotated, Any, get_type_hints

import typer

from text_generation_launcher import environment
from text_generation_launcher.flags import Flags
from text_generation_launcher.report import version

NAME = "text-generation-launcher"

HELP = """Serve a language model: one router and one process per shard.

Every flag also reads the environment: --max-total-tokens reads TGI_MAX_TOTAL_TOKENS, else MAX_TOTAL_TOKENS, where
booleans may be true or false, 1 or 0, yes or no. The command line wins.
"""

EXIT_CODES = "Exit codes: 0 stopped as asked, 1 an error, 2 wrong usage, 128+n stopped at once by a second signal n."

app = typer.Typer(
    name=NAME,
    add_completion=False,
    rich_markup_mode=None,  # boxes cut long flags short, and container logs show them badly
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"{NAME} {version()}")
        raise typer.Exit


def command(context: typer.Context, version: bool, **flags: Any) -> None:
    from text_generation_launcher import launch  # asyncio and what hangs on it: --help needs none

    raise typer.Exit(launch.launch(Flags(**flags), dict(os.environ), context.obj or []))


# Typer reads a function's signature: this one's are the fields of `Flags`, so that a flag is written down once.
_VERSION = Annotated[
    bool,
    typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version."),
]
_PARAMETERS = [
    inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
    *(
        parameter.replace(annotation=hint)
        for parameter, hint in zip(
            inspect.signature(Flags).parameters.values(),
            get_type_hints(Flags, include_extras=True).values(),
            strict=True,
        )
    ),
    inspect.Parameter("version", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_VERSION),
]
command.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]
command.__annotations__ = {parameter.name: parameter.annotation for parameter in _PARAMETERS}
app.command(help=HELP, epilog=EXIT_CODES)(command)


def main() -> None:
    warnings = environment.adopt(os.environ)
    app(args=sys.argv[1:], prog_name=NAME, obj=warnings)
