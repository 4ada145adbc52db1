"""What docs/operations.md, sizing.md and upgrade.md say: figures are those of rows or of their formulas, links lead somewhere,
flags are those of the programs."""

import json
import os
import re
import subprocess
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GUIDES = [ROOT / "docs" / name for name in ("operations.md", "sizing.md", "upgrade.md")]
SIZING = (ROOT / "docs/sizing.md").read_text()
BIN = os.environ.get("HEADWATER_BIN", "")
LLAMA_8B_KV_BYTES = 2 * 32 * 8 * 128 * 2
SCRIPTS = ("tools/make_wire_golden.py", "tools/make_certificates.py")


def rows_of(name: str) -> list:
    return [json.loads(line) for line in (ROOT / "bench/results" / f"{name}.jsonl").read_text().splitlines()]


def table(header: str) -> list:
    """Cells of the lines of the table of sizing.md whose first line begins so."""
    lines = SIZING[SIZING.index(f"| {header}"):].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def number(text: str) -> float:
    return float(text.replace(",", "").rstrip(" %"))


class FiguresTest(unittest.TestCase):
    def rounded(self, said: str, value: float, what):
        """`said` is `value` to the digits that it has."""
        digits = len(said.partition(".")[2])
        self.assertAlmostEqual(number(said), value, delta=0.5000001 * 10 ** -digits, msg=what)

    def test_times_to_first_token_are_those_of_rows(self):
        lines = table("device, GPUs |")
        self.assertGreater(len(lines), 15)
        for device, tokens, policy, linear, sink, ttft, rate, memory, egress, commit in lines:
            name, gpus = device.rsplit(", ", 1)
            kind, density = policy.split(", ")
            wanted = {"tokens": number(tokens), "gpus": int(gpus), "policy": kind, "linear": linear, "sink": sink}
            found = [row["metrics"] for row in rows_of("prefill")
                     if row["commit"] == commit and name.split()[0] in row["device"] and row["params"]["model"] == "llama-3-8b"
                     and all(row["params"].get(key) == value for key, value in wanted.items())]
            what = [device, tokens, policy, linear, sink, commit]
            self.assertTrue(found, what)
            metrics = min(found, key=lambda one: abs(one["ttft_s"] - number(ttft)))
            self.rounded(ttft, metrics["ttft_s"], what)
            self.rounded(rate, metrics["tokens_per_s"], what)
            self.rounded(density, metrics["density"], what)
            self.rounded(memory, metrics["planned_device_bytes"] / 2**30, what)
            self.rounded(egress, LLAMA_8B_KV_BYTES * number(tokens) / metrics["ttft_s"] / 1e9, what)

    def test_attentions_part_is_that_of_rows(self):
        lines = table("prompt tokens | linear, s")
        self.assertEqual(len(lines), 5)
        for tokens, linear, attention, part in lines:
            metrics = next(row["metrics"] for row in rows_of("prefill") if row["commit"] == "e384b2aef1fe"
                           and row["params"]["tokens"] == number(tokens) and row["params"]["policy"] == "dense")
            self.rounded(linear, metrics["linear_s"], tokens)
            self.rounded(attention, metrics["attention_s"], tokens)
            share = metrics["attention_s"] / (metrics["linear_s"] + metrics["attention_s"])
            self.rounded(part.rstrip(" %"), 100 * share, tokens)

    def test_kv_streams_are_those_of_rows(self):
        lines, rows = table("device | TLS"), rows_of("kv")
        self.assertEqual(len(lines), len(rows))
        for device, tls, connections, rate, cpu, commit in lines:
            row = next(row for row in rows if row["commit"] == commit and device in row["device"]
                       and row["params"]["tls"] == (tls == "yes") and row["params"]["channels"] == int(connections))
            self.rounded(rate, row["metrics"]["gb_per_s"], [device, tls, connections])
            self.rounded(cpu, row["metrics"]["cpu_s_per_gb"], [device, tls, connections])

    def test_sizes_of_caches_are_those_of_the_formula(self):
        lines = table("model | layers")
        self.assertGreater(len(lines), 4)
        for model, layers, heads, head_dim, token, *sizes in lines:
            self.assertEqual(number(token), 2 * int(layers) * int(heads) * int(head_dim) * 2, model)
            for tokens, size in zip((8192, 32768, 131072, 1048576), sizes, strict=True):
                self.rounded(size, number(token) * tokens / 2**30, [model, tokens])


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


class WordsTest(unittest.TestCase):
    def test_links_lead_to_files_and_headings(self):
        for guide in GUIDES:
            links = re.findall(r"\]\(([^)\s]+)\)", guide.read_text())
            self.assertTrue(links, guide.name)
            for link in links:
                path, _, anchor = link.partition("#")
                target = (guide.parent / path).resolve() if path else guide
                self.assertTrue(target.exists(), f"{guide.name}: {link}")
                if anchor:
                    target = target / "README.md" if target.is_dir() else target
                    headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
                    self.assertIn(anchor, map(slug, headings), f"{guide.name}: {link}")

    def test_paths_in_the_tree_are_there(self):
        for guide in GUIDES:
            folders = "base|bench|coordinator|deploy|kvtransfer|proto|tests|tools"
            for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", guide.read_text()):
                if "VERSION" not in path:
                    self.assertTrue((ROOT / path).exists(), f"{guide.name}: {path}")

    @unittest.skipUnless(os.access(Path(BIN) / "headwater-coordinator", os.X_OK), f"HEADWATER_BIN={BIN} has no programs")
    def test_flags_are_those_of_the_programs(self):
        def text_of(*command):
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
            return done.stdout + done.stderr

        known = set()
        subcommands = re.findall(r"^  (\w+) ", text_of(f"{BIN}/headwater", "help"), re.M)
        self.assertGreater(len(subcommands), 8)
        commands = [[f"{BIN}/{program}"] for program in ("headwater-coordinator", "headwater-worker", "headwater-decode")]
        commands += [[f"{BIN}/headwater", name] for name in subcommands if name != "help"]
        commands += [[f"{BIN}/headwater", "bench", "prefill"]] + [[sys.executable, str(ROOT / script)] for script in SCRIPTS]
        for command in commands:
            help_text = text_of(*command, "--help")
            known |= set(re.findall(r"--([a-z]\w*)", help_text))
            known |= {f"no{name}" for name in re.findall(r"--(\w+) \(default true\)", help_text)}
        for guide in GUIDES:
            prose = re.sub(r"(?:openssl|mv|ln|gdb|git) [^\n`]*", "", guide.read_text())
            flags = set(re.findall(r"(?<![\w-])--([a-z]\w*)", prose))
            self.assertEqual(flags - known, set(), guide.name)


if __name__ == "__main__":
    unittest.main()
