"""The README's commands run. Installing is what CI does; training here is two steps and a small table."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from fastdiff import cli
from fastdiff.checkpoints.locate import EMOJI
from fastdiff.quality import samples

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def fenced(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands():
    lines = [line.split("#")[0].strip() for block in fenced("bash") for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip().startswith("fastdiff ")]


def test_the_two_commands_are_there():
    main = re.search(r"<!-- main -->\n```bash\n(.*?)```", TEXT, re.DOTALL)[1]
    test = re.search(r"<!-- test -->\n```bash\n(.*?)```", TEXT, re.DOTALL)[1]
    assert main.strip() == "pip install . && fastdiff train-lcm-lora"
    assert test.strip() == 'pip install ".[test]" && pytest -n 2'


@pytest.mark.parametrize("line", commands())
def test_every_command_is_accepted(line, capfd, tmp_path, monkeypatch):
    """Each parses and resolves: flags, choices and presets are real."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    code = cli.main([*shlex.split(line)[1:], "--dry-run", "--json"])
    told = json.loads(capfd.readouterr().out)
    asked_hub = any(x in line for x in ("owner/name", "model.safetensors", "path/to/folder"))
    assert code == 0 or (asked_hub and code in {2, 3}), told


def test_train_merge_and_sample_as_the_readme_tells(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train, sample, merge, styled = (
        next(c for c in commands() if c.startswith(start))
        for start in (
            "fastdiff train-lcm-lora",
            "fastdiff sample --lora runs",
            "fastdiff merge-lora --accel lcm.safetensors --style anime",
            "fastdiff sample --lora lcm-anime",
        )
    )
    assert cli.main([*shlex.split(train)[1:], "--steps", "2", "--proof", "8", "--batch-size", "4", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert set(told["metrics"]["gap_closed"]["retrieval"]) == {"1", "2", "4", "8"}
    rows = told["metrics"]["rows"]
    assert {r["calls"] for r in rows if r["model"] == "student"} == {1, 2, 4, 8}
    assert cli.main(shlex.split(sample)[1:]) == 0
    shutil.copy("runs/train-lcm-lora-emoji/lcm.safetensors", "lcm.safetensors")
    shutil.copy(EMOJI / "style.safetensors", "anime.safetensors")
    assert cli.main(shlex.split(merge)[1:]) == 0
    assert cli.main(shlex.split(styled)[1:]) == 0
    assert (tmp_path / "runs" / "sample-emoji").is_dir()


def test_the_python_example_runs(tmp_path, monkeypatch):
    """As it stands, with fewer steps and pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(samples, "TIMED_S", 0)
    monkeypatch.setattr(samples, "TIMED", (1, 1))
    (text,) = (block for block in fenced("python") if "import fastdiff as fd" in block)
    for whole, small in (
        ("steps=200, lora_rank=32", 'steps=2, lora_rank=4, lora_alpha=4, batch_size=2, proof=0, device="cpu"'),
        ("num_steps=[1, 2, 4]", "num_steps=[1], num_images=4, teacher_steps=2, baseline=False"),
    ):
        assert whole in text
        text = text.replace(whole, small)
    shutil.copy(EMOJI / "style.safetensors", "anime.safetensors")
    scope = {}
    exec(text, scope)
    assert scope["picture"].size == (64, 64)
    assert type(scope["pipe"].scheduler).__name__ == "TCDScheduler"
    assert {"apples.png", "fast-anime.safetensors"} <= {path.name for path in tmp_path.iterdir()}


def test_the_method_that_is_shown_is_the_file_that_is_tested_and_the_row_is_one():
    (shown,) = (block for block in fenced("python") if block.startswith("class "))
    assert (ROOT / "examples" / "methods" / "score_identity.py").read_text().endswith(shown)
    (row,) = (block for block in fenced("python") if block.startswith("Command("))
    command = eval(row.strip().rstrip(","), {"Command": cli.Command})
    assert (ROOT / "examples" / f"{command.place[1:].partition(':')[0].replace('.', '/')}.py").exists()
