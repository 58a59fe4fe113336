"""The command `tutelage`: its verbs, and what holds for all of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tutelage.cli.bench import bench
from tutelage.cli.cache import cache
from tutelage.cli.compare import compare
from tutelage.cli.doctor import doctor
from tutelage.cli.explain import explain
from tutelage.cli.export import export
from tutelage.cli.failures import report_failure, show_warning
from tutelage.cli.methods import methods
from tutelage.cli.processes import is_first_process, leave
from tutelage.cli.recipes import recipes
from tutelage.cli.report import report
from tutelage.cli.reproduce import reproduce
from tutelage.cli.resume import resume
from tutelage.cli.run import run
from tutelage.cli.taps import taps

HELP = """Make a small model from a big one.

\b
First steps
  tutelage doctor                                 is everything in place?
  tutelage recipes                                ready recipes
  tutelage run digits --dry-run                   check everything, spend nothing
  tutelage run digits method=nkd train.epochs=20  any field, by its path
  tutelage compare digits --methods none,kd,nkd   a table and a report

\b
Exit codes
  0 done   1 failed   2 wrong usage, recipe or data
  3 method, teacher and data do not fit together
  130, 143 stopped by Ctrl-C, SIGTERM; `tutelage resume` goes on
  torchrun ends with 1 whatever went wrong, and lists these codes

\b
Tables go to standard output, progress and errors to standard error;
with --json standard output is JSON alone.
"""


class Verbs(TyperGroup):
    """Runs a verb; errors that a user can mend become one short message and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # `tutelage run x --debug` is what one types after an error, so the option holds anywhere on the line.
        own = args[: args.index("--")] if "--" in args else args
        if "--debug" in own:
            args = ["--debug", *(arg for arg in own if arg != "--debug"), *args[len(own) :]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            if not is_first_process():
                warnings.simplefilter("ignore")  # the first process says it
            warnings.showwarning = show_warning
            return self._invoke(ctx)

    def _invoke(self, ctx: Any) -> Any:
        try:
            done = super().invoke(ctx)
            leave()
            return done
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            code = report_failure(error, debug=bool(ctx.params.get("debug")))
            if code is None:
                raise
            raise typer.Exit(code) from error


app = typer.Typer(
    cls=Verbs,
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tutelage {version('tutelage')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; anywhere on the line.")
    ] = False,
) -> None:
    pass


def _help(verb: Callable[..., None]) -> str:
    """The verb's docstring with each paragraph in one line, but for those that \b marks as laid out by hand."""
    paragraphs = inspect.cleandoc(verb.__doc__ or "").split("\n\n")
    return "\n\n".join(part if part.startswith("\b") else part.replace("\n", " ") for part in paragraphs)


for _verb in (
    run,
    cache,
    compare,
    resume,
    report,
    explain,
    export,
    bench,
    methods,
    recipes,
    taps,
    reproduce,
    doctor,
):
    app.command(help=_help(_verb))(_verb)
