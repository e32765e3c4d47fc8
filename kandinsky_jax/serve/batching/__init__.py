"""Continuous batching: images at different steps of different schedules share the steps of one program.

`rows` puts an image's place in its own schedule into numbers, `slots` runs the steps of a padded batch, `image_task` is
the way of one image through prior, decoder and MoVQ, and `engine` gives images their slots.
"""
