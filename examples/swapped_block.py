"""A swapped block: every attention of the UNet looks harder at the image embedding, in an ordinary pipeline."""

from flax import nnx

import kandinsky_jax as kj


class Stronger(nnx.Module):
    def __init__(self, attention, strength):
        self.attention, self.strength = attention, strength

    def condition(self, tokens):
        key, value = self.attention.condition(tokens)
        return self.strength * key, value

    def __call__(self, x, condition):
        return self.attention(x, condition)


pipe = kj.KandinskyV22CombinedPipeline.from_pretrained("tiny")
for block in (*pipe.unet.down_blocks, pipe.unet.mid_block, *pipe.unet.up_blocks):
    for i, attention in enumerate(block.attentions):
        block.attentions[i] = Stronger(attention, 1.5)
picture = pipe("red apple", guidance_scale=2.0, prior_guidance_scale=1.0, height=64, width=64, generator=0).images[0]
picture.save("swapped_block.png")
