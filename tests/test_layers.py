"""The law of the house: a room imports only rooms to its left."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff.cli import COMMANDS
from fastdiff.runtime.config import options

PACKAGE = Path(__file__).parent.parent / "fastdiff"
LAW = (
    "runtime < diffusion < checkpoints < options < lora < models < sampling < data < quality < training < methods < cost "
    "< commands < cli"
)
ORDER = {room: i for i, room in enumerate(LAW.split(" < "))}


def imported(path):
    """fastdiff modules named in any import statement of the file, also inside functions: `runtime.console`, ..."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastdiff":
            inside = node.module.removeprefix("fastdiff").removeprefix(".")
            yield from (f"{inside}.{alias.name}".removeprefix(".") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("fastdiff.") for a in node.names if a.name.startswith("fastdiff."))


def upward(package=PACKAGE):
    """Every import that breaks the law, as text."""
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package).with_suffix("").parts
        if place in {("__init__",), ("__main__",)}:
            continue  # lazy public names, and the way in
        floor = ORDER[place[0]]
        for name in imported(path):
            room = name.split(".")[0]
            if room in ORDER and ORDER[room] > floor:
                yield f"{'.'.join(place)} imports {name}"


def test_a_room_imports_only_rooms_to_its_left():
    assert not list(upward())


def test_options_load_no_heavy_library():
    """Help pages, completion, dry runs and usage errors wait for nothing."""
    script = "import sys; from fastdiff.cli import COMMANDS; [c.describe() for c in COMMANDS]; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "diffusers", "transformers", "PIL", "safetensors"} & set(modules)
    assert len([name for name in modules if name.startswith("fastdiff.options.")]) >= len(COMMANDS)


def test_every_command_has_a_module_of_options_with_ten_essentials_at_most():
    for command in COMMANDS:
        config = command.describe().Config
        assert config.__module__ == f"fastdiff.options.{command.place.split(':')[0].split('.')[-1]}"
        names = {o.name for o in options(config)}
        assert {*vars(config)["ESSENTIALS"].split()} <= names
        assert 1 <= len(vars(config)["ESSENTIALS"].split()) <= 10


def test_names_that_options_repeat_are_those_of_the_code():
    from fastdiff.diffusion.samplers import SOLVERS
    from fastdiff.models import unet
    from fastdiff.options import prune, sample

    assert tuple(SOLVERS) == next(o for o in options(sample.Config) if o.name == "scheduler").choices
    assert tuple(unet.LAYOUTS) == prune.LAYOUTS


def test_every_file_is_in_a_room():
    files = {path.name for path in PACKAGE.glob("*.py")}
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert files == {"__init__.py", "__main__.py", "cli.py"}
    assert rooms == {*ORDER, "assets"} - {"cli"}


@pytest.mark.parametrize("line", ["from fastdiff.methods import lcm", "def f():\n    import fastdiff.methods.lcm"])
def test_a_planted_upward_import_is_found(tmp_path, line):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bad.py").write_text(line + "\n")
    assert list(upward(tmp_path)) == ["data.bad imports methods.lcm"]


def test_methods_do_not_import_each_other_and_no_landfills():
    for path in PACKAGE.rglob("*.py"):
        assert path.name not in {"utils.py", "helpers.py", "common.py", "misc.py"}
    for path in (PACKAGE / "methods").glob("*.py"):
        others = [n for n in imported(path) if n.startswith("methods.") and not n.startswith("methods.shared.")]
        assert not others, f"{path.name} imports {others}"


def test_every_look_up_of_a_name_has_its_reason():
    """getattr and hasattr stand for a missing protocol, unless a comment on the line or the line before says for what."""
    bare = []
    for path in sorted(PACKAGE.rglob("*.py")):
        lines = path.read_text().splitlines()
        for i, line in enumerate(lines):
            used = "getattr" in line or "hasattr" in line
            if used and "#" not in line and not lines[i - 1].lstrip().startswith("#"):
                bare.append(f"{path.relative_to(PACKAGE)}:{i + 1}")
    assert not bare


def test_schedule_maths_is_in_one_room():
    """alpha and sigma are combined by the schedule's own functions: (x_t - sigma eps) / alpha anywhere else is a bug."""
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "diffusion":
            assert ".sigma[" not in path.read_text(), path.relative_to(PACKAGE)
