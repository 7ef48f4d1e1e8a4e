"""Runs examples/tutorial.ipynb in a kernel and writes its outputs into it.

python -m tests.notebook      (or: make notebook)
"""

from __future__ import annotations

import pathlib

PATH = pathlib.Path(__file__).resolve().parent.parent / "examples" / "tutorial.ipynb"


def main() -> None:
    """Runs all cells; stops at the first error and writes nothing then."""
    import nbclient
    import nbformat

    notebook = nbformat.read(PATH, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=None, record_timing=False, coalesce_streams=True)
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # without what TensorFlow says of this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, PATH)


if __name__ == "__main__":
    main()
