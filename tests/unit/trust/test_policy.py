"""A site's own policy: read strictly, and stronger than any contract."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.config.allowed import MERGES
from pretrain.config.keys import OuterConfig, RunConfig
from pretrain.exchange.options import destination
from pretrain.federation.preflight import check_policy, check_silo
from pretrain.federation.relay import Relay
from pretrain.trust.contract import agreed_settings
from pretrain.trust.policy import ALLOWED, Policy, in_one_value, read_policy
from tests.conftest import TinyConfig
from tests.support import ROOT, one_line_error

ALL: dict[str, Any] = {
    "codecs": ["int4", "fp32"],
    "max_norm": 3,
    "least_silos": 2,
    "bytes_a_day": 10**9,
    "hosts": ["/", "*.example"],
    "metrics": ["loss", "step/*"],
    "wandb": "offline",
    "second_moments": False,
    "mean_gradients": False,
}


def configured(tiny_config: TinyConfig, directory: Path, said: str, **changes: Any) -> RunConfig:
    directory.mkdir(exist_ok=True)
    (directory / "policy.yaml").write_text(said)
    return tiny_config(directory, trust={"policy": str(directory / "policy.yaml")}, **changes)


@pytest.mark.parametrize("dump", [yaml.safe_dump, json.dumps])
def test_all_keys_are_read(dump: Any, tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = configured(tiny_config, tmp_path, dump(ALL))
    policy = check_policy(config)
    assert {key: getattr(policy, key) for key in ALLOWED} == ALL
    assert policy.rule("hosts", "max_norm") == f"{policy.sha256}: hosts, max_norm"
    check_silo(config, "alpha")
    assert read_policy(tiny_config(tmp_path / "without")).rule("hosts") == "no policy"


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("codec: [int4]", "its 'codec' is no key of a policy; allowed: codecs, max_norm, "),
        ("codecs: int4", "its codecs is 'int4'; allowed: a list of fp32, bf16, "),
        ("codecs: [int5]", "its codecs is ['int5']; allowed: a list of fp32, bf16, "),
        ("max_norm: -1", "its max_norm is -1; allowed: a number above 0"),
        ("max_norm: .nan", "its max_norm is nan; allowed: a number above 0"),
        ("max_norm: true", "its max_norm is True; allowed: a number above 0"),
        ("max_norm:", "its max_norm is None; allowed: a number above 0"),
        ("least_silos: 2.5", "its least_silos is 2.5; allowed: a whole number, 1 or more"),
        ("bytes_a_day: 1e9", "its bytes_a_day is 1000000000.0; allowed: a whole number, 1 or more"),
        ("hosts: [3]", "its hosts is [3]; allowed: a list of hosts, and of folders from / on"),
        ("wandb: 0", "its wandb is 0; allowed: false, offline, online"),
        ("wandb: disabled", "its wandb is 'disabled'; allowed: false, offline, online"),
        ("second_moments: 'no'", "its second_moments is 'no'; allowed: true, false"),
        ("max_norm: 1\nmax_norm: 9", "it is no YAML: "),
        ("max_norm: [", "it is no YAML: "),
        ("", "allowed: a file of keys and values, one at least: codecs, "),
        ("- codecs", "allowed: a file of keys and values, one at least: codecs, "),
        ("x" * (65 << 10), "allowed: a file of up to 65536 bytes"),
    ],
)
def test_what_is_no_policy_is_one_line(said: str, error: str, tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = configured(tiny_config, tmp_path, said)
    assert f"trust.policy: {config.trust.policy} given; {error}" in one_line_error(check_silo, config, "alpha")


def test_a_policy_is_part_of_no_contract(tiny_config: TinyConfig, tmp_path: Path) -> None:
    """A silo with one of its own has the contract of those without."""
    config, without = configured(tiny_config, tmp_path, yaml.safe_dump(ALL)), tiny_config(tmp_path)
    assert config.trust.policy
    assert agreed_settings(config) == agreed_settings(without)


def test_a_policy_that_is_not_there(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, trust={"policy": str(tmp_path / "none.yaml")})
    said = f"trust.policy: {tmp_path / 'none.yaml'} given; it cannot be read: No such file or directory"
    assert one_line_error(check_silo, config, "alpha") == said


FIVE: dict[str, dict[str, str]] = {"gamma": {}, "delta": {}, "epsilon": {}}
SHARED = {"second_moments": "shared", "merge": "importance"}


@pytest.mark.parametrize(
    ("said", "changes", "error"),
    [
        ("codecs: [int4, topk]", {}, "its codecs is int4, topk, and the contract's outer.codec is fp32"),
        ("codecs: []", {}, "its codecs is an empty list, and the contract's outer.codec is fp32"),
        ("least_silos: 3", {}, "its least_silos is 3, and the contract's roster is 2 silos"),
        (
            "least_silos: 2",
            {"membership": {"quorum": 1}},
            "its least_silos is 2, and the contract's membership.quorum is 1",
        ),
        (
            "least_silos: 2",
            {"silos": FIVE, "outer": {"merge": "krum"}},
            "its least_silos is 2, and the contract's outer.merge is krum, with which each value is of 1 of 5",
        ),
        (
            "least_silos: 2",
            {"silos": FIVE, "outer": {"merge": "median"}, "membership": {"quorum": 4}},
            "its least_silos is 2, and the contract's outer.merge is median, with which each value is of 1 of 4",
        ),
        (
            "least_silos: 3",
            {"silos": FIVE, "outer": {"merge": "trimmed_mean"}, "membership": {"sample": 4}},
            "its least_silos is 3, and the contract's outer.merge is trimmed_mean, with which each value is of 2 of 4",
        ),
        (
            "metrics: [loss]",
            {"membership": {"quorum": 2, "steps": "speed"}},
            "its metrics is loss, and the contract's membership.steps is speed, which needs seconds_per_step",
        ),
        (
            "second_moments: false",
            {"outer": SHARED},
            "its second_moments is false, and the contract's outer.second_moments is shared",
        ),
        (
            "mean_gradients: false",
            {"inner": {"optimizer": "muon"}, "outer": {"control_variates": 0.5}},
            "its mean_gradients is false, and the contract's outer.control_variates is 0.5",
        ),
        ("wandb: false", {"wandb": {"mode": "offline"}}, "its wandb is false, and wandb.mode is offline"),
        (
            "wandb: false\ncodecs: [int4]",
            {"wandb": {"mode": "online"}},
            "its wandb is false, and wandb.mode is online; its codecs is int4, and the contract's outer.codec is fp32",
        ),
        ("hosts: [/elsewhere]", {}, "its hosts is /elsewhere, and where exchange.url leads is {store}"),
        (
            "hosts: [other.example]",
            {"exchange": {"url": "s3://b/run", "options": {"endpoint_url": "https://s3.example:9000"}}},
            "its hosts is other.example, and where exchange.url leads is s3.example",
        ),
        (
            "hosts: [s3.*.amazonaws.com]",
            {"exchange": {"url": "gs://b/run"}},
            "its hosts is s3.*.amazonaws.com, and where exchange.url leads is storage.googleapis.com",
        ),
        (
            "hosts: [other.example]",
            {"exchange": {"kind": "collective", "url": "tcp://host.example:29600"}},
            "its hosts is other.example, and the host of exchange.url is host.example",
        ),
        (
            "bytes_a_day: 10",
            {"exchange": {"kind": "collective", "url": "tcp://host.example:29600"}},
            "its bytes_a_day is 10, and exchange.kind is collective, in which nobody can wait for a day",
        ),
        (
            "hosts: [/]",
            {"wandb": {"mode": "online"}},
            "its hosts is /, and the server of wandb.mode=online is api.wandb.ai",
        ),
    ],
)
def test_a_policy_wins_over_the_contract(
    said: str, changes: dict[str, Any], error: str, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    """Both sides are named, and nothing was written."""
    config = configured(tiny_config, tmp_path, said, **changes)
    expected = f"trust.policy: {config.trust.policy} given; {error}; change either, or take no part"
    assert one_line_error(check_silo, config, "alpha") == expected.format(store=config.store_url)
    assert not Path(config.directory).exists()


def test_a_relay_sends_where_the_policy_allows(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = configured(tiny_config, tmp_path, f"hosts: [{tmp_path}/run]")
    check_policy(config)
    remote = str(tmp_path / "remote")
    assert f"its hosts is {tmp_path}/run, and --remote is {remote};" in one_line_error(Relay, config, remote)


def test_places() -> None:
    policy = Policy(hosts=["s3.example", "*.Consortium.org", "/mnt/store"])
    allowed = ["s3.example", "S3.EXAMPLE", "a.consortium.org", "/mnt/store", "/mnt/store/run"]
    others = ["s3.example.evil", "consortium.org", "/mnt/store2", "/mnt", "/mnt/store/../other", ""]
    assert [place for place in allowed + others if policy.allows_place(place)] == allowed


def test_a_pseudo_gradient_that_is_too_long() -> None:
    policy = Policy(max_norm=2.0, file="p.yaml")
    policy.check_norm("law", 3, 2.0)
    Policy().check_norm("law", 3, 1e30)
    for norm in (2.0001, float("nan")):
        said = one_line_error(policy.check_norm, "law", 3, norm)
        assert said.startswith("trust.policy: p.yaml given; its max_norm is 2, and the pseudo-gradient of silo law for")


def test_a_commit_of_too_few() -> None:
    """Whatever was agreed: an amendment, or an operator, may have done otherwise."""
    policy = Policy(least_silos=3, file="p.yaml")
    policy.check_merged(7, 3)
    Policy().check_merged(7, 1)
    said = "trust.policy: p.yaml given; its least_silos is 3, and commit 7 has merged what we delivered among 2;"
    assert one_line_error(policy.check_merged, 7, 2).startswith(said)
    of_five = [in_one_value(OuterConfig(merge=merge), 5) for merge in MERGES]
    assert dict(zip(MERGES, of_five, strict=True)) == {
        **{"mean": 5, "importance": 5, "clip": 5},
        **{"trimmed_mean": 3, "median": 1, "krum": 1},
    }


def test_the_policy_of_the_documentation(tiny_config: TinyConfig, tmp_path: Path) -> None:
    said = "#" + (ROOT / "docs" / "clusters.md").read_text().split("# policy.yaml")[1].split("```")[0]
    policy = read_policy(configured(tiny_config, tmp_path, said))
    assert all(getattr(policy, key) is not None for key in ALLOWED)


def test_where_a_bucket_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the store's library finds it: in options, in the environment, by region."""
    pytest.importorskip("botocore")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    url = "s3://bucket/run"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    assert destination(url, {}) == "s3.eu-central-1.amazonaws.com"
    (tmp_path / "config").write_text("[profile other]\nregion = eu-west-3\nendpoint_url = https://of.profile:9000\n")
    assert destination(url, {"profile": "other"}) == "of.profile"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://of.environment")
    assert destination(url, {}) == "of.environment"
    assert destination(url, {"client_kwargs": {"endpoint_url": "http://of.client:1"}}) == "of.client"
    assert destination("az://c/run", {"account_name": "ours"}) == "ours.blob.core.windows.net"
    assert destination("file:///mnt/store", {}) == "/mnt/store"
    said = one_line_error(destination, "az://c/run", {})
    assert said.startswith("exchange.url: 'az://c/run' given; the host that its bytes go to cannot be told; allowed: ")
    said = one_line_error(destination, url, {"profile": "none"})
    assert said.startswith("exchange.options: the store's endpoint cannot be told: ")
