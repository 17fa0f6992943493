"""Length-prefixed frames over a socket, between the verifier pool and its workers."""

import socket
import struct

_LENGTH = struct.Struct("!Q")


def send_frame(connection: socket.socket, payload: bytes) -> None:
    """Send one frame: its length in 8 bytes, then the bytes."""
    connection.sendall(_LENGTH.pack(len(payload)) + payload)


class FrameReader:
    """Cuts what arrives on a socket into frames."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.ended = False
        self._buffer = bytearray()

    def read_available(self) -> list[bytes]:
        """Read once (blocking if nothing is there) and return the frames that are now complete, maybe none.

        Sets ``ended`` when the other side has closed; what was complete before that is still returned.
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
