"""The options of `merge-lora`."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from fastdiff.checkpoints import published
from fastdiff.checkpoints.family import LAST_TIMESTEP
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.options.base import BaseConfig
from fastdiff.runtime.config import Range
from fastdiff.runtime.errors import UsageError, as_field

EXAMPLES = """fastdiff merge-lora --accel lcm.safetensors --style anime.safetensors
fastdiff merge-lora --accel lcm.safetensors --style a.safetensors=0.6 --style b.safetensors=0.4 --rank 64 -o fast.safetensors
fastdiff merge-lora --accel lcm.safetensors --style anime.safetensors --base model.safetensors -o fast-model.safetensors
fastdiff merge-lora --accel renamed.safetensors --style anime.safetensors --recipe lightning-4
fastdiff merge-lora --extract --base sdxl --tuned lightning.safetensors --rank 64 -o lightning-lora.safetensors
fastdiff merge-lora --base custom.safetensors --tuned fast-folder --reference sdxl -o custom-fast.safetensors"""


@dataclass
class Config(BaseConfig):
    PANEL: ClassVar[str] = "Merge"
    ESSENTIALS: ClassVar[str] = "accel style base output recipe rank format precision extract tuned"

    accel: Annotated[str | None, "few-step LoRA as FILE[=WEIGHT], a file or hub id, default weight 1; its recipe is kept"] = None
    style: Annotated[list[str], "style LoRA as FILE[=WEIGHT], a file or hub id, default weight 0.8; repeatable"] = field(
        default_factory=list
    )
    base: Annotated[str | None, "merge into this checkpoint and write a folder, or one file with --output NAME.safetensors"] = (
        field(  # type: ignore[assignment]
            default=None, metadata={"flags": ["-b"]}
        )
    )
    output: Annotated[str | None, "default <accel>-<style>.safetensors; with --base a folder <accel>-<style>"] = field(
        default=None, metadata={"flags": ["-o"]}
    )
    recipe: Annotated[
        str, "sampling settings that the result carries: auto, the inputs'; lcm, lightning-4, hyper-8, dmd2, ...; or none"
    ] = "auto"
    num_steps: Annotated[int | None, "sampling steps in the result's recipe", Range(1, 1000)] = None
    scheduler: Annotated[Literal["ddim", "euler", "dpm++", "dpm++sde", "lcm", "tcd"] | None, "sampler in the result's recipe"] = (
        None
    )
    guidance: Annotated[float | None, "classifier-free guidance in the result's recipe, 1 or less = none", Range(0)] = None
    eta: Annotated[float | None, "TCD's gamma in the result's recipe, 0 to 1", Range(0, 1)] = None
    timesteps: Annotated[str | None, "timesteps in the result's recipe, descending, as 999,749,499,249"] = None
    rank: Annotated[
        str | None, "rank of the written LoRA: a number, or auto; default: the sum of the ranks, with --extract 64"
    ] = None
    energy: Annotated[
        float, "share of the squared singular values that --rank auto keeps in every module", Range(above=0, high=1)
    ] = 0.95
    method: Annotated[Literal["sum", "ties", "dare-ties", "dare-linear"], "how the LoRAs are combined"] = "sum"
    density: Annotated[float, "share of entries that ties and dare keep", Range(above=0, high=1)] = 0.5
    seed: Annotated[int, "seed of the random masks of dare", Range(0, 2**31 - 1)] = 0
    block_weights: Annotated[str | None, "12, 17, 20 or 26 numbers (BASE,IN..,M00,OUT..) that scale every --style"] = None
    format: Annotated[
        Literal["kohya", "diffusers", "peft"],
        "key layout of the written LoRA: kohya loads in all programs; of diffusers' layout ComfyUI skips attention layers",
    ] = "kohya"
    precision: Annotated[
        Literal["stored", "fp16", "bf16", "fp32"],
        "precision of the written tensors; stored: with --base the base's, else the widest of the inputs; sums are always fp32",
    ] = "stored"
    remap: Annotated[str | None, "a pruned checkpoint: move LoRAs of its unpruned parent to the layers that it kept"] = None
    allow_partial: Annotated[bool, "merge the fitting modules of a LoRA that does not fit completely"] = False
    extract: Annotated[bool, "write the LoRA between --base and --tuned"] = False
    tuned: Annotated[str | None, "fine-tuned checkpoint, for --extract, or with --reference for base + (tuned - reference)"] = (
        None
    )
    reference: Annotated[str | None, "checkpoint that --tuned was trained from; the difference of both is added to --base"] = None
    check: Annotated[str | None, "draw with the LoRAs before and after the merge on this base, and compare"] = None

    def recipe_from(self, own: Recipe | None) -> Recipe | None:
        """The recipe that the options name, or else `own`, with the single settings that they give; None where all leave it open.

        UsageError for an unknown name, timesteps that do not descend, and single settings without a recipe to change.
        """
        given = dict(num_steps=self.num_steps, scheduler=self.scheduler, guidance=self.guidance, eta=self.eta)
        timesteps = None
        if self.timesteps is not None:
            try:
                timesteps = tuple(int(t) for t in self.timesteps.split(","))
            except ValueError:
                timesteps = ()
            if not timesteps or timesteps != tuple(sorted({t for t in timesteps if 0 <= t <= LAST_TIMESTEP}, reverse=True)):
                message = f"{as_field('timesteps', self.timesteps)}: needs numbers from {LAST_TIMESTEP} down to 0"
                raise UsageError(message, "as 999,749,499,249")
            if self.num_steps not in {None, len(timesteps)}:
                raise UsageError(f"{as_field('num_steps', self.num_steps)}: `timesteps` has {len(timesteps)} of them")
        recipe = published.asked(self.recipe) or own
        set_any = timesteps is not None or any(value is not None for value in given.values())
        return published.changed(recipe or Recipe(), **given, timesteps=timesteps) if set_any else recipe
