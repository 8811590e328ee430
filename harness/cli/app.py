"""The ``bench`` application: its commands, and how every one of them ends."""

from __future__ import annotations

import errno
from typing import Any

import typer
from typer.core import TyperGroup

from attnbench.harness.cli.results import plot, report
from attnbench.harness.cli.run import run
from attnbench.harness.cli.show import doctor, list_
from attnbench.harness.run.errors import Exit, RunError

# What a user can mend; any other OSError is a defect and keeps its traceback.
_MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}

HELP = """Benchmark and conformance harness for attention implementations.

stdout is data, stderr is talk. Exit codes:

  0  every cell was answered; OOM, UNSUPPORTED and UNAVAILABLE are answers
  1  the run is complete; some cell is INCORRECT, CRASHED, TIMEOUT or ERROR
  2  bad option, name or suite file
  3  nothing was measured
  5  the machine is unfit: no GPU for a GPU suite, GPU held by another run,
     output unwritable, disk full
130  interrupted; what is recorded stays, go on with --resume
141  the reader of stdout went away
"""


class _OneLineErrors(TyperGroup):
    """Ends a command that cannot go on with one line on stderr and its exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RunError as error:
            message, code = str(error), error.exit_code
        except BrokenPipeError:
            raise typer.Exit(Exit.PIPE_CLOSED) from None
        except OSError as error:
            if error.errno not in _MENDABLE:
                raise
            place = f" {error.filename}" if error.filename else ""
            message, code = f"cannot write{place}: {error.strerror}", int(Exit.MACHINE)
        typer.echo(f"bench: {message}", err=True)
        raise typer.Exit(code)


app = typer.Typer(
    name="bench", cls=_OneLineErrors, help=HELP, no_args_is_help=True, pretty_exceptions_enable=False,
    add_completion=False, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
app.command("run")(run)
app.command("list")(list_)
app.command("doctor")(doctor)
app.command("report")(report)
app.command("plot")(plot)


def main() -> None:
    """Entry point of ``bench``."""
    app(prog_name="bench")
