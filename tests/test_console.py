"""What reaches the terminal: warnings, tables, progress."""

import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fastdiff.runtime import console
from fastdiff.runtime.errors import Result


@pytest.fixture(autouse=True)
def fresh():
    console.reset()
    yield
    console.reset()


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(console, "time", made)
    return made


def test_lines_are_not_wrapped_and_markup_is_text(capsys):
    console.info("[red]" + "x" * 300)
    assert capsys.readouterr().err == "[red]" + "x" * 300 + "\n"


def test_quiet_keeps_warnings_and_errors(capsys):
    console.reset(quiet=True)
    console.info("no")
    console.table("no", ["a"], [[1]])
    with console.progress(3, "no") as bar:
        bar.update(3)
    console.warn("w")
    console.error("e", "h")
    assert capsys.readouterr().err == "warning: w\nerror: e; h\n"


def test_control_characters_do_not_reach_the_terminal(capsys):
    console.warn("file\x1b[2Jname")
    assert "\x1b" not in capsys.readouterr().err


def test_table(capsys):
    console.table("Title", ["name", "value"], [["[a]", 1.23456], ["b", None]])
    out, err = capsys.readouterr()
    assert out == ""
    assert all(word in err for word in ("Title", "name", "value", "[a]", "1.235", "b"))


@pytest.mark.parametrize(("width", "left_out"), [(80, []), (40, ["density"]), (30, ["density", "drift"])])
def test_a_narrow_terminal_does_without_optional_columns(capsys, width, left_out):
    console.reset()
    console.terminal().width = width
    columns = ["model", "recognised", "density", "drift"]
    console.table("Title", columns, [["student", 0.9, 1.0, 0.1]], optional=["density", "drift"])
    table, _, said = capsys.readouterr().err.partition("left out")
    assert all((name in table) == (name not in left_out) for name in columns)
    assert all(name in said for name in left_out)
    assert bool(said) == bool(left_out)


def test_plain_progress_is_sparse(capsys, clock):
    with console.progress(1000, "training") as bar:
        for _ in range(1000):
            clock.now += 1.0  # 100 s a tenth: a line a minute
            bar.update(1, loss=0.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 17
    assert lines[0].startswith("training: 60/1000 (6%), 60 s, 940 s left, loss 0.5")
    assert lines[-1] == "training: 1000/1000 (100%), 1000 s, loss 0.5"


def test_plain_progress_says_a_tenth_at_most_every_ten_seconds(capsys, clock):
    with console.progress(100, "x") as bar:
        for _ in range(100):
            clock.now += 0.5
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["20/100", "40/100", "60/100", "80/100", "100/100"]


def test_progress_of_a_moment_is_silent(capsys, clock):
    with console.progress(3, "x") as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_time_left_of_a_resumed_run_counts_what_it_did_itself(capsys, clock):
    with console.progress(1000, "x") as bar:
        bar.update(900)
        clock.now += 20
        bar.update(50)
        clock.now += 61
        bar.update(0)
    assert "950/1000 (95%), 81 s, 81 s left" in capsys.readouterr().err


def test_unknown_total(capsys, clock):
    with console.progress(None, "x") as bar:
        clock.now += 61
        bar.update(5)
    assert capsys.readouterr().err == "x: 5, 61 s\n"


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    console.reset()
    with console.progress(10, "drawing [x]") as bar:
        bar.update(4, loss=0.123456)
        console.warn("above the bar")
    err = capsys.readouterr().err
    assert "drawing [x]" in err
    assert "4/10" in err
    assert "loss 0.1235" in err
    assert "above the bar" in err


def test_timings_are_kept_when_the_block_fails(clock):
    def load():
        with console.timed("load_s"):
            clock.now += 2
            raise RuntimeError

    for _ in range(2):
        pytest.raises(RuntimeError, load)
    assert console.state.timings == {"load_s": 4.0}
    assert json.loads(console.json_object("x", None))["timings"].keys() == {"total_s", "load_s"}


def test_warnings_are_listed_and_shown_once(capsys):
    with console.collecting_warnings():
        for _ in range(2):
            console.warn("careful")
            warnings.warn("old thing", UserWarning, stacklevel=1)
    assert json.loads(console.json_object("x", None))["warnings"] == ["careful", "old thing (UserWarning)"]
    assert capsys.readouterr().err == "warning: careful\nwarning: old thing (UserWarning)\n"
    console.reset()
    assert json.loads(console.json_object("x", None))["warnings"] == []


def test_libraries_are_quiet_but_a_set_variable_wins(monkeypatch):
    monkeypatch.setattr(os, "environ", {"DIFFUSERS_VERBOSITY": "info"})
    console.quiet_libraries(offline=True)
    assert os.environ["DIFFUSERS_VERBOSITY"] == "info"
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_guard_survives_an_error_and_gives_stdout_back(capfd):
    def noisy():
        with console.stdout_guard():
            print("inside")
            raise RuntimeError

    pytest.raises(RuntimeError, noisy)
    print("outside")
    os.write(1, b"low\n")
    out, err = capfd.readouterr()
    assert out == "outside\nlow\n"
    assert err == "inside\n"


def test_outputs_are_hashed(tmp_path):
    weights, folder = tmp_path / "a.safetensors", tmp_path / "model"
    weights.write_bytes(b"abc")
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "b.json").write_text("{}")
    (folder / "a.txt").write_text("1")
    first, second = json.loads(console.json_object("x", Result([weights, folder])))["outputs"]

    def sha256(data):
        return hashlib.sha256(data).hexdigest()

    assert first == {"path": str(weights), "sha256": sha256(b"abc"), "bytes": 3, "format": "safetensors"}
    listing = f"{sha256(b'1')}  a.txt\n{sha256(b'{}')}  unet/b.json\n"  # what sha256sum prints
    assert second == {"path": str(folder), "sha256": sha256(listing.encode()), "bytes": 3, "format": "folder"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), None),
        ([float("inf"), 1.5], [None, 1.5]),
        (torch.tensor(1.5), 1.5),
        (torch.tensor([1, 2]).numpy(), [1, 2]),
        (torch.tensor(float("nan")).numpy()[()], None),
        ({1: (True, None)}, {"1": [True, None]}),
        (Path("a/b"), "a/b"),
        (Result(next_command="x"), {"outputs": [], "metrics": {}, "next_command": "x"}),
    ],
)
def test_metrics_become_strict_json(value, expected):
    assert json.loads(console.json_object("x", Result(metrics={"v": value})))["metrics"] == {"v": expected}


