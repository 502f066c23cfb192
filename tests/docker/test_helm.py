"""docker/helm, rendered by Helm itself: valid objects that belong together."""

from __future__ import annotations

import re
from typing import Any

import helm_python
import kubernetes_validate
import promql_parser
import pytest
import yaml
from support.monitoring import HELM, alerts, expressions, panels

from hashevict_vllm.config import POLICY_NAMES

KUBERNETES = "1.34"
OWN_KINDS = ("ServiceMonitor", "PrometheusRule", "ScaledObject")
"""Of operators; kubernetes-validate knows those of Kubernetes itself."""

OPERATORS = {
    name: {"enabled": True}
    for name in ("serviceMonitor", "alerts", "dashboard", "autoscaling")
}
CPU = yaml.safe_load((HELM / "values-cpu.yaml").read_text())
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "operators": OPERATORS,
    "cpu": CPU,
    "all": {
        "model": "org/model",
        "args": ["--max-model-len", "32768"],
        "env": {"VLLM_LOGGING_LEVEL": "WARNING"},
        "hubTokenSecret": "hub",
        "apiKeySecret": "api",
        "pullSecrets": ["registry"],
        "cacheClaim": "models",
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
    },
}


def objects(values: dict[str, Any]) -> dict[str, Any]:
    """What a release `prod` in the namespace `llm` consists of, by kind."""
    chart = helm_python.Chart.load(str(HELM))
    chart.validate_schema(values)
    rendered = chart.render(values, name="prod", namespace="llm")
    found = [
        part
        for name, text in rendered.items()
        if name.endswith(".yaml")
        for part in yaml.safe_load_all(text)
        if part
    ]
    return {part["kind"]: part for part in found}


def container(values: dict[str, Any]) -> dict[str, Any]:
    (only,) = objects(values)["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only


def test_helm_lint_has_nothing_to_say_but_that_there_is_no_icon() -> None:
    report = helm_python.lint(str(HELM), strict=True)
    assert report["errors"] == []
    assert [m["error"] for m in report["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_object_is_valid(name: str) -> None:
    found = objects(SETTINGS[name])
    assert {"Deployment", "Service", "PodDisruptionBudget"} <= found.keys()
    for kind, part in found.items():
        if kind not in OWN_KINDS:
            kubernetes_validate.validate(part, KUBERNETES, strict=True)


def test_objects_of_operators_point_at_what_is_there() -> None:
    found = objects(OPERATORS)
    pods = found["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    service = found["Service"]
    assert service["spec"]["selector"].items() <= pods
    disruption = found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
    assert disruption.items() <= pods
    monitor = found["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= (
        service["metadata"]["labels"].items()
    )
    ports = {port["name"] for port in service["spec"]["ports"]}
    assert {end["port"] for end in monitor["endpoints"]} <= ports
    scaled = found["ScaledObject"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]
    # The scaler's number of replicas must not be undone by the chart's.
    assert "replicas" not in found["Deployment"]["spec"]
    assert found["PrometheusRule"]["spec"]["groups"][0]["rules"] == alerts()
    selector = f'{{namespace="llm", service="{service["metadata"]["name"]}"}}'
    for trigger in scaled["triggers"]:
        query = trigger["metadata"]["query"]
        promql_parser.parse(query)
        assert query.startswith("sum(vllm:")
        assert selector in query


def test_the_server_drains_before_kubernetes_kills_it() -> None:
    values = {"drainSeconds": 300}
    pod = objects(values)["Deployment"]["spec"]["template"]["spec"]
    assert "--shutdown-timeout=300" in container(values)["args"]
    (sleep,) = container(values)["lifecycle"]["preStop"]["exec"]["command"][1:]
    assert pod["terminationGracePeriodSeconds"] > 300 + int(sleep)


def test_a_cpu_server_asks_for_no_gpu_and_may_bind_memory() -> None:
    assert "nvidia.com/gpu" not in container(CPU)["resources"]["limits"]
    assert container(CPU)["securityContext"]["capabilities"] == {
        "drop": ["ALL"],
        "add": ["SYS_NICE"],
    }
    assert "nvidia.com/gpu" in container({})["resources"]["limits"]


def test_the_stock_policy_has_no_budget() -> None:
    def names(policy: str) -> set[str]:
        return {entry["name"] for entry in container({"policy": policy})["env"]}

    assert names("hashevict") - names("full") == {"HASHEVICT_BUDGET"}


@pytest.mark.parametrize(
    "values",
    [
        {"replicas": "two"},
        {"polciy": "hashevict"},
        {"policy": "hashevit"},
        {"budget": "many"},
        {"budget": "1024 MiB"},
        {"autoscaling": {"kvUsage": "80%"}},
    ],
    ids=str,
)
def test_wrong_values_are_refused_by_the_schema(values: dict[str, Any]) -> None:
    with pytest.raises(helm_python.HelmValuesError):
        helm_python.Chart.load(str(HELM)).validate_schema(values)


def test_the_schema_knows_all_policies() -> None:
    schema = helm_python.Chart.load(str(HELM)).schema
    assert schema
    assert schema["properties"]["policy"]["enum"] == list(POLICY_NAMES)


def test_every_expression_is_promql() -> None:
    assert len(panels()) >= 12
    for expression in expressions():
        promql_parser.parse(expression)


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_every_alert_has_an_entry_in_the_runbook(rule: dict[str, Any]) -> None:
    docs = HELM.parent.parent / "docs" / "operations.md"
    headings = re.findall(r"^#+ (.*)$", docs.read_text(), re.M)
    assert rule["alert"] in headings
    runbook = rule["annotations"]["runbook"]
    assert runbook == f"docs/operations.md#{rule['alert'].lower()}"
