"""docs/quickstart.ipynb runs as it is, from images in folders to synthetic ones."""

import os
from pathlib import Path
import sys

from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpec
import nbclient
import nbformat

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / 'docs' / 'quickstart.ipynb'


class OwnKernel(KernelManager):
    """A kernel of this Python, whatever kernels are installed."""

    @property
    def kernel_spec(self):
        words = [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}']
        return KernelSpec(argv=words, display_name='Python', language='python')


def said(cell):
    """What a cell wrote to standard output."""
    return ''.join(out.text for out in cell.outputs if out.output_type == 'stream' and out.name == 'stdout')


def shown(cell, kind):
    """What a cell displayed in this MIME type."""
    return [out.data[kind] for out in cell.outputs if kind in out.get('data', {})]


def test_the_notebook_holds_no_outputs():
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == 'code']
    assert len(cells) == 10
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv('DPP_QUICKSTART', 'tiny')
    monkeypatch.setenv('PYTHONPATH', f'{ROOT}{os.pathsep}{os.environ.get("PYTHONPATH", "")}')
    monkeypatch.setenv('MPLBACKEND', 'module://matplotlib_inline.backend_inline')
    monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
    book = nbformat.read(NOTEBOOK, as_version=4)
    where = {'metadata': {'path': str(tmp_path)}}
    nbclient.NotebookClient(book, km=OwnKernel(), timeout=300, resources=where).execute()
    _, _, _, plan, run, images, statement, scores, more, export = (
        cell for cell in book.cells if cell.cell_type == 'code'
    )
    assert 'data.classes' in said(plan) and 'NOT PRIVATE' not in said(plan)
    assert 'finetune: done' in said(run)
    assert '40 images of 10 classes' in said(images) and len(shown(images, 'image/png')) == 1
    (text,) = shown(statement, 'text/markdown')
    assert 'ε' in text and 'public by declaration' in text
    assert 'accuracy' in said(scores).lower() and 'FID' in said(scores)
    assert '10 classes' in said(more) and len(shown(more, 'image/png')) == 1
    assert '\n40 PNG files' in said(export)
    assert (tmp_path / 'synthetic_images.zip').stat().st_size > 10_000
