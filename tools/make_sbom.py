#!/usr/bin/env python3
"""Writes the bill of materials of programs: SPDX 2.3, as JSON.

    make_sbom.py --output FILE PROGRAM...

Listed are the project with the version and commit that the first program names, the Debian packages of the libraries that the
programs load (and of headers that are compiled in), with their versions and, where their copyright files are machine readable,
licences; and the PyPI packages that tools/requirements.txt pins. A library of no Debian package is listed with its checksum.
The time is SOURCE_DATE_EPOCH's where that is set.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Nothing that is loaded tells of these: headers, and the protos of google.rpc.
COMPILED_IN = ("nlohmann-json3-dev", "golang-github-gogo-googleapis-dev")
PROJECT = "SPDXRef-headwater"
# Debian's short names that are not SPDX's; the rest of KNOWN is written alike.
SPDX_NAMES = {"Expat": "MIT", "expat": "MIT", "BSD-2-clause": "BSD-2-Clause", "BSD-3-clause": "BSD-3-Clause",
              "Apache-2": "Apache-2.0", "GPL-2": "GPL-2.0-only", "GPL-2+": "GPL-2.0-or-later", "GPL-3": "GPL-3.0-only",
              "GPL-3+": "GPL-3.0-or-later", "LGPL-2": "LGPL-2.0-only", "LGPL-2+": "LGPL-2.0-or-later",
              "LGPL-2.1": "LGPL-2.1-only", "LGPL-2.1+": "LGPL-2.1-or-later", "LGPL-3": "LGPL-3.0-only",
              "LGPL-3+": "LGPL-3.0-or-later"}
KNOWN = {"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "ISC", "MIT", "Zlib"}


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def loaded_libraries(programs: list) -> list:
    """Paths of the shared libraries that the programs load, directly or not."""
    paths = set()
    for program in programs:
        for line in output_of("ldd", program).splitlines():
            if "not found" in line:
                raise SystemExit(f"make_sbom: {program}: {line.strip()}")
            if match := re.search(r"(?:=> |^\s*)(/\S+) \(0x", line):
                paths.add(match[1])
    return sorted(paths)


def owners(paths: list) -> dict:
    """The Debian package ("name:arch" or "name") of each file that is of one. /lib is /usr/lib, and packages name either."""
    candidates = {}
    for path in paths:
        real = os.path.realpath(path)
        for candidate in (path, real, f"/usr{path}", f"/usr{real}", path.removeprefix("/usr"), real.removeprefix("/usr")):
            candidates[candidate] = path
    # Ends with 1 where it knows one of the names not.
    said = subprocess.run(["dpkg-query", "--search", *candidates], capture_output=True, text=True, check=False).stdout
    found = {}
    for line in said.splitlines():
        package, _, name = line.rpartition(": ")
        if name in candidates and "," not in package and not package.startswith("diversion"):
            found[candidates[name]] = package
    return found


def licence_names(package: str) -> list:
    """What the Files paragraphs of a machine-readable copyright file name; empty where it is not one."""
    file = Path("/usr/share/doc") / package / "copyright"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if not text.startswith("Format:"):
        return []
    names = set()
    for paragraph in re.split(r"\n\s*\n", text):
        if re.match(r"Files:", paragraph) and (match := re.search(r"^License:[ \t]*(\S.*)$", paragraph, re.MULTILINE)):
            names.add(" ".join(match[1].split()))
    return sorted(names)


def licence_expression(names: list, extracted: dict) -> str:
    """SPDX's expression of Debian's names. One that SPDX does not have becomes a reference, whose text goes to `extracted`."""
    parts = []
    for name in names:
        words = [SPDX_NAMES.get(word, word) for word in re.split(r",? (and|or) ", name)]
        if all(word in KNOWN or word in SPDX_NAMES.values() for word in words[::2]):
            words[1::2] = [word.upper() for word in words[1::2]]
            parts.append(f"({' '.join(words)})" if len(words) > 1 else words[0])
        else:
            reference = "LicenseRef-Debian-" + re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-")
            extracted[reference] = name
            parts.append(reference)
    return " AND ".join(sorted(set(parts))) or "NOASSERTION"


def package_entry(identifier: str, name: str, **more) -> dict:
    safe = re.sub(r"[^A-Za-z0-9.-]", lambda match: f"-x{ord(match[0]):02x}", identifier)
    return {"SPDXID": f"SPDXRef-{safe}", "name": name, "downloadLocation": "NOASSERTION", "filesAnalyzed": False,
            "licenseConcluded": "NOASSERTION", "licenseDeclared": "NOASSERTION", "copyrightText": "NOASSERTION", **more}


def purl(locator: str) -> list:
    return [{"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl",
             "referenceLocator": locator.replace("+", "%2B")}]


def project_entry(program: str) -> dict:
    said = output_of(program, "--version")
    match = re.search(r" (\d+\.\d+\.\d+) \(commit ([0-9a-f]+\+?|unknown),", said)
    if not match:
        raise SystemExit(f"make_sbom: {program} --version says no version and commit: {said!r}")
    return package_entry("headwater", "headwater", versionInfo=match[1], sourceInfo=f"commit {match[2]}",
                         primaryPackagePurpose="APPLICATION", supplier="Organization: Headwater maintainers")


def debian_entry(package: str, files: list, extracted: dict) -> dict:
    form = "\\t".join(f"${{{field}}}" for field in ("Package", "Version", "Architecture", "Maintainer"))
    name, version, architecture, maintainer = output_of("dpkg-query", "--show", f"--showformat={form}", package).split("\t")
    contact = re.fullmatch(r"(.*\S) <(\S+)>", maintainer)
    return package_entry(
        f"deb-{name}", name, versionInfo=version, licenseDeclared=licence_expression(licence_names(name), extracted),
        supplier=f"Organization: {contact[1]} ({contact[2]})" if contact else "NOASSERTION",
        comment="loaded: " + ", ".join(files) if files else "compiled in",
        externalRefs=purl(f"pkg:deb/debian/{name}@{version}?arch={architecture}&distro=debian-12"))


def python_entries(requirements: str) -> list:
    entries = []
    for line in requirements.splitlines():
        if line.strip() and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line.strip())
            if not match:
                raise SystemExit(f"make_sbom: tools/requirements.txt: {line!r} pins no version")
            entries.append(package_entry(f"pypi-{match[1]}", match[1], versionInfo=match[2], comment="for tests and tools",
                                         externalRefs=purl(f"pkg:pypi/{match[1]}@{match[2]}")))
    return entries


def make(programs: list, requirements: str) -> dict:
    extracted, packages = {}, {}
    libraries = loaded_libraries(programs)
    owned = owners(libraries)
    for path, package in sorted(owned.items()):
        packages.setdefault(package, []).append(Path(path).name)
    debian = [debian_entry(package, files, extracted) for package, files in sorted(packages.items())]
    static = [debian_entry(package, [], extracted) for package in COMPILED_IN]
    others = [package_entry(f"file-{Path(path).name}", Path(path).name, comment="loaded; of no Debian package",
                            checksums=[{"algorithm": "SHA256",
                                        "checksumValue": hashlib.sha256(Path(path).read_bytes()).hexdigest()}])
              for path in libraries if path not in owned]
    python = python_entries(requirements)
    entries = [project_entry(programs[0]), *debian, *static, *others, *python]

    relations = [("SPDXRef-DOCUMENT", "DESCRIBES", PROJECT)]
    relations += [(PROJECT, "DYNAMIC_LINK", entry["SPDXID"]) for entry in debian + others]
    relations += [(PROJECT, "STATIC_LINK", entry["SPDXID"]) for entry in static]
    relations += [(entry["SPDXID"], "DEV_DEPENDENCY_OF", PROJECT) for entry in python]
    created = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())))
    content = json.dumps(entries, sort_keys=True)
    return {
        "spdxVersion": "SPDX-2.3", "dataLicense": "CC0-1.0", "SPDXID": "SPDXRef-DOCUMENT",
        "name": f"headwater-{entries[0]['versionInfo']}",
        "documentNamespace": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, content)}",
        "creationInfo": {"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", created),
                         "creators": [f"Tool: headwater-make-sbom-{entries[0]['versionInfo']}"]},
        "packages": entries,
        "relationships": [{"spdxElementId": one, "relationshipType": kind, "relatedSpdxElement": other}
                          for one, kind, other in relations],
        "hasExtractedLicensingInfos": [
            {"licenseId": reference, "name": name,
             "extractedText": f"'{name}' in the copyright files of the Debian packages that refer to it."}
            for reference, name in sorted(extracted.items())],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("programs", nargs="+", metavar="PROGRAM")
    arguments = parser.parse_args()
    document = make(arguments.programs, (ROOT / "tools" / "requirements.txt").read_text())
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
