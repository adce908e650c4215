"""What every command promises, over the command table: a new one is picked up by its line there."""

import json

import pytest

from fastdiff import cli
from fastdiff.runtime.config import options

NAMES = [c.name for c in cli.COMMANDS]


def module_of(name):
    return next(c for c in cli.COMMANDS if c.name == name).load()


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_every_option_its_text_and_examples(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main([name, "--help-all"]) == 0
    page = capsys.readouterr().out
    module = module_of(name)
    for option in options(module.Config):
        assert option.help, f"{option.name} has no help text"
        assert (option.name.upper() if option.argument else option.flag) in page
    first, *_ = module.examples.splitlines()
    assert first in page
    assert "--json" in page


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_is_one_json_object_and_no_traceback(name, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args, word in ((["--no-such-flag"], "--no-such-flag"), (["--config", "gone.toml"], "gone.toml")):
        assert cli.main([name, *args, "--json"]) == 2
        out, err = capfd.readouterr()
        told = json.loads(out)
        assert (told["ok"], told["command"]) == (False, name)
        assert word in told["error"]["message"]
        assert "Traceback" not in err


@pytest.mark.parametrize("name", NAMES)
def test_defaults_and_presets_are_within_their_ranges(name):
    module = module_of(name)
    rows = [{}, *getattr(module, "PRESETS", {}).values()]
    for option in options(module.Config):
        for value in (row.get(option.name, option.default) for row in rows):
            if isinstance(value, int | float) and not isinstance(value, bool):
                assert value in option.range, f"{option.flag} {value}"
