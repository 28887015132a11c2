"""The listener process: `process` accepts, `visit` is one connection, `threads` its thread, `observer` its log."""
