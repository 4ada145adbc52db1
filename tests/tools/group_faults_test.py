"""Tests of tools/group_faults.py: arguments, what is judged, the row; and, where the service was built, one run of it."""

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import unittest.mock
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import group_faults  # noqa: E402
from group_faults_cluster import DeviceMemory  # noqa: E402
from small_model import VOCAB, write_model  # noqa: E402

BIN = os.environ.get("HEADWATER_BIN", "")
RUN = {"run": 1, "worker": "w1", "disturbed_at_layer": 9, "error": "", "device_mib_over": None, "buried": True,
       "abort_s": 0.25, "abort_code": "UNAVAILABLE", "restart_s": 0.5, "recovered_s": 2.0, "retries": 1, "resume_layer": 4,
       "digest": "aa", "first_token": 7, "world_size": 1, "ttft_s": 3.0}
UNDISTURBED = {"first_token": 7, "kv_digest": "dd", "ttft": 1.5}


class Folder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def arguments(self, *words, layers=12):
        config = {"num_hidden_layers": layers, "vocab_size": VOCAB}
        (self.folder / "config.json").write_text(json.dumps(config))
        return group_faults.parse_arguments(["--bin", "/nowhere", "--model", str(self.folder), "--tokens", "100", *words])


class ArgumentsTest(Folder):
    def refused(self, pattern, *words, **shape):
        with self.assertRaisesRegex(group_faults.Usage, pattern):
            self.arguments(*words, **shape)

    def test_what_cannot_be_used_is_refused_with_its_name_and_value(self):
        self.refused("--devices: 1 given", "--devices", "cpu")
        self.refused("--devices: 'gpu' is neither", "--devices", "gpu", "gpu")
        self.refused("not of both", "--devices", "cpu", "cuda:0")
        self.refused("--times=0", "--times", "0")
        self.refused("2 layers", layers=2)
        self.refused("--checkpoint_layers=x", "--worker_flags=--checkpoint_layers=x")
        self.refused("--collective_timeout=1h", "--worker_flags=--collective_timeout=1h")
        self.refused("has no config.json", "--model", str(self.folder / "no"))

    def test_wrong_usage_ends_with_status_2(self):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            self.assertEqual(group_faults.main(["--bin", "b", "--model", str(self.folder), "--tokens", "1"]), 2)
        self.assertIn("has no config.json", err.getvalue())

    def test_worker_flags_count_for_what_the_script_must_know(self):
        arguments = self.arguments("--worker_flags=--threads=1 --checkpoint_layers=3 --collective_timeout=1500ms")
        self.assertEqual((arguments.checkpoint_layers, arguments.collective_timeout), (3, 1.5))
        self.assertEqual(arguments.worker_words, ["--threads=1", "--checkpoint_layers=3", "--collective_timeout=1.5s"])

    def test_programs_that_are_not_there_are_named(self):
        self.arguments()
        with contextlib.redirect_stderr(io.StringIO()) as err:
            status = group_faults.main(["--bin", "/nowhere", "--model", str(self.folder), "--tokens", "100",
                                        "--logs", str(self.folder / "logs")])
        self.assertEqual(status, 1)
        self.assertIn("/nowhere/headwater-coordinator is not there", err.getvalue())


