"""The HTTP API: OpenAI's image routes, models, health and metrics."""

from kandinsky_jax.serve.api.app import make_app
from kandinsky_jax.serve.api.server import ServerThread, address_of, bind, no_telemetry, run_server

__all__ = ["ServerThread", "address_of", "bind", "make_app", "no_telemetry", "run_server"]
