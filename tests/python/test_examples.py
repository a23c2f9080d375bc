"""The examples in Python run, and say that they computed what one process computes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(*command, folder, code=0):
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("num_ranks", ["2", "4"])
def test_training_equals_one_process_and_its_routing_is_replayed(num_ranks, tmp_path):
    said = run(str(EXAMPLES / "train_moe.py"), "--ranks", num_ranks, "--steps", "15", folder=tmp_path)
    assert re.search(r"largest difference of the losses \S+, allowed \S+: EQUAL", said)
    first, last = map(float, re.search(rf"{num_ranks} ranks: loss (\S+) -> (\S+) in 15 steps", said).groups())
    assert last < first - 1  # it learns: the curves are not equal because nothing moves
    replay = re.search(r"replay it: anyep (.*)", said).group(1).split()
    replayed = run("-m", "anyep", *replay, "--op", "dispatch,combine", "--dtype", "bf16", "-n", "1", "-w", "0", folder=tmp_path)
    assert "routing trace:train_moe.trace" in replayed and "tokens 1024, pairs 2048" in replayed


def test_a_training_run_that_differs_says_so(tmp_path):
    """Without the other ranks' gradients."""
    script = (EXAMPLES / "train_moe.py").read_text()
    broken = script.replace("parameter.grad.copy_(", "parameter.grad.mul_(1.0).add_(0 * ")
    assert broken != script
    (tmp_path / "examples").mkdir()
    (tmp_path / "docs").symlink_to(EXAMPLES.parent / "docs")
    (tmp_path / "README.md").symlink_to(EXAMPLES.parent / "README.md")
    path = tmp_path / "examples" / "train_moe.py"
    path.write_text(broken)
    assert ": DIFFERENT" in run(str(path), "--steps", "15", folder=tmp_path, code=1)


def test_decoding_with_hooks_equals_the_dense_computation(tmp_path):
    said = run(str(EXAMPLES / "decode_loop.py"), "--steps", "2", folder=tmp_path)
    assert said.endswith("all answers of the last step against the dense computation: EQUAL\n")
    assert re.search(r"with hooks: \d+ tokens/s, 2 ranks", said)


def test_decoding_that_differs_says_so(tmp_path):
    script = (EXAMPLES / "decode_loop.py").read_text()
    broken = script.replace("self.model.expert(self.layer, expert,", "self.model.expert(self.layer, self.mine[0],")
    assert broken != script
    path = tmp_path / "decode_loop.py"
    path.write_text(broken)
    assert ": DIFFERENT" in run(str(path), "--steps", "1", folder=tmp_path, code=1)
