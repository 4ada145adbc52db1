"""Tests of bench/prefill_bench.py with stand-in programs: what is run, what a row holds, that a limit is held; and of what
tools/plot_prefill.py reads."""

import contextlib
import io
import json
import stat
import sys
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

sys.path.insert(0, str(ROOT / "tools"))

import plot_prefill  # noqa: E402
import prefill_bench  # noqa: E402

ROW = {"bench": "prefill", "device": "GPU", "commit": "", "date": "", "params": {"tokens": 0}, "peers": {},
       "metrics": {"ttft_s": 2.0, "density": 1.0, "tflops_per_gpu": 500.0, "peak_device_bytes": 2**30, "floor_s": 1.0}}
PROGRAM = f"#!/bin/sh\necho \"$@\" >>\"$(dirname \"$0\")/calls\"\necho '{json.dumps(ROW)}'\n"
# In place of Python: it is given bench/prefill_peers.py as its first argument.
PEERS = """#!/bin/sh
case "$2" in
cudnn) echo '{"tokens": 100, "ms": 1.0, "tflops": 600.0}'; echo '{"tokens": 50, "ms": 1.0, "tflops": 500.0}' ;;
*) echo '{"tokens": 100, "ttft_s": 3.0, "version": "5"}' ;;
esac
"""


class PrefillBenchTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def executable(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    def bench(self, *words, program=PROGRAM) -> tuple:
        """Returns (exit status, stdout, stderr)."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = prefill_bench.main([
                "--program", self.executable("program", program), "--python", self.executable("python", PEERS),
                "--output", str(self.folder / "rows"), "--commit", "abc", *words])
        return status, out.getvalue(), err.getvalue()

    def rows(self) -> list:
        path = self.folder / "rows"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def test_a_dry_run_prints_every_command_and_runs_none(self):
        status, out, _ = self.bench("--dry-run")
        self.assertEqual(status, 0)
        self.assertEqual(self.rows(), [])
        self.assertFalse((self.folder / "calls").exists())
        self.assertIn("cudnn --tokens 8192 16384 32768 65536 131072\n", out)
        self.assertIn("transformers --tokens 65536\n", out)
        self.assertIn("--tokens=1048576 --policy=probe --density=0.01 --sink=verify --linear=fp8", out)

    def test_rows_get_their_peers_and_the_rate_of_their_length(self):
        status, out, err = self.bench("--cases", "dense", "peer", "--dense_tokens", "50", "--peer_tokens", "200",
                                      "--cudnn_up_to", "100")
        self.assertEqual(status, 0, err)
        calls = (self.folder / "calls").read_text().splitlines()
        self.assertEqual(len(calls), 2)
        self.assertIn("--tokens=50", calls[0])
        self.assertIn("--attention_tflops=500", calls[0])
        self.assertIn("--tokens=200", calls[1])
        self.assertIn("--attention_tflops=600", calls[1])
        dense, peer = self.rows()
        self.assertEqual(dense["peers"], {"cudnn": {"tokens": 50, "tflops": 500.0}})
        self.assertEqual(peer["peers"]["cudnn"], {"tokens": 100, "tflops": 600.0})
        self.assertEqual(peer["peers"]["transformers"], {"ttft_s": 3.0, "version": "5"})
        self.assertIn("floor 1.000 s (50.0 %)", out)
        self.assertIn("transformers 3.000 s (1.50x)", out)

    def test_a_given_rate_is_not_measured(self):
        status, out, _ = self.bench("--cases", "dense", "--dense_tokens", "50", "--attention_tflops", "700")
        self.assertEqual(status, 0)
        self.assertNotIn("cudnn", out)
        self.assertIn("--attention_tflops=700", (self.folder / "calls").read_text())
        self.assertEqual(self.rows()[0]["peers"], {})

    def test_a_failed_case_is_named_and_the_others_run(self):
        program = PROGRAM + "case \"$*\" in *--tokens=50*) echo the reason >&2; exit 1;; esac\n"
        status, _, err = self.bench("--cases", "dense", "--dense_tokens", "50", "100", program=program)
        self.assertEqual(status, 1)
        self.assertIn("dense, 50 tokens", err)
        self.assertIn("the reason", err)
        self.assertIn("no row of dense at 50\n", err)
        self.assertEqual(len(self.rows()), 1)

    def test_the_limit_is_held(self):
        start = time.monotonic()
        status, _, err = self.bench("--cases", "dense", "--dense_tokens", "50", "--limit_s", "0.5",
                                    program="#!/bin/sh\nexec sleep 60\n")
        self.assertEqual(status, 1)
        self.assertLess(time.monotonic() - start, 20)
        self.assertIn("more than --limit_s=0.5", err)


class ReadSeriesTest(unittest.TestCase):
    def read(self, *rows, device="") -> dict:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            return plot_prefill.read_series([path], device)

    def test_rows_of_packed_prompts_are_left_out(self):
        params = {"model": "m", "policy": "dense", "linear": "bf16"}
        packed = {**ROW, "params": {**params, "case": "packed", "tokens": 9}, "metrics": {"tokens_per_s": 1.0}}
        series = self.read(packed, {**ROW, "params": {**params, "tokens": 5}})
        self.assertEqual([[row["params"]["tokens"] for row in rows] for rows in series.values()], [[5]])

    def test_skipped_lengths_are_left_out_and_emulated_groups_are_called_so(self):
        params = {"model": "m", "policy": "dense", "linear": "bf16", "tokens": 5, "gpus": 2, "partition": "zigzag", "strategy": "ring"}
        skipped = {**ROW, "params": {**params, "tokens": 9}, "metrics": {"planned_device_bytes": 9}, "skipped": "too large"}
        series = self.read(skipped, {**ROW, "params": params}, {**ROW, "params": {**params, "emulated": True}})
        self.assertEqual(sorted(series), ["m, dense, 2 GPUs (zigzag, ring), bf16", "m, dense, 2 emulated GPUs (zigzag, ring), bf16"])

    def test_series_differ_in_all_that_the_runs_did(self):
        params = {"model": "m", "policy": "dense", "linear": "bf16", "tokens": 5}
        group = {**params, "gpus": 2, "partition": "zigzag", "strategy": "ring"}
        rows = [{**ROW, "params": p} for p in (params, group, {**group, "strategy": "allgather"}, {**group, "sink": "memory"},
                                               {**group, "checkpoint_layers": 8})]
        self.assertEqual(len(self.read(*rows)), 5)
        other = {**ROW, "device": "Other 1", "params": params}
        self.assertEqual(list(self.read(*rows, other, device="Other")), ["m, dense, bf16"])

    def test_what_is_no_prefill_row_is_refused_with_its_line(self):
        with self.assertRaisesRegex(ValueError, "rows:1: not a prefill row"):
            self.read({"bench": "prefill", "device": "GPU", "params": {"tokens": 1}, "metrics": {}})


if __name__ == "__main__":
    unittest.main()
