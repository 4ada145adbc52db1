"""Tests of the demo's machinery with stand-in programs: failures are explained, and nothing is left running."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

try:
    import demo
    from demo_cluster import Cluster, ClusterError, free_ports
    from headwater import Client
except ImportError as error:
    print(f"SKIPPED: {error} (tools/venv.sh installs it)")
    sys.exit(77)

LASTING = "#!/bin/sh\necho $$ >>\"$(dirname \"$0\")/pids\"\nexec sleep 600\n"


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition, seconds=20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


class ClusterTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        for name in ("coordinator", "worker", "decode"):
            self.program(name, LASTING)

    def program(self, name, text):
        path = self.folder / f"headwater-{name}"
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def pids(self):
        path = self.folder / "pids"
        return [int(line) for line in path.read_text().split()] if path.is_file() else []

    def cluster(self):
        return Cluster(self.folder, self.folder, self.folder / "state", workers=2)

    def start_demo(self):
        """Starts the demo's cluster in a process of its own, which waits for registrations that never come."""
        code = (f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import demo, demo_cluster\n"
                f"from pathlib import Path; from headwater import Client; folder = Path({str(self.folder)!r})\n"
                "def run(arguments):\n"
                "    with demo_cluster.Cluster(folder, folder, folder / 'state', 2) as c, Client(c.coordinator) as client:\n"
                "        c.wait_registered(client, print)\n"
                "demo.run = run; sys.argv = ['demo.py']; sys.exit(demo.main())\n")
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.addCleanup(process.kill)
        self.assertTrue(wait_until(lambda: len(self.pids()) == 4), "four programs run")
        return process

    def test_a_process_that_ends_is_reported_with_the_end_of_its_log(self):
        self.program("worker", "#!/bin/sh\nfor i in $(seq 40); do echo line $i; done\necho 'no such model' >&2\nexit 3\n")
        with self.cluster() as cluster, Client(cluster.coordinator) as client:
            with self.assertRaises(ClusterError) as caught:
                cluster.wait_registered(client, lambda workers, nodes: None)
        self.assertRegex(str(caught.exception), r"worker-[01] ended with status 3")
        self.assertIn("no such model", str(caught.exception))
        self.assertNotIn("line 10\n", str(caught.exception))

    def test_leaving_the_cluster_ends_every_process(self):
        with self.cluster():
            self.assertTrue(wait_until(lambda: len(self.pids()) == 4))
        self.assertFalse([pid for pid in self.pids() if alive(pid)])

    def test_programs_get_ports_threads_and_names_of_their_own(self):
        with self.cluster() as cluster:
            commands = [process.popen.args for process in cluster.processes]
            addresses = [word for command in commands for word in command if word.startswith(("--listen", "--metrics"))]
        self.assertEqual(len({address.split("=")[1] for address in addresses}), 8)
        self.assertIn("--worker_id=w1", commands[2])
        self.assertIn(f"--coordinator={commands[0][1].split('=')[1]}", commands[3])

    def test_ctrl_c_ends_every_process(self):
        process = self.start_demo()
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(30), 130)
        self.assertIn("interrupted", process.stdout.read())
        self.assertTrue(wait_until(lambda: not any(map(alive, self.pids()))))
        process.stdout.close()

    def test_a_killed_demo_takes_its_processes_along(self):
        process = self.start_demo()
        process.kill()
        process.wait(30)
        self.assertTrue(wait_until(lambda: not any(map(alive, self.pids()))))
        process.stdout.close()

    def test_a_missing_program_is_named(self):
        os.remove(self.folder / "headwater-decode")
        with self.assertRaisesRegex(ClusterError, "headwater-decode is not there"):
            self.cluster()

    def test_free_ports_are_distinct(self):
        self.assertEqual(len(set(free_ports(20))), 20)


class MessagesTest(unittest.TestCase):
    def run_demo(self, *arguments):
        return subprocess.run([sys.executable, str(ROOT / "tools" / "demo.py"), *arguments], capture_output=True, text=True, timeout=60)

    def test_wrong_arguments_are_refused(self):
        for arguments, message in ((["--workers=0"], "--workers is 0, must be 1 to 64"),
                                   (["--max_new_tokens=70000"], "70000, must be 1 to 65536"),
                                   (["--polcy=dense"], "--polcy=dense")):
            done = self.run_demo(*arguments)
            self.assertEqual(done.returncode, 2)
            self.assertIn(message, done.stderr)

    def test_a_model_that_is_none_is_named(self):
        done = self.run_demo("--model=/nowhere")
        self.assertEqual(done.returncode, 1)
        self.assertIn("/nowhere has no config.json", done.stderr)

    def test_without_the_package_the_message_says_what_to_pass(self):
        def refuse(say):
            raise demo.fetch_model.FetchError("no network")

        original, demo.fetch_model.download = demo.fetch_model.download, refuse
        cache, demo.fetch_model.CACHE = demo.fetch_model.CACHE, ROOT / "build" / "no-cache"
        try:
            with self.assertRaisesRegex(demo.DemoError, "make demo MODEL=dir"):
                demo.find_model("")
        finally:
            demo.fetch_model.download, demo.fetch_model.CACHE = original, cache


class ReferenceTest(unittest.TestCase):
    IDS = [1, 2]

    def compare(self, generated, f32=((5, 6, 7), (9.0, 9.0, 9.0)), bf16=((5, 9, 9), (9.0, 0.0, 9.0))):
        case = {"question": "q", "prompt_sha256": demo.hashlib.sha256(b"\1\0\0\0\2\0\0\0").hexdigest()}
        for name, (tokens, gaps) in (("f32", f32), ("bf16", bf16)):
            case[name] = {"token_ids": list(tokens), "top2_logit_gaps": list(gaps)}
        return demo.compare_with_reference({"cases": [case]}, self.IDS, "q", generated)

    def test_tokens_are_counted_up_to_the_first_difference(self):
        self.assertEqual(self.compare([5, 6, 7]), {"f32": (3, 3), "bf16": (1, 1)})
        self.assertEqual(self.compare([5, 6, 8])["f32"], (2, 3))
        self.assertEqual(self.compare([4, 6, 7])["f32"], (0, 3))
        self.assertEqual(self.compare([5])["f32"], (1, 3))

    def test_another_prompt_has_no_reference(self):
        self.IDS = [1, 3]
        self.assertEqual(self.compare([5, 6, 7]), {})


if __name__ == "__main__":
    unittest.main()
