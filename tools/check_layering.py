#!/usr/bin/env python3
"""Holds the rules that a reader of the sources would otherwise have to: who may depend on whom, and how long a file may be.

    check_layering.py [ROOT]     prints every violation; exit status 1 if there is one

Looked at are the #include lines of C++ files and the DEPS of hw_library, hw_cuda_library and hw_binary in CMake.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Iterator, NamedTuple

# Part -> the parts of ours that it may include and link, besides itself. A part is a folder; the longest match counts.
ALLOWED = {
    "proto": set(),
    "base": set(),
    "base/rpc": {"base", "proto"},
    "base/config": {"base"},
    "kernels": set(),
    "model": {"base", "kernels"},
    "kvtransfer": {"base", "base/rpc", "proto"},
    "worker": {"base", "base/config", "base/rpc", "proto", "kernels", "model", "kvtransfer"},
    "coordinator": {"base", "base/config", "base/rpc", "proto"},
    "decode": {"base", "base/config", "base/rpc", "proto", "kernels", "model", "kvtransfer"},
    "tools/cli": {"base", "base/rpc", "proto"},
}
# Part -> third-party include prefixes that it must not use.
SERVICE = ("absl/", "grpc/", "grpcpp/", "google/", "prometheus/", "nlohmann/")
CUDA = ("cuda", "cublas", "nccl", "curand", "nvrtc", "nvtx")
FORBIDDEN = {
    "base": ("grpc/", "grpcpp/", "google/", "gloo/", "oneapi/", "dnnl") + CUDA,
    "base/rpc": ("gloo/", "oneapi/", "dnnl") + CUDA,
    "base/config": ("grpc/", "grpcpp/", "gloo/", "oneapi/", "dnnl") + CUDA,
    "kernels": SERVICE + ("gloo/", "nccl", "thread", "future", "iostream", "cstdio", "stdio.h"),
    "model": ("grpc/", "grpcpp/", "google/", "gloo/", "oneapi/", "dnnl", "nccl"),
    "kvtransfer": ("gloo/", "oneapi/", "dnnl", "nccl", "cublas"),
    "worker": ("oneapi/", "dnnl"),
    "coordinator": ("gloo/", "oneapi/", "dnnl") + CUDA,
    "decode": ("gloo/", "oneapi/", "dnnl", "nccl"),
    "tools/cli": ("gloo/", "oneapi/", "dnnl") + CUDA,
}
# Third-party CMake targets that a part must not link.
FORBIDDEN_LINKS = {
    "base": ("gRPC::", "gloo", "DNNL::", "CUDA::"),
    "base/rpc": ("gloo", "DNNL::", "CUDA::"),
    "base/config": ("gRPC::", "gloo", "DNNL::", "CUDA::"),
    "kernels": ("absl::", "gRPC::", "protobuf::", "prometheus-cpp::", "nlohmann_json::", "gloo", "Threads::"),
    "model": ("gRPC::", "protobuf::", "gloo", "DNNL::"),
    "kvtransfer": ("gloo", "DNNL::"),
    "worker": ("DNNL::",),
    "coordinator": ("gloo", "DNNL::", "CUDA::"),
    "decode": ("gloo", "DNNL::"),
    "tools/cli": ("gloo", "DNNL::", "CUDA::"),
}
FREE_PARTS = ("tests", "bench")  # may use what they test or time
MAX_LINES, MAX_TEST_LINES = 400, 600
CODE = {".cc", ".h", ".cu", ".cuh", ".py", ".sh", ".cmake"}
# Not in a file of this project, whatever it is for.
UNWANTED = {
    "a path of one machine": re.compile(r"(?<![\w.])/(?:work|farm)/"),
    "the host of a package registry": re.compile(r"deb\.debian\.org|pypi\.org|pythonhosted\.org|registry\.npmjs"),
    "an open end without an issue, TODO(#n)": re.compile(r"\b(?:TODO(?!\(#\d+\))|FIXME|XXX|HACK)\b"),
}
# Deadlines and durations come from SteadyNow(); these files tell people the time, or look at certificates.
WALL_CLOCK = re.compile(r"\babsl::Now\(\)|WaitWithDeadline|AwaitWithDeadline")
WALL_CLOCK_FILES = ("base/log.cc", "base/rpc/transport.cc", "base/clock.h")
INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])([^">]+)[">]', re.MULTILINE)
TARGET = re.compile(r"\b(hw_library|hw_cuda_library|hw_binary)\s*\(([^)]*)\)")
LINKS = re.compile(r"\btarget_link_libraries\s*\(([^)]*)\)")
KEYWORDS = {"SOURCES", "HEADERS", "DEPS", "PRIVATE_DEPS", "OUTPUT", "PUBLIC", "PRIVATE", "INTERFACE"}


class Source(NamedTuple):
    path: str
    text: str


def part_of(path: str) -> str:
    """The part that a path or an include belongs to, "" for none of ours."""
    if path.startswith("headwater/v1/"):
        return "proto"
    matches = [part for part in ALLOWED if path.startswith(part + "/")]
    return max(matches, key=len, default="")


def check_includes(source: Source) -> Iterator[str]:
    part = part_of(source.path)
    for match in INCLUDE.finditer(source.text):
        included = match.group(2)
        line = source.text.count("\n", 0, match.start()) + 1
        other = part_of(included)
        if other and other != part and other not in ALLOWED[part]:
            yield f"{source.path}:{line}: {part} must not include {included} of {other}"
        elif included.startswith(FREE_PARTS):
            yield f"{source.path}:{line}: {part} must not include {included}"
        elif not other and included.startswith(FORBIDDEN.get(part, ())):
            yield f"{source.path}:{line}: {part} must not include {included}"


def linked_targets(text: str) -> Iterator[tuple]:
    """Yields (target, its dependencies) of one CMakeLists.txt."""
    text = re.sub(r"#.*", "", text)
    for match in TARGET.finditer(text):
        name, *words = match.group(2).split()
        dependencies, section = [], ""
        for word in words:
            if word in KEYWORDS:
                section = word
            elif section in ("DEPS", "PRIVATE_DEPS"):
                dependencies.append(word)
        yield name, dependencies
    for match in LINKS.finditer(text):
        name, *words = match.group(1).split()
        yield name, [word for word in words if word not in KEYWORDS]


def target_part(path: str, name: str) -> str:
    # base/CMakeLists.txt defines the libraries of base/config and base/rpc too.
    inner = {"hw_config": "base/config", "hw_rpc": "base/rpc"}
    return inner.get(name, "base") if path.startswith("base/") else part_of(path)


def check_clock(source: Source) -> Iterator[str]:
    if part_of(source.path) and source.path not in WALL_CLOCK_FILES:
        for match in WALL_CLOCK.finditer(source.text):
            line = source.text.count("\n", 0, match.start()) + 1
            yield f"{source.path}:{line}: {match.group(0)} steps with the wall clock; base/clock.h has SteadyNow()"


def check_links(sources: list) -> Iterator[str]:
    lists = [source for source in sources if source.path.endswith("CMakeLists.txt") and part_of(source.path)]
    owner = {name: target_part(source.path, name) for source in lists for name, _ in linked_targets(source.text)}
    for source in lists:
        for name, dependencies in linked_targets(source.text):
            part = owner[name]
            for dependency in dependencies:
                other = owner.get(dependency)
                if other and other != part and other not in ALLOWED[part]:
                    yield f"{source.path}: {name} of {part} must not link {dependency} of {other}"
                elif not other and dependency.startswith(FORBIDDEN_LINKS.get(part, ())):
                    yield f"{source.path}: {name} of {part} must not link {dependency}"


def check_text(source: Source) -> Iterator[str]:
    if Path(source.path).suffix in CODE:
        limit = MAX_TEST_LINES if source.path.startswith("tests/") else MAX_LINES
        lines = source.text.count("\n")
        if lines > limit:
            yield f"{source.path}: {lines} lines, limit {limit}"
    if source.path.endswith(("tools/check_layering.py", "tests/tools/check_layering_test.py")):
        return  # they spell out what is unwanted
    for what, pattern in UNWANTED.items():
        for match in pattern.finditer(source.text):
            line = source.text.count("\n", 0, match.start()) + 1
            yield f"{source.path}:{line}: {match.group(0)!r} is {what}"


def check(sources: list) -> list:
    problems = list(check_links(sources))
    for source in sources:
        problems += check_text(source)
        if Path(source.path).suffix in {".cc", ".h", ".cu", ".cuh"} and part_of(source.path):
            problems += check_includes(source)
            problems += check_clock(source)
    return problems


def read_tree(root: Path) -> list:
    """All text files that git tracks or would track."""
    listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                            check=True, capture_output=True, text=True).stdout
    sources = []
    for path in sorted(set(filter(None, listed.split("\0")))):
        file = root / path
        if not file.is_file():
            continue
        data = file.read_bytes()
        if b"\0" not in data[:8192]:
            sources.append(Source(path, data.decode("utf-8", errors="replace")))
    return sources


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    sources = read_tree(root)
    if not sources:
        print(f"{root} has no files that git knows")
        return 1
    problems = check(sources)
    print("\n".join(problems) if problems else f"{len(sources)} files keep the layering, the budgets and the words")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
