"""What the actors' plain classes do beside calling others."""

from __future__ import annotations

import contextlib
import gc

from verst.runtime.imports import large_imports


def test_nothing_is_collected_while_much_is_imported():
    assert gc.isenabled()
    with contextlib.suppress(ImportError), large_imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()  # also where the import failed
    gc.disable()
    try:
        with large_imports():
            pass
        assert not gc.isenabled()  # as its owner had it
    finally:
        gc.enable()
