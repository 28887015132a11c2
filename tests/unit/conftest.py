"""For all unit tests: hypothesis judges no time, which belongs to whatever else the machine does."""

from __future__ import annotations

from hypothesis import settings

# Made of the profile in force, so that what CI or the search for mutants has set stays.
settings.register_profile("patient", settings(), deadline=None)
settings.load_profile("patient")