class JudgeTest(Folder):
    def test_moments_leave_room_for_a_checkpoint_and_for_work(self):
        self.assertEqual(group_faults.moments(32, 8), (12, 27))
        self.assertEqual(group_faults.moments(12, 3), (7, 10))
        self.assertEqual(group_faults.moments(32, 0), (1, 27))
        self.assertEqual(group_faults.moments(3, 8), (1, 2))
        of = lambda device, layers: group_faults.report_layers(  # noqa: E731
            argparse.Namespace(devices=[device], checkpoint_layers=layers))
        self.assertEqual([of("cpu", 8), of("cuda:0", 8), of("cuda:0", 3), of("cuda:0", 64)], [4, 9, 4, 11])
        self.assertEqual(group_faults.moments(10, 3, of("cuda:0", 3)), (7, 8))

    def problems(self, *words, **changes):
        return group_faults.judge({**RUN, **changes}, UNDISTURBED, self.arguments("--checkpoint_layers=4", *words))

    def test_a_good_run_has_no_problem(self):
        self.assertEqual(self.problems(), [])
        self.assertEqual(self.problems(device_mib_over=3), [])
        self.assertEqual(self.problems(resume_layer=0, disturbed_at_layer=7), [], "no checkpoint had to be there")
        self.assertEqual(self.problems("--kill=stop", "--collective_timeout=2", abort_s=6.9), [])

    def test_each_problem_names_value_and_limit(self):
        for pattern, changes in {"given up after 5.10 s, the limit is 5 s": {"abort_s": 5.1},
                                 "names no rank": {"abort_s": None},
                                 "0 epochs given up, want 1": {"retries": 0},
                                 "ended on 2 workers, want 1": {"world_size": 2},
                                 "first token 8, undisturbed 7": {"first_token": 8},
                                 "began anew at layer 0": {"resume_layer": 0},
                                 "processes of the disturbed worker": {"buried": False},
                                 "900 MiB .* the limit is 64": {"device_mib_over": 900},
                                 "run 1: the prompt failed": {"error": "the prompt failed"}}.items():
            problems = self.problems(**changes)
            self.assertEqual(len(problems), 1, pattern)
            self.assertRegex(problems[0], pattern)
        self.assertRegex(self.problems("--kill=stop", "--collective_timeout=2", abort_s=7.1)[0], "the limit is 7 s")

    def test_digests_of_the_same_layer_and_ranks_must_agree(self):
        runs = [RUN, {**RUN, "run": 2}, {**RUN, "run": 3, "resume_layer": 0, "digest": "bb"},
                {"run": 4, "error": "failed"}]
        self.assertEqual(group_faults.compare_digests(runs, {1: "bb"}), ({"4/1": 2, "0/1": 1}, []))
        _, problems = group_faults.compare_digests(runs, {1: "cc"})
        self.assertRegex(problems[0], "run 3: digest bb from layer 0 on with 1 ranks, others have cc")
        _, problems = group_faults.compare_digests([RUN, {**RUN, "run": 2, "digest": "ee"}], {})
        self.assertRegex(problems[0], "run 2: digest ee")

    def test_the_log_says_when_the_others_gave_up(self):
        failed = {"msg": "rank failed", "epoch": 1, "error": "UNAVAILABLE: rank 0: send failed: reset"}
        log = [{"msg": "epoch started", "epoch": 1, "at": 1.0}, {**failed, "worker": "w0", "at": 10.5},
               {**failed, "worker": "w1", "at": 12.0}, {"msg": "epoch started", "epoch": 2, "at": 11.0}]
        self.assertEqual(group_faults.read_abort(log, 10.0, "w1"),
                         {"abort_s": 0.5, "abort_code": "UNAVAILABLE", "restart_s": 1.0})
        self.assertEqual(group_faults.read_abort(log[:1], 10.0, "w1"),
                         {"abort_s": None, "abort_code": "", "restart_s": None})
        # The others had ended their parts when the last one was killed.
        started = [entry for entry in log if entry["msg"] == "epoch started"]
        self.assertEqual(group_faults.read_abort(started, 10.0, "w1"),
                         {"abort_s": 1.0, "abort_code": "ENDED", "restart_s": 1.0})

    def test_the_row_sums_up(self):
        runs = [RUN, {**RUN, "run": 2, "abort_s": 0.75, "resume_layer": 0, "device_mib_over": 5},
                {"run": 3, "error": "failed", "device_mib_over": None}]
        row = group_faults.make_row(self.arguments("--commit", "abc", "--times", "3"), UNDISTURBED, runs, ["run 3: failed"],
                                    {"4/1": 1, "0/1": 1})
        self.assertEqual((row["bench"], row["commit"]), ("group_faults", "abc"))
        self.assertEqual(row["params"]["kill"], "kill")
        self.assertEqual(row["metrics"], {
            "times": 3, "completed": 2, "resumed": 1, "abort_s_max": 0.75, "abort_s_median": 0.5,
            "abort_codes": {"UNAVAILABLE": 2}, "recovered_s_max": 2.0,
            "ttft_s": 1.5, "ttft_s_disturbed_max": 3.0, "digests_equal": True, "digests_compared": 1,
            "runs_by_layer_and_ranks": {"4/1": 1, "0/1": 1}, "device_mib_over_max": 5, "problems": 1})

    def test_memory_of_gpus_is_what_is_in_use_beyond_the_start(self):
        program = self.folder / "nvidia-smi"
        values = self.folder / "values"
        program.write_text(f"#!/bin/sh\ncat {values}\n")
        program.chmod(0o755)
        values.write_text("7\n500\n40\n")
        with unittest.mock.patch.dict(os.environ, {"PATH": f"{self.folder}:{os.environ['PATH']}"}):
            memory = DeviceMemory(["cuda:2", "cuda:1"])
            values.write_text("9000\n500\n140\n")
            self.assertEqual(memory.wait_free([0], 64, 0.1), 100)
            self.assertEqual(memory.wait_free([0], 100, 0), 100)
            self.assertEqual(memory.wait_free([1], 0, 0), 0)
            values.write_text("[N/A]\n[N/A]\n[N/A]\n")
            self.assertIsNone(memory.wait_free([0, 1], 64, 0))

    def test_memory_of_cpus_is_not_known(self):
        self.assertIsNone(DeviceMemory(["cpu", "cpu"]).wait_free([0, 1], 0, 0))


