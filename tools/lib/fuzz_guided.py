"""Fuzzing that is led by the coverage of the code: libFuzzer by way of atheris, where that is installed.

For hours by hand; nothing else needs it. It makes inputs that reach new lines into further inputs, which `tools.lib.fuzz`
can only guess at.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from tools.lib.fuzz import MEMORY, Target


def guided(target: Target, seconds: float, seed: str, folder: Path) -> int:
    """Fuzz one target for so long; ends the process when atheris is there.

    What fails is saved as ``folder/NAME-crash-...``, and what reached something new stays in ``folder/NAME-corpus``, where
    the next run finds it. ``seed``: digits.
    """
    try:
        # No dependency of ours: it is looked for only when somebody asks for it.
        atheris: Any = importlib.import_module("atheris")
    except ImportError:
        print("tools/fuzz: atheris is not installed; pip install atheris, or run without --guided", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}, {seconds:g} seconds", flush=True)
    corpus = folder / f"{target.name}-corpus"
    corpus.mkdir(exist_ok=True)
    for number, data in enumerate(target.seeds()):
        (corpus / f"seed{number}").write_bytes(data)

    def try_one(data: bytes) -> None:
        target.check(data)

    atheris.instrument_all()
    options = {
        "max_total_time": max(1, round(seconds)),
        "seed": int(seed) if seed.isdigit() else 1,
        "max_len": 8192,
        "timeout": 10,
        "malloc_limit_mb": MEMORY >> 20,
        "artifact_prefix": f"{folder}/{target.name}-",
    }
    atheris.Setup([sys.argv[0], *(f"-{name}={value}" for name, value in options.items()), str(corpus)], try_one)
    atheris.Fuzz()
    return 0
