"""Start `kandinsky-jax serve` in a Space: the page and the API at port 7860."""

import os
import sys


def command(environment: dict[str, str]) -> list[str]:
    """Return the command line for an environment, see README.md."""
    model = environment.get("MODEL", "tiny")
    host = environment.get("ALLOW_HOST") or environment.get("SPACE_HOST")
    line = ["kandinsky-jax", "serve", "--host", "0.0.0.0", "--port", "7860"]
    line += [] if model == "official" else ["--model", model]
    line += ["--allow-host", host] if host else []
    # The Hub shows Spaces in a frame of its own page, and leads requests to them through its proxy.
    line += ["--allow-origin", "https://huggingface.co", "--behind-proxy"] if "SPACE_HOST" in environment else []
    return line + ([] if environment.get("KANDINSKY_JAX_API_KEY") else ["--without-key"])


if __name__ == "__main__":
    line = command(dict(os.environ))
    print(" ".join(line), file=sys.stderr, flush=True)
    os.execvp(line[0], line)
