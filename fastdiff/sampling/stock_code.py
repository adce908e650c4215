"""The Python code that draws the same pictures as given settings do, with the schedulers and pipelines of stock diffusers.

So every row of a table can be checked by somebody who does not trust this package.
"""

from collections.abc import Sequence
from typing import NamedTuple

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.diffusion.samplers import SOLVERS
from fastdiff.diffusion.schedule import PredictionType
from fastdiff.runtime.errors import UsageError
from fastdiff.sampling.assemble import scheduler_arguments
from fastdiff.sampling.settings import Settings, listed

# The spacings that a diffusers scheduler computes exactly as NoiseSchedule.grid does. DPMSolverMultistepScheduler's "leading" and
# "linspace" divide by one more, Euler's "linspace" is not rounded: these timesteps have to be given one by one.
OWN_SPACINGS = {
    "ddim": {"trailing", "leading", "linspace"},
    "euler": {"trailing", "leading"},
    "dpm++": {"trailing"},
    "dpm++sde": {"trailing"},
    "lcm": {"lcm"},
    "tcd": {"lcm"},
}
SD_GUIDANCE = """\
cond, uncond = pipe.encode_prompt(prompt, pipe.device, 1, True, CLIP_SKIP)


def guide_next_step(pipe, step, timestep, tensors):
    w = guidance[min(step + 1, len(guidance) - 1)]
    pipe._guidance_scale = w
    return {"prompt_embeds": torch.cat([uncond, cond]) if w > 1 else cond}
"""
# transformers 5 has moved the norm that diffusers 0.42 puts after the layer of `clip_skip`.
ENCODING = "device=pipe.device, num_images_per_prompt=1"
NORM_FOR_CLIP_SKIP = """\
if not hasattr(pipe.text_encoder, "text_model"):  # clip_skip looks there for the last norm
    vars(pipe.text_encoder)["text_model"] = pipe.text_encoder
"""
SDXL_GUIDANCE = """\
cond, uncond, pooled, uncond_pooled = pipe.encode_prompt(prompt, device=pipe.device, CLIP_SKIP)


def guide_next_step(pipe, step, timestep, tensors):
    w = guidance[min(step + 1, len(guidance) - 1)]
    pipe._guidance_scale = w
    ids = tensors["add_time_ids"][: len(cond)]
    if w <= 1:
        return {"prompt_embeds": cond, "add_text_embeds": pooled, "add_time_ids": ids}
    pairs = {"prompt_embeds": (uncond, cond), "add_text_embeds": (uncond_pooled, pooled), "add_time_ids": (ids, ids)}
    return {name: torch.cat(pair) for name, pair in pairs.items()}
"""


def literal(value: str | bool) -> str:
    """A value as Python source, text in double quotes."""
    return f'"{value}"' if isinstance(value, str) else repr(value)


class StockCall(NamedTuple):
    """How stock diffusers draws with settings: the scheduler, the entries of its config, and what the pipeline is called with."""

    scheduler: str  # the name of the class
    config: str  # `, key=value` for each entry that differs from the pipeline's own scheduler
    steps: str  # steps or timesteps, and eta, as keyword arguments
    size: str  # `, height=..., width=...` where the pipeline would draw another size; else empty


def stock_call(base: Checkpoint, settings: Settings, kind: PredictionType | None = None) -> StockCall:
    """Return scheduler and arguments with which stock diffusers draws what `Sampler` does.

    `kind` is what the network outputs, where LoRAs change it; default: what the base does. A single file says neither that nor
    the size of its pictures to diffusers, so both are named.
    """
    name, spacing = settings.scheduler, settings.spacing or SOLVERS[settings.scheduler].spacing
    if settings.timesteps is None and spacing in OWN_SPACINGS[name]:
        steps, wanted = f"num_inference_steps={settings.num_steps}", scheduler_arguments(name, spacing)
    else:
        steps = f"timesteps=[{listed(settings.grid(base.schedule(), base.scheduler_config).t.tolist())}]"
        if name == "ddim":  # DDIMScheduler takes none; Euler's steps equal DDIM's, and with leading spacing the noise is as given
            name, spacing = "euler", "leading"
        wanted = scheduler_arguments(name, "leading" if spacing == "lcm" else spacing)
        if name != "euler":
            wanted.pop("timestep_spacing")  # it would have no effect; on Euler's start noise it has
    single, kind = base.path.is_file(), kind or base.prediction_type
    stored = base.stored_scheduler_config
    if single or kind != stored.get("prediction_type", "epsilon"):
        wanted["prediction_type"] = kind
    if base.ends_in_noise and (single or not stored.get("rescale_betas_zero_snr")):
        wanted["rescale_betas_zero_snr"] = True
    config = "".join(f", {key}={literal(value)}" for key, value in wanted.items())
    eta = f", eta={settings.eta:g}" if settings.eta and settings.scheduler == "tcd" else ""
    size = f", height={base.resolution_px}, width={base.resolution_px}" if single else ""
    return StockCall(SOLVERS[name].stock, config, steps + eta, size)


