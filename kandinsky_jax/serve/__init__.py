"""The web page and the HTTP API: `kandinsky-jax serve`, and `launch(pipe)` in a notebook."""
