"""A port for ranks of one host to meet at."""

import random
import socket

# Below what Linux gives to those who ask for any port: between the look and the use of one of
# those, another process's connection can get it.
_RANGE = range(12000, 28000)


def free_port() -> int:
    """A port of this host at which nothing listens. OSError if a hundred in a row are taken."""
    source = random.SystemRandom()  # seeds are the same in processes that start together
    for attempt in range(100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port := source.choice(_RANGE)))
                return port
            except OSError:
                if attempt == 99:
                    raise
    raise AssertionError
