"""All fuzz targets."""

from __future__ import annotations

from typing import Final

from tools.lib import fuzz_client, fuzz_content, fuzz_files, fuzz_grammar, fuzz_sasl, fuzz_server, fuzz_wire
from tools.lib.fuzz import Target

TARGETS: Final[dict[str, Target]] = {
    target.name: target
    for target in (
        fuzz_server.TARGET,
        fuzz_client.TARGET,
        fuzz_content.TARGET,
        *fuzz_wire.TARGETS,
        fuzz_grammar.TARGET,
        *fuzz_files.TARGETS,
        fuzz_sasl.TARGET,
    )
}
