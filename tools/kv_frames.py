"""KV frames as kvtransfer/frame.h has them, and a small KV stream in them: what both ends of KvTransferService say."""

import hashlib
import struct

from google.protobuf import text_format

MAGIC, VERSION, PREFIX = b"HWKV", 1, struct.Struct("<4sHHII")
SESSION, TOKEN, REQUEST, FINGERPRINT = "golden-session", "golden-token", "golden-request", "golden-model"
LAYERS, HEADS, HEAD_DIM, TOKENS, BLOCK_TOKENS, ELEMENT_BYTES = 1, 2, 4, 40, 16, 2
KINDS = ("KV_KIND_K", "KV_KIND_V")


def _crc_table() -> list:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def encode(header, payload: bytes = b"", version: int = VERSION) -> bytes:
    body = header.SerializeToString(deterministic=True)
    return PREFIX.pack(MAGIC, version, 0, len(body), crc32c(body)) + body + payload


def decode(schema, frame: bytes) -> tuple:
    """(KvFrameHeader, payload). ValueError: not a frame of this version."""
    magic, version, zero, size, crc = PREFIX.unpack_from(frame)
    body = frame[PREFIX.size:PREFIX.size + size]
    if (magic, version, zero, len(body), crc) != (MAGIC, VERSION, 0, size, crc32c(body)):
        raise ValueError(f"no KV frame: {magic} version {version}, {size} bytes of header")
    header = schema.new("headwater.v1.KvFrameHeader")
    header.ParseFromString(body)
    return header, frame[PREFIX.size + size:]


def digest(blocks) -> bytes:
    """Of (index, payload bytes, CRC) of all blocks; kvtransfer/digest.h."""
    total = sum(int.from_bytes(hashlib.sha256(struct.pack("<QQI", *block)).digest()[:16], "little") for block in blocks)
    return (total % (1 << 128)).to_bytes(16, "little")


def open_request(schema):
    request = schema.new("headwater.v1.OpenSessionRequest")
    request.session_id, request.session_token, request.request_id, request.epoch = SESSION, TOKEN, REQUEST, 1
    layout = request.layout
    layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.num_tokens = LAYERS, HEADS, HEAD_DIM, TOKENS
    layout.block_tokens, layout.model_fingerprint = BLOCK_TOKENS, FINGERPRINT
    text_format.Merge("dtype: KV_DTYPE_BF16", layout)
    return request


def block_frames(schema) -> list:
    """(header, payload) of the session's blocks, by block index."""
    frames = []
    for kind in KINDS:
        for begin in range(0, TOKENS, BLOCK_TOKENS):
            end = min(begin + BLOCK_TOKENS, TOKENS)
            size = (end - begin) * HEADS * HEAD_DIM * ELEMENT_BYTES
            payload = bytes((7 * len(frames) + 3 * i) % 251 for i in range(size))
            header = schema.new("headwater.v1.KvFrameHeader")
            block = header.block
            block.epoch, block.head_end, block.token_begin, block.token_end = 1, HEADS, begin, end
            block.crc32c = crc32c(payload)
            text_format.Merge(f"kind: {kind}", block)
            frames.append((header, payload))
    return frames


def _header(schema, text: str):
    return text_format.Parse(text, schema.new("headwater.v1.KvFrameHeader"))


def golden_frames(schema) -> dict:
    """{file name: bytes} of one KV stream: what the sender writes, what the receiver answers, and the calls around it."""
    blocks = block_frames(schema)
    client = {"hello": (_header(schema, f'hello {{ session_id: "{SESSION}" session_token: "{TOKEN}" epoch: 1 rank: 3 }}'), b"")}
    client.update({f"block_{i}": frame for i, frame in enumerate(blocks)})
    server = {"state_none": _header(schema, "state { epoch: 1 }"),
              "state_all": _header(schema, f'state {{ epoch: 1 stored_blocks: "\\x{(1 << len(blocks)) - 1:02x}" }}')}
    server.update({f"ack_{i}": _header(schema, f"ack {{ status: KV_ACK_STATUS_STORED block_indices: {i} }}")
                   for i in range(len(blocks))})
    commit = schema.new("headwater.v1.CommitSessionRequest")
    commit.session_id, commit.session_token, commit.epoch, commit.first_token = SESSION, TOKEN, 1, 77
    commit.kv_digest = digest((i, len(payload), header.block.crc32c) for i, (header, payload) in enumerate(blocks))
    commit.token_ids.extend(range(1000, 1000 + TOKENS))
    files = {"frame.session.txtpb": text_format.MessageToString(open_request(schema)).encode(),
             "frame.commit.txtpb": text_format.MessageToString(commit).encode()}
    for name, (header, payload) in {**client, **{name: (header, b"") for name, header in server.items()}}.items():
        files[f"frame.{name}.bin"] = encode(header, payload)
        files[f"frame.{name}.txtpb"] = text_format.MessageToString(header).encode()
    return files
