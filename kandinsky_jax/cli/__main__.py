"""`python -m kandinsky_jax.cli`."""

from kandinsky_jax.cli.main import main

main()
