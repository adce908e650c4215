"""Contact sheets and figures of ControlNet distillation: how well drawn pictures follow control pictures that were held out."""

from typing import Any

from torch import Tensor

from fastdiff.data import control, emoji, held_out
from fastdiff.data.batch import Encoded
from fastdiff.models import controlnet
from fastdiff.models.denoiser import Denoiser
from fastdiff.runtime import console
from fastdiff.runtime.errors import UsageError
from fastdiff.sampling.pictures import uint8
from fastdiff.sampling.sampler import Sampler, at_once
from fastdiff.sampling.settings import Settings
from fastdiff.sampling.sheet import Sheet, in_calls
from fastdiff.training.exhibit import Exhibit
from fastdiff.training.method import Method
from fastdiff.training.run import Run
from fastdiff.training.scene import Scene


class Edges(Exhibit):
    """Draws items that were held out of training, with their texts, seeds and control pictures.

    On the embedded checkpoint they are images that no student is trained on, each with its name and background as the prompt.
    """

    controls: Tensor  # (N, 1 or 3, H, W) uint8
    names: list[str]  # of the N items: prompts or file names; may be empty

    def __init__(self, scene: Scene, config: Any) -> None:  # nothing of the usual exhibit: neither prompts nor judge
        self.prompt = scene.base.family.example_prompt
        self.base, self.vae, self.device, self.px = scene.base, scene.vae, scene.device, scene.resolution_px
        self.how = control.extractor(config.control)
        self.unseen: Encoded | None = None
        if scene.base.family.judge_ships:
            if self.px != emoji.CELL_PX:
                raise UsageError(f"`resolution={self.px}`: the pictures that judge control are {emoji.CELL_PX} px")
            before = next(scene.base.vae.parameters()).device
            unseen = emoji.encode(scene.base, *held_out.images(held_out.JUDGED), device=scene.device)
            scene.base.vae.to(before)
            self.unseen = unseen.rows(slice(None, None, max(1, len(unseen) // config.proof))).rows(slice(config.proof))

    def keep(self, unseen: Encoded) -> None:
        """Take the items that were held out of training; all of them have control pictures."""
        assert unseen.controls is not None
        self.controls, self.uncond, self.names = unseen.controls, unseen.uncond, unseen.names or []
        self.cond = unseen.texts[unseen.captions[:, 0]]

    def begin(self, method: Method) -> None:
        """Nothing has to be drawn before the first step."""

    def settings(self, method: Method, denoiser: Denoiser) -> Settings:
        """Return the settings that one of the method's networks is sampled with."""
        return Settings.of_base(self.base) if denoiser is method.teacher else method.settings()

    def draw(self, method: Method, denoiser: Denoiser, controls: Tensor | None, n: int | None = None) -> Tensor:
        """Draw the first n items, or all, with a network of the method: (N, 3, H, W) on the CPU. Item i has seed i."""
        cond = self.cond[:n]
        if controls is not None:
            cond = cond.with_control((controls[:n].float() / 255).expand(-1, 3, -1, -1))
        sampler, seeds = Sampler.of_networks(self.base, denoiser, self.vae, device=self.device), list(range(len(cond)))
        settings = self.settings(method, denoiser)
        n = min(8, at_once(self.px // self.base.pixels_per_latent, training=True))
        return sampler.pixels(cond, self.uncond, seeds, settings, resolution_px=self.px, batch=n)

    def agreement(self, pictures: Tensor, controls: Tensor) -> float:
        """Return the mean F1 between the edges of pictures (N, 3, H, W) and those of control pictures."""
        return control.agreement(control.extract(uint8(pictures), self.how), controls).mean().item()

    def sheet(self, method: Method) -> Sheet:
        """Draw six items in three columns: control, teacher, student."""
        columns = [("control", (self.controls[:6].float() / 127.5 - 1).expand(-1, 3, -1, -1))]
        for name, denoiser in (("teacher", method.teacher), ("student", method.student)):
            label = in_calls(name, self.settings(method, denoiser).calls)
            columns.append((label, self.draw(method, denoiser, self.controls, 6)))
        return Sheet.of_columns(columns, self.names[:6])

    def figures(self, method: Method, run: Run) -> dict[str, Any]:
        """Measure how well the written ControlNet follows the controls, and what changes without it or with other controls.

        A prompt alone draws many of the edges that its own control asks for. So what control does is told by the controls of
        other items: `steered` is how much better pictures agree with those when asked to than when drawn without control.
        """
        written = controlnet.load(str(run.folder / "controlnet"), method.student.net.config)
        method.student.controlnet = written.to(self.device)
        others = self.controls.roll(1, 0)
        teacher = self.draw(method, method.teacher, self.controls)
        on, off, other = (self.draw(method, method.student, c) for c in (self.controls, None, others))
        teacher_off, teacher_other = (self.draw(method, method.teacher, c) for c in (None, others))
        steered = {
            "steered_teacher": self.agreement(teacher_other, others) - self.agreement(teacher_off, others),
            "steered_student": self.agreement(other, others) - self.agreement(off, others),
        }
        figures = {
            "edges_teacher": self.agreement(teacher, self.controls),
            "edges_student": self.agreement(on, self.controls),
            "edges_student_off": self.agreement(off, self.controls),
            "edges_other_control": self.agreement(other, others),
            "change_off": (on - off).abs().mean().item(),
            "change_other_control": (on - other).abs().mean().item(),
            **steered,
        }
        kept = {
            f"{what}_kept": figures[f"{what}_student"] / max(figures[f"{what}_teacher"], 1e-9) for what in ("edges", "steered")
        }
        figures = {"items": len(on), **figures, **kept}
        console.table(
            f"edges of the control and of {len(on)} pictures (F1), and what the control changes",
            ["figure", "value"],
            [[name, f"{value:.4g}"] for name, value in figures.items()],
        )
        return figures
