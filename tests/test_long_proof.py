"""The long proofs of examples/emoji without their hours: their commands are accepted, and the table says what the results say."""

import json
import os
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from fastdiff import cli

FOLDER = Path(__file__).parent.parent / "examples" / "emoji"


LONG = ["train-lcm-lora", "dmd", "lightning", "distill-vae", "prune", "sdxs"]
EQUAL = ["tdm", "lightning", *["train-lcm-lora"] * 3, *["dmd"] * 2, "sid", *["tdm"] * 3]


@pytest.mark.parametrize(
    ("script", "arguments", "names"),
    [
        ("long_proof.sh", ["2"], LONG),
        ("equal_minutes.sh", ["10", "2"], EQUAL),
        ("equal_minutes.sh", ["10", "2", "tdm2=406", "lightning"], ["lightning", "tdm"]),
    ],
)
def test_every_command_of_the_script_is_accepted(script, arguments, names, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name, does in (("fastdiff", 'printf "%s " "$@" >> commands; echo >> commands; echo {}'), ("python", "true")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([FOLDER / script, *arguments], env={**os.environ, **path}, check=True)
    lines = [shlex.split(line) for line in Path("commands").read_text().splitlines()]
    assert [line[0] for line in lines] == names
    written = [line[line.index("-o") + 1] for line in lines]
    assert len({*written}) == len(written)
    for line in lines:
        assert line[line.index("--seed") + 1] == "2"
        if "tdm2=406" in arguments:
            assert ("--steps 406" in " ".join(line), "--max-time" in line) == (
                (True, False) if line[0] == "tdm" else (False, True)
            )
        for flag, stand_in in (("--init", "emoji"), ("--vae", None)):  # what an earlier line writes
            if flag in line:
                at = line.index(flag)
                assert any(line[at + 1].startswith(f"{folder}/") for folder in written)
                line[at : at + 2] = [flag, stand_in] if stand_in else []
        assert cli.main([*line, "--dry-run"]) == 0, capfd.readouterr().err


def test_the_curves_of_a_run_are_its_measurements_over_the_minutes_of_its_training(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    curves = runpy.run_path(str(FOLDER / "convergence.py"))["curves"]
    rows = [
        {"step": 9, "loss": 1.0},
        {"step": 9, "elapsed_s": 300.0, "frechet": 4.0, "retrieval": 0.5},
        {"step": 19, "elapsed_s": 600.0, "frechet": 2.0, "retrieval": 0.9},
    ]
    run, result = tmp_path / "run", tmp_path / "result.json"
    run.mkdir()
    result.write_text(json.dumps({"outputs": [{"path": str(run / "tdm.safetensors")}]}))
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert curves(result) == {"retrieval": [(5.0, 0.5), (10.0, 0.9)], "frechet": [(5.0, 4.0), (10.0, 2.0)]}
    (run / "metrics.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(ValueError, match="--eval-every"):
        curves(result)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 9, "frechet": 4.0, "retrieval": 0.5}))
    with pytest.raises(ValueError, match="an older version .* train again"):
        curves(result)


def test_frequencies_count_the_pictures_that_would_have_to_change(tmp_path):
    script = runpy.run_path(str(FOLDER / "frequencies.py"))
    drawn, wanted, group = torch.tensor([[0, 0, 1, 1, 5, 6], [0, 1, 1, 1, 6, 5], [0, 0, 0, 0, 1, 1]])
    assert script["distance"](drawn, wanted, group) == 1 / 6  # one more of picture 1; the second group has another order alone
    assert script["distance"](wanted, wanted, group) == 0
    (tmp_path / "a:b.safetensors").touch()
    assert script["file_and_steps"](f"{tmp_path}/a:b.safetensors:4") == (f"{tmp_path}/a:b.safetensors", 4)
    with pytest.raises(Exception, match="write FILE:STEPS"):
        script["file_and_steps"](f"{tmp_path}/a:b.safetensors")


def test_the_picture_of_few_steps_takes_names_files_and_steps(tmp_path):
    script = runpy.run_path(str(FOLDER / "few_steps.py"))
    (tmp_path / "a:b=c.safetensors").touch()
    assert script["student"](f"TDM={tmp_path}/a:b=c.safetensors:4") == ("TDM", f"{tmp_path}/a:b=c.safetensors", 4)
    for wrong in ("TDM", f"{tmp_path}/a:b=c.safetensors:4", f"TDM={tmp_path}/a:b=c.safetensors", "TDM=nowhere.safetensors:4"):
        with pytest.raises(Exception, match="write NAME=FILE:STEPS"):
            script["student"](wrong)


def test_the_table_has_unseen_and_seen_prompts_and_says_where_a_student_is_not_ahead(tmp_path, monkeypatch, capsys):
    gap = dict(student=0.95, gap_closed=0.876, low=0.8, high=0.9, verdict="ahead")
    behind = dict(student=3.0, gap_closed=-1.0, low=-2.0, high=-0.5, verdict="behind")
    one = {"retrieval": {"1": gap}, "frechet": {"1": behind}}
    several = {"a-8step": {m: {"8": gap} for m in one}, "a-1step": one, "a-1step-full": one}
    for name, gaps in (("one", one), ("several", several)):
        Path(tmp_path / f"{name}.json").write_text(json.dumps({"metrics": {"gap_closed": gaps, "seen": {"gap_closed": gaps}}}))
    monkeypatch.setattr("sys.argv", ["table.py", f"DMD={tmp_path}/one.json", f"L={tmp_path}/several.json"])
    runpy.run_path(str(FOLDER / "table.py"), run_name="__main__")
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|") == 11
    figures = "0.950 | 88 % [80, 90] | 3.000 | behind"
    assert rows[0] == f"| DMD | 1 | {figures} | {figures} |"
    assert [row.split(" | ")[:2] for row in rows[1:]] == [["| L", "1"], ["| L, full weights", "1"], ["| L", "8"]]


def test_the_table_of_several_seeds_has_their_mean_and_range(tmp_path, monkeypatch, capsys):
    for seed, student in enumerate((0.9, 0.96, 0.93)):
        gaps = {
            m: {"4": dict(student=student, gap_closed=None, low=None, high=None, verdict="behind")}
            for m in ("retrieval", "frechet")
        }
        (tmp_path / f"{seed}.json").write_text(json.dumps({"metrics": {"gap_closed": gaps, "seen": {"gap_closed": gaps}}}))
    files = ",".join(str(tmp_path / f"{seed}.json") for seed in range(3))
    monkeypatch.setattr("sys.argv", ["table.py", f"TDM={files}"])
    runpy.run_path(str(FOLDER / "table.py"), run_name="__main__")
    head, _, row = capsys.readouterr().out.splitlines()
    assert "lowest to highest" in head
    assert row == "| TDM | 4 |" + " 0.930 | 0.900 to 0.960 |" * 4
    monkeypatch.setattr("sys.argv", ["table.py", f"TDM={files}", f"DMD={tmp_path}/0.json"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(FOLDER / "table.py"), run_name="__main__")
    assert "several to each" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "argument", "problem"),
    [
        ("table.py", "DMD=gone.json", "a file that exists"),
        ("table.py", "DMD=other.json", "not what a training command prints"),
        ("frequencies.py", "gone.safetensors:1", "a LoRA that exists"),
        ("frequencies.py", "other.json:0", "a LoRA that exists"),
        ("reference.py", "--winners=gone.json", "run undistilled.py first"),
    ],
)
def test_scripts_say_what_is_wrong_with_a_file(script, argument, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)
    (tmp_path / "other.json").write_text('{"metrics": {}}')
    monkeypatch.setattr("sys.argv", [script, argument])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err
