"""What a figure says to those who cannot see it, in a real kernel."""

import nbformat
import pytest

from optinfer.execute import execute

CELLS = [
    "from optinfer import plots",
    'fig, ax = plots.figure()\nax.plot([1, 2], label="measured")\nax.set(xlabel="tokens", ylabel="ms", title="First")\nax.legend();',
    'fig, ax = plots.figure()\nax.set(xlabel="tokens", ylabel="ms", title="Second");',
]


@pytest.mark.notebook
def test_every_figure_is_described_the_first_one_too(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    path = tmp_path / "figures.ipynb"
    nbformat.write(notebook, path)
    done = execute(path)
    said = [cell.outputs[-1]["data"]["text/plain"] for cell in done.cells[1:]]
    assert said[0] == "Figure. First; ms over tokens; series: measured"
    assert said[1] == "Figure. Second; ms over tokens"
