#!/usr/bin/env python3
"""Lints the protos with buf's STANDARD rules.

    lint_protos.py [PROTO_DIR]

protoc compiles them to a descriptor image and buf (PyPI buf-bin) judges the image, so that buf needs no network for the
google/rpc imports. Exits with 77 (skipped) where buf or protoc is absent.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOOGLEAPIS = [Path("/usr/share/gocode/src/github.com/gogo/googleapis"), Path("/usr/share/googleapis"), Path("/usr/include")]
SKIPPED = 77


def googleapis_dir():
    folders = list(GOOGLEAPIS)
    try:
        from google.rpc import status_pb2

        folders.append(Path(status_pb2.__file__).parents[2])
    except ImportError:
        pass
    return next((folder for folder in folders if (folder / "google/rpc/status.proto").is_file()), None)


def lint(proto: Path, protoc: str, buf: str, googleapis: Path) -> subprocess.CompletedProcess:
    sources = sorted(str(path.relative_to(proto)) for path in proto.glob("headwater/v1/*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.binpb"
        compiled = subprocess.run([protoc, f"-I{proto}", f"-I{googleapis}", "--include_imports", "--include_source_info",
                                   "-o", str(image), *sources], capture_output=True, text=True, timeout=60)
        if compiled.returncode != 0 or not sources:
            return compiled
        return subprocess.run([buf, "lint", str(image), "--config", str(proto / "buf.yaml"), "--path", "headwater/v1"],
                              capture_output=True, text=True, timeout=120)


def main() -> int:
    proto = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "proto"
    # buf-bin puts buf beside the interpreter of its environment.
    buf = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
    protoc, googleapis = shutil.which("protoc"), googleapis_dir()
    for name, found in (("buf (PyPI buf-bin)", buf), ("protoc", protoc), ("google/rpc/status.proto", googleapis)):
        if not found:
            print(f"SKIPPED: {name} is absent")
            return SKIPPED
    if not list(proto.glob("headwater/v1/*.proto")):
        print(f"{proto} has no headwater/v1/*.proto")
        return 1
    result = lint(proto, protoc, buf, googleapis)
    print(result.stdout + result.stderr, end="")
    print("the protos keep buf's STANDARD rules" if result.returncode == 0 else "buf found the lines above")
    return 0 if result.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