NOISY = """
import ctypes, os, sys
from dataclasses import dataclass
from fastdiff.runtime.command import Runnable
from fastdiff.runtime.errors import Result, UsageError
print("at import")
libc = ctypes.CDLL(None)
libc.printf(b"from C at import\\n")
@dataclass
class Config:
    fail: bool = False
def run(config):
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"
    assert os.environ["DIFFUSERS_VERBOSITY"] == "error"
    print("from python")
    os.write(1, b"from the os\\n")
    os.system("echo from a child")
    libc.printf(b"from C\\n")
    sys.__stdout__.write("from the original\\n"); sys.__stdout__.flush()
    if config.fail:
        raise UsageError("no", "do this")
    return Result(metrics={"x": float("nan")})
COMMAND = Runnable(Config, run)
"""
DRIVER = """
import sys, fastdiff.cli as cli
cli.COMMANDS = [cli.Command("noisy", "noisy", "Noise.", "Use")]
sys.exit(cli.main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no C library by that name")
@pytest.mark.parametrize("fail", [False, True])
def test_stdout_is_one_json_object_whatever_is_printed(tmp_path, fail):
    (tmp_path / "noisy.py").write_text(NOISY)
    (tmp_path / "driver.py").write_text(DRIVER)

    def run(*args):
        env = {**os.environ, "PYTHONPATH": str(Path(console.__file__).parents[2])}
        return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env)

    args = [str(tmp_path / "driver.py"), "noisy", "--offline", *(["--fail"] if fail else [])]
    done = run(*args, "--json")
    assert done.returncode == (2 if fail else 0)
    told = json.loads(done.stdout, parse_constant=pytest.fail)
    assert told["ok"] is not fail
    assert told.get("error") == ({"kind": "usage", "message": "no", "hint": "do this"} if fail else None)
    for line in (
        "at import",
        "from C at import",
        "from python",
        "from the os",
        "from a child",
        "from C",
        "from the original",
    ):
        assert line in done.stderr.splitlines()
    assert run(*args).stdout == ""
