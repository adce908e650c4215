"""The run folder: resolved config, metrics, previews, and a resumable state that is either whole or absent."""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastdiff.console import InputRefused, sha256

MANIFEST = "manifest.json"


def write_atomic(path: Path, text: str) -> None:
    """Whole or not at all: temporary file in the same folder, fsync, one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


@dataclass
class Run:
    """One training run on disk."""

    folder: Path
    command: str = ""
    outputs: list[Path] = field(default_factory=list)  # what `export` wrote, for the result and the model card

    @property
    def state_folder(self) -> Path:
        return self.folder / "state"

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
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def drop_log_after(self, step: int) -> None:
        """A resumed run repeats the steps after its state: their old lines go."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < step]
            write_atomic(path, "".join(line + "\n" for line in kept))

    def save_state(self, state: dict[str, Any]) -> None:
        """Staged beside the old state, hashed, manifest last, then swapped by rename."""
        staged = self.folder / f".state.{os.getpid()}.tmp"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        torch.save(state, staged / "state.pt")
        with (staged / "state.pt").open("rb") as file:
            os.fsync(file.fileno())
        write_atomic(staged / MANIFEST, json.dumps({"step": state["step"], "state.pt": sha256(staged / "state.pt")}))
        old = self.folder / f".state.{os.getpid()}.old"
        if self.state_folder.exists():
            self.state_folder.rename(old)
        staged.rename(self.state_folder)
        shutil.rmtree(old, ignore_errors=True)

    def load_state(self) -> dict[str, Any] | None:
        """The saved state, or None where there is none; a damaged one is refused by name."""
        manifest = self.state_folder / MANIFEST
        if not manifest.exists():
            return None
        path = self.state_folder / "state.pt"
        if not path.exists() or sha256(path) != json.loads(manifest.read_text())["state.pt"]:
            raise InputRefused(f"{path}: damaged (its hash is not the manifest's)", "start again with --resume never")
        return torch.load(path, map_location="cpu", weights_only=True)
