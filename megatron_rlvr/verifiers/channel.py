"""Messages between the verifier pool and its workers: length-prefixed frames, and the replies of a worker.

A worker runs code of the user, which runs on text of the model. So its replies are not unpickled: a reply is a fixed
header and a bounded text, and every field is checked. Anything else is a ProtocolError, for which the pool replaces the
worker. Messages to a worker are pickled, because the trainer trusts itself.
"""

import math
import socket
import struct
from dataclasses import dataclass

from megatron_rlvr.verifiers.verdict import REPLIED_STATUSES, Verdict, is_float32

_LENGTH = struct.Struct("!Q")
# Magic, kind, index of the item, reward, bytes of the detail; then the detail and the traceback in UTF-8.
_HEADER = struct.Struct("!4sBQdI")
_MAGIC = b"RLVR"
_CONTROL_KINDS = ("ready", "accepted", "refused")
_KINDS = (*_CONTROL_KINDS, *REPLIED_STATUSES)
_LONGEST_TEXT = 16_384
LONGEST_REPLY = _HEADER.size + 2 * _LONGEST_TEXT


class ProtocolError(Exception):
    """A worker sent something that is not a reply."""


@dataclass(frozen=True)
class Reply:
    """One reply of a worker.

    Attributes:
        kind: ``ready`` after the verifier was loaded, ``accepted`` before the first item of a request, ``refused`` for
            a UserError; otherwise the status of a verdict.
        index: of the item; 0 for ``ready`` and ``refused``.
        reward: 0 unless the kind is ``ok``.
        detail: what failed; the text of the UserError; the answer of the completion, for ``ok``.
        traceback: of the failure, if the worker sends it.
    """

    kind: str
    index: int = 0
    reward: float = 0.0
    detail: str = ""
    traceback: str = ""

    @property
    def verdict(self) -> Verdict:
        """The verdict that this reply reports."""
        return Verdict(self.reward, self.kind, self.detail)

    def encoded(self) -> bytes:
        """Return the payload of this reply's frame. Long texts are cut."""
        detail = self.detail.encode("utf-8", "replace")[:_LONGEST_TEXT]
        # The end of a traceback is what names the error.
        traceback = self.traceback.encode("utf-8", "replace")[-_LONGEST_TEXT:]
        header = _HEADER.pack(_MAGIC, _KINDS.index(self.kind), self.index, self.reward, len(detail))
        return header + detail + traceback


def decoded(payload: bytes) -> Reply:
    """Return the reply that a frame holds.

    Raises:
        ProtocolError: if any of its fields is out of range.
    """
    if len(payload) < _HEADER.size:
        raise ProtocolError(f"a reply of {len(payload)} bytes")
    magic, kind, index, reward, detail_length = _HEADER.unpack_from(payload)
    if magic != _MAGIC or kind >= len(_KINDS):
        raise ProtocolError("bytes that are no reply")
    if detail_length > min(_LONGEST_TEXT, len(payload) - _HEADER.size):
        raise ProtocolError("a reply whose text is longer than the reply")
    if not is_float32(reward) or (_KINDS[kind] != "ok" and (reward != 0 or math.copysign(1, reward) < 0)):
        raise ProtocolError(f"the reward {reward} in a reply of kind {_KINDS[kind]}")
    text = payload[_HEADER.size :]
    detail, traceback = (part.decode("utf-8", "replace") for part in (text[:detail_length], text[detail_length:]))
    return Reply(_KINDS[kind], index, reward, detail, traceback)


def frame(payload: bytes) -> bytes:
    """Return one frame: the payload's length in 8 bytes, then the payload."""
    return _LENGTH.pack(len(payload)) + payload


class FrameReader:
    """Splits the bytes that arrive on a socket into frames.

    Args:
        connection: the socket.
        longest: number of bytes of the longest frame that the other side may send; None for any.

    Attributes:
        ended: whether the other side has closed the connection.
    """

    def __init__(self, connection: socket.socket, longest: int | None = None) -> None:
        self.connection = connection
        self.ended = False
        self._longest = longest
        self._buffer = bytearray()

    def read_available(self) -> list[bytes]:
        """Read once and return the frames that are now complete, possibly none.

        Blocks if no data is available and the socket blocks. If the other side has closed the connection, frames that
        were complete before that are still returned.

        Raises:
            ProtocolError: if a frame is longer than allowed.
        """
        try:
            received = self.connection.recv(1 << 20)
            self.ended = not received
        except BlockingIOError:
            received = b""
        except ConnectionError:
            received, self.ended = b"", True
        self._buffer += received
        frames = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if self._longest is not None and length > self._longest:
                raise ProtocolError(f"a frame of {length} bytes")
            if len(self._buffer) - start - _LENGTH.size < length:
                break
            start += _LENGTH.size
            frames.append(bytes(self._buffer[start : start + length]))
            start += length
        del self._buffer[:start]
        return frames
