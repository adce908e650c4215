"""examples/gpu/run.py without a card: its limits, its command lines, what it keeps of a run that is cut off, and a rehearsal."""

import importlib
import json
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastdiff import cli
from fastdiff.options.train import TrainConfig

SMALL = "--quantize-base"
HOME = Path(__file__).parent.parent / "examples" / "gpu"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(HOME)
    return importlib.import_module("run")


@pytest.fixture
def row(script):
    """A row that is a line of Python; it takes milliseconds."""

    def make(name, code, limit_s=60, group="a", **more):
        return script.Row(name, group, f"PYTHON -c '{code}'", limit_s, program=True, **more)

    return make


def test_the_limits_of_what_runs_in_turn_add_up_to_eight_minutes(script):
    rows = script.ROWS
    assert script.longest_s(rows) <= 8 * 60
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert [row.group for row in rows] == sorted(row.group for row in rows)  # in the order of their worth
    for group in {row.group for row in rows} - {script.BESIDE}:
        assert sum(row.group in (group, script.BESIDE) and not row.after for row in rows) <= 20  # as many as --jobs
    for i, row in enumerate(rows):
        assert not row.after or row.after in names[:i], row
    shortened = [row._replace(limit_s=1) for row in rows]
    assert script.longest_s(shortened) == 2 + 3  # a chain of two in the first group


def test_the_parts_of_the_gpu_tests_are_all_of_them(script):
    text = (Path(__file__).parent / "test_gpu.py").read_text()
    names = re.findall(r"^def (test_\w+)", text, re.M)
    parts = [shlex.split(row.words)[-1].split(" or ") for row in script.ROWS if row.name.startswith("gpu tests")]
    for name in names:
        assert sum(any(word in name for word in part) for part in parts) == 1, name


@pytest.mark.parametrize("rehearse", [False, True])
def test_every_row_is_a_command_line_that_fastdiff_accepts(script, tmp_path, capsys, rehearse):
    runs = script.Runs(tmp_path, 1, jobs=1, rehearse=rehearse)
    for row in script.ROWS:
        if row.program or row.exit_code == 2:
            continue
        words = runs.command(row)[3:]
        if SMALL in row.words and "quantize_base" not in TrainConfig.__dataclass_fields__:
            continue  # where an option is missing, the row fails on the card, and the others run
        assert cli.main([*words, "--dry-run"]) == 0, (row.name, capsys.readouterr().out)
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        if rehearse:
            assert told["metrics"]["config"]["device"] == "cpu", row.name


def test_a_run_goes_on_where_it_was_cut(script, row, tmp_path):
    count = f'open("{tmp_path}/NAME", "a").write("x")'
    rows = [
        row("good", f"{count.replace('NAME', 'good')}; print(7)"),
        row("bad", f"{count.replace('NAME', 'bad')}; raise SystemExit(3)"),
        row("meant", "raise SystemExit(4)", exit_code=4),
        row("slow", "import time; print(1, flush=True); time.sleep(60)", limit_s=1),
        row("then", "print(2)", after="bad"),
        row("last", "print(3)", group="b"),
    ]
    runs = script.Runs(tmp_path, 1, jobs=4)
    assert not runs.all(rows)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name: result["why"] for name, result in results.items()} == {
        "good": "", "bad": "exit 3", "meant": "", "slow": "not done in 1 s", "then": "needs bad", "last": ""
    }  # fmt: skip
    assert results["good"]["said"] == "7"
    text = (tmp_path / "table.md").read_text()
    assert "| slow | not done in 1 s |" in text
    assert "said 7 |" in text

    mended = [row("bad", count.replace("NAME", "bad")), *(other for other in rows if other.name != "bad")]
    mended = [other._replace(words="PYTHON -c 'print(1)'") if other.name == "slow" else other for other in mended]
    assert script.Runs(tmp_path, 1, jobs=4).all(mended)
    assert (tmp_path / "good").read_text() == "x"  # done in the first run, so not repeated
    assert (tmp_path / "bad").read_text() == "xx"


def test_without_time_a_row_does_not_start_and_says_so(script, row, tmp_path):
    assert not script.Runs(tmp_path, 0, jobs=1).all([row("a", "print(1)")])
    assert json.loads((tmp_path / "results.json").read_text())["a"] == {"ok": False, "why": "no time was left"}


def test_figures_that_a_row_tells_before_it_fails_are_kept(script, row, tmp_path):
    figures = '{"s_per_step": 0.25, "machine": "M"}'
    code = f'import json, os; f = open(os.environ["GPU_ROW"], "w"); json.dump({figures}, f); f.close(); 1 / 0'
    assert not script.Runs(tmp_path, 1, jobs=1).all([row("steps", code)])
    text = (tmp_path / "table.md").read_text()
    assert "Machine: M" in text
    assert "s_per_step 0.25" in text


def test_a_killed_row_gets_its_signal_and_its_own_folder(script, row, tmp_path):
    (tmp_path / "run").mkdir()
    rows = f'open("{tmp_path}/run/metrics.jsonl", "w").write("1\\n2\\n")'
    code = f"import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); {rows}; time.sleep(60)"
    told = row("killed", code, exit_code=75, stop_after_rows=2)
    assert script.Runs(tmp_path, 1, jobs=1).all([told._replace(words=f"{told.words} -o OUT/run")])


def test_wheels_are_installed_for_the_rows(script, row, tmp_path):
    wheels, info = tmp_path / "wheels", "carried-1.0.dist-info"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "value = 42\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    script.install(wheels, tmp_path / "site")
    runs = script.Runs(tmp_path, 1, jobs=1, path=[str(tmp_path / "site")])
    assert runs.all([row("carried", "import carried, fastdiff; print(carried.value)")])
    assert runs.results["carried"]["said"] == "42"
    with pytest.raises(SystemExit, match="no .whl file"):
        script.install(tmp_path, tmp_path / "site")


@pytest.mark.slow
def test_rehearsal(script, tmp_path):
    """Every row on the CPU with tiny networks: some twenty minutes on one core."""
    subprocess.run([sys.executable, str(HOME / "run.py"), "--rehearse", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    print((tmp_path / "table.md").read_text())
    lacking = "quantize_base" not in TrainConfig.__dataclass_fields__
    due = [row.name for row in script.ROWS if not (lacking and SMALL in row.words)]
    assert [name for name in due if not results[name]["ok"]] == []