@unittest.skipUnless(BIN and os.access(Path(BIN) / "headwater", os.X_OK), "HEADWATER_BIN names no built service")
class ServiceTest(Folder):
    def command(self, *words, layers: int = 12, tokens: int = 6000) -> list:
        write_model(self.folder, layers)
        return [sys.executable, str(ROOT / "tools" / "group_faults.py"), "--bin", BIN, "--model", str(self.folder),
                "--tokens", str(tokens), "--logs", str(self.folder / "logs"), "--commit", "abc",
                "--worker_flags=--threads=1 --checkpoint_layers=3 --measure_rates=false", *words]

    def run_it(self, *words, **shape) -> dict:
        ended = subprocess.run(self.command("--output", str(self.folder / "rows"), *words, **shape), capture_output=True,
                               text=True, timeout=200)
        self.assertEqual(ended.returncode, 0, ended.stdout + ended.stderr)
        return json.loads((self.folder / "rows").read_text())["metrics"]

    def test_a_killed_worker(self):
        metrics = self.run_it("--times", "2")
        self.assertEqual((metrics["completed"], metrics["resumed"], metrics["digests_equal"]), (2, 2, True))

    def test_a_stopped_worker_is_given_up_at_the_collectives_deadline(self):
        # 0.3 s and what a slow machine needs for a layer, 0.9 s: before the coordinator misses heartbeats for 3.5 s.
        metrics = self.run_it("--times", "1", "--kill", "stop", "--collective_timeout", "0.3", layers=40, tokens=2500)
        self.assertEqual((metrics["completed"], metrics["resumed"]), (1, 1))
        self.assertNotIn("CANCELLED", metrics["abort_codes"])
        self.assertLess(metrics["abort_s_max"], 3)

    def test_an_interrupt_ends_all_processes(self):
        process = subprocess.Popen(self.command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.addCleanup(process.kill)
        self.assertIn("undisturbed:", process.stdout.readline())
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 130, err)
        self.assertIn(f"logs: {self.folder / 'logs'}", err)
        left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if self.uses_folder(path)]
        end = time.monotonic() + 10
        while left and time.monotonic() < end:
            time.sleep(0.1)
            left = [path for path in left if self.uses_folder(path)]
        self.assertEqual(left, [])

    def uses_folder(self, path: Path) -> bool:
        try:
            return f"--model={self.folder.resolve()}".encode() in path.read_bytes()
        except OSError:
            return False


if __name__ == "__main__":
    unittest.main()
