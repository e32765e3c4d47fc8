"""The web page of `kandinsky-jax serve`, built with Gradio; `mount_page` adds it to the API's app."""

from kandinsky_jax.serve.page.mount import mount_page, remove_folders

__all__ = ["mount_page", "remove_folders"]
