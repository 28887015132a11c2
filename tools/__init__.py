"""Programs for those who work on mtad; what several of them share is in `tools.lib`."""
