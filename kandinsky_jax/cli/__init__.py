"""The command line, `kandinsky-jax`: one file a command."""

from kandinsky_jax.cli.main import app, main

__all__ = ["app", "main"]
