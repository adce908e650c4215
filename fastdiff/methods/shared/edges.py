"""What distilling a ControlNet shows: how well held-out control pictures are kept, and whether the control does anything."""

from typing import Any

from torch import Tensor

from fastdiff.data import control
from fastdiff.data.batch import Encoded
from fastdiff.models import controlnet
from fastdiff.models.denoiser import Denoiser
from fastdiff.runtime import console
from fastdiff.sampling.pictures import contact_sheet, uint8
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings
from fastdiff.training.run import Run
from fastdiff.training.scene import Scene


class Edges:
    """Items that were kept out of training: their texts, seeds and control pictures."""

    def __init__(self, scene: Scene, config: Any) -> None:
        self.prompt = scene.base.family.example_prompt
        self.base, self.vae, self.device, self.px = scene.base, scene.vae, scene.device, scene.resolution_px
        self.how = control.extractor(config.control)

    def keep(self, held_out: Encoded) -> None:
        """These are the items."""
        self.controls, self.uncond = held_out.controls, held_out.uncond
        self.cond = held_out.texts[held_out.captions[:, 0]]

    def begin(self, method: Any) -> None: ...

    def draw(self, method: Any, who: Denoiser, controls: Tensor | None, n: int | None = None) -> Tensor:
        """Pictures (N, 3, H, W) on the CPU, item i from seed i."""
        cond = self.cond[:n]
        if controls is not None:
            cond = cond.with_control((controls[:n].float() / 255).expand(-1, 3, -1, -1))
        sampler, seeds = Sampler.of_networks(self.base, who, self.vae, device=self.device), list(range(len(cond)))
        settings = Settings.usual(self.base.family) if who is method.teacher else method.settings()
        return sampler.pixels(cond, self.uncond, seeds, settings, resolution_px=self.px, batch=8)

    def agreement(self, pictures: Tensor, controls: Tensor) -> float:
        """Mean F1 of the pictures' edges and the control's."""
        return control.agreement(control.extract(uint8(pictures), self.how), controls).mean().item()

    def sheet(self, method: Any) -> Any:
        """Control | teacher | student, six of them."""
        controls = (self.controls[:6].float() / 127.5 - 1).expand(-1, 3, -1, -1)
        drawn = [self.draw(method, who, self.controls, 6) for who in (method.teacher, method.student)]
        return contact_sheet([controls, *drawn], scale=max(1, 128 // self.px))

    def figures(self, method: Any, run: Run) -> dict[str, Any]:
        """How well what was written keeps the control, and whether it does anything: off, and with another item's."""
        written = controlnet.load(str(run.folder / "controlnet"), method.student.net.config)
        method.student.controlnet = written.to(self.device)
        others = self.controls.roll(1, 0)
        teacher = self.draw(method, method.teacher, self.controls)
        on, off, other = (self.draw(method, method.student, c) for c in (self.controls, None, others))
        figures = {
            "edges_teacher": self.agreement(teacher, self.controls),
            "edges_student": self.agreement(on, self.controls),
            "edges_student_off": self.agreement(off, self.controls),
            "edges_other_control": self.agreement(other, others),
            "change_off": (on - off).abs().mean().item(),
            "change_other_control": (on - other).abs().mean().item(),
        }
        figures = {"items": len(on), **figures, "edges_kept": figures["edges_student"] / max(figures["edges_teacher"], 1e-9)}
        console.table(
            f"edges of the control and of {len(on)} pictures (F1), and what the control changes",
            ["figure", "value"],
            [[name, f"{value:.4g}"] for name, value in figures.items()],
        )
        return figures
