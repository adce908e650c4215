"""Messages of the library name fields, and the command line alone turns them into flags."""

import ast
import json
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff import cli
from fastdiff.checkpoints.tensors import open_file
from fastdiff.diffusion.schedule import NoiseSchedule
from fastdiff.runtime import console, stop
from fastdiff.runtime.config import from_toml, options, resolve
from fastdiff.runtime.errors import FIELD, UsageError, as_field, quoted, with_flags
from fastdiff.sampling.settings import Settings

PACKAGE = Path(__file__).parent.parent / "fastdiff"
SPEAKERS = {"warn", "info", "error", "UsageError", "InputRefused", "Failed", "DoesNotFit", "GateFailed", "Stopped"}
COMMAND = re.compile(r"`fastdiff [^`]*`")  # a command line in a message is one


@pytest.fixture(autouse=True)
def fresh():
    console.reset()
    yield
    console.reset()


# ---- no message of the library names a flag


def words(node):
    """The string constants of an expression, those of f-strings too."""
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def called(node):
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def sources(tree):
    """(names, expression they are made from) of every assignment and loop."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets, made = node.targets, node.value
        elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
            targets, made = [node.target], node.value
        elif isinstance(node, ast.For | ast.comprehension):
            targets, made = [node.target], node.iter
        else:
            continue
        if made:
            yield names(*targets), made


def names(*nodes):
    return {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)}


def messages(tree):
    """(line, text) of every string of a message: inside `raise`, given to a speaker, or in what such a variable is made from."""
    said = [n.exc for n in ast.walk(tree) if isinstance(n, ast.Raise) and n.exc]
    said += [n for n in ast.walk(tree) if isinstance(n, ast.Call) and called(n) in SPEAKERS]
    said += [n.value for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg in {"off", "instead", "hint"}]
    rows, known = list(sources(tree)), -1
    while len(said) != known:  # a variable of a variable
        known, used = len(said), names(*said)
        said += [made for targets, made in rows if targets & used and made not in said]
    yield from {(part.lineno, text) for part in said for text in words(part)}


def spoken(package=PACKAGE, *, besides=("commands",)):
    """(place, text) of all messages outside the command line."""
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        if place != Path("cli.py") and place.parts[0] not in besides:
            yield from ((f"{place}:{line}", text) for line, text in messages(ast.parse(path.read_text())))


def flags_in(rows):
    return [f"{place}: {text}" for place, text in rows if re.search("--[a-z]", COMMAND.sub("", text))]


def test_no_message_of_the_library_names_a_flag():
    assert not flags_in(spoken())


@pytest.mark.parametrize(
    "code",
    [
        'raise UsageError(f"--base {ref}: no such file")',
        'raise UsageError("it is wrong", "give --force")',
        'def f():\n    hint = "a smaller --batch-size"\n    raise kind("too large", hint)',
        'console.warn(f"{a}: {b}" + f" (--max-images {n})")',
        'distance(family, off="--fm-encoder unet")',
        'ROWS = (("a LoRA", "give it with --lora"),)\nfor what, fix in ROWS:\n    raise refuse(what, fix)',
    ],
)
def test_a_planted_flag_is_found(tmp_path, code):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bad.py").write_text(code + "\n")
    assert len(flags_in(spoken(tmp_path))) == 1


def test_messages_name_options_that_some_command_has():
    known = {o.name for command in cli.COMMANDS for o in options(command.load().Config)}
    known |= {row.name.removeprefix("cli_") for row in cli.general()} | set(cli.PLAN_OPTIONS)
    named = {(m[1] or m[4], place) for place, text in spoken(besides=("commands",)) for m in FIELD.finditer(text)}
    named |= {
        (word, str(path.relative_to(PACKAGE)))
        for path in PACKAGE.rglob("*.py")
        for word in re.findall(r"""as_field\(['"](\w+)['"]""", path.read_text())
    }
    assert len(named) > 30
    assert not [row for row in named if row[0] not in known]


# ---- the translator


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("`base`: not there", "--base: not there"),
        ("give `eval_every` too", "give --eval-every too"),
        ("`base=nothing-here`: no such file", "--base nothing-here: no such file"),
        ("`data=wds:a=b/{0..9}.tar`", "--data wds:a=b/{0..9}.tar"),
        ("`output=my runs/a b`: exists", "--output my runs/a b: exists"),
        ("`lora_only=True`, `shard=False`", "--lora-only, --no-shard"),
        ("(`resume=never`); `lr`", "(--resume never); --lr"),
        ("`base=`: not an alias", "--base : not an alias"),
        ("`fastdiff prune --controlnet` cuts one, `fastdiff inspect` looks", None),
        ("`Cond.guidance` must be given; `Base`, `--base`, ``x``, a`base`, `base`s", None),
        ("a lone ` and another `x", None),
        ("", None),
    ],
)
def test_fields_become_flags_and_nothing_else_does(text, flags):
    assert with_flags(text) == (text if flags is None else flags)


HOSTILE = [
    "plain", "", " ", "a b", "a=b", "True", "False", "None", "`", "``", "a`b", "`a", "a`", "a``b`c", "`base`", "`base=x`",
    " `` ", "a\nb", "x` `steps", "x`: ok; `steps=1", "\\1", "--lr 1", "ü`é",
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE)
def test_any_value_comes_through(value):
    message = f"{as_field('base', value)}: no such file; see {as_field('num_steps', 4)} and {as_field('prompt', value)}"
    assert with_flags(message) == f"--base {value}: no such file; see --num-steps 4 and --prompt {value}"


