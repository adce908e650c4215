"""A stranger's method is one file and one row: two unlike ones, put into a copy of the package, get everything else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {"score-identity": ("score_identity", "ScoreIdentity"), "segments": ("segments", "Segments")}  # one phase; several
TESTS = ("conftest.py", "tiny.py", "playing.py", "test_methods.py")


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of package and tests with a new file and a new row for each method; runs a command in it."""
    folder = tmp_path_factory.mktemp("house")
    package = folder / "fastdiff"
    shutil.copytree(ROOT / "fastdiff", package, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (package / "assets").symlink_to(ROOT / "fastdiff" / "assets")
    (folder / "tests").mkdir()
    for name in TESTS:
        shutil.copy(ROOT / "tests" / name, folder / "tests")
    rows = ""
    for name, (file, cls) in FILES.items():
        shutil.copy(ROOT / "examples" / "methods" / f"{file}.py", package / "methods")
        rows += f'    Command("{name}", ".methods.{file}:{cls}", "A method of one file.", "Train"),\n'
    cli = package / "cli.py"
    first = cli.read_text().index("COMMANDS = [\n") + len("COMMANDS = [\n")
    cli.write_text(cli.read_text()[:first] + rows + cli.read_text()[first:])

    def run(*args, code=0):
        env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "FASTDIFF_CACHE": str(folder / "cache")}
        done = subprocess.run([sys.executable, *map(str, args)], cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return run


TESTED = """
import sys
import pytest
for more in ([f"golden and ({sys.argv[1]})", "--write-golden"], [sys.argv[1]]):
    code = pytest.main(["-q", "-p", "no:cacheprovider", "tests/test_methods.py", "-k", *more])
    if code:
        sys.exit(code)
"""


@pytest.mark.slow
def test_the_contract_and_golden_losses_pick_them_up(house):
    """Written by the tests' own option, then compared like everybody's; one process, since imports take longer than tests."""
    told = house("-c", TESTED, " or ".join(FILES))
    assert "2 passed" in told
    assert "12 passed" in told


SCRIPT = """
import json, sys
from fastdiff import cli
from fastdiff.commands import train
from fastdiff.quality import samples
samples.TIMED_S, samples.TIMED, samples.DIVERSE = 0, (1, 1), (2, 2)  # latency and diversity of a few pictures
name = sys.argv[1]
assert train.named(name).name == name
def told(*args, code=0):
    import io, contextlib
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main([*args, "--json"]) == code, (args, out.getvalue())
    return json.loads(out.getvalue())
assert cli.main([name, "--help-all"]) == 0
small = ["--steps", "4", "--batch-size", "2", "--lora-rank", "4", "--lora-alpha", "4", "--proof", "8", "-o", "run-" + name]
plan = told("plan", name, *small, "--no-probe")["metrics"]
run = told(name, *small)
again = told(name, *small)
weights = next(o["path"] for o in reversed(run["outputs"]) if o["path"].endswith(".safetensors"))
drawn = told("sample", "--lora", weights, "--prompt", "a panda", "-o", "drawn-" + name)
judged = told("evaluate", "--student", weights, "--num-images", "8", "--no-baseline", "-o", "judged-" + name)
print(json.dumps(dict(plan=plan, run=run, again=again, drawn=drawn, judged=judged, card=open(f"run-{name}/README.md").read())))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["score-identity", "segments"])
def test_help_plan_run_resume_card_sample_and_evaluate_pick_it_up(name, house):
    page, _, last = house("-c", SCRIPT, name).rpartition("\n{")
    found = json.loads("{" + last)
    assert "--lora-rank" in page
    assert f"fastdiff {name}" in page
    ranks = [row["lora_rank"] for row in found["plan"]["settings"]]
    assert ranks[0] == 4
    assert len({(row["batch_size"], row["gradient_checkpointing"]) for row in found["plan"]["settings"]}) > 1
    assert found["run"]["metrics"]["steps"] == found["again"]["metrics"]["steps"] == 4
    hashes = [{o["path"]: o["sha256"] for o in found[run]["outputs"]} for run in ("run", "again")]
    assert hashes[0] == hashes[1]
    assert found["run"]["metrics"]["rows"]
    assert found["run"]["next_command"].startswith("fastdiff sample --base emoji --lora run-")
    scheduler, steps = {"score-identity": ("lcm", 1), "segments": ("ddim", 1)}[name]
    settings = found["drawn"]["metrics"]["settings"]
    assert (settings["scheduler"], settings["num_steps"]) == (scheduler, steps)
    assert any(row["model"] != "teacher" for row in found["judged"]["metrics"]["rows"])
    assert {"lcm": "LCMScheduler", "ddim": "DDIMScheduler"}[scheduler] in found["card"]
    if name == "segments":
        assert [Path(o["path"]).name for o in found["run"]["outputs"] if "safetensors" in o["path"]] == [
            "segments-2.safetensors",
            "segments-1.safetensors",
        ]
