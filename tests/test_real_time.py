"""The whole chain, from a checkpoint to real time, by its own script; a few steps of everything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "real_time.sh"


@pytest.mark.slow
def test_the_chain_runs_measures_every_part_and_goes_on_where_it_was(tmp_path):
    few = dict(steps=4, pairs=32, batch_size=4, teacher_steps=1, proof=16, match_steps=1, gan_from=2, save_every=2)
    env = {**os.environ, "FASTDIFF_CACHE": str(tmp_path / "cache"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env |= {f"FASTDIFF_{k.upper()}": str(v) for k, v in few.items()}
    command = [SCRIPT, tmp_path / "chain", "--samples", "40", "--rounds", "1"]
    for _ in range(2):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "chain/real_time.json").read_text())
    assert told["one step, tiny decoder"]["calls"] == 1
    assert told["one step, tiny decoder"]["faster"][0] > told["small network"]["faster"][0] > 1
    assert "frechet_gap" in told["one step, tiny decoder"]
    assert told["control"]["change_off"] > 0
    assert (tmp_path / "chain/real_time.png").exists()
    assert "gap closed" in done.stdout
