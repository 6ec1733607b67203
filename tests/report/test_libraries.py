"""What writes results is looked for before anything is computed."""

from __future__ import annotations

import sys

import pytest

from moa_diffusion.report.libraries import PLOTS, TABLES_AND_PLOTS, check_libraries


@pytest.mark.parametrize("names", [PLOTS, TABLES_AND_PLOTS])
def test_a_missing_library_is_told_with_the_line_that_installs_it(names, monkeypatch):
    check_libraries(names)
    monkeypatch.setitem(sys.modules, names[-1], None)
    with pytest.raises(ImportError, match=rf'{names[-1]}.*pip install "moa-diffusion\[report\]"'):
        check_libraries(names)
