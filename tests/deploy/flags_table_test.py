"""docs/flags.md is what the programs' --help says, and its writer takes help texts as they are written."""

import os
import re
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import make_flags_table  # noqa: E402
from make_flags_table import read_flags, section  # noqa: E402

BIN = Path(os.environ.get("HEADWATER_BIN", ""))
if not os.access(BIN / "headwater-coordinator", os.X_OK):
    print(f"SKIPPED: HEADWATER_BIN={BIN} has no headwater-coordinator")
    sys.exit(77)

HELP = """usage: program [flags]

Words.

flags:
  --one=VALUE (default 80 % (about))
      a file
  --two
      on or off
"""


class FlagsTest(unittest.TestCase):
    def test_a_help_text_becomes_rows(self):
        self.assertEqual(read_flags(HELP), [("--one=", "80 % (about)", "a file"), ("--two", "", "on or off")])
        self.assertEqual(section("the program", HELP).splitlines()[1:], [
            "## the program", "", "`program [flags]`", "", "| flag | default | meaning |", "|---|---|---|",
            "| `--one=` | `80 % (about)` | a file |", "| `--two` |  | on or off |"])

    def test_a_help_text_of_another_form_is_refused(self):
        for text in ("", "usage: x\n", HELP + "  --three\n", HELP.replace("  --two", " --two"), HELP.replace("      on", "on")):
            with self.assertRaises(ValueError, msg=text):
                read_flags(text)

    def test_the_table_is_current(self):
        text = (ROOT / "docs" / "flags.md").read_text()
        self.assertEqual(make_flags_table.run(BIN).splitlines(), text.splitlines(), "run tools/make_flags_table.py")

    def test_the_table_has_every_field_of_the_configuration(self):
        proto = (ROOT / "proto/headwater/v1/config.proto").read_text()
        sections = dict(re.findall(r"^## (\S+)$(.*?)(?=^## |\Z)", (ROOT / "docs" / "flags.md").read_text(), re.M | re.S))
        for program, body in re.findall(r"^// Of (\S+)\.\nmessage \w+ {(.*?)^}", proto, re.M | re.S):
            listed = set(re.findall(r"^\| `--(\w+)", sections.pop(program), re.M)) - {"config", "print_config"}
            self.assertEqual(listed, set(re.findall(r"optional \w+ (\w+) =", body)), program)
        self.assertFalse([name for name in sections if name.startswith("headwater-")], "programs without a message")


if __name__ == "__main__":
    unittest.main()
