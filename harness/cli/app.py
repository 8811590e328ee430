"""The ``bench`` application: its commands, and how every one of them ends."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from attnbench.harness.cli.build import build
from attnbench.harness.cli.ceilings import ceilings
from attnbench.harness.cli.compare import compare
from attnbench.harness.cli.conform import conform
from attnbench.harness.cli.export import export
from attnbench.harness.cli.findings import findings
from attnbench.harness.cli.gate import gate, gate_power
from attnbench.harness.cli.history import history
from attnbench.harness.cli.io import io
from attnbench.harness.cli.limits import limits
from attnbench.harness.cli.matrix import matrix
from attnbench.harness.cli.mutants import mutants
from attnbench.harness.cli.publish import publish
from attnbench.harness.cli.results import plot, report
from attnbench.harness.cli.run import run
from attnbench.harness.cli.show import doctor, list_
from attnbench.harness.cli.tune import tune
from attnbench.harness.cli.verify import verify
from attnbench.harness.run.errors import MENDABLE, Exit, RunError

HELP = """Benchmark and conformance harness for attention implementations.

stdout is data, stderr is talk. Exit codes:

  0  every cell was answered; OOM, UNSUPPORTED and UNAVAILABLE are answers
  1  some cell is INCORRECT, CRASHED, TIMEOUT or ERROR; the run is complete,
     or --fail-fast ended it there
  2  bad option, name or suite file
  3  nothing was measured
  5  the machine is unfit: no GPU for a GPU suite, GPU held by another run,
     output unwritable, disk full
4, 6 are bench gate's: wrong answers, unsure; its help says what 0 to 6 mean there
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
        except KeyboardInterrupt:
            message, code = "interrupted", int(Exit.INTERRUPTED)
        except BrokenPipeError:
            raise typer.Exit(Exit.PIPE_CLOSED) from None
        except OSError as error:
            if error.errno not in MENDABLE:
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
app.command("conform")(conform)
app.command("matrix")(matrix)
app.command("mutants")(mutants)
app.command("list")(list_)
app.command("doctor")(doctor)
app.command("compare")(compare)
app.command("gate")(gate)
app.command("gate-power")(gate_power)
app.command("history")(history)
app.command("report")(report)
app.command("plot")(plot)
app.command("export")(export)
app.command("publish")(publish)
app.command("verify")(verify)
app.command("build")(build)
app.command("tune")(tune)
app.command("ceilings")(ceilings)
app.command("io")(io)
app.command("findings")(findings)
app.command("limits")(limits)
