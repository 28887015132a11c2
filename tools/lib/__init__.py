"""The parts of the programs in tools/ that are worth a test."""
