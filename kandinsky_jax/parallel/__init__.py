"""Meshes, and the sharding of arrays over them."""
