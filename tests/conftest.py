"""Which tests run when nobody says: all but the sweeps, which would take the whole beyond five minutes on two cores.

MTAD_SWEEPS=1 tools/test runs them, too; each is the short form of a sweep of tools/crashtest.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("MTAD_SWEEPS") else ["e2e/test_sweep_*.py"]
