"""A log as a file: squeezed, and sealed with digests. A digest finds any change; a keyed one proves who wrote it.

The layout is set down in docs/seed-logs.md. Nothing is unpacked before its digest was found to be right.
"""

from __future__ import annotations

import hashlib
import hmac
import struct

import zstandard

from thinwire.errors import ConfigError, PacketError

MAGIC, FORMAT = b"TWSL", 1
_HEADER = struct.Struct("<4sHHQ32s32s")  # magic, format, flags, length of the file, digest, keyed digest: 80 bytes
_DIGEST = 16  # where the digests begin
_KEYED = 1
_MOST = 1 << 28  # bytes of content that are opened: 250 million scalars
_LEVEL = 19


def seal(content: bytes, key: bytes | None = None) -> bytes:
    """A file of this content; signed if there is a key.  key: of `key_of`"""
    frame = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(content)
    flags = 0 if key is None else _KEYED
    start = _HEADER.pack(MAGIC, FORMAT, flags, _HEADER.size + len(frame), b"", b"")[:_DIGEST]
    signed = bytes(32) if key is None else _digest(start, frame, key=key)
    return start + _digest(start, signed, frame) + signed + frame


def unseal(data: bytes, key: bytes | None = None) -> bytes:
    """The content of a file.

    key     if given, the file must be signed with it
    raises  PacketError for anything that is not whole and unchanged, ConfigError for another key
    """
    frame = _checked(data, key)
    try:
        size = zstandard.frame_content_size(frame)
        if not 0 <= size <= _MOST:
            raise wrong(f"a log that says its content has {size} bytes", _HEADER.size)
        content: bytes = zstandard.ZstdDecompressor().decompress(frame, max(size, 1), allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise wrong(f"the log cannot be unpacked: {error}", _HEADER.size) from error
    return content


def key_of(secret: bytes) -> bytes:
    """The key that a key file stands for: 64 bytes, of any 16 or more."""
    if len(secret) < 16:
        raise ConfigError(
            f"a key of {len(secret)} bytes",
            expected="16 bytes or more that nobody can guess",
            mend="head -c 32 /dev/urandom > team.key",
        )
    return hashlib.blake2b(secret, person=b"thinwire key").digest()


def is_signed(data: bytes) -> bool:
    """Whether a log that was read has a keyed digest."""
    return bool(_HEADER.unpack_from(data)[2] & _KEYED)


def _checked(data: bytes, key: bytes | None) -> bytes:
    """The frame, once length and digests are what they should be."""
    if len(data) < _HEADER.size:
        raise wrong(f"only {len(data)} bytes, and a log's header has {_HEADER.size}", len(data))
    magic, version, flags, length, plain, signed = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise wrong(f"the first bytes are {magic!r}, not {MAGIC!r}: this is no log of seeds", 0)
    if version != FORMAT:
        raise PacketError(
            f"a log of format {version}", offset=4, expected=f"format {FORMAT}", mend="read it with a newer thinwire"
        )
    if length != len(data):
        raise wrong(f"the log says it has {length} bytes, and {len(data)} are here", 8)
    start, frame = data[:_DIGEST], data[_HEADER.size :]
    if plain != _digest(start, signed, frame):
        raise wrong("the log's digest does not match: bytes of it were changed", _DIGEST)
    if flags not in (0, _KEYED) or (flags == 0 and signed != bytes(32)):
        raise wrong(f"a log with unknown flags {flags:#06x}, or a signature that they deny", 6)
    if key is None:
        return frame
    if not flags & _KEYED:
        raise ConfigError(
            "the log is not signed",
            expected="a log with a keyed digest, since a key was given",
            mend="have it written with `thinwire export --seeds --key FILE`, or read it without a key",
        )
    if not hmac.compare_digest(signed, _digest(start, frame, key=key)):
        raise ConfigError(
            "the log was signed with another key",
            expected="the key that it is read with",
            mend="ask who wrote it for the key, and trust the log only if you trust them",
        )
    return frame


def _digest(*parts: bytes, key: bytes = b"") -> bytes:
    state = hashlib.blake2b(digest_size=32, key=key, person=b"thinwire log")
    for part in parts:
        state.update(part)
    return state.digest()


def wrong(said: str, offset: int) -> PacketError:
    """What is wrong with a file, at this byte."""
    return PacketError(
        said, offset=offset, expected="a log of seeds, whole and unchanged", mend="copy it again from who wrote it"
    )
