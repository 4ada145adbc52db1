"""Tests of tools/make_sbom.py, and of the bill of materials of this build: required fields, and nothing that is linked is
missing."""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import packaging_facts as facts
from packaging_facts import BUILD, ROOT

sys.path.insert(0, str(ROOT / "tools"))

import make_sbom  # noqa: E402

IDENTIFIER = re.compile(r"SPDXRef-[A-Za-z0-9.-]+")
EXPRESSION = re.compile(r"NOASSERTION|\(?[A-Za-z0-9.-]+( (AND|OR) \(?[A-Za-z0-9.-]+\)?)*\)?")
RELATIONS = {"DESCRIBES", "DYNAMIC_LINK", "STATIC_LINK", "DEV_DEPENDENCY_OF"}


def problems(document: dict) -> list:
    """Where the document lacks what SPDX 2.3 requires."""
    required = ("name", "documentNamespace", "creationInfo", "packages", "relationships")
    found = [f"no {name}" for name in required if name not in document]
    if found:
        return found
    if (document["spdxVersion"], document["dataLicense"], document["SPDXID"]) != ("SPDX-2.3", "CC0-1.0", "SPDXRef-DOCUMENT"):
        found.append("not a document of SPDX 2.3")
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", document["creationInfo"]["created"]):
        found.append(f"created {document['creationInfo']['created']}")
    known = {"SPDXRef-DOCUMENT"}
    references = {one["licenseId"] for one in document["hasExtractedLicensingInfos"] if one["extractedText"]}
    for package in document["packages"]:
        identifier = package["SPDXID"]
        if not IDENTIFIER.fullmatch(identifier) or identifier in known:
            found.append(f"{identifier} is no identifier of its own")
        known.add(identifier)
        required = ("name", "downloadLocation", "copyrightText")
        found += [f"{identifier} has no {name}" for name in required if not package.get(name)]
        if not package.get("versionInfo") and not package.get("checksums"):
            found.append(f"{identifier} has neither version nor checksum")
        if not EXPRESSION.fullmatch(package["licenseDeclared"]):
            found.append(f"{identifier} has the licence {package['licenseDeclared']}")
        found += [f"{identifier}: {name} is explained nowhere" for name in
                  re.findall(r"LicenseRef-[A-Za-z0-9.-]+", package["licenseDeclared"]) if name not in references]
    for relation in document["relationships"]:
        ends = {relation["spdxElementId"], relation["relatedSpdxElement"]}
        if relation["relationshipType"] not in RELATIONS or not ends <= known:
            found.append(f"relation {relation}")
    return found


