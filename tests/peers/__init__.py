"""The other side, for tests and tools: a DNS server and mail exchangers that do exactly what they are told.

Real sockets on loopback addresses, each peer in threads of its own, all of it over when its ``with`` block ends. Nothing
here sleeps to wait for something: the peers offer conditions to wait for.
"""
