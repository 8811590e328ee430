"""``bench``: parse, call, print. Nothing heavy is imported until a command needs it."""

import sys


def main() -> None:
    """Entry point of ``bench``. An interrupt ends it quietly from here on: the commands take 0.4 s to import."""
    try:
        from attnbench.harness.cli.app import app

        app(prog_name="bench")
    except KeyboardInterrupt:
        from attnbench.harness.run.errors import Exit

        sys.exit(Exit.INTERRUPTED)
