"""The pictures and figures of a run: contact sheets while it trains, measurements, and a closing table of what it wrote."""

from typing import TYPE_CHECKING, Any

from fastdiff.sampling.sheet import Sheet
from fastdiff.training.previews import Judged, Measured, Preview
from fastdiff.training.run import Run
from fastdiff.training.scene import Scene

if TYPE_CHECKING:
    from fastdiff.training.method import Method

UNSEEN = "unseen"  # the name of the closing sheet


class Exhibit:
    """Draws a few prompts by teacher, undistilled teacher and student, and measures the student.

    Families that ship a judge (`emoji`) also get a closing table. It is made before training frees the text encoders. A method
    whose student draws no pictures by itself returns a subclass from `Method.exhibit`.
    """

    prompt: str  # shown in the command to type next
    judged: Judged | None = None
    measured: Measured | None = None

    def __init__(self, scene: Scene, config: Any) -> None:
        self.config, self.preview = config, Preview(scene)
        self.prompt = self.preview.prompts[0]
        judged = scene.base.family.judge_ships and config.proof > 0
        self.judged = Judged(scene, config.proof) if judged else None
        self.measured = Measured(scene) if config.eval_every else None

    def begin(self, method: "Method") -> None:
        """Draw and measure, before the first step, what can no longer be drawn after it."""
        self.preview.begin(method)
        if self.judged:
            self.judged.begin(method)

    def sheet(self, method: "Method") -> Sheet:
        """Draw a contact sheet of the student as it is now, beside what it is compared with."""
        return self.preview.sheet(method)

    def measure(self, method: "Method") -> dict[str, float]:
        """Measure the student as it is now. `score` decides which weights are the best: less is better."""
        assert self.measured is not None, "measured without `eval_every`"
        return self.measured.measure(method)

    def figures(self, method: "Method", run: Run) -> dict[str, Any]:
        """Read back the weights that the run wrote, and measure them for metrics and model card."""
        if not self.judged:
            return {}
        figures = self.judged.prove(run.weights(), self.config)
        previews = run.folder / "previews"
        previews.mkdir(parents=True, exist_ok=True)
        for path in self.judged.sheet(self.config).save(previews / f"{UNSEEN}.png"):
            run.wrote(path)
        return figures
