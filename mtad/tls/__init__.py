"""TLS for both roles: the only `import ssl`.

`connection` is the encrypted stream, `server` and `client` make one of a connection, `certificates` reads the files.
"""
