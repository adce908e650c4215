"""A module imports only from lower floors."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "fastdiff"
FLOORS = [
    {"console", "measure", "schedule"},
    {"config", "intel", "losses", "processes", "rng", "io.disk"},
    {"io.recipe", "io.state", "io.tensors", "sharding", "stop"},
    {"io.run", "io.updates", "io.ldm", "io.family", "io.component", "io.download"},
    {"io.bases"},
    {"io.layouts", "io.checkpoint"},
    {"io.lora", "io.export"},
    {"io.fitting"},
    {"models.adapters", "models.ema", "models.features", "models.frozen", "models.judges", "solvers"},
    {"models.clip", "models.decoder", "models.denoiser", "models.folded", "coefficients", "distances"},
    {"models.autoencoder"},
    {"models.perceptual", "models.text", "models.discriminator", "models.unet", "difference"},
    {"models.controlnet", "models.similarity", "engine"},
    {"sampling"},
    {"data.store", "data.pictures"},
    {"data.batch", "data.folder"},
    {"data.embedded", "data.streams", "data.cache"},
    {"data.teacher", "data.control"},
    {"data"},
    {"method", "players", "resume"},
    {"drift", "trainer", "baselines"},
    {"judge", "footprint"},
    {"card", "surgery", "decoders", "roles"},
    {"assemble", "matching"},
    {"lenses"},
    {"gallery"},
    {"proof", "compare", "survival", "report"},
    {"session", "sample", "merge", "export", "inspect", "evaluate"},
    {"segmented", "probe", "stages", "estimate"},
    {"plan"},
    {"methods.lcm", "methods.dmd", "methods.lightning", "methods.prune", "methods.vae", "methods.sdxs", "methods.controlnet"},
    {"bench"},
    {"cli"},
    {"__main__"},
]
FREE = {"", "io", "models", "methods"}  # package files without imports of their own, and the lazy public names


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix("__init__").removesuffix("."), path


def imported(path, names):
    """fastdiff modules named in any import statement of the file, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastdiff":
            inside = node.module.removeprefix("fastdiff").removeprefix(".")
            for alias in node.names:
                child = f"{inside}.{alias.name}".removeprefix(".")
                yield child if child in names else inside
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("fastdiff.") for a in node.names if a.name.startswith("fastdiff."))


def test_every_module_has_a_floor_and_imports_downwards():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    found = dict(modules())
    assert set(found) - FREE == set(floor), "the table of floors and the files differ"
    wrong = [
        f"{name} imports {other}"
        for name, path in found.items()
        if name not in FREE
        for other in imported(path, set(found))
        if other not in FREE and floor[other] >= floor[name]
    ]
    assert not wrong


def test_a_wrong_import_would_be_seen(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from fastdiff.methods import lcm\n")
    assert list(imported(bad, {"methods", "methods.lcm"})) == ["methods.lcm"]


def test_methods_do_not_import_each_other_and_no_landfills():
    for name, path in modules():
        assert path.name not in {"utils.py", "helpers.py", "common.py", "misc.py"}
        if name.startswith("methods."):
            assert not [o for o in imported(path, set(dict(modules()))) if o.startswith("methods.") and o != name]
