"""The run folder: resolved config, metrics, previews, weights, and the states to go on from."""

import json
import shlex
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fastdiff.runtime.console import jsonable
from fastdiff.runtime.disk import FULL, write_atomic
from fastdiff.runtime.errors import DoesNotFit
from fastdiff.training.states import States


@dataclass
class Run:
    """One training run on disk."""

    folder: Path
    command: str = ""
    outputs: list[Path] = field(default_factory=list)  # what `export` wrote, for the result and the model card

    @property
    def state_folder(self) -> Path:
        return self.folder / "state"

    @cached_property
    def states(self) -> States:
        return States(self.state_folder)

    @property
    def resume_command(self) -> str:
        """What goes on with this run."""
        return shlex.join(["fastdiff", self.command, "--config", str(self.folder / "config.toml")])

    def wrote(self, path: Path) -> None:
        if path not in self.outputs:
            self.outputs.append(path)

    def written(self) -> list[str]:
        """The outputs' places in the folder."""
        return [path.relative_to(self.folder).as_posix() for path in self.outputs]

    def weights(self) -> list[Path]:
        """The LoRA files and checkpoint folders among the outputs, in the order that they were made."""
        return [path for path in self.outputs if path.suffix == ".safetensors" or (path / "model_index.json").exists()]

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        try:
            with path.open("a") as file:
                file.write(json.dumps(jsonable(row)) + "\n")
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise DoesNotFit(f"{path}: {error.strerror.lower()}", self.states.kept()) from error

    def rows(self) -> int:
        """How many lines metrics.jsonl has."""
        path = self.folder / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def drop_log_after(self, step: int, rows: int) -> None:
        """A resumed run repeats what came after its state, which was at that step with so many lines: the others go."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = []
            for line in path.read_text().splitlines()[:rows]:
                with suppress(ValueError):  # a crash can leave half a line
                    if json.loads(line)["step"] < step:
                        kept.append(line)
            write_atomic(path, "".join(line + "\n" for line in kept))

    def load_state(self) -> dict[str, Any] | None:
        """The newest whole state, or None where there is none."""
        found = self.states.newest()
        return None if found is None else self.states.load(found)
