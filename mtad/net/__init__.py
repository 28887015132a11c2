"""The network: the only package that imports socket.

`connection` is an open connection, for both roles; TLS puts another `connection.Stream` in its place. `listening` takes
connections in, `channels` are the local sockets between our own processes.
"""
