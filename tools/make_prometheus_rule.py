#!/usr/bin/env python3
"""Writes deploy/alerts/prometheusrule.yaml: the rules of headwater.rules.yml as the Prometheus operator takes them.

    make_prometheus_rule.py [--output deploy/alerts/prometheusrule.yaml]
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALERTS = ROOT / "deploy" / "alerts"
HEAD = """# Written by tools/make_prometheus_rule.py from headwater.rules.yml.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: headwater
  namespace: headwater
  labels:
    app.kubernetes.io/name: headwater
    app.kubernetes.io/instance: headwater
    app.kubernetes.io/part-of: headwater
    app.kubernetes.io/version: VERSION
    app.kubernetes.io/component: monitoring
spec:
"""


def version() -> str:
    return re.search(r'kVersion\[\] = "([^"]+)"', (ROOT / "base" / "version.h").read_text(encoding="utf-8"))[1]


def render() -> str:
    rules = (ALERTS / "headwater.rules.yml").read_text(encoding="utf-8")
    body = rules[rules.index("groups:\n"):]
    return HEAD.replace("VERSION", version()) + "".join(f"  {line}" if line.strip() else line for line in body.splitlines(True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ALERTS / "prometheusrule.yaml")
    arguments = parser.parse_args()
    arguments.output.write_text(render(), encoding="utf-8")
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
