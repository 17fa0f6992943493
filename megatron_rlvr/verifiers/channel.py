"""Length-prefixed frames over a socket, between the verifier pool and its workers.

This uses a plain socket, not a ``multiprocessing.connection.Connection``, because a socket has a timeout for sending,
and one system call reads all replies that have arrived.
"""

import socket
import struct

_LENGTH = struct.Struct("!Q")


def send_frame(connection: socket.socket, payload: bytes) -> None:
    """Send one frame: the payload's length in 8 bytes, then the payload."""
    connection.sendall(_LENGTH.pack(len(payload)) + payload)


class FrameReader:
    """Splits the bytes that arrive on a socket into frames.

    Attributes:
        ended: whether the other side has closed the connection.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.ended = False
        self._buffer = bytearray()

    def read_available(self) -> list[bytes]:
        """Read once and return the frames that are now complete, possibly none. Blocks if no data is available.

        If the other side has closed the connection, frames that were complete before that are still returned.
        """
        try:
            received = self.connection.recv(1 << 20)
        except ConnectionError:
            received = b""
        if not received:
            self.ended = True
        self._buffer += received
        frames = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if len(self._buffer) - start - _LENGTH.size < length:
                break
            start += _LENGTH.size
            frames.append(bytes(self._buffer[start : start + length]))
            start += length
        del self._buffer[:start]
        return frames
