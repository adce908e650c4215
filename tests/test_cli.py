"""The command line's contract, on a made-up command: no checkpoint, no training."""

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, ClassVar, Literal

import pytest
import typer

from fastdiff import cli
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.runtime import config, console
from fastdiff.runtime import config as configuration
from fastdiff.runtime.command import Runnable
from fastdiff.runtime.errors import DoesNotFit, GateFailed, InputRefused, Result, Stopped, UsageError

ROOT = Path(__file__).parent.parent


@dataclass
class Base:
    PANEL: ClassVar[str] = "Training"

    base: Annotated[str, "what to start from"] = field(default="emoji", metadata={"flags": ["-b"]})
    steps: Annotated[int, "how many [steps]"] = 1000
    lr: float = 1e-4


@dataclass
class Config(Base):
    PANEL: ClassVar[str] = "Fake things"

    target: Annotated[Literal["zero", "edge"], "where to"] = "zero"
    prompt: list[str] = field(default_factory=list)
    full: bool = False
    grid: bool = True
    guidance: float | None = None
    note: str | None = "kept"


class Fake(ModuleType):
    """A command's module, whose parts a test may change."""

    Config, PRESETS, EXAMPLES = Config, {}, ""

    def __init__(self, name):
        super().__init__(name)
        self.seen = []

    @property
    def COMMAND(self):  # noqa: N802
        return Runnable(self.Config, lambda config: self.run(config), self.PRESETS, self.EXAMPLES)


@pytest.fixture
def fake(monkeypatch):
    """`fastdiff fake`: what `module.run` does is up to the test."""
    module = Fake("fake_command")
    module.run = lambda config: module.seen.append(config) or Result()
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setattr(cli, "COMMANDS", [cli.Command("fake", "fake_command", "A made-up command.", "Use"), *cli.COMMANDS])
    for name in list(os.environ):
        if name.startswith("FASTDIFF_"):
            monkeypatch.delenv(name)
    return module


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def python(*args, **env):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT, env=env)


# --- start-up, help, completion


def test_help_loads_no_torch_and_names_every_command():
    heavy = "bool({'torch', 'numpy', 'diffusers'} & {*sys.modules})"
    code = f"import sys; from fastdiff.cli import main; main(['--help']); sys.exit({heavy})"
    done = python("-c", code)
    assert done.returncode == 0
    assert all(c.name in done.stdout for c in cli.COMMANDS)
    assert python("-m", "fastdiff", "--help").stdout == done.stdout


def test_public_names_are_lazy():
    code = "import sys, fastdiff as f; assert 'torch' not in sys.modules; print(f.NoiseSchedule, 'load' in dir(f))"
    assert python("-c", code).stdout == "<class 'fastdiff.diffusion.schedule.NoiseSchedule'> True\n"
    import fastdiff

    with pytest.raises(AttributeError, match="nonsense"):
        _ = fastdiff.nonsense


