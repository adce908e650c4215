"""What a run shows for itself: contact sheets while it trains, measurements, and figures of what was written."""

from typing import Any

from fastdiff.training.previews import Judged, Measured, Preview
from fastdiff.training.run import Run
from fastdiff.training.scene import Scene


class Exhibit:
    """The usual one: a few prompts by teacher, undistilled teacher and student; a closing table where a judge ships.

    Made before training frees the text encoders. A method whose student draws no pictures by itself has its own.
    """

    def __init__(self, scene: Scene, config: Any) -> None:
        self.config, self.preview = config, Preview(scene)
        judged = scene.base.family.judge_ships and config.proof > 0
        self.judged = Judged(scene, config.proof) if judged else None
        self.measured = Measured(scene) if config.eval_every else None

    @property
    def prompt(self) -> str:
        """Of the command to type next."""
        return self.preview.prompts[0]

    def begin(self, method: Any) -> None:
        """Before the first step: what cannot be drawn later."""
        self.preview.begin(method)
        if self.judged:
            self.judged.begin(method)

    def sheet(self, method: Any) -> Any:
        """A contact sheet, as a PIL picture."""
        return self.preview.sheet(method)

    def measure(self, method: Any) -> dict[str, float]:
        """Figures of the student as it is now; `score` decides which weights are the best, less is better."""
        assert self.measured is not None
        return self.measured.measure(method)

    def figures(self, method: Any, run: Run) -> dict[str, Any]:
        """Of the weights that were written, read back."""
        return self.judged.prove(run.weights(), self.config) if self.judged else {}
