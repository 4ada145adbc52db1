"""The boards are what their script makes, their queries parse, and they name only what the processes export."""

import json
import re
import unittest

import promtool
from make_dashboards import OUTPUT, boards
from make_metrics_table import read_table
from promtool import ROOT, RULES

promtool.need("promtool")
METRICS = read_table((ROOT / "docs" / "metrics.md").read_text())
BY_PROMETHEUS = {"up": set(), "scrape_duration_seconds": set(), "scrape_samples_scraped": set(), "ALERTS": set()}
SCRAPED = {"job", "instance"}
ROWS = ["Traffic", "Queue", "Prefill compute", "KV egress", "Leases and sessions", "Workers and collectives", "Process"]


def series() -> dict:
    """Name of each series that can be asked for -> its labels."""
    names = dict(BY_PROMETHEUS)
    for family in METRICS:
        suffixes = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}.get(family.type, ("",))
        for suffix in suffixes:
            names.setdefault(family.name + suffix, set()).update(family.labels | ({"le"} if suffix == "_bucket" else set()))
    return names


def named(expression: str) -> list:
    """(series, labels of its matchers) of a query."""
    found = re.findall(r"\b(up|ALERTS|(?:headwater|scrape)_\w+)\b(?:\{([^}]*)\})?", expression)
    return [(name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", re.sub(r'"[^"]*"', "", matchers)))) for name, matchers in found]


def panels(board: dict) -> list:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


class DashboardsTest(unittest.TestCase):
    def setUp(self):
        self.boards = {path.name: json.loads(path.read_text()) for path in OUTPUT.glob("*.json")}

    def queries(self) -> list:
        return [target["expr"] for board in self.boards.values() for panel in panels(board) for target in panel["targets"]]

    def unknown(self, expression: str) -> list:
        """What a query names that nobody exports."""
        exported = series()
        return [name if name not in exported else f"{name}{sorted(labels - exported[name] - SCRAPED)}"
                for name, labels in named(expression) if name not in exported or labels - exported[name] - SCRAPED]

    def test_committed_boards_are_the_generated_ones(self):
        made = boards()
        self.assertEqual(sorted(self.boards), sorted(made))
        for name, text in made.items():
            self.assertTrue((OUTPUT / name).read_text() == text, f"{name} is not what tools/make_dashboards.py makes: run it")

    def test_queries_parse(self):
        queries = [query.replace("$__rate_interval", "1m") for query in self.queries()]
        self.assertGreater(len(queries), 70)
        status, output = promtool.check_queries(queries)
        self.assertEqual(status, 0, output)
        self.assertNotIn("$__interval", "".join(queries))

    def test_queries_name_what_is_exported(self):
        for query in self.queries():
            self.assertEqual(self.unknown(query), [], query)

    def test_rules_name_what_is_exported(self):
        self.assertGreater(len(promtool.rules()), 40)
        recorded = {rule["record"] for rule in promtool.rules() if "record" in rule}
        for rule in promtool.rules():
            self.assertEqual(self.unknown(rule["expr"]), [], rule["expr"])
            self.assertLessEqual(set(re.findall(r"headwater:[\w:]+", rule["expr"])), recorded, rule["expr"])
        runbook = (ROOT / "docs" / "runbook.md").read_text()
        self.assertLessEqual(set(re.findall(r"headwater:[\w:]+", runbook)), recorded, "recorded series in the runbook")
        self.assertEqual([name for name, _ in named(runbook) if name not in series()], [], "metrics in the runbook")
        self.assertIn("headwater:queue_seconds", RULES.read_text())

    def test_what_is_not_exported_is_found(self):
        self.assertEqual(self.unknown("rate(headwater_no_such_total[1m])"), ["headwater_no_such_total"])
        self.assertEqual(self.unknown('up{job="x"} + headwater_workers{code="OK"}'), ["headwater_workers['code']"])
        self.assertEqual(self.unknown("headwater_attention_recall_ratio"), ["headwater_attention_recall_ratio"])

    def test_rows_and_variables(self):
        rows = [panel["title"] for panel in self.boards["service.json"]["panels"] if panel["type"] == "row"]
        self.assertEqual(rows, ROWS)
        for name, board in self.boards.items():
            variables = [variable["name"] for variable in board["templating"]["list"]]
            self.assertEqual(variables[:3], ["datasource", "job", "instance"], name)
            used = set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"]))) - {"__rate_interval"}
            self.assertEqual(used, set(variables), f"{name}: variables used, and defined")

    def test_each_panel_names_its_metric_and_what_it_does_not_count(self):
        for board in self.boards.values():
            self.assertEqual(len({panel["id"] for panel in board["panels"]}), len(board["panels"]))
            for panel in panels(board):
                with self.subTest(panel["title"]):
                    metric = re.match(r"`(\w+)`\. Not counted: \S.+\.$", panel["description"])
                    self.assertIsNotNone(metric, panel["description"])
                    self.assertIn(metric[1], panel["targets"][0]["expr"])
                    self.assertEqual(panel["fieldConfig"]["defaults"]["noValue"], "No traffic")
                    self.assertEqual(panel["fieldConfig"]["defaults"]["mappings"][0]["options"]["match"], "nan")

    def test_panels_do_not_overlap(self):
        for name, board in self.boards.items():
            taken = set()
            for panel in board["panels"]:
                at = panel["gridPos"]
                cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
                self.assertEqual(cells & taken, set(), f"{name}: {panel['title']}")
                self.assertLessEqual(at["x"] + at["w"], 24, f"{name}: {panel['title']}")
                taken |= cells


if __name__ == "__main__":
    unittest.main()