def test_version_and_bare_call(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastdiff {cli.__version__}\n"
    assert cli.main([]) == 0
    assert "train-lcm-lora" in capsys.readouterr().out


def test_command_help_shows_panels_defaults_presets_examples(fake, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    fake.PRESETS = {"emoji": {"steps": 7}}
    fake.EXAMPLES = "fastdiff fake -b x\nfastdiff fake --full"
    assert cli.main(["fake", "--help-all"]) == 0
    out = capsys.readouterr().out
    for text in (
        "Examples",
        "A made-up command.",
        "how many [steps] [default: 1000; emoji: 7]",
        "--full",
        "--no-FLAG",
        "zero|edge",
        "-b",
    ):
        assert text in out, text
    assert out.index("fastdiff fake -b x") < out.index("Essentials") < out.index("General")
    assert not fake.seen


@pytest.mark.parametrize("command", [[c.name] for c in cli.COMMANDS] + [["plan", "dmd"]], ids=" ".join)
def test_a_help_page_shows_examples_and_ten_options_and_help_all_the_rest(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    config = next(c for c in cli.COMMANDS if c.name == command[-1]).describe().Config
    assert cli.main([*command, "--help"]) == 0
    short = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main([*command, "--help-all"]) == 0
    whole = capsys.readouterr().out
    for o in configuration.options(config):
        row = f"│   {o.name.upper()} " if o.argument else f"│ {o.flag} "
        assert row in whole, o.name
        assert (row in short) == (o.name in config.ESSENTIALS.split()), o.name
    assert short.index("Examples") < short.index("Essentials")
    assert len(short.splitlines()) < 70
    assert "--help-all" in short or len(configuration.options(config)) <= 10


def test_the_top_page_says_where_to_start(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert out.index("Start here") < out.index("Commands" if "Commands" in out else "Train")


def test_values_that_families_share_are_listed_once_and_a_plan_page_is_of_plan(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["plan", "dmd", "--help"]) == 0
    page = capsys.readouterr().out
    assert "sd15, sd21: 2; sdxl: 1]" in page
    assert "fastdiff plan dmd --base" in page
    assert "\n fastdiff dmd" not in page
    assert "--no-probe" in page


@pytest.mark.parametrize(
    "args",
    [
        ["train-lcm-lora", "--help"],
        ["evaluate", "--help-all"],
        ["dmd", "--base", "sdxl", "--dry-run"],
        ["sample", "--stesp", "3"],
        ["lightning", "--stages", "3:2"],
        ["lightning", "--stages", "8:4:inf"],
        ["dmd", "--max-time", "5x"],
        ["train-lcm-lora", "--keep", "best"],
        ["train-lcm-lora", "--lr", "inf"],
        ["plan", "prune", "--help"],
        ["plan", "nonsense"],
    ],
    ids=" ".join,
)
def test_help_dry_run_and_usage_errors_load_no_torch(args):
    code = f"import sys; from fastdiff.cli import main; code = main({args}); sys.exit(9 if 'torch' in sys.modules else code)"
    expected = 0 if {"--help", "--help-all", "--dry-run"} & set(args) else 2
    assert python("-c", code).returncode == expected


def test_shell_completion(fake, capsys, monkeypatch):
    flags = ("fastdiff fake --gui", ["--guidance"]), ("fastdiff fake --target e", ["edge"])
    for words, expected in (("fastdiff merge", ["merge-lora"]), *flags):
        monkeypatch.setenv("_FASTDIFF_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        with pytest.raises(SystemExit) as done:
            cli.main(["x"])
        assert done.value.code == 0
        assert capsys.readouterr().out.split() == expected


# --- where values come from


def test_precedence_flag_variable_file_preset_default(fake, tmp_path, monkeypatch):
    families = ModuleType("fastdiff.checkpoints.locate")
    families.family_of = lambda ref, config, allow_pickle: FAMILIES[{"emoji": "emoji", "x": "sd15", "y": "sdxl"}[ref]]
    monkeypatch.setitem(sys.modules, "fastdiff.checkpoints.locate", families)
    monkeypatch.setattr("fastdiff.checkpoints.locate", families, raising=False)
    fake.PRESETS = {"sd15": {"steps": 2, "lr": 0.2, "target": "edge"}, "sdxl": {"steps": 9}}
    file = tmp_path / "run.toml"

    def got(*flags):
        assert cli.main(["fake", *flags]) == 0
        return fake.seen[-1]

    assert got() == Config()
    assert got("--base", "x") == Config(base="x", steps=2, lr=0.2, target="edge")
    file.write_text('base = "x"\nsteps = 3\nprompt = ["p"]\n')
    assert got("--config", str(file)) == Config(base="x", steps=3, lr=0.2, target="edge", prompt=["p"])
    monkeypatch.setenv("FASTDIFF_STEPS", "4")
    monkeypatch.setenv("FASTDIFF_PROMPT", "a, b\nc")
    monkeypatch.setenv("FASTDIFF_FULL", "yes")
    monkeypatch.setenv("FASTDIFF_GUIDANCE", "")
    now = got("--config", str(file))
    assert now == Config(base="x", steps=4, lr=0.2, target="edge", prompt=["a, b", "c"], full=True)
    flags = ["--steps", "5", "--prompt", "d", "--prompt", "e", "--no-full", "--target", "zero", "-b", "x"]
    now = got("--config", str(file), *flags)
    assert now == Config(base="x", steps=5, lr=0.2, prompt=["d", "e"])
    monkeypatch.setenv("FASTDIFF_BASE", "y")  # the variable beats the file, and picks the preset
    monkeypatch.delenv("FASTDIFF_STEPS")
    assert got("--config", str(file)).steps == 3
    assert got().steps == 9
    assert got("--note", "none", "--guidance", "2", "--no-grid").note is None


def test_dry_run_prints_toml_that_repeats_the_run(fake, tmp_path, capsys):
    assert cli.main(["fake", "--steps", "3", "--prompt", 'a "b" \\ \n c', "--note", "none", "-n"]) == 0
    out = capsys.readouterr().out
    assert tomllib.loads(out)["steps"] == 3
    assert not fake.seen
    (tmp_path / "c.toml").write_text(out)
    assert cli.main(["fake", "--config", str(tmp_path / "c.toml")]) == 0
    assert fake.seen == [Config(steps=3, prompt=['a "b" \\ \n c'], note=None)]
    capsys.readouterr()
    assert cli.main(["fake", "--steps", "3", "--dry-run", "--json"]) == 0
    assert strict(capsys.readouterr().out)["metrics"]["config"] == {**vars(Config(steps=3))}


@pytest.mark.parametrize(
    "value",
    [
        Config(),
        Config(base="q\"uo\\te's", prompt=["", "\n\t\r\x00\x7f", "caf\u00e9 \U0001f680", "[x] # y"], full=True),
        Config(lr=1e-30, guidance=1e300, note=None, steps=-(10**15), target="edge"),
        Config(lr=5.0, guidance=0.0, note=""),
    ],
)
def test_toml_round_trip(value):
    assert Config(**config.from_toml(Config, config.to_toml(value))) == value


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("stepz = 1", "unknown key 'stepz'", "did you mean steps?"),
        ("[training]\nsteps = 1", "unknown key 'training'", ""),
        ("steps = '1'", "steps: '1' is not a whole number", ""),
        ("steps = 1.5", "steps: 1.5 is not a whole number", ""),
        ("steps = true", "steps: True is not a whole number", ""),
        ("full = 1", "full: 1 is not true or false", ""),
        ("base = 15", "base: 15 is not text", ""),
        ("prompt = 'x'", "prompt: 'x' is not a list", ""),
        ("prompt = [1]", "prompt: 1 is not text", ""),
        ("target = 'edgy'", "target: 'edgy' is not one of zero, edge", "did you mean edge?"),
        ("steps", "not valid TOML", ""),
    ],
)
def test_a_wrong_file_is_named_with_its_key(fake, tmp_path, capsys, text, message, hint):
    file = tmp_path / "c.toml"
    file.write_text(text)
    assert cli.main(["fake", "--config", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line
    assert message in line
    assert line.endswith(f"; {hint}" if hint else "")


def test_toml_is_lenient_where_nothing_can_be_misread():
    assert config.from_toml(Config, "steps = 3.0\nlr = 1\n") == {"steps": 3, "lr": 1.0}


@pytest.mark.parametrize(
    ("args", "env", "message", "hint"),
    [
        (["--steps", "many"], {}, "--steps: 'many' is not a whole number", ""),
        (["--lr", "x"], {}, "--lr: 'x' is not a number", ""),
        (["--target", "edg"], {}, "--target: 'edg' is not one of zero, edge", "did you mean edge?"),
        ([], {"FASTDIFF_STEPS": "x"}, "FASTDIFF_STEPS: 'x' is not a whole number", ""),
        ([], {"FASTDIFF_FULL": "maybe"}, "FASTDIFF_FULL: 'maybe' is not true or false", ""),
        (["--stepz", "3"], {}, "No such option: --stepz", "did you mean --steps?"),
        (["--steps"], {}, "'--steps' requires an argument", ""),
        (["extra"], {}, "unexpected extra argument", ""),
        (["--config", "no.toml"], {}, "--config no.toml: no such file or directory", ""),
    ],
)
def test_a_wrong_command_line_is_one_line(fake, capsys, monkeypatch, args, env, message, hint):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["fake", *args]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith("error: ")
    assert message in line
    assert line.endswith(f"; {hint}" if hint else "")
    assert cli.main(["fake", *args, "--json"] if args != ["--steps"] else ["fake", "--json", "--steps"]) == 2
    told = strict(capsys.readouterr().out)
    assert (told["ok"], told["command"], told["error"]["kind"]) == (False, "fake", "usage")
    assert message in told["error"]["message"]


def test_unknown_command(capsys):
    assert cli.main(["sampel"]) == 2
    assert "Did you mean 'sample'?" in capsys.readouterr().err
    assert cli.main(["sampel", "--json"]) == 2
    assert strict(capsys.readouterr().out)["ok"] is False


def test_a_field_without_default_must_be_given(fake, capsys):
    @dataclass
    class Needy:
        accel: Annotated[str, "the file"]

    fake.Config = Needy
    assert cli.main(["fake"]) == 2
    assert capsys.readouterr().err.startswith("error: --accel is required; give ")
    assert cli.main(["fake", "--accel", "f"]) == 0
    assert fake.seen == [Needy("f")]
    assert cli.main(["fake", "--help"]) == 0
    assert "[required]" in capsys.readouterr().out


def test_a_preset_of_an_unknown_field_is_our_bug():
    with pytest.raises(AssertionError, match="stepz"):
        config.resolve(Config, presets={"emoji": {"stepz": 1}}, family_of=lambda values: values["base"])


# --- results


def test_result_for_people_and_for_scripts(fake, tmp_path, capsys):
    weights = tmp_path / "a.safetensors"
    weights.write_bytes(b"abc")
    fake.run = lambda config: Result([weights], {"x": float("nan")}, "fastdiff next")
    assert cli.main(["fake"]) == 0
    assert capsys.readouterr().out == f"{weights}\nnext: fastdiff next\n"
    assert cli.main(["fake", "-q"]) == 0
    assert capsys.readouterr().out == f"{weights}\n"
    assert cli.main(["fake", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    told = strict(out)
    keys = "schema_version command ok outputs metrics warnings timings next_command"
    assert " ".join(told) == keys
    assert (told["schema_version"], told["command"], told["ok"], told["metrics"]) == (1, "fake", True, {"x": None})
    assert told["outputs"][0]["bytes"] == 3
    assert told["next_command"] == "fastdiff next"


def test_an_output_that_was_not_written_is_a_failure(fake, tmp_path, capsys):
    fake.run = lambda config: Result([tmp_path / "none.png"])
    assert cli.main(["fake"]) == 1
    assert "was not written" in capsys.readouterr().err


# --- failures

OUT_OF_MEMORY = type("OutOfMemoryError", (RuntimeError,), {})


@pytest.mark.parametrize(
    ("error", "code", "kind", "line"),
    [
        (UsageError("bad flag", "use that"), 2, "usage", "error: bad flag"),
        (typer.BadParameter("bad"), 2, "usage", "error: Invalid value: bad"),
        (InputRefused("x.bin: a pickle"), 3, "input", "error: x.bin: a pickle"),
        (
            FileNotFoundError(2, "No such file or directory", "x.png"),
            3,
            "input",
            "error: x.png: no such file or directory",
        ),
        (DoesNotFit("12 GiB"), 4, "capacity", "error: 12 GiB"),
        (OUT_OF_MEMORY("CUDA"), 4, "capacity", "error: out of memory: CUDA"),
        (GateFailed("worse"), 5, "gate", "error: worse"),
        (Stopped("at step 3", "go on"), 75, "stopped", "error: at step 3"),
        (Stopped("at step 3", exit_code=130), 130, "stopped", "error: at step 3"),
        (KeyboardInterrupt(), 130, "stopped", "error: interrupted"),
        (PermissionError(13, "Permission denied", "x"), 1, "failure", "error: x: permission denied"),
        (OSError("no name"), 1, "unexpected", "error: unexpected error: OSError: no name"),
        (RuntimeError("two\n  lines"), 1, "unexpected", "error: unexpected error: RuntimeError: two lines"),
        (ValueError("from a library"), 1, "unexpected", "error: unexpected error: ValueError: from a library"),
        (SystemExit(7), 7, "failure", "error: the command ended early (7)"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else None,
)
def test_exit_codes(fake, capsys, error, code, kind, line):
    def run(config):
        raise error

    fake.run = run
    assert cli.main(["fake"]) == code
    out, err = capsys.readouterr()
    (shown,) = err.splitlines()
    assert out == ""
    assert shown.split("; ")[0] == line
    assert cli.main(["fake", "--json"]) == code
    told = strict(capsys.readouterr().out)
    assert told["ok"] is False
    assert told["error"]["kind"] == kind
    assert f"error: {told['error']['message']}" == line


def test_a_failed_gate_tells_its_figures(fake, capsys):
    def run(config):
        raise GateFailed("worse", result=Result(metrics={"fid": 9.0}))

    fake.run = run
    assert cli.main(["fake", "--json"]) == 5
    assert strict(capsys.readouterr().out)["metrics"] == {"fid": 9.0}


def test_our_own_value_error_is_a_usage_error(fake, capsys, monkeypatch):
    def run(config):
        raise ValueError("--steps must be positive")

    fake.run = run
    monkeypatch.setattr(cli, "PACKAGE", Path(__file__).parent)
    assert cli.main(["fake"]) == 2
    assert capsys.readouterr().err == "error: --steps must be positive\n"
    fake.run = lambda config: json.loads("{")  # a ValueError of a library, and of a subclass
    assert cli.main(["fake"]) == 1


def test_debug_shows_the_traceback(fake, capsys):
    def run(config):
        raise UsageError("bad")

    fake.run = run
    assert cli.main(["fake", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: bad\n")


def test_a_broken_module_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli, "COMMANDS", [cli.Command("gone", "fastdiff.gone", "Gone.", "Use")])
    assert cli.main(["gone", "--json"]) == 1
    out, err = capsys.readouterr()
    assert strict(out)["error"]["kind"] == "unexpected"
    assert err.startswith("error: unexpected error: ModuleNotFoundError")


def test_only_the_first_process_of_a_distributed_run_reports(fake, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    fake.run = lambda config: console.info("hello") or Result(next_command="x")
    assert cli.main(["fake", "--json"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_left_is_no_error(tmp_path):
    code = "import sys; from fastdiff.cli import emit; emit('x' * 10**6); sys.exit(3)"
    start = f"import subprocess as s, sys; p = s.Popen([sys.executable, '-c', {code!r}], stdout=s.PIPE)"
    done = python("-c", f"{start}; p.stdout.close(); sys.exit(p.wait())")
    assert (done.returncode, done.stderr) == (3, "")
