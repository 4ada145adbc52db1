"""Every alert is tested both ways, says what it must, and has its section in the runbook; promtool accepts rules and tests."""

import re
import unittest

import promtool
import yaml
from promtool import RULE_TESTS, RULES

import make_prometheus_rule  # promtool made tools/ known

promtool.need("promtool")
RUNBOOK = promtool.RUNBOOK.read_text()
PARTS = ("Means", "Users see", "Look first", "Do")
ALERTS = {rule["alert"]: rule for rule in promtool.rules() if "alert" in rule}


def sections() -> dict:
    """Alert -> text of its section."""
    _, *rest = re.split(r"^## (\w+)\n", RUNBOOK, flags=re.MULTILINE)
    return dict(zip(rest[::2], rest[1::2]))


def cases() -> list:
    """(alert, what is expected to fire) of every unit test."""
    return [(case["alertname"], case["exp_alerts"]) for path in RULE_TESTS
            for test in yaml.safe_load(path.read_text())["tests"] for case in test["alert_rule_test"]]


class AlertsTest(unittest.TestCase):
    def test_promtool_accepts_the_rules(self):
        status, output = promtool.promtool("check", "rules", "--lint-fatal", RULES)
        self.assertEqual(status, 0, output)

    def test_promtool_passes_the_unit_tests(self):
        self.assertEqual(len(RULE_TESTS), 3, RULE_TESTS)
        status, output = promtool.promtool("test", "rules", *RULE_TESTS)
        self.assertEqual(status, 0, output)

    def test_the_operators_rules_are_these(self):
        path = promtool.ROOT / "deploy" / "alerts" / "prometheusrule.yaml"
        self.assertEqual(path.read_text(), make_prometheus_rule.render(), "run tools/make_prometheus_rule.py")
        self.assertEqual(yaml.safe_load(path.read_text())["spec"]["groups"], yaml.safe_load(RULES.read_text())["groups"])

    def test_each_alert_has_a_case_that_fires_and_one_that_stays_silent(self):
        self.assertGreater(len(ALERTS), 20)
        fires = [name for name, expected in cases() if expected]
        silent = [name for name, expected in cases() if not expected]
        self.assertEqual(sorted(fires), sorted(ALERTS), "cases that fire, and alerts")
        self.assertEqual(sorted(silent), sorted(ALERTS), "cases that stay silent, and alerts")

    def test_each_alert_says_what_it_must(self):
        for name, rule in ALERTS.items():
            with self.subTest(name):
                self.assertIn(rule["labels"]["severity"], ("critical", "warning"))
                self.assertEqual(set(rule["annotations"]), {"summary", "description", "runbook_url"})
                self.assertEqual(rule["annotations"]["runbook_url"], f"docs/runbook.md#{name.lower()}")
                if not rule["expr"].startswith("absent("):
                    self.assertIn("$value", rule["annotations"]["description"])

    def test_each_alert_has_a_section_of_the_runbook(self):
        self.assertEqual(sorted(sections()), sorted(ALERTS), "sections, and alerts")
        for name, text in sections().items():
            with self.subTest(name):
                self.assertEqual(re.findall(r"^- \*\*(.+?)\*\*: ", text, re.MULTILINE), list(PARTS))
                first = text.split("**Look first**")[1].split("**Do**")[0]
                self.assertRegex(first, "`.+`", "a command or a query")

    def test_links_of_the_runbook_have_their_section(self):
        anchors = {name.lower() for name in ALERTS}
        linked = set(re.findall(r"\]\(#(\w+)\)", RUNBOOK))
        self.assertTrue(linked)
        self.assertEqual(linked - anchors, set())

    def test_queries_of_the_runbook_parse(self):
        queries = promtool.runbook_queries()
        self.assertGreater(len(queries), 60)
        status, output = promtool.check_queries(queries)
        self.assertEqual(status, 0, output)


if __name__ == "__main__":
    unittest.main()
