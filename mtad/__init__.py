"""mtad, a mail transfer agent: receives mail, keeps it safe, delivers it, and can say what became of it.

The packages follow the journey of a message; ``docs/architecture.md`` has the picture and the floors.
"""

from typing import Final

VERSION: Final = "0.1.0"
