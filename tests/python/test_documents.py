"""What the documents show runs, and the reference is what the docstrings say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs" / "python").glob("*.md"))]


def snippets():
    for document in DOCUMENTS:
        if document.name == "torch.md":
            continue  # its lines need a model around them: test_torch_processes.py
        for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", document.read_text(), re.M | re.S)):
            yield pytest.param(document.name, code, id=f"{document.stem}-{number}")


@pytest.mark.parametrize("document, code", list(snippets()))
def test_snippets_run(tmp_path, document, code):
    """Those that start a process group run as two ranks, as torchrun would start them."""
    script = tmp_path / "snippet.py"
    script.write_text(code)
    (tmp_path / "bench").symlink_to(ROOT / "bench")  # snippets may read the repository's records, and write elsewhere
    num_ranks = 2 if "init_process_group" in code else 1
    port = str(free_port())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                   "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "PYTHONWARNINGS": "error::DeprecationWarning"}
    ranks = [subprocess.Popen([sys.executable, str(script)], env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                              cwd=tmp_path, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
             for rank in range(num_ranks)]
    try:
        for rank in ranks:
            output, _ = rank.communicate(timeout=60)
            assert rank.returncode == 0, output
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_the_readme_has_both_snippets():
    code = (ROOT / "README.md").read_text()
    assert "anyep.run_threads" in code and "from deep_ep import Buffer" in code


@pytest.mark.skipif(sys.version_info < (3, 11), reason="signatures print differently")
def test_the_reference_is_what_the_docstrings_say():
    written = subprocess.run([sys.executable, str(ROOT / "tools" / "make_python_reference.py")], check=True,
                             capture_output=True, text=True).stdout
    assert (ROOT / "docs" / "python" / "reference.md").read_text() == written, (
        "docs/python/reference.md is old; tools/make_python_reference.py writes it")


def test_links_between_documents_lead_somewhere():
    for document in [*DOCUMENTS, ROOT / "docs" / "README.md", ROOT / "CONTRIBUTING.md"]:
        prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
