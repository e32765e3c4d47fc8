"""The web page and the HTTP API: `kandinsky-jax serve`, and `launch(pipe)` in a notebook."""

from kandinsky_jax.serve.notebook import LaunchedPage, launch

__all__ = ["LaunchedPage", "launch"]