def test_spellings():
    assert as_field("eval_every") == "`eval_every`"
    assert as_field("eta", 0.5) == "`eta=0.5`"
    assert as_field("full", True) == "`full=True`"
    assert with_flags(as_field("full", False)) == "--no-full"
    assert as_field("base", "a`b") == "``base=a`b ``"
    assert with_flags(f"({quoted('pass `height` or `width=8`')})") == "(pass 'height' or 'width=8')"


# ---- the same mistake from Python and on the command line


def test_python_speaks_fields(tmp_path):
    with pytest.raises(UsageError, match=re.escape("`base=nothing-here`: not an alias (emoji, sd15")):
        fastdiff.load("nothing-here")
    with pytest.raises(ValueError, match="`scheduler=nope`: use one of "):
        Settings(scheduler="nope")
    with pytest.raises(ValueError, match="`num_steps` must be between 1 and 1000, not 0"):
        NoiseSchedule(torch.linspace(0.99, 0.01, 1000)).grid(0, "trailing")
    (tmp_path / "a.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(UsageError) as caught:
        open_file(tmp_path / "a.ckpt")
    assert "`allow_pickle`" in caught.value.hint
    console.warn("`pairs=3`: only that many of the 5 prompts are used")
    console.warn(f"{as_field('base', 'a`b')}: old")
    assert console.state.warnings == ["`pairs=3`: only that many of the 5 prompts are used", "``base=a`b ``: old"]


@pytest.mark.parametrize("name", ["nothing-here", "no`thing", "`steps`"])
def test_the_command_line_speaks_flags(capfd, name):
    assert cli.main(["sample", "--base", name, "--prompt", "x", "--json"]) == 2
    told, err = capfd.readouterr()
    start = f"--base {name}: not an alias (emoji, sd15, sd21, sd21-base, sdxl, ssd-1b), a hub id"
    assert json.loads(told)["error"]["message"].startswith(start)
    assert f"error: {start}" in err
    with pytest.raises(UsageError, match="base="):  # afterwards Python speaks fields again
        fastdiff.load(name)
    console.warn("`remap`: nothing to move")
    assert console.state.warnings[-1] == "`remap`: nothing to move"


def test_hints_and_warnings_on_the_command_line(capfd, monkeypatch):
    import warnings

    from fastdiff.commands import inspect

    def run(config):
        console.warn("`pairs=3`: only that many")
        console.info("the first 3 images (`max_images`)")
        warnings.warn("`torch_dtype` is deprecated", FutureWarning, stacklevel=1)
        raise UsageError("`keep=best`: nothing is measured", "give `eval_every` too; `fastdiff plan dmd --steps 4` tells more")

    monkeypatch.setattr(inspect, "COMMAND", replace(inspect.COMMAND, run=run))
    assert cli.main(["inspect", "file", "--json"]) == 2
    told, err = capfd.readouterr()
    told = json.loads(told)
    assert told["warnings"] == ["--pairs 3: only that many", "`torch_dtype` is deprecated (FutureWarning)"]
    assert told["error"]["message"] == "--keep best: nothing is measured"
    assert told["error"]["hint"] == "give --eval-every too; `fastdiff plan dmd --steps 4` tells more"
    assert "the first 3 images (--max-images)" in err
    assert "error: --keep best: nothing is measured; give --eval-every too; `fastdiff plan" in err


def test_the_command_to_go_on_with_is_left_as_it_was_typed(capfd, monkeypatch):
    from fastdiff.commands import inspect

    def run(config):
        stop.request.command = "fastdiff sample --prompt 'a `cat` and `base=x`'"
        raise stop.stopped()

    monkeypatch.setattr(inspect, "COMMAND", replace(inspect.COMMAND, run=run))
    assert cli.main(["inspect", "file", "--json"]) == 75
    stop.request.forget()
    told = json.loads(capfd.readouterr().out)
    assert told["error"]["hint"] == "go on with: fastdiff sample --prompt 'a `cat` and `base=x`'"


def test_options_are_read_with_fields_for_names(tmp_path, capfd):
    Config = import_module("fastdiff.commands.sample").Config  # noqa: N806
    with pytest.raises(UsageError, match="^`num_steps=0`: must be at least 1"):
        resolve(Config, {"num_steps": "0"})
    with pytest.raises(UsageError, match="^`num_steps`: 'x' is not a whole number"):
        resolve(Config, {"num_steps": "x"})
    with pytest.raises(UsageError, match="^FASTDIFF_NUM_STEPS 0: must be"):
        resolve(Config, environ={"FASTDIFF_NUM_STEPS": "0"})
    with pytest.raises(UsageError, match="^config: num_steps 0: must be"):
        from_toml(Config, "num_steps = 0")
    file = tmp_path / "run.toml"
    with pytest.raises(UsageError, match="^`config=.*run.toml`: no such file"):
        resolve(Config, file=file)
    assert cli.main(["sample", "--config", str(file)]) == 2
    assert f"error: --config {file}: no such file" in capfd.readouterr().err
    assert cli.main(["sample", "--num-steps", "0"]) == 2
    assert "error: --num-steps 0: must be at least 1" in capfd.readouterr().err
