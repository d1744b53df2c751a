import importlib
import sys

from processes import ROOT


def benchmark(name):
    """A module of `benchmarks/`, which find one another there."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
