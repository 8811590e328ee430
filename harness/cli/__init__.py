"""``bench``: parse, call, print. Nothing heavy is imported until a command needs it."""

from attnbench.harness.cli.app import app, main

__all__ = ["app", "main"]
