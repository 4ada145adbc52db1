#!/usr/bin/env python3
"""Writes what a version of the protos puts on the wire to tests/proto/golden/VERSION, once, when that version is released.

    make_wire_golden.py v0.2

descriptors.binpb: the protos' FileDescriptorSet. MESSAGE.binpb and MESSAGE.txtpb: an example of each message that crosses
a process boundary, as bytes and as text, with every field set; MESSAGE.CASE.binpb where it has oneofs, one for each case.
frame.*.bin: a KV stream, of a session of one layer; frame.session.txtpb and frame.commit.txtpb: what opens and commits it.
The same protos give the same files. A directory that is there is never written again: tests/proto/golden_test.py holds
all later protos against it. docs/upgrade.md says when to make one.
"""

import argparse
import re
import sys
from pathlib import Path

from google.protobuf import text_format

from kv_frames import golden_frames
from wire_schema import ROOT, Schema, compile_protos, examples

GOLDEN = ROOT / "tests/proto/golden"


def as_text(message) -> str:
    return text_format.MessageToString(message)


def contents(schema: Schema) -> dict:
    """{file name: bytes} of a version's directory."""
    files = {"descriptors.binpb": schema.files.SerializeToString(deterministic=True)}
    for stem, message in examples(schema).items():
        files[f"{stem}.binpb"] = message.SerializeToString(deterministic=True)
        files[f"{stem}.txtpb"] = as_text(message).encode()
    files.update(golden_frames(schema))
    return files


def write(folder: Path, files: dict) -> None:
    """FileExistsError where the version has a directory already."""
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="such as v0.2")
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="directory of all versions")
    arguments = parser.parse_args()
    if not re.fullmatch(r"v\d+\.\d+", arguments.version):
        parser.error(f"{arguments.version} is not vMAJOR.MINOR")
    folder = arguments.golden / arguments.version
    files = contents(Schema(compile_protos()))
    try:
        write(folder, files)
    except FileExistsError:
        print(f"{folder} is there already: what a version put on the wire does not change", file=sys.stderr)
        return 1
    print(f"{len(files)} files in {folder}, {sum(map(len, files.values()))} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