class Parts(unittest.TestCase):
    def test_licences_become_expressions_of_spdx(self):
        extracted = {}
        for names, wanted in (([], "NOASSERTION"), (["Expat"], "MIT"),
                              (["GPL-2+ or Expat", "BSD-3-clause"], "(GPL-2.0-or-later OR MIT) AND BSD-3-Clause"),
                              (["U OF I"], "LicenseRef-Debian-U-OF-I"), (["Expat and odd"], "LicenseRef-Debian-Expat-and-odd")):
            self.assertEqual(make_sbom.licence_expression(names, extracted), wanted)
        self.assertEqual(extracted, {"LicenseRef-Debian-U-OF-I": "U OF I", "LicenseRef-Debian-Expat-and-odd": "Expat and odd"})

    def test_every_pypi_package_is_pinned(self):
        pinned = make_sbom.python_entries((ROOT / "tools/requirements.txt").read_text())
        locators = {one["name"]: one["externalRefs"][0]["referenceLocator"] for one in pinned}
        self.assertRegex(locators["grpcio"], r"^pkg:pypi/grpcio@\d+\.\d+")
        make_sbom.python_entries((ROOT / "deploy/images/cuda-requirements.txt").read_text())
        for line in ("numpy", "numpy>=2", "numpy==2.*"):
            with self.assertRaisesRegex(SystemExit, "pins no version"):
                make_sbom.python_entries(f"# comment\n{line}\n")

    def test_a_library_of_no_package_is_listed_with_its_checksum(self):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "own.c").write_text("int own(void) { return 0; }\n")
            said = "p 1.2.3 (commit 0123456789ab+, protocol 1)"
            (folder / "main.c").write_text("int puts(const char*);\nint own(void);\n"
                                           f'int main(void) {{ puts("{said}"); return own(); }}\n')
            for words in (["-shared", "-fPIC", "-o", "libown.so", "own.c"],
                          ["-o", "program", "main.c", "-L.", "-lown", "-Wl,-rpath,$ORIGIN"]):
                subprocess.run(["gcc", *words], cwd=folder, check=True)
            made = subprocess.run([sys.executable, ROOT / "tools/make_sbom.py", "--output", "sbom.json", "./program"],
                                  cwd=folder, capture_output=True, text=True, check=False)
            self.assertEqual(made.returncode, 0, made.stderr)
            document = json.loads((folder / "sbom.json").read_text())
            digest = hashlib.sha256((folder / "libown.so").read_bytes()).hexdigest()
        self.assertEqual(problems(document), [])
        packages = {package["name"]: package for package in document["packages"]}
        self.assertEqual(packages["libown.so"]["checksums"], [{"algorithm": "SHA256", "checksumValue": digest}])
        self.assertEqual(packages["libc6"]["comment"].split(",")[0], "loaded: libc.so.6")
        self.assertEqual((packages["headwater"]["versionInfo"], packages["headwater"]["sourceInfo"]),
                         ("1.2.3", "commit 0123456789ab+"))

    def test_one_version_everywhere(self):
        version = facts.version()
        self.assertIn(f"project(headwater VERSION {version} ", (ROOT / "CMakeLists.txt").read_text())
        self.assertIn(f'\nversion = "{version}"\n', (ROOT / "python/pyproject.toml").read_text())
        self.assertTrue((ROOT / "deploy/packages/changelog").read_text().startswith(f"headwater ({version}) "))


class Document(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.document = json.loads((BUILD / "sbom.spdx.json").read_text())

    def test_required_fields(self):
        self.assertEqual(problems(self.document), [])

    def test_defects_are_found(self):
        for damage, wanted in ((lambda d: d.pop("documentNamespace"), "no documentNamespace"),
                               (lambda d: d["packages"][1].pop("versionInfo"), "neither version nor checksum"),
                               (lambda d: d["packages"].pop(1), "relation"),
                               (lambda d: d["hasExtractedLicensingInfos"].clear(), "explained nowhere"),
                               (lambda d: d["packages"].append(d["packages"][0]), "no identifier of its own"),
                               (lambda d: d["packages"][0].update(licenseDeclared="public domain"), "has the licence")):
            document = json.loads(json.dumps(self.document))
            damage(document)
            self.assertIn(wanted, "\n".join(problems(document)))

    def test_the_project_and_what_it_loads(self):
        packages = {package["name"]: package for package in self.document["packages"]}
        said = subprocess.run([BUILD / "bin/headwater", "--version"], capture_output=True, text=True, check=True).stdout
        self.assertEqual(packages["headwater"]["versionInfo"], facts.version())
        self.assertIn(packages["headwater"]["sourceInfo"], said)
        named = {name for package in packages.values()
                 for name in package.get("comment", "").removeprefix("loaded: ").split(", ")}
        named |= set(packages)  # libraries of no Debian package have the name of their file
        loaded = set()
        for name in facts.PROGRAMS:
            text = subprocess.run(["ldd", BUILD / "bin" / name], capture_output=True, text=True, check=True).stdout
            loaded |= {path.split("/")[-1] for path in re.findall(r"(/\S+) \(0x", text)}
        self.assertTrue({"libc.so.6", "libgrpc++.so.1.51", "libisal.so.2"} <= loaded, loaded)
        self.assertEqual(loaded - named, set())
        self.assertIn("nlohmann-json3-dev", packages)

    def test_versions_are_those_installed(self):
        debian = [package for package in self.document["packages"] if package["SPDXID"].startswith("SPDXRef-deb-")]
        shown = subprocess.run(["dpkg-query", "--show", "--showformat=${Package}=${Version}\\n"], capture_output=True,
                               text=True, check=True).stdout.split()
        self.assertGreater(len(debian), 10)
        for package in debian:
            self.assertIn(f"{package['name']}={package['versionInfo']}", shown)


if __name__ == "__main__":
    facts.need("dpkg-query", "gcc", "ldd")
    unittest.main(verbosity=2)
