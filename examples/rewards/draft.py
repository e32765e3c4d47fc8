# %% [markdown]
# # A LoRA by gradients of a reward
# DRaFT (arXiv 2309.17400) differentiates CLIP's similarity through the last steps of the sampler, into a LoRA of the
# UNet. It is trained on some names of emoji and measured on others, and saved as the file that pipelines load.

# %%
import kandinsky_jax as kj
from kandinsky_jax import diffusion, rewards

seen = ["red apple", "rocket", "snowman", "tulip", "skull", "penguin", "crown", "banana", "bell", "key", "frog"]
unseen = ["red heart", "christmas tree", "mushroom", "slice of pizza", "guitar", "bicycle", "umbrella", "balloon"]
pipe = kj.KandinskyV22CombinedPipeline.from_pretrained("tiny")


def embeddings(names):
    return pipe.prior_pipe(names, guidance_scale=1.0, generator=[0] * len(names)).image_embeds


# %% [markdown]
# The decoder as a function of noise and embeddings, with 8 steps of DDIM, and the reward of each list of names.

# %%
sampler = rewards.DecoderSampler.from_pipeline(
    pipe,
    kj.DDIMScheduler.from_config(pipe.scheduler.config).schedule(8),
    guider=diffusion.ClassifierFreeGuidance(2.0),
    height=64,
    width=64,
)
of_seen, of_unseen = (rewards.ClipSimilarity.from_pipeline(pipe.prior_pipe, names) for names in (seen, unseen))
config = rewards.DraftConfig(updates=40, batch_size=11, gradient_steps=1, learning_rate=1e-3)
trained = rewards.train_draft(sampler, embeddings(seen), of_seen, config)

# %% [markdown]
# The same noise without and with the LoRA.

# %%
embeds = embeddings(unseen)
before, after = (s.generate(embeds, seed=1) for s in (sampler, sampler.with_lora(trained.changes)))
print(f"similarity of unseen names: {of_unseen(before).mean():.4f}, with the LoRA {of_unseen(after).mean():.4f}")

# %%
trained.save("draft_lora")
pipe.load_lora_weights("draft_lora")
options = {"prior_guidance_scale": 1.0, "guidance_scale": 2.0, "height": 64, "width": 64, "generator": 0}
pipe("red heart", **options).images[0].save("draft.png")
