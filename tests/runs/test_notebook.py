"""The notebook runs from top to bottom on the drawn demo."""

import json
import os
import sys
from pathlib import Path

import psutil
import pytest

from support.processes import ROOT, state

NOTEBOOK = ROOT / "launch" / "colab.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert len(notebook.cells) <= 10
    (settings,) = (cell for cell in notebook.cells if cell.metadata.get("tags") == ["settings"])
    settings.source = settings.source.replace(
        'EXTRA = ""', 'EXTRA = "--run.epochs 1 --eval.views flips --model.name shufflenet_v2_x0_5"'
    )
    settings.source = settings.source.replace('RUNS = "runs"', f'RUNS = "{tmp_path / "My Drive" / "runs"}"')
    pip = tmp_path / "bin" / "pip"  # so that the environment that other tests run in stays as it is
    pip.parent.mkdir()
    pip.write_text(f'#!/bin/sh\nexec {sys.executable} -m pip "$@" --dry-run\n')
    pip.chmod(0o755)
    monkeypatch.setenv("PATH", f"{pip.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    try:
        nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    finally:  # TensorBoard outlives its kernel
        for process in psutil.process_iter(["cmdline"]):
            if any(str(tmp_path) in word for word in process.info["cmdline"] or []):
                process.kill()
    run = tmp_path / "My Drive" / "runs" / "demo"
    assert state(run)["status"] == "finished"
    text = json.dumps(notebook.cells)
    assert "all checks passed" in text
    assert "images: balanced accuracy" in text
    assert "image/png" in text
    assert (run / "evaluation-val-none" / "metrics.json").is_file()


def test_each_cell_of_the_notebook_is_stored_without_outputs():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs"), "clear all outputs before you commit it"
