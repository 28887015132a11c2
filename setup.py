"""Packaging of mtad; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^VERSION: Final = "([^"]+)"', (HERE / "mtad/__init__.py").read_text(encoding="utf-8"), re.M)
assert VERSION is not None

setup(
    name="mtad",
    version=VERSION[1],
    description="A mail transfer agent that keeps what it acknowledged and can say why a message waits",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["mtad", "mtad.*"]),
    package_data={"mtad": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "click>=8.1",
        "cryptography>=45",
        "dnspython[idna]>=2.4",
        "idna>=3.3",
        "msgspec>=0.18",
        "python-daemon>=3.0",
        "rich>=13",
        "scramp>=1.5",
        "setproctitle>=1.3",
    ],
    extras_require={
        "test": [
            "hypothesis>=6",
            "mypy>=1.8",
            "pytest>=8",
            "pytest-timeout>=2",
            "pytest-xdist>=3",
            "ruff>=0.4",
            "trustme>=1",
        ],
        "mutation": [  # for tools/mutants only
            "coverage>=7",
            "mutmut>=3.8,<4",
        ],
    },
    entry_points={
        "console_scripts": [
            "mtad = mtad.cli.mtad:main",
            "mtaq = mtad.cli.mtaq:main",
            "mtad-flush = mtad.cli.mtad_flush:main",
        ],
    },
)
