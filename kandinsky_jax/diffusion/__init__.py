"""The public core: guided predictions, solver steps and whole samples as pure functions of arrays.

From a pipeline to a gradient:

    import jax, kandinsky_jax as kj
    from kandinsky_jax import diffusion

    pipe = kj.KandinskyV22CombinedPipeline.from_pretrained("tiny")
    embeds, negative = pipe.prior_pipe("red heart", generator=0, return_dict=False)
    schedule = kj.DDIMScheduler.from_config(pipe.scheduler.config).schedule(8)
    unet, movq = pipe.unet, pipe.movq
    [noise] = diffusion.noise_source(0, images=1, use=diffusion.DECODER_STREAM).initial((1, 8, 8, 4))

    def brightness(noise, scale):
        guider = diffusion.ClassifierFreeGuidance(scale)
        cond, uncond = unet.condition(embeds), unet.condition(negative)
        latents = diffusion.sample(unet, noise * schedule.init_noise_sigma, cond, uncond, schedule, guider=guider)
        return movq.decode(latents).mean()

    value, (to_noise, to_scale) = jax.jit(jax.value_and_grad(brightness, argnums=(0, 1)))(noise, 2.0)

For gradients to the weights, `network, params = diffusion.Network.split(pipe.unet)` takes a module apart, and
`network.bind(params)` within the function puts it together; LoRA's changes are added by `kandinsky_jax.lora.merged`.
"""

from kandinsky_jax.diffusion.guidance import (
    ClassifierFreeGuidance,
    CondUncondGuider,
    DifferentiatingGuider,
    Evaluation,
    Guider,
    Model,
    NetworkCall,
    NoGuidance,
    batch_evaluations,
    predict,
    split_output,
)
from kandinsky_jax.diffusion.guider_names import GUIDERS, guider_named
from kandinsky_jax.diffusion.guiders import (
    AdaptiveProjectedGuidance,
    Autoguidance,
    CFGPlusPlus,
    IntervalGuidance,
    PerturbedAttentionGuidance,
    RescaledGuidance,
    perturbed_attention,
)
from kandinsky_jax.diffusion.interpolation import lerp, slerp
from kandinsky_jax.diffusion.loop import (
    AfterStep,
    LoopState,
    Step,
    StepNoise,
    denoise,
    initial_loop_state,
    sample,
)
from kandinsky_jax.diffusion.network import Network, Params, matmul_precision, model_precision
from kandinsky_jax.diffusion.rng import DECODER_STREAM, PRIOR_STREAM, GivenNoise, KeyNoise, noise_source
from kandinsky_jax.diffusion.solver import (
    Prediction,
    SolverCoefficients,
    dynamic_threshold,
    initial_state,
    noise_stddev,
    output_for_x0,
    per_image,
    predict_x0,
    prediction_from_output,
    solver_coefficients,
    solver_step,
    step_log_prob,
)
from kandinsky_jax.schedulers.table import Schedule

__all__ = [
    "DECODER_STREAM",
    "GUIDERS",
    "PRIOR_STREAM",
    "AdaptiveProjectedGuidance",
    "AfterStep",
    "Autoguidance",
    "CFGPlusPlus",
    "ClassifierFreeGuidance",
    "CondUncondGuider",
    "DifferentiatingGuider",
    "Evaluation",
    "GivenNoise",
    "Guider",
    "IntervalGuidance",
    "KeyNoise",
    "LoopState",
    "Model",
    "Network",
    "NetworkCall",
    "NoGuidance",
    "Params",
    "PerturbedAttentionGuidance",
    "Prediction",
    "RescaledGuidance",
    "Schedule",
    "SolverCoefficients",
    "Step",
    "StepNoise",
    "batch_evaluations",
    "denoise",
    "dynamic_threshold",
    "guider_named",
    "initial_loop_state",
    "initial_state",
    "lerp",
    "matmul_precision",
    "model_precision",
    "noise_source",
    "noise_stddev",
    "output_for_x0",
    "per_image",
    "perturbed_attention",
    "predict",
    "predict_x0",
    "prediction_from_output",
    "sample",
    "slerp",
    "solver_coefficients",
    "solver_step",
    "split_output",
    "step_log_prob",
]