def clip_skip(base: Checkpoint, guided: bool) -> tuple[str, list[str]]:
    """The keyword arguments of pipelines and `encode_prompt` for the base's clip skip, and the lines that make them work."""
    if not base.skipped_layers:
        return "", []
    skip, lines = f", clip_skip={base.skipped_layers}", []
    if base.family.text_layer == -1:
        lines += NORM_FOR_CLIP_SKIP.splitlines()
    if guided and not base.zeros_for_empty_prompt:
        # diffusers takes the empty prompt from the usual layer all the same; A1111 and ComfyUI do not.
        lines.append(f'empty = pipe.encode_prompt("", do_classifier_free_guidance=False, {ENCODING}{skip})')
        pooled = ", negative_pooled_prompt_embeds=empty[2]" if base.family.size_conditioned else ""
        skip += f", negative_prompt_embeds=empty[0]{pooled}"
    return skip, lines


def stock_code(
    base: Checkpoint,
    settings: Settings,
    *,
    kind: PredictionType | None = None,
    opening: Sequence[str] = (),
    imports: Sequence[str] = (),
    modules: Sequence[str] = (),
    arguments: str = "",
) -> str:
    """Return Python code that draws the variable `prompt` from the integer `seed`, and names the picture `image`.

    The lines `opening` come first, after the imports, and make `prompt`, `seed` and `pipe`, a StableDiffusionPipeline or
    StableDiffusionXLPipeline of the base in fp32; without them, whoever runs the code does. `imports` are further names that it
    takes from diffusers, `modules` further modules, and `arguments` further keyword arguments of the pipeline's call
    (`, image=control`). The code gives the pipeline its scheduler. The pictures are those of `Sampler`, up to rounding. Where
    steps differ in guidance, a callback sets the guidance of the next step, and an unguided step calls the network for the prompt
    alone. `kind` is as in `stock_call`.

    Raises UsageError for guidance of single steps with a base that takes the guidance weight as an input.
    """
    if settings.step_guidance is not None and base.unet_config.get("time_cond_proj_dim") is not None:
        raise UsageError("step_guidance: this base takes one guidance for all steps, as an input", "give one `guidance`")
    call = stock_call(base, settings, kind)
    skip, empty = clip_skip(base, settings.guided)
    lines = [
        *(f"import {name}" for name in sorted({*modules, "torch"})),
        f"from diffusers import {', '.join(sorted({*imports, call.scheduler}))}",
        "",
        *opening,
        *empty,
        f"pipe.scheduler = {call.scheduler}.from_config(pipe.scheduler.config{call.config})",
    ]
    rescale = f", guidance_rescale={settings.guidance_rescale:g}" if settings.guidance_rescale and settings.guided else ""
    drawn = f"{call.steps}{rescale}{skip}{call.size}{arguments}, generator=torch.Generator().manual_seed(seed)"
    if settings.step_guidance is None:
        return "\n".join([*lines, f"image = pipe(prompt, guidance_scale={settings.guidance:g}, {drawn}).images[0]", ""])
    sized = base.family.size_conditioned
    names = ", ".join(map(literal, ("prompt_embeds", "add_text_embeds", "add_time_ids") if sized else ("prompt_embeds",)))
    lines += [
        f"guidance = [{listed(settings.step_guidance)}]",
        *(SDXL_GUIDANCE if sized else SD_GUIDANCE).replace(", CLIP_SKIP", skip).splitlines(),
        "",
        "",
        f"how = dict({drawn})",
        f"how |= dict(callback_on_step_end=guide_next_step, callback_on_step_end_tensor_inputs=[{names}])",
        "image = pipe(prompt, guidance_scale=guidance[0], **how).images[0]",
        "",
    ]
    return "\n".join(lines)
