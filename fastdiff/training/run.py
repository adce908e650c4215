"""The run folder: config.toml, metrics.jsonl, previews, weights, and the states that a run resumes from."""

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
    command: str = ""  # the subcommand, as in `fastdiff COMMAND`
    outputs: list[Path] = field(default_factory=list)  # files and folders that `export` and the previews wrote

    @property
    def state_folder(self) -> Path:
        """The folder of the states that this run can resume from."""
        return self.folder / "state"

    @cached_property
    def states(self) -> States:
        return States(self.state_folder)

    @property
    def resume_command(self) -> str:
        """The command line that resumes this run."""
        return shlex.join(["fastdiff", self.command, "--config", str(self.folder / "config.toml")])

    def wrote(self, path: Path) -> None:
        """Record a file or folder as an output of this run. An `export` calls it for everything that it writes."""
        if path not in self.outputs:
            self.outputs.append(path)

    def written(self) -> list[str]:
        """Return the outputs as paths relative to the run folder."""
        return [path.relative_to(self.folder).as_posix() for path in self.outputs]

    def weights(self) -> list[Path]:
        """Return the LoRA files and checkpoint folders among the outputs, in the order in which they were made."""
        return [path for path in self.outputs if path.suffix == ".safetensors" or (path / "model_index.json").exists()]

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl. A full disk raises DoesNotFit."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        try:
            with path.open("a") as file:
                file.write(json.dumps(jsonable(row)) + "\n")
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise DoesNotFit(f"{path}: {(error.strerror or str(error)).lower()}", self.states.kept()) from error

    def rows(self) -> int:
        """Count the lines of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def drop_log_after(self, step: int, rows: int) -> None:
        """Drop the lines of metrics.jsonl that a resumed run will write again.

        The state was saved at `step`, when the file had `rows` lines; the lines of later steps and later lines go.
        """
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = []
            for line in path.read_text().splitlines()[:rows]:
                with suppress(ValueError):  # a crash may have left an incomplete last line
                    if json.loads(line)["step"] < step:
                        kept.append(line)
            write_atomic(path, "".join(line + "\n" for line in kept))

    def load_state(self) -> dict[str, Any] | None:
        """Load the newest undamaged state; None where no state was saved. InputRefused where all are damaged."""
        path = self.states.newest()
        return None if path is None else self.states.load(path)
